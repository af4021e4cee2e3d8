"""From conditioning and noise to pictures: one pure function over a UNet and an autoencoder, compiled whole."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from lcm_jax.consistency import consistency
from lcm_jax.guidance import cfg
from lcm_jax.parameterization import bind
from lcm_jax.sampling import Grid, Sampler, sample
from lcm_jax.typing import Apply, Cond, Denoiser, Image, Key, Kind, Params, Schedule
from vae16 import AutoencoderKL, AutoencoderTiny, unscale


def as_apply(net: Any) -> Apply:
    """A flax module as the pure function that the mathematics takes."""
    return lambda params, x, t, cond: net.apply({"params": params}, x, t, cond)


@dataclass(frozen=True, kw_only=True)
class Generator:
    """The static half of a text-to-image model; parameters, conditioning and noise are arguments.

    embeds_guidance: the network takes w = guidance - 1 as an input (a distilled student), so CFG is not run on top.
    """

    net: Any  # flax module, apply({"params": ...}, x, t, cond)
    vae: AutoencoderKL | AutoencoderTiny
    schedule: Schedule
    kind: Kind
    embeds_guidance: bool = False

    def denoiser(
        self, params: Params, cond: Cond, null: Cond, guidance: Float[Array, ""] | float, *, guided: bool
    ) -> Denoiser:
        """The network with everything bound. cond: n rows; null: the same leaves of the negative prompt, n rows.

        guided: static, whether classifier-free guidance is run (two rows for each picture).
        """

        apply = as_apply(self.net)
        if self.embeds_guidance:
            rows = next(iter(cond.values())).shape[0]
            w = jnp.broadcast_to(jnp.asarray(guidance, jnp.float32) - 1.0, (rows,))
            return bind(apply, params, {**cond, "guidance": w}, self.schedule, self.kind)
        if not guided:
            return bind(apply, params, cond, self.schedule, self.kind)
        both = {name: jnp.concatenate([null[name], value]) for name, value in cond.items()}
        return cfg(bind(apply, params, both, self.schedule, self.kind), guidance)

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
    ) -> Image:
        """The clean latents (b, h, w, c) that the sampler reaches from x at grid.times[0]."""
        denoise = self.denoiser(params, cond, null, guidance, guided=guided)
        if sampler.consistency:
            denoise = consistency(denoise, self.schedule)
        return sample(denoise, self.schedule, sampler.solver, grid, x, key)

    def decode(self, vae_params: Params, latents: Image) -> UInt8[Array, "b h w 3"]:
        """Pictures of clean latents."""
        vae: Any = self.vae
        return to_uint8(vae.apply({"params": vae_params}, unscale(latents, vae.config), method="decode"))


def to_float(images: UInt8[Array, "b h w 3"] | UInt8[np.ndarray, "b h w 3"]) -> Float[Array, "b h w 3"]:
    """0 ... 255 to [-1, 1]."""
    return jnp.asarray(images, jnp.float32) / 127.5 - 1.0


def to_uint8(images: Float[Array, "b h w 3"]) -> UInt8[Array, "b h w 3"]:
    """[-1, 1] to 0 ... 255, rounded and clipped."""
    return jnp.clip(jnp.round((images.astype(jnp.float32) + 1.0) * 127.5), 0, 255).astype(jnp.uint8)
