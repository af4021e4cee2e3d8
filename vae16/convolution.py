"""The 3 x 3 convolution by the fastest algorithm of each platform, as a `conv_general_dilated` of `flax.linen.Conv`."""

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

# Winograd's algorithm pays from WIDTH channels and SIZE input values on, where the transformed kernel stays in the
# cache (at most TURNED values, channels in times channels out) or at least ROWS pixels of the batch share it.
WIDTH, SIZE, TURNED, ROWS = 64, 2**15, 2**16, 2**10
# With fewer than WIDE channels it pays only up to LARGE input values: beyond, its additions are limited by memory
# (Intel, 2 MiB of L2 a core: 512 x 512 x 64 direct 101 ms, Winograd 127 ms; 64 x 64 x 64 1.6 and 1.3 ms).
WIDE, LARGE = 128, 2**20
# XLA:CPU's convolution is slow where its matrix products have short rows: few channels out, or few in and not many out.
FEW_OUT, FEW_IN, NOT_MANY = 8, 4, 64
# Gradients: with more than PRODUCTS products for each kernel position Winograd's gradient pays, in spite of its many
# small operations. A kernel of at least HEAVY values (channels in times channels out) takes longer to transpose than
# the products of fewer than ROWS pixels take.
PRODUCTS, HEAVY = 2**26, 2**19


def convolve(
    x: Float[Array, "b h w i"], kernel: Float[Array, "3 3 i o"], *_: Any, **__: Any
) -> Float[Array, "b h w o"]:
    """Convolve by a 3 x 3 kernel with stride 1 and a padding of 1, by the fastest algorithm of the platform.

    A CPU takes `winograd` or `blocks` where they pay (float32, even sides, large), `columns` for images smaller than
    the kernel, and else `direct`, as all other platforms do. Gradients on a CPU take `winograd` where it pays, `places`
    where the kernel is much larger than the images, and else XLA's own convolution. Further arguments, those of
    `jax.lax.conv_general_dilated`, are ignored.

    >>> import jax.numpy as jnp
    >>> from vae16.convolution import convolve
    >>> convolve(jnp.ones((1, 3, 3, 1)), jnp.ones((3, 3, 1, 1)))[0, :, :, 0].tolist()
    [[4.0, 6.0, 4.0], [6.0, 9.0, 6.0], [4.0, 6.0, 4.0]]
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
    """Return the output block (p, q) for `blocks` where that algorithm pays, else None."""
    inner, outer = kernel.shape[2:]
    if math.prod(x.shape[:3]) < ROWS:
        return None
    if outer <= FEW_OUT:
        return 2, 2
    return (1, 2) if inner <= FEW_IN and outer <= NOT_MANY else None


@partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _on_cpu(forward: Convolution, backward: Convolution, x: Array, kernel: Array) -> Array:
    """Compute `direct`; on a CPU the values by `forward` and the derivatives by those of `backward`."""
    return jax.lax.platform_dependent(x, kernel, cpu=forward, default=direct)


@partial(_on_cpu.defjvp, symbolic_zeros=True)
def _(forward: Convolution, backward: Convolution, primals: tuple[Array, Array], tangents: tuple[Any, Any]) -> Any:
    # Store nothing but x and the kernel for the gradient: Winograd's tiles are four times as large as the images.
    backward = backward if backward is direct else jax.checkpoint(backward)
    return _on_cpu(forward, backward, *primals), _derivative(primals, tangents, on_cpu=backward)


def _derivative(primals: tuple[Array, Array], tangents: tuple[Any, Any], *, on_cpu: Convolution) -> Array:
    """Return the derivative of `direct` along the tangents that are not zero; on a CPU by the algorithm `on_cpu`.

    A convolution is bilinear: d conv(x, k) = conv(dx, k) + conv(x, dk).
    """
    (x, kernel), (dx, dk) = primals, tangents
    nonzero = [not isinstance(tangent, SymbolicZero) for tangent in tangents]
    convolution = partial(jax.lax.platform_dependent, cpu=on_cpu, default=direct)
    return reduce(jnp.add, starmap(convolution, compress(((dx, kernel), (x, dk)), nonzero)))


def direct(
    x: Float[Array, "b h w i"], kernel: Float[Array, "k l i o"], strides: Pair = (1, 1), padding: Padding = AROUND
) -> Float[Array, "b h2 w2 o"]:
    """Convolve by XLA's own convolution; with the default strides and padding a 3 x 3 kernel keeps the size."""
    dimensions = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, kernel, strides, padding, dimension_numbers=dimensions)


