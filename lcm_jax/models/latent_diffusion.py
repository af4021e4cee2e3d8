"""From conditioning and noise to images: pure functions over a denoiser and an autoencoder."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt8

from lcm_jax.diffusion.consistency_function import consistency
from lcm_jax.diffusion.guidance import cfg, skip_layer_guidance
from lcm_jax.diffusion.parameterization import bind
from lcm_jax.diffusion.samplers import Sampler
from lcm_jax.diffusion.sampling import sample
from lcm_jax.diffusion.schedules import OnGrid
from lcm_jax.diffusion.solvers import Inpaint, InpaintTarget
from lcm_jax.diffusion.time_grids import Grid
from lcm_jax.lora import Adapted, branches
from lcm_jax.nets.attention_hooks import Memory, extended_attention, keys_values, use_keys_values
from lcm_jax.precision.context import is_low_precision, precision_context
from lcm_jax.precision.quantization import Quantized
from lcm_jax.runtime.jit import jit
from lcm_jax.typing import Apply, Cond, Denoiser, Image, Key, Kind, Params, Prediction, Schedule, Time
from vae16 import AutoencoderKL, AutoencoderTiny, scale, unscale

__all__ = ["BoundDenoiser", "LatentDiffusion", "Memory", "SkipLayers", "as_apply", "to_float", "to_uint8"]


def as_apply(net: Any, *, memory: Memory | None = None, **options: Any) -> Apply:
    """Return a flax module as the pure function apply(params, x, network_time, cond) that the mathematics takes.

    Its parameters may be `lora.Adapted` or `Quantized`, or one inside the other. cond["cross"]: the text's keys and
    values (`keys_values`), where they were computed before. memory: tokens that its self-attention attends to as well.
    options: keyword arguments of the module's call.

    >>> import flax.linen as nn
    >>> import jax.numpy as jnp
    >>> from lcm_jax.models.latent_diffusion import as_apply
    >>> class Double(nn.Module):
    ...     def __call__(self, x, t, cond):
    ...         return 2.0 * x
    >>> float(as_apply(Double())({}, jnp.ones((1, 1, 1, 1)), 0.0, {}).squeeze())
    2.0
    """

    def apply(params: Params, x: Image, t: Time, cond: Cond) -> Image:
        with contextlib.ExitStack() as stack:
            if "cross" in cond:
                cross: Any = cond["cross"]
                stack.enter_context(use_keys_values(cross))
                cond = {name: leaf for name, leaf in cond.items() if name != "cross"}
            if memory is not None:
                stack.enter_context(extended_attention(memory))
            if isinstance(params, Adapted):
                stack.enter_context(branches(params.adapters, params.dropout))
                params = params.params
            params = stack.enter_context(precision_context(params))
            return net.apply({"params": params}, x, t, cond, **options)

    return apply


@partial(jax.tree_util.register_dataclass, data_fields=("scale", "interval"), meta_fields=("layers",))
@dataclass(frozen=True, kw_only=True)
class SkipLayers:
    """The settings of `skip_layer_guidance`: the layers to leave out (static), the scale and the interval of times.

    >>> import numpy as np
    >>> from lcm_jax.models.latent_diffusion import SkipLayers
    >>> skip = SkipLayers.in_steps(np.linspace(1.0, 0.0, 11), (7, 8, 9), 2.8, (0.01, 0.3))
    >>> [round(float(t), 2) for t in skip.interval]
    [0.8, 0.9]
    """

    layers: tuple[int, ...]
    scale: Float[Array, ""] | float
    interval: tuple[Time, Time]

    @classmethod
    def in_steps(
        cls, times: Float[np.ndarray, " n_plus_1"], layers: tuple[int, ...], scale: float, part: tuple[float, float]
    ) -> SkipLayers:
        """Return the settings for the steps i of n with part[0] < i / n < part[1]; a warning if there are none."""
        steps = len(times) - 1
        inside = [times[i] for i in range(steps) if part[0] * steps < i < part[1] * steps]
        if not inside:
            warnings.warn(f"skip_interval={part} holds none of {steps} steps: no layer is skipped", stacklevel=3)
        low, high = (inside[-1], inside[0]) if inside else (np.inf, -np.inf)
        return cls(layers=layers, scale=jnp.float32(scale), interval=(jnp.float32(low), jnp.float32(high)))


@dataclass(frozen=True, kw_only=True)
class LatentDiffusion:
    """The static half of a latent diffusion model; parameters, conditioning and noise are arguments of its methods.

    It is a frozen hashable value, so it can be static under jit.

    embeds_guidance: the network has a w-embedding, of w = guidance - 1 (a distilled student), so CFG is not run on top.
    embeds_span: the network has a span embedding, of the length of the step.
    """

    net: Any  # flax module, apply({"params": ...}, x, t, cond)
    vae: AutoencoderKL | AutoencoderTiny
    schedule: Schedule
    kind: Kind
    embeds_guidance: bool = False
    embeds_span: bool = False

    def denoiser(
        self,
        params: Params,
        cond: Cond,
        null: Cond,
        guidance: Float[Array, ""] | float,
        *,
        guided: bool,
        skip: SkipLayers | None = None,
    ) -> Denoiser:
        """Return the network's denoiser with everything bound.

        cond: the conditioning of n images; null: the same leaves for the negative prompts. guided: static, whether
        classifier-free guidance is run, with two network inputs for each image. skip: skip-layer guidance, if guided.
        """

        apply, spans = as_apply(self.net), self.embeds_span
        if self.embeds_guidance:
            rows = next(iter(cond.values())).shape[0]
            w = jnp.broadcast_to(jnp.asarray(guidance, jnp.float32) - 1.0, (rows,))
            return bind(apply, params, {**cond, "guidance": w}, self.schedule, self.kind, spans=spans)
        if not guided:
            return bind(apply, params, cond, self.schedule, self.kind, spans=spans)
        both = {name: jnp.concatenate([null[name], value]) for name, value in cond.items()}
        paired = bind(apply, params, both, self.schedule, self.kind, spans=spans)
        if skip is None:
            return cfg(paired, guidance)
        skipping = as_apply(self.net, skip_layers=skip.layers)
        skipped = bind(skipping, params, cond, self.schedule, self.kind, spans=spans)
        return skip_layer_guidance(paired, skipped, guidance, skip.scale, interval=skip.interval)

    def latents(
        self,
        params: Params,
        cond: Cond,
        null: Cond,
        x: Image,
        grid: Grid,
        guidance: Float[Array, ""] | float,
        key: Key,
        *,
        sampler: Sampler,
        guided: bool,
        skip: SkipLayers | None = None,
        inpaint_target: InpaintTarget | None = None,
        parts: Int[Array, " steps"] | None = None,
    ) -> Image:
        """Return the clean latents (b, h, w, c) that the sampler reaches from x at grid.times[0].

        parts: where the prompts change with the step, the number of each step's part; all leaves of cond and null have
        the parts on their second axis then, (b, p, ...).
        """

        walked = self if grid.network_times is None else replace(self, schedule=OnGrid(self.schedule, grid))

        def bound(cond: Cond, null: Cond) -> Denoiser:
            return walked.denoiser(params, cond, null, guidance, guided=guided, skip=skip)

        denoise = bound(cond, null) if parts is None else by_step(bound, cond, null, grid, parts)
        if sampler.consistency:
            denoise = consistency(denoise, self.schedule)
        if inpaint_target is None:
            return sample(denoise, self.schedule, sampler.solver, grid, x, key)
        x = sample(denoise, self.schedule, Inpaint(solver=sampler.solver, target=inpaint_target), grid, x, key)
        mask, x0, _ = inpaint_target
        return mask * x + (1.0 - mask) * x0  # clean, even where the grid ends before the clean time

    def check_start(self, t: float) -> None:
        """Raise ValueError for a first time at which the network's output does not determine x0."""
        schedule: Any = self.schedule
        if self.kind == "epsilon" and _alpha(schedule, t) == 0.0:
            raise ValueError(
                f"the grid begins at timestep {t:.0f}, which is pure noise (rescale_betas_zero_snr), where "
                "prediction_type 'epsilon' says nothing about the picture: use timestep_spacing 'leading'"
            )

    def precompute(self, params: Params, cond: Cond) -> dict[str, Any]:
        """Return the conditioning with the text's keys and values, the same at every step: `keys_values`."""
        kernels = params.params if isinstance(params, Quantized) else params
        return {**cond, "cross": keys_values(self.net, kernels, cond["context"])}

    def encode(self, vae_params: Params, images: UInt8[Array, "b h2 w2 3"]) -> Image:
        """Encode images as clean latents (the posterior's mean), in the denoiser's units."""
        vae: Any = self.vae
        with precision_context(vae_params) as params:
            return scale(vae.apply({"params": params}, to_float(images), method="encode")[0], vae.config)

    def decode(self, vae_params: Params, latents: Image) -> UInt8[Array, "b h2 w2 3"]:
        """Decode clean latents to images."""
        vae: Any = self.vae
        with precision_context(vae_params) as params:
            return to_uint8(vae.apply({"params": params}, unscale(latents, vae.config), method="decode"))


