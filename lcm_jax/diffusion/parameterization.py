"""The meaning of a network's output: y = a x0 + b eps, and the 2x2 solve that turns any such output into any other.

    kind           a        b        det = alpha b - sigma a     singular where
    epsilon        0        1        alpha                       alpha = 0 (zero terminal SNR, t = 1 of a flow)
    sample         1        0        -sigma                      sigma = 0 (the clean end)
    v_prediction   -sigma   alpha    alpha^2 + sigma^2           never (2202.00512)
    flow           -1       1        alpha + sigma               never (eps - x0, 2403.03206)
    edm            sigma/kS -alpha k/S   -S/k                    never (2206.00364), S^2 = k^2 alpha^2 + sigma^2

edm is the raw output F of Karras' preconditioned denoiser c_skip x + c_out F(c_in x), where k = sigma_data = 0.5 is the
standard deviation of the data and S that of x. His table is for alpha = 1; this one is for any schedule, as x / alpha
with the noise level sigma / alpha is his x. So the preconditioning goes with any schedule and any density of times.

At a singular time the output does not determine one of the two unknowns; the solve then returns inf or nan there rather
than an invented value. Schedules with zero terminal SNR need v_prediction or flow.
"""

from __future__ import annotations

from typing import get_args

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped

from lcm_jax.diffusion.schedules import log_snr
from lcm_jax.typing import AnyTime, Apply, Cond, Denoiser, Image, Kind, Params, Prediction, Schedule, Time

KINDS: tuple[Kind, ...] = get_args(Kind)
SIGMA_DATA = 0.5


def expand(v: Shaped[Array | np.ndarray, "*b"] | float, like: Array) -> Array:
    """Return a scalar as it is, and (b,) as (b, 1, ..., 1), ready to multiply `like`.

    >>> import jax.numpy as jnp
    >>> from lcm_jax.diffusion.parameterization import expand
    >>> expand(jnp.ones(2), jnp.zeros((2, 8, 8, 4))).shape
    (2, 1, 1, 1)
    """
    v = jnp.asarray(v)
    return v.reshape(v.shape + (1,) * (like.ndim - 1)) if v.ndim == 1 else v


def prediction_coefficients(kind: Kind, alpha: Array, sigma: Array) -> tuple[Array, Array]:
    """Return (a, b) of y = a x0 + b eps, each with alpha's shape; ValueError for an unknown kind.

    >>> import jax.numpy as jnp
    >>> from lcm_jax.diffusion.parameterization import prediction_coefficients
    >>> a, b = prediction_coefficients("v_prediction", jnp.float32(0.8), jnp.float32(0.6))
    >>> round(float(a), 6), round(float(b), 6)
    (-0.6, 0.8)
    """
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
    """Return S, the standard deviation of x for data of standard deviation SIGMA_DATA."""
    return jnp.sqrt((SIGMA_DATA * alpha) ** 2 + sigma**2)


def to_prediction(kind: Kind, y: Image, x: Image, alpha: Float[Array, "*b"], sigma: Float[Array, "*b"]) -> Prediction:
    """Solve x = alpha x0 + sigma eps, y = a x0 + b eps for (x0, eps).

    >>> import jax.numpy as jnp
    >>> from lcm_jax.diffusion.parameterization import to_prediction
    >>> x, velocity = jnp.full((1, 1, 1, 1), 2.0), jnp.full((1, 1, 1, 1), 2.0)  # x0 1 and eps 3, half way
    >>> x0, eps = to_prediction("flow", velocity, x, jnp.float32(0.5), jnp.float32(0.5))
    >>> float(x0.squeeze()), float(eps.squeeze())
    (1.0, 3.0)
    """
    alpha, sigma = expand(alpha, x), expand(sigma, x)
    a, b = prediction_coefficients(kind, alpha, sigma)
    det = alpha * b - sigma * a
    return Prediction(x0=(b * x - sigma * y) / det, eps=(alpha * y - a * x) / det)


def target(kind: Kind, x0: Image, eps: Image, alpha: Float[Array, "*b"], sigma: Float[Array, "*b"]) -> Image:
    """Return y = a x0 + b eps, the output of a perfect network of this kind.

    >>> import jax.numpy as jnp
    >>> from lcm_jax.diffusion.parameterization import target
    >>> x0, eps = jnp.full((1, 1, 1, 1), 1.0), jnp.full((1, 1, 1, 1), 3.0)
    >>> float(target("flow", x0, eps, jnp.float32(0.5), jnp.float32(0.5)).squeeze())
    2.0
    """
    a, b = prediction_coefficients(kind, expand(alpha, x0), expand(sigma, x0))
    return a * x0 + b * eps


def add_noise(schedule: Schedule, x0: Image, eps: Image, t: Time) -> Image:
    """Return x_t = alpha(t) x0 + sigma(t) eps, the forward process.

    >>> import jax.numpy as jnp
    >>> from lcm_jax.diffusion.parameterization import add_noise
    >>> from lcm_jax.diffusion.schedules import RectifiedFlow
    >>> x0, eps = jnp.full((1, 1, 1, 1), 1.0), jnp.full((1, 1, 1, 1), 3.0)
    >>> float(add_noise(RectifiedFlow(), x0, eps, 0.5).squeeze())
    2.0
    """
    return expand(schedule.alpha(t), x0) * x0 + expand(schedule.sigma(t), x0) * eps