@jax.custom_jvp
def corners(x: Float[Array, "b h w i"], kernel: Float[Array, "2 2 i o"]) -> Float[Array, "b h+1 w+1 o"]:
    """Convolve by a 2 x 2 kernel with stride 1 and a padding of 1: one output for each corner of a pixel."""
    return direct(x, kernel)


@partial(corners.defjvp, symbolic_zeros=True)
def _(primals: tuple[Array, Array], tangents: tuple[Any, Any]) -> Any:
    # The kernel's gradient is a convolution by the output's gradient, which is larger than the image. XLA:CPU has a
    # slow loop for that, unless the image is already padded: 255 and 15 ms (16 images of 32 x 32 pixels, 32 channels).
    return corners(*primals), _derivative(primals, tangents, on_cpu=_corners_of_padded)


def _corners_of_padded(x: Array, kernel: Array) -> Array:
    return direct(jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0))), kernel, padding=((0, 0), (0, 0)))


def convolve_bfloat16(
    x: BFloat16[Array, "b h w i"], kernel: BFloat16[Array, "k l i o"], strides: Pair, padding: Padding
) -> BFloat16[Array, "b h2 w2 o"]:
    """Convolve bfloat16 arrays on a CPU, for which XLA has no bfloat16 convolution.

    With at least WIDE channels in and out it is made of matrix products, for which processors have bfloat16
    instructions; with fewer channels, or a padding given by name, it runs in float32.
    """
    is_3x3_same = kernel.shape[:2] == (3, 3) and (strides, padding) == ((1, 1), AROUND)
    if min(kernel.shape[2:]) < WIDE or isinstance(padding, str):
        float32 = x.astype(jnp.float32), kernel.astype(jnp.float32)
        return (convolve(*float32) if is_3x3_same else direct(*float32, strides, padding)).astype(x.dtype)
    if is_3x3_same and not (x.shape[1] % 2 or x.shape[2] % 2):
        return _on_cpu(winograd, direct, x, kernel)
    return lines(x, kernel, strides, padding)