def by_step(
    bound: Callable[[Cond, Cond], Denoiser], cond: Cond, null: Cond, grid: Grid, parts: Int[Array, " steps"]
) -> Denoiser:
    """Return a denoiser whose conditioning is that of the step in which it is called, known by the time.

    cond, null: leaves (b, p, ...) of p parts. parts: the part of each step of the grid. A time between those of two
    steps belongs to the first of them.

    >>> import jax.numpy as jnp, numpy as np
    >>> from lcm_jax.diffusion.time_grids import pad
    >>> from lcm_jax.models.latent_diffusion import by_step
    >>> from lcm_jax.typing import Prediction
    >>> bound = lambda cond, null: lambda x, t, s=None: Prediction(x + cond["context"], x)
    >>> cond = {"context": jnp.asarray([[7.0, 9.0]]).reshape(1, 2, 1, 1, 1)}
    >>> grid = pad(np.asarray([3.0, 2.0, 1.0]))
    >>> denoise = by_step(bound, cond, cond, grid, jnp.asarray([0, 1]))
    >>> [float(denoise(jnp.zeros((1, 1, 1, 1)), t).x0.squeeze()) for t in (3.0, 2.5, 2.0)]
    [7.0, 7.0, 9.0]
    """

    def denoise(x: Image, t: Time, s: Time | None = None) -> Prediction:
        step = jnp.sum(grid.times > jnp.max(jnp.asarray(t, jnp.float32)))
        is_between = jnp.max(jnp.asarray(t, jnp.float32)) > grid.times[jnp.minimum(step, len(grid.times) - 1)]
        part = parts[jnp.clip(step - is_between, 0, len(parts) - 1)]
        now = [{name: leaf[:, part] for name, leaf in leaves.items()} for leaves in (cond, null)]
        return bound(*now)(x, t, *(() if s is None else (s,)))

    return denoise


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("params", "cond", "null", "guidance"),
    meta_fields=("model", "guided"),
)
@dataclass(frozen=True, kw_only=True, eq=False)
class BoundDenoiser:
    """A denoiser (x_t, t) -> Prediction as a tree: its leaves are the parameters, the conditioning and the guidance.

    It can be an argument of a jitted function, be sharded, donated or cast like any tree; another guidance scale, or
    another prompt of the same number of images, is the same program. `LatentDiffusion.denoiser` explains the fields.
    """

    model: LatentDiffusion
    params: Params
    cond: Cond
    null: Cond
    guidance: Float[Array, ""] | float
    guided: bool

    def __call__(self, x: Image, t: Time, s: Time | None = None, /) -> Prediction:
        """Predict x0 and eps from x at time t. s: end time of the step, for networks with a span embedding; None: t.

        Outside of another transformation it is compiled once for each shape. ValueError for an x of another shape.
        """
        config, rows = self.model.net.config, next(iter(self.cond.values())).shape[0]
        channels = getattr(config, "in_channels", self.model.vae.config.latent_channels)
        patch = getattr(config, "patch_size", 1)
        shape = np.shape(x)
        if len(shape) != 4 or shape[0] != rows or shape[3] != channels or shape[1] % patch or shape[2] % patch:
            sides = f", height and width multiples of {patch}" if patch > 1 else ""
            raise ValueError(f"x has the shape {shape}, and this denoiser takes ({rows}, h, w, {channels}){sides}")
        return _predict[is_low_precision(self.params)](self, x, t, s)


