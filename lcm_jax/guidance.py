"""Guidance: functions from a denoiser to a denoiser."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

from lcm_jax.parameterization import expand, target, to_prediction
from lcm_jax.typing import Denoiser, Image, Kind, Prediction, Schedule, Time


def cfg(
    paired: Denoiser,
    scale: Float[Array, "*n"] | float,
    *,
    rescale: Float[Array, ""] | float = 0.0,
    schedule: Schedule | None = None,
    kind: Kind = "epsilon",
    interval: tuple[Time, Time] | None = None,
) -> Denoiser:
    """Classifier-free guidance (2207.12598) u + scale (c - u), on n rows, from a denoiser of 2n rows [uncond; cond].

    scale: a number or (n,); 1 is the conditional prediction. It may be traced, so changing it does not recompile.
    In the w-convention of the LCM paper, scale = 1 + w.

    rescale: phi of 2305.08891 eq. 15-16. The guided output gets, row by row, the standard deviation of the conditional
    one, mixed by phi. As in diffusers this acts on the network's raw output, so it needs the schedule and the kind.

    interval: guide only for t_lo <= t <= t_hi in schedule time and use scale 1 outside (2404.07724).
    """
    rescaled = not (isinstance(rescale, (int, float)) and rescale == 0)
    if rescaled and schedule is None:
        raise ValueError("guidance rescale acts on the network's raw output: pass schedule= and kind= to cfg")

    def denoise(x: Image, t: Time) -> Prediction:
        t = jnp.asarray(t, jnp.float32)
        both = paired(jnp.concatenate([x, x]), jnp.concatenate([t, t]) if t.ndim else t)
        (x0_u, x0_c), (eps_u, eps_c) = (jnp.split(y, 2) for y in both)
        w = jnp.asarray(scale, jnp.float32)
        if interval is not None:
            w = jnp.where((t >= interval[0]) & (t <= interval[1]), w, 1.0)
        w = expand(w, x)
        guided = Prediction(x0_u + w * (x0_c - x0_u), eps_u + w * (eps_c - eps_u))
        if not rescaled or schedule is None:
            return guided
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        y = target(kind, *guided, alpha, sigma)
        gain = _std(target(kind, x0_c, eps_c, alpha, sigma)) / _std(y)
        return to_prediction(kind, (rescale * gain + (1.0 - rescale)) * y, x, alpha, sigma)

    return denoise


def _std(y: Image) -> Float[Array, "b 1 1 1"]:
    return jnp.std(y, axis=tuple(range(1, y.ndim)), keepdims=True)
