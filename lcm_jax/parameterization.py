"""What a network's output means: a row y = a x0 + b eps, and the 2x2 solve that turns any row into any other.

    kind           a        b        det = alpha b - sigma a     singular where
    epsilon        0        1        alpha                       alpha = 0 (zero terminal SNR, t = 1 of a flow)
    sample         1        0        -sigma                      sigma = 0 (the clean end)
    v_prediction   -sigma   alpha    alpha^2 + sigma^2           never (2202.00512)
    flow           -1       1        alpha + sigma               never (eps - x0, 2403.03206)

At a singular time the output says nothing about one of the two unknowns; the solve then returns inf or nan there rather
than an invention. Schedules with zero terminal SNR need v_prediction or flow.
"""

from __future__ import annotations

from typing import get_args

import jax.numpy as jnp
from jaxtyping import Array, Float

from lcm_jax.typing import Apply, Cond, Denoiser, Image, Kind, Params, Prediction, Schedule, Time

KINDS: tuple[Kind, ...] = get_args(Kind)


def expand(v: Time, like: Array) -> Array:
    """A scalar as it is; (b,) as (b, 1, ..., 1), ready to multiply `like`."""
    v = jnp.asarray(v)
    return v.reshape(v.shape + (1,) * (like.ndim - 1)) if v.ndim == 1 else v


def rows(kind: Kind, alpha: Array, sigma: Array) -> tuple[Array, Array]:
    """(a, b) of y = a x0 + b eps, each with alpha's shape."""
    if kind not in KINDS:
        raise ValueError(f"prediction type {kind!r} is unknown: use one of {', '.join(KINDS)}")
    zero, one = jnp.zeros_like(alpha), jnp.ones_like(alpha)
    return {"epsilon": (zero, one), "sample": (one, zero), "v_prediction": (-sigma, alpha), "flow": (-one, one)}[kind]


def to_prediction(kind: Kind, y: Image, x: Image, alpha: Float[Array, "*b"], sigma: Float[Array, "*b"]) -> Prediction:
    """Solve x = alpha x0 + sigma eps, y = a x0 + b eps for (x0, eps)."""
    alpha, sigma = expand(alpha, x), expand(sigma, x)
    a, b = rows(kind, alpha, sigma)
    det = alpha * b - sigma * a
    return Prediction(x0=(b * x - sigma * y) / det, eps=(alpha * y - a * x) / det)


def target(kind: Kind, x0: Image, eps: Image, alpha: Float[Array, "*b"], sigma: Float[Array, "*b"]) -> Image:
    """The output y = a x0 + b eps a perfect network of this kind would give."""
    a, b = rows(kind, expand(alpha, x0), expand(sigma, x0))
    return a * x0 + b * eps


def add_noise(schedule: Schedule, x0: Image, eps: Image, t: Time) -> Image:
    """x_t = alpha(t) x0 + sigma(t) eps."""
    return expand(schedule.alpha(t), x0) * x0 + expand(schedule.sigma(t), x0) * eps


def bind(apply: Apply, params: Params, cond: Cond, schedule: Schedule, kind: Kind) -> Denoiser:
    """The denoiser of one network with its parameters and conditioning fixed; the solve is in float32."""

    def denoise(x: Image, t: Time) -> Prediction:
        y = apply(params, x, schedule.network_time(t), cond)
        return to_prediction(kind, y.astype(jnp.float32), x, schedule.alpha(t), schedule.sigma(t))

    return denoise
