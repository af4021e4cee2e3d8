"""PatchGAN discriminator (Isola et al. 2017, section 3.2.2) and the hinge losses (Lim & Ye 2017)."""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from vae16.layers import GroupNorm


@dataclass(frozen=True, kw_only=True)
class DiscriminatorConfig:
    """`n_layers` strided and widening convolutions from width `ndf`; a logit sees 70 pixels for n_layers=3."""

    ndf: int = 64
    n_layers: int = 3
    group_size: int = 16

    def __post_init__(self) -> None:
        if self.n_layers < 1:
            raise ValueError(f"n_layers: {self.n_layers} is too few; use at least 1")
        if 2 * self.ndf % self.group_size:
            raise ValueError(f"group_size: {self.group_size} does not divide 2*ndf={2 * self.ndf}; choose a divisor")


class PatchDiscriminator(nn.Module):
    """Images (b, h, w, c) to a map of logits, one for each patch.

    The original normalises by batch statistics. Here groups of `group_size` channels of one image are normalised
    instead: no running averages to carry beside the parameters, no dependence on how real and generated images are
    batched or sharded, and, unlike instance norm, the contrast of a channel against its group survives.
    """

    config: DiscriminatorConfig = DiscriminatorConfig()
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 1"]:
        c = self.config

        def layer(features: int, stride: int, bias: bool, name: str) -> nn.Conv:
            return nn.Conv(
                features, (4, 4), strides=stride, padding=1, use_bias=bias, kernel_init=nn.initializers.normal(0.02),
                dtype=self.dtype, param_dtype=self.param_dtype, name=name,
            )  # fmt: skip

        h = nn.leaky_relu(layer(c.ndf, 2, True, "conv_in")(x), 0.2)
        for i in range(1, c.n_layers + 1):
            width = c.ndf * min(2**i, 8)
            h = layer(width, 2 if i < c.n_layers else 1, False, f"convs_{i - 1}")(h)
            h = GroupNorm(
                width // c.group_size, 1e-5, dtype=self.dtype, param_dtype=self.param_dtype, name=f"norms_{i - 1}"
            )(h)
            h = nn.leaky_relu(h, 0.2)
        return layer(1, 1, True, "conv_out")(h).astype(jnp.float32)


def hinge_discriminator(real: Float[Array, "..."], fake: Float[Array, "..."]) -> Float[Array, ""]:
    """(mean relu(1 - real) + mean relu(1 + fake)) / 2."""
    return 0.5 * (jnp.maximum(1.0 - real, 0.0).mean() + jnp.maximum(1.0 + fake, 0.0).mean())


def hinge_generator(fake: Float[Array, "..."]) -> Float[Array, ""]:
    """-mean fake."""
    return -fake.mean()
