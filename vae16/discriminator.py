"""The PatchGAN discriminator (Isola et al. 2017, section 3.2.2) and the hinge losses (Lim & Ye 2017)."""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from vae16.layers import GroupNorm


@dataclass(frozen=True, kw_only=True)
class DiscriminatorConfig:
    """The size of a PatchGAN discriminator: `n_layers` strided and widening convolutions from width `ndf`.

    Each logit sees a patch of 70 x 70 pixels for n_layers=3. group_size: channels that are normalised together.
    Raises ValueError unless n_layers is at least 1 and group_size divides 2 ndf.
    """

    ndf: int = 64
    n_layers: int = 3
    group_size: int = 16

    def __post_init__(self) -> None:
        if self.n_layers < 1:
            raise ValueError(f"n_layers: {self.n_layers} is too few; use at least 1")
        if 2 * self.ndf % self.group_size:
            raise ValueError(f"group_size: {self.group_size} does not divide 2*ndf={2 * self.ndf}; choose a divisor")


class PatchDiscriminator(nn.Module):
    """The PatchGAN discriminator: images (b, h, w, c) to a map of logits, one for each patch.

    The original normalises by batch statistics. Here groups of `group_size` channels of one image are normalised
    instead: no running averages to carry beside the parameters, no dependence on how real and generated images are
    batched or sharded, and, unlike instance norm, the contrast of a channel against its group survives.

    >>> import jax, jax.numpy as jnp
    >>> from vae16 import DiscriminatorConfig, PatchDiscriminator
    >>> critic = PatchDiscriminator(DiscriminatorConfig(ndf=4, group_size=4, n_layers=2))
    >>> x = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)
    >>> logits, _ = jax.eval_shape(critic.init_with_output, jax.random.key(0), x)
    >>> logits.shape
    (2, 6, 6, 1)
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
    """Return the discriminator's hinge loss, (mean relu(1 - real) + mean relu(1 + fake)) / 2 (Lim & Ye 2017).

    real, fake: logits of real and of generated images, of any shape.

    >>> import jax.numpy as jnp
    >>> from vae16 import hinge_discriminator
    >>> float(hinge_discriminator(real=jnp.array([2.0, 0.0]), fake=jnp.array([-2.0, 1.0])))
    0.75
    """
    return 0.5 * (jnp.maximum(1.0 - real, 0.0).mean() + jnp.maximum(1.0 + fake, 0.0).mean())


def hinge_generator(fake: Float[Array, "..."]) -> Float[Array, ""]:
    """Return the generator's hinge loss, -mean fake, of the logits of generated images.

    >>> import jax.numpy as jnp
    >>> from vae16 import hinge_generator
    >>> float(hinge_generator(jnp.array([1.0, 3.0])))
    -2.0
    """
    return -fake.mean()