def lines(
    x: Float[Array, "b h w i"], kernel: Float[Array, "k l i o"], strides: Pair, padding: tuple[Pair, Pair]
) -> Float[Array, "b h2 w2 o"]:
    """Compute `direct` as one matrix product for each row of the kernel, on the pixels under that row side by side."""
    x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
    h, w = (1 + (x.shape[i + 1] - kernel.shape[i]) // strides[i] for i in (0, 1))

    def pixels(i: int, j: int) -> Array:
        """Return the input pixels (b, h2, w2, i) under position (i, j) of the kernel."""
        rows, columns = (
            slice(start, start + (n - 1) * s + 1, s) for start, n, s in ((i, h, strides[0]), (j, w, strides[1]))
        )
        return x[:, rows, columns]

    sums = [
        _product(jnp.concatenate([pixels(i, j) for j in range(len(row))], axis=-1), row.reshape(-1, row.shape[-1]))
        for i, row in enumerate(kernel)
    ]
    return reduce(jnp.add, sums).astype(x.dtype)


def _product(x: Float[Array, "*b i"], kernel: Float[Array, "i o"]) -> Float[Array, "*b o"]:
    """Return x @ kernel in float32, with the leading axes of x as one."""
    y = jnp.dot(x.reshape(-1, x.shape[-1]), kernel, preferred_element_type=jnp.float32)
    return y.reshape(*x.shape[:-1], -1)


def columns(x: Float[Array, "b h w i"], kernel: Float[Array, "3 3 i o"]) -> Float[Array, "b h w o"]:
    """Compute `direct` as one matrix product, on the nine neighbours of every pixel side by side (im2col).

    XLA:CPU has a slow loop for a kernel that is larger than the image: 134 ms for four images of 2 x 2 pixels with 1280
    channels in and out, where this takes 4 ms.
    """
    return jnp.concatenate(_neighbours(x), axis=-1) @ kernel.reshape(9 * x.shape[-1], -1)


def places(x: Float[Array, "b h w i"], kernel: Float[Array, "3 3 i o"]) -> Float[Array, "b h w o"]:
    """Compute `direct` as one matrix product for each of the nine positions of the kernel.

    The gradient of `direct` transposes the kernel first: 55 ms for 16 x 16 pixels and 45 ms for 8 x 8, with 1280
    channels in and out; the gradient of these products takes 30 and 18 ms.
    """
    taps = _unstack(kernel.reshape(9, *kernel.shape[2:]), 0)
    return reduce(jnp.add, [_product(pixels, tap) for pixels, tap in zip(_neighbours(x), taps, strict=True)])


def _neighbours(x: Float[Array, "b h w i"]) -> list[Float[Array, "b h w i"]]:
    """Return the input pixels under each of the nine positions of a 3 x 3 kernel, with zeros outside the image."""
    h, w = x.shape[1:3]
    x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    return [x[:, i : i + h, j : j + w] for i in range(3) for j in range(3)]


def blocks(
    x: Float[Array, "b h w i"], kernel: Float[Array, "3 3 i o"], shape: tuple[int, int]
) -> Float[Array, "b h w o"]:
    """Compute `direct` as a convolution of stride (p, q) = `shape` that gives p x q pixels at each position.

    h and w must be multiples of p and q. The kernel has (2 + p) x (2 + q) pixels and contains, for each of the p q
    pixels, the 3 x 3 kernel at that pixel's offset. The rows of the matrix product are p q times as long, for
    (2 + p) (2 + q) / (9 p q) of the values read and (2 + p) (2 + q) / 9 times the products.
    """
    p, q = shape
    corners = [((a, p - 1 - a), (b, q - 1 - b), (0, 0), (0, 0)) for a in range(p) for b in range(q)]
    block_kernel = jnp.concatenate([jnp.pad(kernel, corner) for corner in corners], axis=-1)
    return rearrange(direct(x, block_kernel, shape), "b h w (p q o) -> b (h p) (w q) o", p=p, q=q)


def winograd(x: Float[Array, "b h w i"], kernel: Float[Array, "3 3 i o"]) -> Float[Array, "b h w o"]:
    """Compute `direct` for even h and w with 4/9 of its products: F(2 x 2, 3 x 3) of Lavin & Gray (arXiv:1509.09308).

    Tiles d of 4 x 4 pixels that overlap by two give 2 x 2 pixels each, A^T [(G g G^T) * (B^T d B)] A (section 4.1,
    with the elementwise product *). Summed over the channels, that is one matrix product of all tiles for each of the
    16 positions in a tile. Its error is about that of `direct`; that of F(4 x 4, 3 x 3) would be five times as large.
    Additions are in float32, multiplications in x's dtype.
    """
    (b, h, w, _), dtype = x.shape, x.dtype
    x, kernel = x.astype(jnp.float32), kernel.astype(jnp.float32)
    tiles = [_transform_input(_tile_pixels(row, 2)) for row in _transform_input(_tile_pixels(x, 1))]
    kernels = [_transform_kernel(_unstack(row, 0)) for row in _transform_kernel(_unstack(kernel, 0))]
    products = [
        [_product(tile.astype(dtype), tap.astype(dtype)) for tile, tap in zip(*row, strict=True)]
        for row in zip(tiles, kernels, strict=True)
    ]
    pixels = [_transform_output(column) for column in zip(*map(_transform_output, products), strict=True)]
    rows = [jnp.stack(row, 3).reshape(b, h // 2, w, -1) for row in zip(*pixels, strict=True)]
    return jnp.stack(rows, 2).reshape(b, h, w, -1).astype(dtype)


def _unstack(x: Array, axis: int) -> list[Array]:
    """Split along an axis; the gradient is a concatenation (that of `jnp.unstack` is a sum of padded pieces)."""
    return [piece.squeeze(axis) for piece in jax.lax.split(x, (1,) * x.shape[axis], axis)]


def _tile_pixels(x: Array, axis: int) -> list[Array]:
    """Return the four pixels along an axis of the tile around every pair of pixels, with zeros outside the image.

    Even and odd pixels are split first, because the gradient of strided slices is slow.
    """
    even, odd = _unstack(x.reshape(*x.shape[:axis], -1, 2, *x.shape[axis + 1 :]), axis + 1)

    def shifted(x: Array, by: int) -> Array:
        return jax.lax.pad(x, jnp.zeros((), x.dtype), [(by, -by, 0) if i == axis else (0, 0, 0) for i in range(x.ndim)])

    return [shifted(odd, 1), even, odd, shifted(even, -1)]


def _transform_input(d: Sequence[Array]) -> list[Array]:
    """Return B^T d."""
    return [d[0] - d[2], d[1] + d[2], d[2] - d[1], d[1] - d[3]]


def _transform_kernel(g: Sequence[Array]) -> list[Array]:
    """Return G g."""
    return [g[0], (g[0] + g[1] + g[2]) / 2, (g[0] - g[1] + g[2]) / 2, g[2]]


def _transform_output(m: Sequence[Array]) -> list[Array]:
    """Return A^T m."""
    return [m[0] + m[1] + m[2], m[1] - m[2] - m[3]]
