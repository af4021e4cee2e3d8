"""The layers of the UNet: convolutions, dense layers, norms, resizing. Arrays are (b, h, w, c)."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from mmdit.blocks import flat_dot, linear
from vae16.convolution import convolve

# PyTorch's default, uniform within 1/sqrt(fan_in): it has a third of the variance of LeCun's initialiser, which keeps
# the residual stream small.
kernel_init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


def _pointwise(x: Array, kernel: Array, *_: Any, precision: Any = None, **__: Any) -> Array:
    """Compute a 1 x 1 convolution as one matrix product."""
    return flat_dot(x, kernel.reshape(kernel.shape[-2:]), precision=precision)


def dense(features: int, name: str, dtype: Any, param_dtype: Any, **options: Any) -> nn.Dense:
    """Return a dense layer with PyTorch's name and initial distribution; options: further fields of `nn.Dense`."""
    return linear(features, name, dtype, param_dtype, **({"kernel_init": kernel_init} | options))


def conv(features: int, name: str, dtype: Any, param_dtype: Any, *, kernel: int = 3, stride: int = 1) -> nn.Conv:
    """Return a convolution that pads both sides by kernel // 2, as PyTorch ("SAME" pads one side when striding)."""
    algorithms = {(1, 1): _pointwise, (3, 1): convolve}
    return nn.Conv(
        features,
        (kernel, kernel),
        (stride, stride),
        padding=kernel // 2,
        name=name,
        dtype=dtype,
        param_dtype=param_dtype,
        kernel_init=kernel_init,
        conv_general_dilated=algorithms.get((kernel, stride)),
    )


def layer_norm(name: str, dtype: Any, param_dtype: Any) -> nn.LayerNorm:
    """Return a layer normalisation with PyTorch's epsilon and a variance that is computed without cancellation."""
    return nn.LayerNorm(epsilon=1e-5, name=name, dtype=dtype, param_dtype=param_dtype, use_fast_variance=False)


class Downsample(nn.Module):
    """The strided convolution that halves height and width, rounding up."""

    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c"]:
        return conv(x.shape[-1], "conv", self.dtype, self.param_dtype, stride=2)(x)


class Upsample(nn.Module):
    """The layer that doubles height and width by repetition, crops to `size`, and convolves.

    size: height and width of the skip connection, which may be odd.
    """

    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], size: tuple[int, int]) -> Float[Array, "b h2 w2 c"]:
        b, h, w, c = x.shape
        x = jnp.broadcast_to(x[:, :, None, :, None, :], (b, h, 2, w, 2, c)).reshape(b, 2 * h, 2 * w, c)
        return conv(c, "conv", self.dtype, self.param_dtype)(x[:, : size[0], : size[1]])