def _bound(denoise: BoundDenoiser, x: Image, t: Time, s: Time | None) -> Prediction:
    model = denoise.model
    denoiser = model.denoiser(denoise.params, denoise.cond, denoise.null, denoise.guidance, guided=denoise.guided)
    return denoiser(x, t, s)


_predict = {low: jit(_bound, low_precision=low) for low in (False, True)}


@cache
def _alpha(schedule: Schedule, t: float) -> float:
    """Return alpha(t), cached: reading it from the device at every call would wait for the device."""
    return float(schedule.alpha(t))


def to_float(images: UInt8[Array, "b h w 3"] | UInt8[np.ndarray, "b h w 3"]) -> Float[Array, "b h w 3"]:
    """Return images in [-1, 1] from 0 ... 255: x / 127.5 - 1."""
    return jnp.asarray(images, jnp.float32) / 127.5 - 1.0


def to_uint8(images: Float[Array, "b h w 3"]) -> UInt8[Array, "b h w 3"]:
    """Return images in 0 ... 255, rounded and clipped, from [-1, 1].

    >>> import jax.numpy as jnp
    >>> from lcm_jax.models.latent_diffusion import to_float, to_uint8
    >>> to_uint8(to_float(jnp.array([0, 128, 255], jnp.uint8).reshape(1, 1, 1, 3))).ravel().tolist()
    [0, 128, 255]
    """
    return jnp.clip(jnp.round((images.astype(jnp.float32) + 1.0) * 127.5), 0, 255).astype(jnp.uint8)
