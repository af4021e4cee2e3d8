"""What a network's output means: a row y = a x0 + b eps, and the 2x2 solve that turns any row into any other.

    kind           a        b        det = alpha b - sigma a     singular where
    epsilon        0        1        alpha                       alpha = 0 (zero terminal SNR, t = 1 of a flow)
    sample         1        0        -sigma                      sigma = 0 (the clean end)
    v_prediction   -sigma   alpha    alpha^2 + sigma^2           never (2202.00512)
    flow           -1       1        alpha + sigma               never (eps - x0, 2403.03206)
    edm            sigma/kS -alpha k/S   -S/k                    never (2206.00364), S^2 = k^2 alpha^2 + sigma^2

edm is the raw output F of Karras' preconditioned denoiser c_skip x + c_out F(c_in x), where k = sigma_data = 0.5 is the
standard deviation of the data and S that of x. His table is for alpha = 1; this one is for any schedule, as x / alpha
with the noise level sigma / alpha is his x. So the preconditioning goes with any schedule and any density of times.

At a singular time the output says nothing about one of the two unknowns; the solve then returns inf or nan there rather
than an invention. Schedules with zero terminal SNR need v_prediction or flow.
"""

from __future__ import annotations

from typing import get_args

import jax.numpy as jnp
from jaxtyping import Array, Float

from lcm_jax.diffusion.schedules import log_snr
from lcm_jax.typing import Apply, Cond, Denoiser, Image, Kind, Params, Prediction, Schedule, Time

KINDS: tuple[Kind, ...] = get_args(Kind)
SIGMA_DATA = 0.5


def expand(v: Time, like: Array) -> Array:
    """A scalar as it is; (b,) as (b, 1, ..., 1), ready to multiply `like`."""
    v = jnp.asarray(v)
    return v.reshape(v.shape + (1,) * (like.ndim - 1)) if v.ndim == 1 else v


def prediction_coefficients(kind: Kind, alpha: Array, sigma: Array) -> tuple[Array, Array]:
    """(a, b) of y = a x0 + b eps, each with alpha's shape."""
    if kind not in KINDS:
        raise ValueError(f"prediction type {kind!r} is unknown: use one of {', '.join(KINDS)}")
    zero, one = jnp.zeros_like(alpha), jnp.ones_like(alpha)
    x_std = _x_std(alpha, sigma)
    return {
        "epsilon": (zero, one),
        "sample": (one, zero),
        "v_prediction": (-sigma, alpha),
        "flow": (-one, one),
        "edm": (sigma / (SIGMA_DATA * x_std), -alpha * SIGMA_DATA / x_std),
    }[kind]


def _x_std(alpha: Array, sigma: Array) -> Array:
    """S, the standard deviation of x for data of SIGMA_DATA."""
    return jnp.sqrt((SIGMA_DATA * alpha) ** 2 + sigma**2)


def to_prediction(kind: Kind, y: Image, x: Image, alpha: Float[Array, "*b"], sigma: Float[Array, "*b"]) -> Prediction:
    """Solve x = alpha x0 + sigma eps, y = a x0 + b eps for (x0, eps)."""
    alpha, sigma = expand(alpha, x), expand(sigma, x)
    a, b = prediction_coefficients(kind, alpha, sigma)
    det = alpha * b - sigma * a
    return Prediction(x0=(b * x - sigma * y) / det, eps=(alpha * y - a * x) / det)


def target(kind: Kind, x0: Image, eps: Image, alpha: Float[Array, "*b"], sigma: Float[Array, "*b"]) -> Image:
    """The output y = a x0 + b eps a perfect network of this kind would give."""
    a, b = prediction_coefficients(kind, expand(alpha, x0), expand(sigma, x0))
    return a * x0 + b * eps


def add_noise(schedule: Schedule, x0: Image, eps: Image, t: Time) -> Image:
    """x_t = alpha(t) x0 + sigma(t) eps."""
    return expand(schedule.alpha(t), x0) * x0 + expand(schedule.sigma(t), x0) * eps


def noise_further(schedule: Schedule, x: Image, eps: Image, s: Time, t: Time) -> Image:
    """x_t of x_s, for a t not before s: r x_s + sqrt(sigma_t^2 - r^2 sigma_s^2) eps, r = alpha_t / alpha_s."""
    ratio = schedule.alpha(t) / schedule.alpha(s)
    std = jnp.sqrt(jnp.maximum(schedule.sigma(t) ** 2 - (ratio * schedule.sigma(s)) ** 2, 0.0))
    return expand(ratio, x) * x + expand(std, x) * eps


def output(apply: Apply, params: Params, x: Image, t: Time, cond: Cond, *, schedule: Schedule, kind: Kind) -> Image:
    """The network's raw output at x_t: given x (for edm c_in x = x / S, of unit variance) and the network time."""
    if kind == "edm":
        x = x / expand(_x_std(schedule.alpha(t), schedule.sigma(t)), x)
    return apply(params, x, schedule.network_time(t), cond)


def bind(apply: Apply, params: Params, cond: Cond, schedule: Schedule, kind: Kind, *, spans: bool = False) -> Denoiser:
    """The denoiser of one network with its parameters and conditioning fixed; the solve is in float32.

    spans: the network takes as cond["span"] how far the step will reach, t - s in its own time.
    """

    def denoise(x: Image, t: Time, s: Time | None = None) -> Prediction:
        network_cond = cond
        if spans:
            span = schedule.network_time(t) - schedule.network_time(t if s is None else s)
            network_cond = {**cond, "span": jnp.broadcast_to(span, x.shape[:1])}
        y = output(apply, params, x, t, network_cond, schedule=schedule, kind=kind)
        return to_prediction(kind, y.astype(jnp.float32), x, schedule.alpha(t), schedule.sigma(t))

    return denoise


def on_schedule(denoise: Denoiser, own: Schedule, seen: Schedule) -> Denoiser:
    """A denoiser of the schedule `own` for the x of the schedule `seen`.

    Where the log-SNR is the same, x differs by a factor and what is believed of x0 and eps does not differ at all. So
    any network can be looked at in the time in which a method is written.
    """
    if own == seen:
        return denoise

    def there(t: Time) -> Time:
        return own.time_at(log_snr(seen, t))

    def moved(x: Image, t: Time, s: Time | None = None) -> Prediction:
        u = there(t)
        factor = _length(own, u) / _length(seen, t)
        return denoise(expand(factor, x) * x, u, None if s is None else there(s))

    return moved


def _length(schedule: Schedule, t: Time) -> Float[Array, "*b"]:
    return jnp.hypot(schedule.alpha(t), schedule.sigma(t))


def flow_map(denoise: Denoiser, schedule: Schedule, x: Image, t: Time, s: Time) -> Image:
    """alpha_s x0 + sigma_s eps of a denoiser that is told where the step ends: DDIM's step, the trajectory function of
    CTM (2310.02279 eq. 9) and TCD (2402.19159 eq. 14), and x - (t - s) u on a flow (MeanFlow, 2505.13447 eq. 12).
    """
    prediction = denoise(x, t, s)
    return expand(schedule.alpha(s), x) * prediction.x0 + expand(schedule.sigma(s), x) * prediction.eps
