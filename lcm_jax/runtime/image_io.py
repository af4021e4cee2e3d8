"""Readers of picture files: uint8 (height, width, 3), upright and in RGB, or one error that names the file."""

from __future__ import annotations

import contextlib
import io
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

Size = tuple[int, int]  # height, width in pixels

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp"})

# 8-bit modes that PIL turns to RGB without losing range; 16-bit and float modes would be clipped silently
_MODES = frozenset({"1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "LAB", "HSV"})
_TOO_DEEP = "picture mode {} is not RGB; convert it to 8 bits a channel first"
# What Pillow and its decoders raise for damaged files and decompression bombs
_UNREADABLE = (
    *(UnidentifiedImageError, Image.DecompressionBombError, OSError, SyntaxError, ValueError, EOFError),
    *(IndexError, KeyError, TypeError, OverflowError, struct.error, zlib.error),
)


def check_picture(data: Path | bytes, source: str = "") -> Size:
    """Return the (height, width) that a picture is shown in; read its header and a PNG's checksums, decode nothing.

    data: a file or its bytes. source: the name of the picture in errors. Raise ValueError if it cannot be a picture.

    >>> import io
    >>> from PIL import Image
    >>> file = io.BytesIO()
    >>> Image.new("RGB", (6, 4)).save(file, "PNG")
    >>> check_picture(file.getvalue())
    (4, 6)
    """
    if isinstance(data, Path) and data.stat().st_size == 0:
        raise ValueError(f"{data}: picture of zero bytes; remove it or write it again")
    with _opened(data, source) as picture:
        is_sideways = sideways(picture)
        picture.verify()
        return picture.size if is_sideways else (picture.height, picture.width)


def read_picture(data: Path | bytes, size: Size | None = None, source: str = "") -> UInt8[np.ndarray, "h w 3"]:
    """Return a picture's pixels as it is `shown`, scaled and cropped to `size` (height, width) if that is given.

    data: a file or its bytes. source: the name of the picture in errors. Raise ValueError if it is not a readable
    picture, OSError if the file itself cannot be read.

    >>> import io
    >>> from PIL import Image
    >>> file = io.BytesIO()
    >>> Image.new("L", (6, 4)).save(file, "PNG")
    >>> read_picture(file.getvalue(), size=(2, 2)).shape
    (2, 2, 3)
    """
    source = source or str(data if isinstance(data, Path) else "picture")
    with _opened(data if isinstance(data, bytes) else data.read_bytes(), source) as picture:
        picture.load()
        upright = shown(picture)
        return np.asarray(upright if size is None else fit(upright, size))


def sideways(picture: Image.Image) -> bool:
    """Return whether a picture's EXIF orientation exchanges its sides."""
    exif = Image.Image.getexif(picture)  # PngImageFile.getexif would decode the pixels of a PNG without EXIF
    return exif.get(ExifTags.Base.Orientation, 1) >= 5


def shown(picture: Image.Image) -> Image.Image:
    """Return a picture upright and in RGB, from palettes, greyscale, CMYK and the rest, with transparency as white.

    Raise ValueError for more than 8 bits a channel.
    """
    if picture.mode not in _MODES:
        raise ValueError(_TOO_DEEP.format(picture.mode))
    ImageOps.exif_transpose(picture, in_place=True)
    if picture.mode in ("LA", "PA", "RGBA") or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
    return picture.convert("RGB")


def fit(picture: Image.Image, size: Size) -> Image.Image:
    """Return a picture scaled so that it just covers `size` (height, width), and cropped to its centre."""
    height, width = size
    if picture.size == (width, height):
        return picture
    return ImageOps.fit(picture, (width, height), Image.Resampling.LANCZOS)


@contextlib.contextmanager
def _opened(data: Path | bytes, source: str) -> Iterator[Image.Image]:
    name = source or str(data if isinstance(data, Path) else "picture")
    try:
        with Image.open(io.BytesIO(data) if isinstance(data, bytes) else data) as picture:
            mode = picture.mode
            if mode in _MODES:
                yield picture
    except _UNREADABLE as error:
        raise ValueError(f"{name}: not a readable picture ({_reason(error)}); remove it or write it again") from error
    if mode not in _MODES:
        raise ValueError(f"{name}: {_TOO_DEEP.format(mode)}")


def _reason(error: Exception) -> str:
    return "unknown format" if isinstance(error, UnidentifiedImageError) else str(error).rstrip(".").lower()
