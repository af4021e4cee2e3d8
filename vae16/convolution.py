"""The 3 x 3 convolution as each platform runs it best: what `flax.linen.Conv` takes as its `conv_general_dilated`."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial, reduce
from itertools import compress, starmap
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, BFloat16, Float

Pair = tuple[int, int]
Padding = tuple[Pair, Pair] | str
Convolution = Callable[[Array, Array], Array]
AROUND = ((1, 1), (1, 1))

# Winograd's products outweigh his sums from WIDTH channels and SIZE numbers of the input on, and the turning of the
# kernel where that stays in the cache (TURNED, in times out) or where ROWS pixels of the whole batch share it.
WIDTH, SIZE, TURNED, ROWS = 64, 2**15, 2**16, 2**10
# With fewer than WIDE channels only up to LARGE numbers: beyond, the sums wait for memory (Intel, 2 MiB of L2 a core:
# 512 x 512 x 64 direct 101 ms, Winograd's 127; 64 x 64 x 64 1.6 and 1.3).
WIDE, LARGE = 128, 2**20
# XLA:CPU's convolution is slow where its products are of short rows: few channels out, or few in and not many out.
FEW_OUT, FEW_IN, NOT_MANY = 8, 4, 64
# Gradients: with more PRODUCTS for each place of the kernel Winograd's own outweighs its many small operations, and a
# kernel of HEAVY, channels in times out, is turned about in more time than the products of fewer than ROWS pixels take.
PRODUCTS, HEAVY = 2**26, 2**19


def convolve(
    x: Float[Array, "b h w i"], kernel: Float[Array, "3 3 i o"], *_: Any, **__: Any
) -> Float[Array, "b h w o"]:
    """3 x 3 of stride 1, padded by 1: on a CPU by `winograd` or `blocks` where those pay (float32, even sides, large).

    A picture of fewer pixels than the kernel on a side is one of `columns` there. Gradients go by `winograd` where that
    pays, too, by `places` where the kernel is much larger than the pictures, else by XLA's own.
    """
    h, w = x.shape[1:3]
    if min(h, w) < 3:
        return jax.lax.platform_dependent(x, kernel, cpu=columns, default=direct)
    if h % 2 or w % 2 or not x.dtype == kernel.dtype == jnp.float32:
        return direct(x, kernel)
    if _winograd_pays(x, kernel):
        pays = x.size * kernel.shape[3] > PRODUCTS
        return _on_cpu(winograd, winograd if pays else direct, x, kernel)
    if shape := _block(x, kernel):
        return _on_cpu(partial(blocks, shape=shape), direct, x, kernel)
    if math.prod(x.shape[:3]) < ROWS and math.prod(kernel.shape[2:]) >= HEAVY:
        return _on_cpu(direct, places, x, kernel)
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


@partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _on_cpu(own: Convolution, back: Convolution, x: Array, kernel: Array) -> Array:
    """`direct`, on a CPU by `own`, and its derivatives by that of `back`."""
    return jax.lax.platform_dependent(x, kernel, cpu=own, default=direct)


@partial(_on_cpu.defjvp, symbolic_zeros=True)
def _(own: Convolution, back: Convolution, primals: tuple[Array, Array], tangents: tuple[Any, Any]) -> Any:
    # Nothing but x and the kernel is kept for the gradient: Winograd's tiles are four times as large as the pictures.
    back = back if back is direct else jax.checkpoint(back)
    return _on_cpu(own, back, *primals), _derivative(primals, tangents, on_cpu=back)


def _derivative(primals: tuple[Array, Array], tangents: tuple[Any, Any], *, on_cpu: Convolution) -> Array:
    """Of `direct`, linear in each of the two, along the directions that are not zero; on a CPU by another way to it."""
    (x, kernel), (dx, dk) = primals, tangents
    moves = [not isinstance(along, SymbolicZero) for along in tangents]
    way = partial(jax.lax.platform_dependent, cpu=on_cpu, default=direct)
    return reduce(jnp.add, starmap(way, compress(((dx, kernel), (x, dk)), moves)))


def direct(
    x: Float[Array, "b h w i"], kernel: Float[Array, "k l i o"], strides: Pair = (1, 1), padding: Padding = AROUND
) -> Float[Array, "b h2 w2 o"]:
    """XLA's own convolution: by default one of 3 x 3 and stride 1 keeps the size."""
    dimensions = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, kernel, strides, padding, dimension_numbers=dimensions)


@jax.custom_jvp
def corners(x: Float[Array, "b h w i"], kernel: Float[Array, "2 2 i o"]) -> Float[Array, "b h+1 w+1 o"]:
    """2 x 2 of stride 1, padded by 1: of the windows around every corner of pixels."""
    return direct(x, kernel)


@partial(corners.defjvp, symbolic_zeros=True)
def _(primals: tuple[Array, Array], tangents: tuple[Any, Any]) -> Any:
    # The kernel's gradient is a convolution by the result's, which is larger than the picture. XLA:CPU has a loop of
    # its own for that, unless the padding is there already: 16 pictures of 32 x 32 pixels, 32 channels, 255 and 15 ms.
    return corners(*primals), _derivative(primals, tangents, on_cpu=_corners_of_padded)


def _corners_of_padded(x: Array, kernel: Array) -> Array:
    return direct(jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0))), kernel, padding=((0, 0), (0, 0)))


