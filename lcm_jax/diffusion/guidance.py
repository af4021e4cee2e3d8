"""Guidance: functions from a denoiser to a denoiser."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from lcm_jax.diffusion.parameterization import expand, target, to_prediction
from lcm_jax.typing import AnyTime, Denoiser, Image, Kind, Prediction, Schedule, Time


def cfg(
    paired: Denoiser,
    scale: Float[Array, "*n"] | float,
    *,
    rescale: Float[Array, ""] | float = 0.0,
    schedule: Schedule | None = None,
    kind: Kind = "epsilon",
    interval: tuple[Time, Time] | None = None,
) -> Denoiser:
    """Classifier-free guidance (CFG, 2207.12598), u + scale (c - u), of n examples.

    paired: the denoiser of 2n examples [unconditional; conditional].
    scale: a number or (n,); 1 is the conditional prediction. It may be traced, so changing it does not recompile.
    In the w-convention of the LCM paper, scale = 1 + w.

    rescale: phi of 2305.08891 eq. 15-16. Each guided output gets the standard deviation of the conditional one, mixed
    by phi. As in diffusers this acts on the network's raw output, so it needs the schedule and the kind; ValueError
    without them.

    interval: guide only for t_lo <= t <= t_hi in schedule time and use scale 1 outside (2404.07724).

    >>> import jax.numpy as jnp
    >>> from lcm_jax.diffusion.guidance import cfg
    >>> from lcm_jax.typing import Prediction
    >>> constants = lambda x, t, s=None: Prediction(jnp.arange(2.0).reshape(2, 1, 1, 1), 0.0 * x)  # u 0, c 1
    >>> float(cfg(constants, 4.0)(jnp.zeros((1, 1, 1, 1)), 0.5).x0.squeeze())
    4.0
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
    """Residual classifier-free guidance, RCFG (StreamDiffusion, 2312.12491 section 3.2): c + (scale - 1) delta (c - v).

    It takes one evaluation, as the negative prediction v does not come from the network. v is the virtual residual
    noise: the prediction that would lead from x to `virtual_x0`, with eps (x - alpha x0) / sigma (eq. 5). virtual_x0 is
    the input frame ("self-negative"), or what the negative prompt made of a frame once ("onetime-negative"). delta
    scales the guidance; the paper's u = delta v, the same at delta 1, would leave a share (scale - 1) (1 - delta) of
    the noise in the picture.

    >>> import jax.numpy as jnp
    >>> from lcm_jax.diffusion.guidance import residual_cfg
    >>> from lcm_jax.diffusion.schedules import RectifiedFlow
    >>> from lcm_jax.typing import Prediction
    >>> one = jnp.ones((1, 1, 1, 1))
    >>> denoise = lambda x, t: Prediction(one, one)
    >>> guided = residual_cfg(denoise, 0.0 * one, 3.0, schedule=RectifiedFlow())
    >>> float(guided(one, 0.5).x0.squeeze())  # c + (3 - 1) (c - 0)
    3.0
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
    """Skip-layer guidance as in SD3.5's reference: u + scale (c - u) + skip_scale (c - c_skipped), of n examples.

    paired: the denoiser of 2n examples [unconditional; conditional], as in `cfg`. skipped: the denoiser of n examples
    with the same conditioning, by the network without some of its layers. It is evaluated only for
    t_lo <= t <= t_hi in schedule time, for all examples if for any; elsewhere this is `cfg`.

    >>> import jax.numpy as jnp
    >>> from lcm_jax.diffusion.guidance import skip_layer_guidance
    >>> from lcm_jax.typing import Prediction
    >>> constants = lambda x, t, s=None: Prediction(jnp.arange(2.0).reshape(2, 1, 1, 1), 0.0 * x)  # u 0, c 1
    >>> without_layers = lambda x, t, s=None: Prediction(0.5 + 0.0 * x, 0.0 * x)
    >>> guided = skip_layer_guidance(constants, without_layers, 4.0, 2.0, interval=(0.0, 1.0))
    >>> float(guided(jnp.zeros((1, 1, 1, 1)), 0.5).x0.squeeze())  # 4 + 2 (1 - 0.5)
    5.0
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
    """Return the predictions of n examples without and with the prompt, from a denoiser of 2n."""

    def twice(u: AnyTime) -> AnyTime:
        return jnp.concatenate([u, u]) if jnp.ndim(u) else u

    both = paired(jnp.concatenate([x, x]), twice(t), *(() if s is None else (twice(s),)))
    (x0_u, x0_c), (eps_u, eps_c) = (jnp.split(y, 2) for y in both)
    return Prediction(x0_u, eps_u), Prediction(x0_c, eps_c)


def _move(start: Prediction, away: Prediction, towards: Prediction, w: Array) -> Prediction:
    """Return start + w (towards - away)."""
    return Prediction(*(y + w * (b - a) for y, a, b in zip(start, away, towards, strict=True)))


def _within(t: Float[Array, "*b"], interval: tuple[Time, Time]) -> Bool[Array, "*b"]:
    return (t >= interval[0]) & (t <= interval[1])


def _std(y: Image) -> Float[Array, "b 1 1 1"]:
    return jnp.std(y, axis=tuple(range(1, y.ndim)), keepdims=True)