def noise_further(schedule: Schedule, x: Image, eps: Image, s: AnyTime, t: AnyTime) -> Image:
    """Return x_t from x_s for t >= s: r x_s + sqrt(sigma_t^2 - r^2 sigma_s^2) eps, with r = alpha_t / alpha_s.

    >>> import jax.numpy as jnp
    >>> from lcm_jax.diffusion.parameterization import noise_further
    >>> from lcm_jax.diffusion.schedules import RectifiedFlow
    >>> x0, eps = jnp.full((1, 1, 1, 1), 1.0), jnp.full((1, 1, 1, 1), 3.0)
    >>> float(noise_further(RectifiedFlow(), x0, eps, 0.0, 0.5).squeeze())
    2.0
    """
    ratio = schedule.alpha(t) / schedule.alpha(s)
    std = jnp.sqrt(jnp.maximum(schedule.sigma(t) ** 2 - (ratio * schedule.sigma(s)) ** 2, 0.0))
    return expand(ratio, x) * x + expand(std, x) * eps


def output(apply: Apply, params: Params, x: Image, t: Time, cond: Cond, *, schedule: Schedule, kind: Kind) -> Image:
    """Return the network's raw output at x_t, from x (for edm from c_in x = x / S, of unit variance) and its time."""
    if kind == "edm":
        x = x / expand(_x_std(schedule.alpha(t), schedule.sigma(t)), x)
    return apply(params, x, schedule.network_time(t), cond)


def bind(apply: Apply, params: Params, cond: Cond, schedule: Schedule, kind: Kind, *, spans: bool = False) -> Denoiser:
    """Return the denoiser of one network with its parameters and conditioning fixed; the solve is in float32.

    spans: the network takes the length of the step, t - s in its own time, as cond["span"].

    >>> import jax.numpy as jnp
    >>> from lcm_jax.diffusion.parameterization import bind
    >>> from lcm_jax.diffusion.schedules import RectifiedFlow
    >>> network = lambda params, x, time, cond: params * x
    >>> denoise = bind(network, jnp.float32(1.0), {}, RectifiedFlow(), "flow")
    >>> prediction = denoise(jnp.full((1, 1, 1, 1), 2.0), 0.5)  # velocity 2
    >>> float(prediction.x0.squeeze()), float(prediction.eps.squeeze())
    (1.0, 3.0)
    """

    def denoise(x: Image, t: Time, s: Time | None = None) -> Prediction:
        network_cond = cond
        if spans:
            span = schedule.network_time(t) - schedule.network_time(t if s is None else s)
            network_cond = {**cond, "span": jnp.broadcast_to(span, x.shape[:1])}
        y = output(apply, params, x, t, network_cond, schedule=schedule, kind=kind)
        return to_prediction(kind, y.astype(jnp.float32), x, schedule.alpha(t), schedule.sigma(t))

    return denoise


def on_schedule(denoise: Denoiser, trained: Schedule, used: Schedule) -> Denoiser:
    """Return a denoiser that takes x and t of the schedule `used` from one that takes those of `trained`.

    Where the log-SNR is the same, x differs by a factor only, and the predictions of x0 and eps are the same. So a
    method written in the time of one schedule works with a network trained on another.

    >>> import jax.numpy as jnp
    >>> from lcm_jax.diffusion.parameterization import bind, on_schedule
    >>> from lcm_jax.diffusion.schedules import Cosine, RectifiedFlow
    >>> denoise = bind(lambda params, x, time, cond: 0.0 * x, None, {}, Cosine(), "epsilon")  # eps is always 0
    >>> flow = on_schedule(denoise, Cosine(), RectifiedFlow())
    >>> round(float(flow(jnp.ones((1, 1, 1, 1)), 0.5).x0.squeeze()), 4)  # x / alpha
    2.0
    """
    if trained == used:
        return denoise

    def time_of(t: Time) -> Time:
        return trained.time_at(log_snr(used, t))

    def rescaled(x: Image, t: Time, s: Time | None = None) -> Prediction:
        u = time_of(t)
        factor = _length(trained, u) / _length(used, t)
        return denoise(expand(factor, x) * x, u, None if s is None else time_of(s))

    return rescaled


def _length(schedule: Schedule, t: Time) -> Float[Array, "*b"]:
    return jnp.hypot(schedule.alpha(t), schedule.sigma(t))


def flow_map(denoise: Denoiser, schedule: Schedule, x: Image, t: Time, s: Time) -> Image:
    """Return the flow map X_{t,s}(x) = alpha_s x0 + sigma_s eps of a denoiser that receives the end of the step, s.

    It is DDIM's step, the trajectory function of CTM (2310.02279 eq. 9) and TCD (2402.19159 eq. 14), and
    x - (t - s) u on a flow (MeanFlow, 2505.13447 eq. 12).

    >>> import jax.numpy as jnp
    >>> from lcm_jax.diffusion.parameterization import flow_map
    >>> from lcm_jax.diffusion.schedules import RectifiedFlow
    >>> from lcm_jax.typing import Prediction
    >>> perfect = lambda x, t, s: Prediction(jnp.ones_like(x), 3.0 * jnp.ones_like(x))
    >>> float(flow_map(perfect, RectifiedFlow(), jnp.full((1, 1, 1, 1), 2.0), 0.5, 0.25).squeeze())
    1.5
    """
    prediction = denoise(x, t, s)
    return expand(schedule.alpha(s), x) * prediction.x0 + expand(schedule.sigma(s), x) * prediction.eps
