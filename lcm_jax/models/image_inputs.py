"""Pictures, masks and sizes that a user gives: checked, and made into what the networks take."""

from __future__ import annotations

import operator
import warnings
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, UInt8
from PIL import Image as PILImage
from PIL import ImageOps

from lcm_jax.runtime.image_io import fit, shown
from lcm_jax.typing import Array


def check_size(size: int | Sequence[int], factor: int, grid: int | None) -> tuple[int, int]:
    """Return (height, width) in pixels; ValueError unless both are multiples of `factor`, at most `grid` of them.

    size: (height, width), or one number for a square.

    >>> from lcm_jax.models.image_inputs import check_size
    >>> check_size((64, 96), 8, None), check_size(64, 8, None)
    ((64, 96), (64, 64))
    """
    given: Any = size
    try:
        sides = [operator.index(side) for side in (given if isinstance(given, (Sequence, np.ndarray)) else [given])]
        height, width = sides * 2 if len(sides) == 1 else sides
    except (TypeError, ValueError):
        raise ValueError(f"size is {given!r:.80}: give (height, width) in pixels, or one number for a square") from None
    if min(height, width) < factor or height % factor or width % factor:
        raise ValueError(f"size {height}x{width}: height and width must be positive multiples of {factor} pixels")
    if grid is not None and max(height, width) > grid * factor:
        raise ValueError(
            f"size {height}x{width}: larger than the position grid, whose {grid} patches on a side "
            f"(pos_embed_max_size) reach {grid * factor} pixels"
        )
    return height, width


def check_pictures(image: Any, size: Sequence[int], number: int) -> UInt8[np.ndarray, "n h w 3"]:
    """Return pictures in `size` (height, width), the middle of each where it has another shape, which is a warning.

    image: a PIL image, uint8 (h, w, 3), or several of them in a list, or uint8 (n, h, w, 3). number: the number of
    prompts, a multiple of n: each picture is for as many of them. ValueError for others.

    >>> import numpy as np
    >>> from PIL import Image
    >>> from lcm_jax.models.image_inputs import check_pictures
    >>> check_pictures([Image.new("L", (20, 20)), np.zeros((8, 8, 3), np.uint8)], (8, 8), 2).shape
    (2, 8, 8, 3)
    """
    pictures = _fitted("image", [_pixels("image", one, "RGB") for one in _singles(image, 3)], size)
    _check_number("image", len(pictures), number)
    return pictures


def fit_masks(mask: Any, size: Sequence[int]) -> UInt8[np.ndarray, "n h w"]:
    """Return masks in `size` (height, width), white where a picture is redrawn, cut to it as `check_pictures` does.

    mask: a PIL image, uint8 or bool (h, w), or several of them in a list, or (n, h, w). ValueError for others.

    >>> import numpy as np
    >>> from lcm_jax.models.image_inputs import fit_masks
    >>> fit_masks(np.eye(2, dtype=bool), (2, 2)).tolist()
    [[[255, 0], [0, 255]]]
    """
    return _fitted("mask", [_pixels("mask", one, "L") for one in _singles(mask, 2)], size)


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
    height, width = size
    if mask.shape[1:3] != (height, width):
        raise ValueError(f"mask is {mask.shape[1]}x{mask.shape[2]}, the picture is to be {height}x{width}: resize it")
    _check_number("mask", len(mask), number)
    white = mask if mask.dtype == np.bool_ else mask >= 128
    small = white[:, ::factor, ::factor, None]
    return jnp.asarray(np.repeat(small, number // len(small), axis=0), jnp.float32)


def _singles(given: Any, ndim: int) -> list[Any]:
    """Return the pictures of one, of a list, or of an array with an axis more than a picture's `ndim`."""
    if isinstance(given, (list, tuple)):
        return list(given)
    if isinstance(given, PILImage.Image) or getattr(given, "ndim", 0) != ndim + 1:
        return [given]
    return list(np.asarray(given))


def _pixels(name: str, given: Any, mode: str) -> np.ndarray:
    if isinstance(given, PILImage.Image):
        pixels = np.asarray(shown(ImageOps.exif_transpose(given)))  # a copy: `shown` turns the picture itself
        return pixels if mode == "RGB" else pixels.mean(axis=-1).astype(np.uint8)
    pixels = np.asarray(given)
    if mode == "RGB" and not (pixels.dtype == np.uint8 and pixels.ndim == 3 and pixels.shape[-1] == 3):
        raise ValueError(f"{name}: expected uint8 (h, w, 3) or (n, h, w, 3), or a PIL image; got {_kind(given)}")
    if mode == "L" and not (pixels.dtype in (np.uint8, np.bool_) and pixels.ndim == 2):
        raise ValueError(f"{name}: expected uint8 or bool (h, w) or (n, h, w), or a PIL image; got {_kind(given)}")
    if not pixels.size:
        raise ValueError(f"{name}: it has no pixels, its shape is {pixels.shape}")
    return pixels * np.uint8(255) if pixels.dtype == np.bool_ else pixels


def _kind(given: Any) -> str:
    pixels = np.asarray(given)
    return type(given).__name__ if pixels.dtype == object or not pixels.ndim else f"{pixels.dtype} {pixels.shape}"


def _fitted(name: str, pictures: list[np.ndarray], size: Sequence[int]) -> np.ndarray:
    height, width = size
    if not pictures:
        raise ValueError(f"{name}: the list of pictures is empty")
    for h, w in {picture.shape[:2] for picture in pictures}:
        if h * width - w * height > w or w * height - h * width > h:  # more than a pixel of the result is cut off
            warnings.warn(
                f"{name} is {h}x{w} and its middle becomes {height}x{width}: a size (height, width) of the same shape "
                "keeps all of it",
                stacklevel=3,
            )
    return np.stack([np.asarray(fit(PILImage.fromarray(picture), (height, width))) for picture in pictures])


def _check_number(name: str, given: int, number: int) -> None:
    if not given or number % given:
        raise ValueError(f"{name}: {given} given for {number} prompts")
