"""Pictures as bytes from unknown clients: their dimensions are checked before anything is decoded."""

from __future__ import annotations

import io
from typing import Literal

import numpy as np
from jaxtyping import UInt8
from PIL import Image as PILImage
from PIL import UnidentifiedImageError

from lcm_jax.runtime.image_io import shown, sideways
from lcm_jax.stream.stream import fit

Form = Literal["auto", "jpeg", "png"]
MOST_PIXELS = 10_000_000  # of a picture that is accepted: a 4K screen has 8.3 million
QUALITY = 90  # of JPEG
SMALL = 65_536  # pixels up to which a picture is cheap to send without loss


def decode(
    data: bytes, size: tuple[int, int] | None = None, *, most_pixels: int = MOST_PIXELS
) -> UInt8[np.ndarray, "h w 3"]:
    """Return a JPEG or PNG as it is shown, on white. Raise ValueError for anything else or over `most_pixels` pixels.

    size: (height, width) that the middle of the picture is scaled to; a large JPEG is then decoded at a lower
    resolution.

    >>> import numpy as np
    >>> decode(encode(np.zeros((20, 60, 3), np.uint8)), size=(16, 16)).shape
    (16, 16, 3)
    """
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
