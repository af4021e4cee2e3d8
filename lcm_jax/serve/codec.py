"""Pictures as bytes from unknown clients: their dimensions and parts are counted before anything is decoded."""

from __future__ import annotations

import base64
import io
import re
from typing import Literal
from urllib.parse import unquote_to_bytes

import numpy as np
from jaxtyping import UInt8
from PIL import Image as PILImage
from PIL import UnidentifiedImageError
from PIL.JpegImagePlugin import MARKER

from lcm_jax.runtime.image_io import shown, sideways
from lcm_jax.stream.stream import fit

Form = Literal["auto", "jpeg", "png"]
MOST_PIXELS = 10_000_000  # of a picture that is accepted: a 4K screen has 8.3 million
MOST_SCANS = 100  # of a progressive JPEG, each of which passes over all pixels: encoders write about ten
MOST_PARTS = 10_000  # segments of a JPEG before its pixels, chunks of a PNG: Pillow reads each of them in Python
QUALITY = 90  # of JPEG
SMALL = 65_536  # pixels up to which a picture is cheap to send without loss


def decode(
    data: bytes, size: tuple[int, int] | None = None, *, most_pixels: int = MOST_PIXELS
) -> UInt8[np.ndarray, "h w 3"]:
    """Return a JPEG or PNG as it is shown, on white.

    Raise ValueError for anything else, and for one of more than `most_pixels` pixels, MOST_SCANS or MOST_PARTS.

    size: (height, width) that the middle of the picture is scaled to; a large JPEG is then decoded at a lower
    resolution.

    >>> import numpy as np
    >>> decode(encode(np.zeros((20, 60, 3), np.uint8)), size=(16, 16)).shape
    (16, 16, 3)
    """
    _check_parts(data)
    try:
        picture = PILImage.open(io.BytesIO(data), formats=("JPEG", "PNG"))
    except UnidentifiedImageError:
        raise ValueError("a picture must be a JPEG or a PNG, and this is neither") from None
    except (PILImage.DecompressionBombError, PILImage.DecompressionBombWarning):
        raise ValueError(f"a picture may have at most {most_pixels} pixels, and this one has far more") from None
    except Exception as error:  # on hostile bytes a decoder may raise anything
        raise ValueError(f"a picture cannot be read: {error!s:.100}") from None
    with picture:
        width, height = picture.size
        if width * height > most_pixels:
            raise ValueError(f"a picture may have at most {most_pixels} pixels, and this one has {width} x {height}")
        try:
            if size is not None:
                picture.draft("RGB", size if sideways(picture) else size[::-1])
            pixels = np.asarray(shown(picture))
        except Exception as error:
            raise ValueError(f"a picture cannot be read: {error!s:.100}") from None
    return pixels if size is None or pixels.shape[:2] == size else fit(pixels, size)


def encode(picture: UInt8[np.ndarray, "h w 3"], form: Form = "png") -> bytes:
    """Return a picture as PNG, which is lossless, or as JPEG with colours at full resolution; "auto": if it is large.

    >>> import numpy as np
    >>> encode(np.zeros((4, 4, 3), np.uint8))[1:4]
    b'PNG'
    """
    out = io.BytesIO()
    if form == "jpeg" or (form == "auto" and picture.shape[0] * picture.shape[1] > SMALL):
        PILImage.fromarray(picture).save(out, "JPEG", quality=QUALITY, subsampling=0)
    else:
        PILImage.fromarray(picture).save(out, "PNG", compress_level=1)
    return out.getvalue()


def from_base64(text: str) -> bytes:
    """Return the bytes of base64 in any of its forms; raise ValueError for anything else.

    It may have line breaks, the alphabet of URLs ("-_" for "+/"), no padding, and be a data URL.

    >>> from_base64("data:image/png;base64,iVBO\\r\\nRw=="), from_base64("iVBORw")
    (b'\\x89PNG', b'\\x89PNG')
    """
    if text[:5].lower() == "data:":
        header, comma, text = text.partition(",")
        if not comma or not header.lower().endswith(";base64"):
            raise ValueError(f"a data URL must begin like data:image/png;base64, and this one with {header!r:.40}")
        text = unquote_to_bytes(text).decode("latin-1")
    letters = _BLANKS.sub("", text).translate(_URL_SAFE).rstrip("=")
    if len(letters) % 4 == 1 or not _BASE64.fullmatch(letters):
        raise ValueError("a picture must be in base64, and this is not")
    return base64.b64decode(letters + "=" * (-len(letters) % 4))


_BLANKS = re.compile(r"[ \t\r\n]+")
_URL_SAFE = str.maketrans("-_", "+/")
_BASE64 = re.compile(r"[A-Za-z0-9+/]+")


def _check_parts(data: bytes) -> None:
    """Raise ValueError for a JPEG or PNG of so many parts that it would take long to read; others are not looked at."""
    parts, at, end = 0, 8, len(data)
    if data.startswith(b"\x89PNG"):
        while at < end and parts <= MOST_PARTS:
            parts, at = parts + 1, at + 12 + int.from_bytes(data[at : at + 4], "big")
    elif data.startswith(b"\xff\xd8"):
        scans = data.count(b"\xff\xda")  # cannot stand in compressed pixels
        if scans > MOST_SCANS:
            raise ValueError(f"a JPEG may have at most {MOST_SCANS} scans, and this one has {scans}")
        at = 2
        while at < end and parts <= MOST_PARTS and data[at : at + 2] != b"\xff\xda":
            parts, at = parts + 1, at + _segment(data, at)
    if parts > MOST_PARTS:
        raise ValueError(f"a picture may have at most {MOST_PARTS} parts, and this one has more")


def _segment(data: bytes, at: int) -> int:
    """Return the bytes that Pillow passes over at once: a segment of a JPEG, or one or two that belong to none."""
    code = int.from_bytes(data[at : at + 2], "big")
    if code < 0xFF00 or code == 0xFFFF:
        return 1
    has_length = code in MARKER and MARKER[code][2] is not None
    return 2 + int.from_bytes(data[at + 2 : at + 4], "big") if has_length else 2
