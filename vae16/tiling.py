"""Encode and decode large images in little memory: one image at a time, or by tiles with blended overlaps."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import product
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from vae16.autoencoder import AutoencoderKL

Images = Float[Array, "b h w c"]


def sliced(fn: Callable[[Images], Images], x: Images) -> Float[Array, "b h2 w2 c2"]:
    """Apply `fn` to the batch one image at a time, with the memory of one.

    >>> import jax.numpy as jnp
    >>> from vae16 import sliced
    >>> sliced(lambda image: 2 * image, jnp.ones((3, 4, 4, 1))).shape
    (3, 4, 4, 1)
    """
    return jax.lax.map(lambda image: fn(image[None])[0], x)


def _starts(size: int, tile: int, overlap: int, multiple: int) -> list[int]:
    """Return the first positions, multiples of `multiple`, of the fewest tiles that cover `size`, evenly spread."""
    if tile >= size:
        return [0]
    last = -(-(size - overlap) // (tile - overlap)) - 1
    return [i * (size - tile) // (last * multiple) * multiple for i in range(last + 1)]


def _window(length: int, overlap: int) -> np.ndarray:
    """Return the weights (length,) along one side of a tile: linear ramps over both overlaps, never zero."""
    distance = np.minimum(np.arange(length), np.arange(length)[::-1]) + 0.5
    return np.minimum(distance / max(overlap, 1), 1.0).astype(np.float32)


def tiled(
    fn: Callable[[Images], Images], x: Images, *, tile: int, overlap: int, multiple: int = 1
) -> Float[Array, "b h2 w2 c2"]:
    """Apply `fn` to overlapping squares of `tile` x `tile` positions of x and blend the results.

    `fn` resizes images by a fixed ratio. `tile` and `overlap` are in positions of x, and tiles begin at multiples of
    `multiple`. The result is sum_i w_i fn(x_i) / sum_i w_i, where w_i has linear ramps over the overlaps. An image no
    larger than a tile is `fn(x)` exactly. All tiles have one shape, so `fn` is compiled once whatever the size.
    Raises ValueError unless 0 <= overlap < tile, and the tile and the sides of x are multiples of `multiple`.

    >>> import jax.numpy as jnp
    >>> from vae16 import tiled
    >>> x = jnp.arange(36.0).reshape(1, 6, 6, 1)
    >>> bool(jnp.allclose(tiled(lambda tile: 2 * tile, x, tile=4, overlap=2), 2 * x))
    True
    """
    if not 0 <= overlap < tile:
        raise ValueError(f"overlap: {overlap} must be at least 0 and below the tile's {tile}")
    b, h, w, c = x.shape
    if tile % multiple or h % multiple or w % multiple:
        raise ValueError(f"tile {tile} and image {h}x{w} must be multiples of {multiple}")
    if h <= tile and w <= tile:
        return fn(x)
    th, tw = min(tile, h), min(tile, w)
    out = jax.eval_shape(fn, jax.ShapeDtypeStruct((b, th, tw, c), x.dtype))
    oh, ow = out.shape[1:3]
    window = jnp.asarray(np.outer(_window(oh, overlap * oh // th), _window(ow, overlap * ow // tw))[None, :, :, None])
    corners = np.array(list(product(_starts(h, th, overlap, multiple), _starts(w, tw, overlap, multiple))))
    shape = (b, h * oh // th, w * ow // tw, out.shape[3])

    def add(carry: tuple[Array, Array], corner: Array) -> tuple[tuple[Array, Array], None]:
        total, weight = carry
        piece = fn(jax.lax.dynamic_slice(x, (0, corner[0], corner[1], 0), (b, th, tw, c)))
        start = (0, corner[0] * oh // th, corner[1] * ow // tw, 0)
        new_total = jax.lax.dynamic_slice(total, start, piece.shape) + window * piece
        new_weight = jax.lax.dynamic_slice(weight, start, window.shape) + window
        return (
            jax.lax.dynamic_update_slice(total, new_total, start),
            jax.lax.dynamic_update_slice(weight, new_weight, start),
        ), None

    zeros = jnp.zeros(shape, jnp.float32), jnp.zeros((1, *shape[1:3], 1), jnp.float32)
    (total, weight), _ = jax.lax.scan(add, zeros, jnp.asarray(corners))
    return (total / weight).astype(out.dtype)


def decode_tiled(
    vae: AutoencoderKL, params: Mapping[str, Any], z: Float[Array, "b h w z"], *, tile: int = 64, overlap: int = 16
) -> Float[Array, "b h2 w2 c"]:
    """Decode unscaled latents of any size by tiles; `tile` and `overlap` are in latent positions.

    >>> import jax, jax.numpy as jnp
    >>> from vae16 import AutoencoderConfig, AutoencoderKL, decode_tiled
    >>> vae = AutoencoderKL(AutoencoderConfig(block_out_channels=(2, 2), norm_num_groups=1))
    >>> x = jax.ShapeDtypeStruct((1, 4, 4, 3), jnp.float32)
    >>> params = jax.eval_shape(vae.init, jax.random.key(0), x)["params"]
    >>> z = jax.ShapeDtypeStruct((1, 6, 8, 4), jnp.float32)
    >>> jax.eval_shape(lambda p, z: decode_tiled(vae, p, z, tile=4, overlap=2), params, z).shape
    (1, 12, 16, 3)
    """

    def decode(t: Images) -> Any:
        return vae.apply({"params": params}, t, method="decode")

    return tiled(decode, z, tile=tile, overlap=overlap)


def encode_tiled(
    vae: AutoencoderKL, params: Mapping[str, Any], x: Images, *, tile: int = 512, overlap: int = 128
) -> tuple[Float[Array, "b h2 w2 z"], Float[Array, "b h2 w2 z"]]:
    """Return mean and log-variance of images of any size, by tiles; `tile` and `overlap` are in pixels."""

    def moments(t: Images) -> Array:
        pair: Any = vae.apply({"params": params}, t, method="encode")
        return jnp.concatenate(pair, axis=-1)

    mean, logvar = jnp.split(
        tiled(moments, x, tile=tile, overlap=overlap, multiple=vae.config.downsample_factor), 2, axis=-1
    )
    return mean, logvar
