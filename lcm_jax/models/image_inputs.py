"""Pictures and masks that a user gives: checked, and made into what the networks take."""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, UInt8

from lcm_jax.typing import Array


def check_size(size: Sequence[int], factor: int, grid: int | None) -> tuple[int, int]:
    """Return (height, width) in pixels; ValueError unless both are multiples of `factor`, at most `grid` of them.

    >>> from lcm_jax.models.image_inputs import check_size
    >>> check_size((64, 96), 8, None)
    (64, 96)
    """
    height, width = size
    if min(height, width) < factor or height % factor or width % factor:
        raise ValueError(f"size {height}x{width}: height and width must be positive multiples of {factor} pixels")
    if grid is not None and max(height, width) > grid * factor:
        raise ValueError(
            f"size {height}x{width}: larger than the position grid, whose {grid} patches on a side "
            f"(pos_embed_max_size) reach {grid * factor} pixels"
        )
    return height, width


def check_pictures(
    image: UInt8[np.ndarray, "*n h w 3"], size: Sequence[int], number: int
) -> UInt8[np.ndarray, "n h w 3"]:
    """Return images (m, h, w, 3) from one or several of `size` (height, width); ValueError for others.

    number: the number of prompts, a multiple of m: each image is for as many of them.

    >>> import numpy as np
    >>> from lcm_jax.models.image_inputs import check_pictures
    >>> check_pictures(np.zeros((8, 8, 3), np.uint8), (8, 8), 2).shape
    (1, 8, 8, 3)
    """
    image = np.asarray(image)
    if image.dtype != np.uint8 or image.ndim not in (3, 4) or image.shape[-1] != 3:
        raise ValueError(f"image: expected uint8 (h, w, 3) or (n, h, w, 3), got {image.dtype} {image.shape}")
    image = image[None] if image.ndim == 3 else image
    _check_fit("image", image, size, number)
    return image


def latent_mask(
    mask: UInt8[np.ndarray, "*n h w"] | Bool[np.ndarray, "*n h w"], size: Sequence[int], number: int, factor: int
) -> Float[Array, "number h2 w2 1"]:
    """Return the mask of the latents, 1 where they are redrawn: where the image's mask is true, or at least 128.

    Of the factor x factor pixels of a latent the first decides, as in diffusers.
    """
    mask = np.asarray(mask)
    if mask.dtype not in (np.uint8, np.bool_) or mask.ndim not in (2, 3):
        raise ValueError(f"mask: expected uint8 or bool (h, w) or (n, h, w), got {mask.dtype} {mask.shape}")
    mask = mask[None] if mask.ndim == 2 else mask
    _check_fit("mask", mask, size, number)
    white = mask if mask.dtype == np.bool_ else mask >= 128
    small = white[:, ::factor, ::factor, None]
    return jnp.asarray(np.repeat(small, number // len(small), axis=0), jnp.float32)


def _check_fit(name: str, given: np.ndarray, size: Sequence[int], number: int) -> None:
    height, width = size
    if given.shape[1:3] != (height, width):
        raise ValueError(
            f"{name} is {given.shape[1]}x{given.shape[2]}, the picture is to be {height}x{width}: resize it"
        )
    if not len(given) or number % len(given):
        raise ValueError(f"{name}: {len(given)} given for {number} prompts")
