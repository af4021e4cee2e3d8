"""LPIPS, the perceptual distance (Zhang et al. 2018, eq. 1), on a VGG16 trunk.

The weights are two published files: torchvision's VGG16 (`features.*`) and the linear heads of the lpips package
(`lin*.model.1.weight`), or one file of the package's full state dict; rules.py has the names of both.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float

_LAYERS = (2, 2, 3, 3, 3)  # convolutions of each VGG16 stage

# ImageNet mean and deviation, moved from [0, 1] to images in [-1, 1].
_SHIFT = (-0.030, -0.088, -0.188)
_SCALE = (0.458, 0.448, 0.450)


@dataclass(frozen=True, kw_only=True)
class LPIPSConfig:
    """The widths of the five stages; VGG16's by default."""

    channels: tuple[int, int, int, int, int] = (64, 128, 256, 512, 512)


class LPIPS(nn.Module):
    """The perceptual distance LPIPS (Zhang et al. 2018, eq. 1): a number (b,) for two batches of images (b, h, w, 3).

    d(x, y) = sum_l mean_hw w_l . (f_l(x) - f_l(y))^2, where f_l are the features of stage l, normalised to unit length
    over channels, and w_l >= 0 a linear head. Images are in [-1, 1]. Raises ValueError unless both batches have one
    shape with 3 channels and sides of at least 16 pixels.

    >>> import jax, jax.numpy as jnp
    >>> from vae16 import LPIPS, LPIPSConfig
    >>> lpips = LPIPS(LPIPSConfig(channels=(2, 2, 2, 2, 2)))
    >>> x = jax.ShapeDtypeStruct((4, 16, 16, 3), jnp.float32)
    >>> distance, _ = jax.eval_shape(lpips.init_with_output, jax.random.key(0), x, x)
    >>> distance.shape
    (4,)
    """

    config: LPIPSConfig = LPIPSConfig()
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w 3"], y: Float[Array, "b h w 3"]) -> Float[Array, " b"]:
        if x.shape != y.shape or x.shape[-1] != 3 or min(x.shape[1:3]) < 16:
            raise ValueError(
                f"LPIPS: {x.shape} and {y.shape}: needs two RGB batches of one shape, of at least 16x16 pixels"
            )
        shift, scale = jnp.asarray(_SHIFT, x.dtype), jnp.asarray(_SCALE, x.dtype)
        # Two passes rather than one on [x; y], so that a gradient in y alone does not compute one for x.
        pair = [(image - shift) / scale for image in (x, y)]
        distance = jnp.zeros(len(x), jnp.float32)
        index = 0  # position in torchvision's Sequential, which also counts activations and pools
        for stage, (width, depth) in enumerate(zip(self.config.channels, _LAYERS, strict=True)):
            if stage:
                pair = [nn.max_pool(h, (2, 2), (2, 2)) for h in pair]
                index += 1
            for _ in range(depth):
                layer = nn.Conv(
                    width, (3, 3), padding=1, dtype=self.dtype, param_dtype=self.param_dtype, name=f"features_{index}"
                )
                pair = [nn.relu(layer(h)) for h in pair]
                index += 2
            head = nn.Conv(
                1, (1, 1), use_bias=False, kernel_init=nn.initializers.constant(1.0 / width), dtype=jnp.float32,
                param_dtype=self.param_dtype, name=f"lin{stage}",
            )  # fmt: skip
            a, b = (_unit(h) for h in pair)
            distance += head(jnp.square(a - b)).mean((1, 2, 3))
        return distance


def _unit(h: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
    """Scale to unit length over channels; zero, with zero gradient, where all channels are zero."""
    h = h.astype(jnp.float32)
    square = jnp.square(h).sum(-1, keepdims=True)
    length = jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1.0)), 0.0)
    return h / (length + 1e-10)
