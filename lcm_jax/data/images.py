"""Pictures of any kind -> uint8 (size, size, 3), or one clear refusal."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps, UnidentifiedImageError

# 8-bit modes that PIL turns to RGB without losing range; 16-bit and float modes would be clipped without a word
_MODES = frozenset({"1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "LAB", "HSV"})
_UNREADABLE = (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError)


def check_picture(path: Path) -> None:
    """Reads the header (and a PNG's checksums), decodes nothing. Raises ValueError naming the file."""
    if path.stat().st_size == 0:
        raise ValueError(f"{path}: picture of zero bytes; remove it or write it again")
    try:
        with Image.open(path) as picture:
            _check_mode(picture, str(path))
            picture.verify()
    except _UNREADABLE as error:
        raise ValueError(f"{path}: not a readable picture ({_reason(error)}); remove it or write it again") from error


def read_picture(data: Path | bytes, size: int, source: str = "") -> UInt8[np.ndarray, "size size 3"]:
    """Decodes, turns to RGB on white, scales the shorter side to `size` pixels and crops the centre."""
    name = source or str(data if isinstance(data, Path) else "picture")
    try:
        with Image.open(io.BytesIO(data) if isinstance(data, bytes) else data) as picture:
            _check_mode(picture, name)
            picture.load()
            return np.asarray(square(to_rgb(ImageOps.exif_transpose(picture)), size))
    except _UNREADABLE as error:
        raise ValueError(f"{name}: not a readable picture ({_reason(error)}); remove it or write it again") from error


def to_rgb(picture: Image.Image) -> Image.Image:
    """Palettes, greyscale, CMYK and the rest to RGB; what is transparent shows white."""
    if picture.mode in ("LA", "PA", "RGBA") or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
    return picture.convert("RGB")


def square(picture: Image.Image, size: int) -> Image.Image:
    """(w, h) -> (size, size): shorter side scaled to `size`, centre kept."""
    if picture.size == (size, size):
        return picture
    return ImageOps.fit(picture, (size, size), Image.Resampling.LANCZOS)


def _check_mode(picture: Image.Image, name: str) -> None:
    if picture.mode not in _MODES:
        raise ValueError(f"{name}: picture mode {picture.mode} is not RGB; convert it to 8 bits a channel first")


def _reason(error: Exception) -> str:
    return "unknown format" if isinstance(error, UnidentifiedImageError) else str(error).rstrip(".").lower()
