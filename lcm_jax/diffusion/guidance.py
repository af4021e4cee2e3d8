"""Guidance: functions from a denoiser to a denoiser."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from lcm_jax.diffusion.parameterization import expand, target, to_prediction
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

    def denoise(x: Image, t: Time, s: Time | None = None) -> Prediction:
        t = jnp.asarray(t, jnp.float32)
        uncond, cond = _halves(paired, x, t, s)
        w = jnp.asarray(scale, jnp.float32)
        if interval is not None:
            w = jnp.where(_within(t, interval), w, 1.0)
        guided = _move(uncond, uncond, cond, expand(w, x))
        if not rescaled or schedule is None:
            return guided
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        y = target(kind, *guided, alpha, sigma)
        gain = _std(target(kind, *cond, alpha, sigma)) / _std(y)
        return to_prediction(kind, (rescale * gain + (1.0 - rescale)) * y, x, alpha, sigma)

    return denoise


def residual_cfg(
    denoise: Denoiser,
    virtual_x0: Image,
    scale: Float[Array, "*n"] | float,
    *,
    schedule: Schedule,
    delta: Float[Array, "*n"] | float = 1.0,
) -> Denoiser:
    """Residual CFG (StreamDiffusion, 2312.12491 section 3.2): c + (scale - 1) delta (c - v), on n rows, one evaluation.

    The negative prediction v is not asked of the network. It is what would lead from x to `virtual_x0`, its eps being
    (x - alpha x0) / sigma (eq. 5): the frame that was given ("self-negative"), or what the negative prompt once made of
    one ("onetime-negative"). delta scales the guidance; the paper's u = delta v, the same at delta 1, would leave a
    share (scale - 1) (1 - delta) of the noise in the picture.
    """

    def guided(x: Image, t: Time, s: Time | None = None) -> Prediction:
        cond = denoise(x, t, *(() if s is None else (s,)))
        alpha, sigma = expand(schedule.alpha(t), x), expand(schedule.sigma(t), x)
        virtual = Prediction(virtual_x0, (x - alpha * virtual_x0) / sigma)
        strength = (jnp.asarray(scale, jnp.float32) - 1.0) * jnp.asarray(delta, jnp.float32)
        return _move(cond, virtual, cond, expand(strength, x))

    return guided


def skip_layer_guidance(
    paired: Denoiser,
    skipped: Denoiser,
    scale: Float[Array, "*n"] | float,
    skip_scale: Float[Array, "*n"] | float,
    *,
    interval: tuple[Time, Time],
) -> Denoiser:
    """u + scale (c - u) + skip_scale (c - c_skipped), as SD3.5's reference guides, on n rows.

    paired: the denoiser of 2n rows [uncond; cond], as `cfg` takes it. skipped: of n rows with the same conditioning,
    by a network that passes some of its layers by. It is asked only for t_lo <= t <= t_hi in schedule time, for all
    rows if for any; elsewhere this is `cfg`.
    """

    def denoise(x: Image, t: Time, s: Time | None = None) -> Prediction:
        t = jnp.asarray(t, jnp.float32)
        uncond, cond = _halves(paired, x, t, s)
        guided = _move(uncond, uncond, cond, expand(jnp.asarray(scale, jnp.float32), x))
        inside = _within(t, interval)
        strength = expand(jnp.where(inside, jnp.asarray(skip_scale, jnp.float32), 0.0), x)
        return jax.lax.cond(
            jnp.any(inside),
            lambda: _move(guided, skipped(x, t, *(() if s is None else (s,))), cond, strength),
            lambda: guided,
        )

    return denoise


def _halves(paired: Denoiser, x: Image, t: Float[Array, "*b"], s: Time | None = None) -> tuple[Prediction, Prediction]:
    """What a denoiser of 2n rows says of n rows without and with the prompt."""

    def twice(u: Time) -> Time:
        return jnp.concatenate([u, u]) if jnp.ndim(u) else u

    both = paired(jnp.concatenate([x, x]), twice(t), *(() if s is None else (twice(s),)))
    (x0_u, x0_c), (eps_u, eps_c) = (jnp.split(y, 2) for y in both)
    return Prediction(x0_u, eps_u), Prediction(x0_c, eps_c)


def _move(start: Prediction, away: Prediction, towards: Prediction, w: Array) -> Prediction:
    """start + w (towards - away)."""
    return Prediction(*(y + w * (b - a) for y, a, b in zip(start, away, towards, strict=True)))


def _within(t: Float[Array, "*b"], interval: tuple[Time, Time]) -> Bool[Array, "*b"]:
    return (t >= interval[0]) & (t <= interval[1])


def _std(y: Image) -> Float[Array, "b 1 1 1"]:
    return jnp.std(y, axis=tuple(range(1, y.ndim)), keepdims=True)