def convolve_bfloat16(
    x: BFloat16[Array, "b h w i"], kernel: BFloat16[Array, "k l i o"], strides: Pair, padding: Padding
) -> BFloat16[Array, "b h2 w2 o"]:
    """A convolution of bfloat16 on a CPU, where XLA has none: by matrix products, for which processors have
    instructions. Those of few channels go by float32's ways.
    """
    usual = kernel.shape[:2] == (3, 3) and (strides, padding) == ((1, 1), AROUND)
    if min(kernel.shape[2:]) < WIDE or isinstance(padding, str):
        wide = x.astype(jnp.float32), kernel.astype(jnp.float32)
        return (convolve(*wide) if usual else direct(*wide, strides, padding)).astype(x.dtype)
    if usual and not (x.shape[1] % 2 or x.shape[2] % 2):
        return _on_cpu(winograd, direct, x, kernel)
    return lines(x, kernel, strides, padding)


def lines(
    x: Float[Array, "b h w i"], kernel: Float[Array, "k l i o"], strides: Pair, padding: tuple[Pair, Pair]
) -> Float[Array, "b h2 w2 o"]:
    """`direct` as a matrix product for each line of the kernel, of the pixels under it side by side."""
    x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
    h, w = (1 + (x.shape[i + 1] - kernel.shape[i]) // strides[i] for i in (0, 1))

    def under(i: int, j: int) -> Array:
        rows, columns = (slice(at, at + (n - 1) * s + 1, s) for at, n, s in ((i, h, strides[0]), (j, w, strides[1])))
        return x[:, rows, columns]

    sums = [
        _product(jnp.concatenate([under(i, j) for j in range(len(line))], axis=-1), line.reshape(-1, line.shape[-1]))
        for i, line in enumerate(kernel)
    ]
    return reduce(jnp.add, sums).astype(x.dtype)


def _product(x: Float[Array, "*b i"], kernel: Float[Array, "i o"]) -> Float[Array, "*b o"]:
    """In float32, of rows that lie one after another."""
    y = jnp.dot(x.reshape(-1, x.shape[-1]), kernel, preferred_element_type=jnp.float32)
    return y.reshape(*x.shape[:-1], -1)


def columns(x: Float[Array, "b h w i"], kernel: Float[Array, "3 3 i o"]) -> Float[Array, "b h w o"]:
    """`direct` as one matrix product, of the nine neighbours of every pixel side by side.

    XLA:CPU has a loop of its own for a kernel that is larger than the picture: 134 ms for four of 2 x 2 pixels, 1280
    channels in and out, where this takes 4.
    """
    return jnp.concatenate(_neighbours(x), axis=-1) @ kernel.reshape(9 * x.shape[-1], -1)


def places(x: Float[Array, "b h w i"], kernel: Float[Array, "3 3 i o"]) -> Float[Array, "b h w o"]:
    """`direct` as one matrix product for each of the kernel's places.

    The gradient of `direct` turns the kernel about first: 55 ms for 16 x 16 pixels, 1280 channels in and out, 45 for
    8 x 8; that of these products takes 30 and 18.
    """
    places = _apart(kernel.reshape(9, *kernel.shape[2:]), 0)
    return reduce(jnp.add, [_product(pixels, place) for pixels, place in zip(_neighbours(x), places, strict=True)])


def _neighbours(x: Float[Array, "b h w i"]) -> list[Float[Array, "b h w i"]]:
    """The pixel under each place of a 3 x 3 kernel, zeros outside."""
    h, w = x.shape[1:3]
    x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    return [x[:, i : i + h, j : j + w] for i in range(3) for j in range(3)]


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
    that of F(4 x 4, 3 x 3) would be five times as great. What is added is float32, what is multiplied of x's dtype.
    """
    (b, h, w, _), dtype = x.shape, x.dtype
    x, kernel = x.astype(jnp.float32), kernel.astype(jnp.float32)
    tiles = [_spread(_around(row, 2)) for row in _spread(_around(x, 1))]
    kernels = [_weigh(_apart(row, 0)) for row in _weigh(_apart(kernel, 0))]
    products = [
        [_product(tile.astype(dtype), place.astype(dtype)) for tile, place in zip(*row, strict=True)]
        for row in zip(tiles, kernels, strict=True)
    ]
    pixels = [_gather(column) for column in zip(*map(_gather, products), strict=True)]
    lined = [jnp.stack(line, 3).reshape(b, h // 2, w, -1) for line in zip(*pixels, strict=True)]
    return jnp.stack(lined, 2).reshape(b, h, w, -1).astype(dtype)


def _apart(x: Array, axis: int) -> list[Array]:
    """Along an axis: `jnp.unstack`, whose gradient would be a sum of padded pieces and not their concatenation."""
    return [piece.squeeze(axis) for piece in jax.lax.split(x, (1,) * x.shape[axis], axis)]


def _around(x: Array, axis: int) -> list[Array]:
    """The four pixels of the tile around every two along an axis, zeros outside: by parity, as strided slices turned
    about for the gradient would be slow.
    """
    even, odd = _apart(x.reshape(*x.shape[:axis], -1, 2, *x.shape[axis + 1 :]), axis + 1)

    def moved(x: Array, by: int) -> Array:
        return jax.lax.pad(x, jnp.zeros((), x.dtype), [(by, -by, 0) if i == axis else (0, 0, 0) for i in range(x.ndim)])

    return [moved(odd, 1), even, odd, moved(even, -1)]


def _spread(d: Sequence[Array]) -> list[Array]:
    """B^T d."""
    return [d[0] - d[2], d[1] + d[2], d[2] - d[1], d[1] - d[3]]


def _weigh(g: Sequence[Array]) -> list[Array]:
    """G g."""
    return [g[0], (g[0] + g[1] + g[2]) / 2, (g[0] - g[1] + g[2]) / 2, g[2]]


def _gather(m: Sequence[Array]) -> list[Array]:
    """A^T m."""
    return [m[0] + m[1] + m[2], m[1] - m[2] - m[3]]
