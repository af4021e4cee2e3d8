"""The 3 x 3 convolution as each platform runs it best: what `flax.linen.Conv` takes as its `conv_general_dilated`."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float

# Winograd's products outweigh his sums from WIDTH channels and SIZE numbers of the input on, and the turning of the
# kernel where that stays in the cache (TURNED, in times out) or where ROWS pixels of the whole batch share it.
WIDTH, SIZE, TURNED, ROWS = 64, 2**15, 2**16, 2**10
# With fewer than WIDE channels only up to LARGE numbers: beyond, the sums wait for memory (Intel, 2 MiB of L2 a core:
# 512 x 512 x 64 direct 101 ms, Winograd's 127; 64 x 64 x 64 1.6 and 1.3).
WIDE, LARGE = 128, 2**20
# XLA:CPU's convolution is slow where its products are of short rows: few channels out, or few in and not many out.
FEW_OUT, FEW_IN, NOT_MANY = 8, 4, 64


def convolve(
    x: Float[Array, "b h w i"], kernel: Float[Array, "3 3 i o"], *_: Any, **__: Any
) -> Float[Array, "b h w o"]:
    """3 x 3 of stride 1, padded by 1: on a CPU by `winograd` or `blocks` where those pay (float32, even sides, large).

    A picture of fewer pixels than the kernel on a side is one of `columns` there.
    """
    h, w = x.shape[1:3]
    if min(h, w) < 3:
        return jax.lax.platform_dependent(x, kernel, cpu=columns, default=direct)
    if h % 2 or w % 2 or not x.dtype == kernel.dtype == jnp.float32:
        return direct(x, kernel)
    if _winograd_pays(x, kernel):
        return _on_cpu(winograd, x, kernel)
    if shape := _block(x, kernel):
        return _on_cpu(partial(blocks, shape=shape), x, kernel)
    return direct(x, kernel)


def _winograd_pays(x: Array, kernel: Array) -> bool:
    widths = kernel.shape[2:]
    shared = math.prod(widths) <= TURNED or math.prod(x.shape[:3]) >= ROWS
    large = x.size >= SIZE and (min(widths) >= WIDE or x.size <= LARGE)
    return shared and large and min(widths) >= WIDTH


def _block(x: Array, kernel: Array) -> tuple[int, int] | None:
    """Of `blocks`, where they pay."""
    inner, outer = kernel.shape[2:]
    if math.prod(x.shape[:3]) < ROWS:
        return None
    if outer <= FEW_OUT:
        return 2, 2
    return (1, 2) if inner <= FEW_IN and outer <= NOT_MANY else None


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _on_cpu(own: Callable[[Array, Array], Array], x: Array, kernel: Array) -> Array:
    return jax.lax.platform_dependent(x, kernel, cpu=own, default=direct)


@_on_cpu.defjvp
def _(own: Callable[[Array, Array], Array], primals: tuple[Array, Array], tangents: tuple[Array, Array]) -> Any:
    # The gradient is that of the direct convolution: it needs no tiles kept, and no strided slices turned.
    return _on_cpu(own, *primals), jax.jvp(direct, primals, tangents)[1]


def direct(
    x: Float[Array, "b h w i"], kernel: Float[Array, "k l i o"], strides: tuple[int, int] = (1, 1)
) -> Float[Array, "b h2 w2 o"]:
    """XLA's own convolution, padded by 1: one of 3 x 3 and stride 1 keeps the size."""
    dimensions = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, kernel, strides, ((1, 1), (1, 1)), dimension_numbers=dimensions)


def columns(x: Float[Array, "b h w i"], kernel: Float[Array, "3 3 i o"]) -> Float[Array, "b h w o"]:
    """`direct` as one matrix product, of the nine neighbours of every pixel side by side.

    XLA:CPU has a loop of its own for a kernel that is larger than the picture: 134 ms for four of 2 x 2 pixels, 1280
    channels in and out, where this takes 4.
    """
    h, w, channels = x.shape[1:]
    x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    neighbours = jnp.concatenate([x[:, i : i + h, j : j + w] for i in range(3) for j in range(3)], axis=-1)
    return neighbours @ kernel.reshape(9 * channels, -1)


def blocks(
    x: Float[Array, "b h w i"], kernel: Float[Array, "3 3 i o"], shape: tuple[int, int]
) -> Float[Array, "b h w o"]:
    """`direct` for sides that are multiples of p and q: each place of a strided convolution gives p x q pixels.

    Its kernel is of (2 + p) x (2 + q) pixels, where the 3 x 3 of each pixel stand: rows p q times as long, for
    (2 + p) (2 + q) / (9 p q) of the numbers read and (2 + p) (2 + q) / 9 times the products.
    """
    p, q = shape
    corners = [((a, p - 1 - a), (b, q - 1 - b), (0, 0), (0, 0)) for a in range(p) for b in range(q)]
    wide = jnp.concatenate([jnp.pad(kernel, corner) for corner in corners], axis=-1)
    return rearrange(direct(x, wide, shape), "b h w (p q o) -> b (h p) (w q) o", p=p, q=q)


def winograd(x: Float[Array, "b h w i"], kernel: Float[Array, "3 3 i o"]) -> Float[Array, "b h w o"]:
    """`direct` for even h and w in 4/9 of its products: F(2 x 2, 3 x 3) of Lavin & Gray (1509.09308, section 4.1).

    Tiles of 4 x 4 pixels that overlap by two, d, give 2 x 2 pixels each: A^T [(G g G^T) (B^T d B)] A. Summed over the
    channels that is a matrix product of all tiles for each of the 16 places. Its error is about `direct`'s;
    that of F(4 x 4, 3 x 3) would be five times as great.
    """
    b, h, w, _ = x.shape
    x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    rows = _spread([x[:, i : i + h : 2] for i in range(4)])
    tiles = [_spread([row[:, :, j : j + w : 2] for j in range(4)]) for row in rows]
    kernels = [_weigh(list(row)) for row in _weigh(list(kernel))]
    products = [[tile @ place for tile, place in zip(*row, strict=True)] for row in zip(tiles, kernels, strict=True)]
    pixels = [_gather(column) for column in zip(*map(_gather, products), strict=True)]
    lines = [jnp.stack(line, 3).reshape(b, h // 2, w, -1) for line in zip(*pixels, strict=True)]
    return jnp.stack(lines, 2).reshape(b, h, w, -1)


def _spread(d: Sequence[Array]) -> list[Array]:
    """B^T d."""
    return [d[0] - d[2], d[1] + d[2], d[2] - d[1], d[1] - d[3]]


def _weigh(g: Sequence[Array]) -> list[Array]:
    """G g."""
    return [g[0], (g[0] + g[1] + g[2]) / 2, (g[0] - g[1] + g[2]) / 2, g[2]]


def _gather(m: Sequence[Array]) -> list[Array]:
    """A^T m."""
    return [m[0] + m[1] + m[2], m[1] - m[2] - m[3]]
