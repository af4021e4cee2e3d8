"""Picture files of any kind -> uint8 (height, width, 3) as they are shown, or one clear refusal."""

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

# 8-bit modes that PIL turns to RGB without losing range; 16-bit and float modes would be clipped without a word
_MODES = frozenset({"1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "LAB", "HSV"})
_TOO_DEEP = "picture mode {} is not RGB; convert it to 8 bits a channel first"
# What Pillow and the decoders beneath it raise for files that are not what they say, bombs among them
_UNREADABLE = (
    *(UnidentifiedImageError, Image.DecompressionBombError, OSError, SyntaxError, ValueError, EOFError),
    *(IndexError, KeyError, TypeError, OverflowError, struct.error, zlib.error),
)


def check_picture(data: Path | bytes, source: str = "") -> Size:
    """The size it is shown in. Reads the header (and a PNG's checksums), decodes nothing. ValueError names the file."""
    if isinstance(data, Path) and data.stat().st_size == 0:
        raise ValueError(f"{data}: picture of zero bytes; remove it or write it again")
    with _opened(data, source) as picture:
        turned = sideways(picture)
        picture.verify()
        return picture.size if turned else (picture.height, picture.width)


def read_picture(data: Path | bytes, size: Size | None = None, source: str = "") -> UInt8[np.ndarray, "h w 3"]:
    """As it is `shown`, scaled to cover `size` and its centre kept, if there is one. ValueError names the file.

    An OSError says that the file could not be read at all, which is no fault of the picture.
    """
    source = source or str(data if isinstance(data, Path) else "picture")
    with _opened(data if isinstance(data, bytes) else data.read_bytes(), source) as picture:
        picture.load()
        whole = shown(picture)
        return np.asarray(whole if size is None else fit(whole, size))


def sideways(picture: Image.Image) -> bool:
    """Whether it is shown with its sides exchanged."""
    exif = Image.Image.getexif(picture)  # a PNG's own would decode it, where no orientation comes first
    return exif.get(ExifTags.Base.Orientation, 1) >= 5


def shown(picture: Image.Image) -> Image.Image:
    """Upright, and in RGB: palettes, greyscale, CMYK and the rest; what is transparent is white.

    ValueError for more than 8 bits a channel.
    """
    if picture.mode not in _MODES:
        raise ValueError(_TOO_DEEP.format(picture.mode))
    ImageOps.exif_transpose(picture, in_place=True)
    if picture.mode in ("LA", "PA", "RGBA") or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
    return picture.convert("RGB")


def fit(picture: Image.Image, size: Size) -> Image.Image:
    """Scaled so that it just covers (height, width), centre kept."""
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
