"""Picture files: read as uint8 (height, width, 3), upright and in RGB, or refused by name; written all or nothing."""

from __future__ import annotations

import contextlib
import io
import os
import warnings
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from jaxtyping import UInt8
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from lcm_jax.runtime.atomic_files import written_aside

Size = tuple[int, int]  # height, width in pixels
T = TypeVar("T")

# The formats that are offered, and the endings of their files; Pillow opens nothing else.
FORMATS = {
    "PNG": (".png",),
    "JPEG": (".jpg", ".jpeg", ".jfif"),
    "WEBP": (".webp",),
    "BMP": (".bmp",),
    "GIF": (".gif",),  # the first picture of an animation
    "TIFF": (".tif", ".tiff"),
    "AVIF": (".avif",),
}
_READABLE = [form for form in FORMATS if form != "AVIF" or find_spec("PIL.AvifImagePlugin")]  # since Pillow 11.3
SUFFIXES = frozenset(suffix for suffixes in FORMATS.values() for suffix in suffixes)
MOST_BYTES = 2**30  # of a picture's file: more than any picture that Pillow's bound on pixels lets through

# 8-bit modes that PIL turns to RGB without losing range; 16-bit and float modes would be clipped silently
_MODES = frozenset({"1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "LAB", "HSV"})
_TOO_DEEP = "picture mode {} is not RGB; convert it to 8 bits a channel first"
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # by EXIF orientation
_TAIL = 64  # bytes at the end of a file, in which its end mark must be
_PNG = b"\x89PNG\r\n\x1a\n"
_TEXTS = frozenset({b"tEXt", b"zTXt", b"iTXt"})
_METADATA = frozenset({*_TEXTS, b"iCCP", b"eXIf"})  # chunks of a PNG that do not change its pixels
_ORIENTATION = (
    b"Raw profile type exif\0",
    b"Raw profile type APP1\0",
    b"XML:com.adobe.xmp\0",
)  # texts that may hold it

# Pillow warns of damaged metadata, which is left out here, and of many pixels, for which it has an error too.
warnings.filterwarnings("ignore", module=r"PIL\.")


def check_picture(data: Path | bytes, source: str = "") -> Size:
    """Return the (height, width) that a picture is shown in, and check that its file is whole, without decoding it.

    The checksums of a PNG are read, and the end of a JPEG, WebP or GIF. A picture whose end does not show that it is
    whole is decoded to see.

    data: a file or its bytes. source: the name of the picture in errors. Raise ValueError if it cannot be a picture.

    >>> import io
    >>> from PIL import Image
    >>> file = io.BytesIO()
    >>> Image.new("RGB", (6, 4)).save(file, "PNG")
    >>> check_picture(file.getvalue())
    (4, 6)
    """
    source = source or str(data if isinstance(data, Path) else "picture")
    if isinstance(data, Path):
        check_file_size(data.stat().st_size, source)

    def measure(picture: Image.Image) -> Size:
        is_png = picture.format == "PNG"
        is_loaded = _has_late_metadata(picture) if is_png else not _ends_as_whole(picture)
        if is_loaded:
            picture.load()
        is_sideways = sideways(picture)
        size = picture.size if is_sideways else (picture.height, picture.width)
        if is_png and not is_loaded:
            picture.verify()
        return size

    return _opened(data, source, measure)


def read_picture(data: Path | bytes, size: Size | None = None, source: str = "") -> UInt8[np.ndarray, "h w 3"]:
    """Return a picture's pixels as it is `shown`, scaled and cropped to `size` (height, width) if that is given.

    Metadata that is damaged or too large (texts, colour profiles, EXIF) is left out; a whole EXIF beside it counts.

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
    if isinstance(data, Path):
        data = read_bytes(data)

    def pixels(picture: Image.Image) -> np.ndarray:
        picture.load()
        upright = shown(picture)
        return np.asarray(upright if size is None else fit(upright, size))

    return _opened(data, source, pixels)


def read_bytes(path: Path) -> bytes:
    """Return the bytes of a picture's file; raise ValueError if they are none, or more than any picture has."""
    with path.open("rb") as stream:
        check_file_size(os.fstat(stream.fileno()).st_size, str(path))
        return stream.read(MOST_BYTES)


def write_picture(path: Path, picture: UInt8[np.ndarray, "h w 3"] | Image.Image) -> None:
    """Write a picture into a file, completely or not at all; its format is that of the file's ending.

    Raises ValueError for an ending of no such format, and OSError if the file cannot be written, as on a full disk.

    >>> import tempfile
    >>> import numpy as np
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_picture(Path(folder) / "red.png", np.full((4, 6, 3), (255, 0, 0), np.uint8))
    ...     check_picture(Path(folder) / "red.png")
    (4, 6)
    """
    form = next((form for form, suffixes in FORMATS.items() if path.suffix.lower() in suffixes), None)
    if form is None:
        raise ValueError(f"{path}: no format of pictures has this ending; give one of {', '.join(sorted(SUFFIXES))}")
    image = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    with written_aside(path) as (temporary,):
        image.save(temporary, form, quality=95)  # of JPEG, WebP and AVIF


def sideways(picture: Image.Image) -> bool:
    """Return whether a picture's EXIF orientation exchanges its sides."""
    return _orientation(picture) >= 5


def shown(picture: Image.Image) -> Image.Image:
    """Return a picture upright and in RGB, from palettes, greyscale, CMYK and the rest, with transparency as white.

    Raise ValueError for more than 8 bits a channel.
    """
    if picture.mode not in _MODES:
        raise ValueError(_TOO_DEEP.format(picture.mode))
    turn = _TURNS.get(_orientation(picture))
    is_transparent = picture.mode in ("LA", "PA", "RGBA") or "transparency" in picture.info
    if turn is not None:
        picture = picture.transpose(turn)
    if is_transparent:
        picture = picture.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
    return picture.convert("RGB")


def fit(picture: Image.Image, size: Size) -> Image.Image:
    """Return a picture scaled so that it just covers `size` (height, width), and cropped to its centre."""
    height, width = size
    if picture.size == (width, height):
        return picture
    return ImageOps.fit(picture, (width, height), Image.Resampling.LANCZOS)


def _orientation(picture: Image.Image) -> int:
    """Return the EXIF orientation from 1 to 8; 1, which is upright, where the EXIF is damaged."""
    with contextlib.suppress(Exception):  # whatever the bytes of a damaged EXIF make Pillow raise
        exif = Image.Image.getexif(picture)  # PngImageFile.getexif would decode the pixels of a PNG without EXIF
        orientation = int(exif.get(ExifTags.Base.Orientation, 1))
        return orientation if orientation in _TURNS else 1
    return 1


def _ends_as_whole(picture: Image.Image) -> bool:
    """Return whether the end of a picture's file, or what Pillow does to open it, shows that it is not cut off."""
    if picture.format == "WEBP":
        return True  # opening compares the length
    ends = {"JPEG": b"\xff\xd9", "MPO": b"\xff\xd9", "GIF": b";"}
    if picture.format not in ends:
        return False
    stream: Any = picture.fp  # type: ignore[attr-defined]
    position = stream.tell()
    stream.seek(max(0, stream.seek(0, os.SEEK_END) - _TAIL))
    end = stream.read(_TAIL).rstrip(b"\0")
    stream.seek(position)
    return end.endswith(ends[picture.format])


def _has_late_metadata(picture: Image.Image) -> bool:
    """Return whether a PNG may have its orientation behind its pixels, where Pillow reads it after them."""
    stream: Any = picture.fp  # type: ignore[attr-defined]
    position = stream.tell()
    start, found, is_behind = len(_PNG), False, False
    while not found:
        stream.seek(start)
        head = stream.read(8)
        if len(head) < 8:
            break
        is_behind = is_behind or head[4:] == b"IDAT"
        found = is_behind and head[4:] in _TEXTS | {b"eXIf"}
        start += 12 + int.from_bytes(head[:4])
    stream.seek(position)
    return found


def check_file_size(number: int, source: str) -> None:
    """Raise ValueError for a file of no bytes, or of more than any picture has."""
    if number == 0:
        raise ValueError(f"{source}: picture of zero bytes; remove it or write it again")
    if number > MOST_BYTES:
        raise ValueError(f"{source}: {number} bytes, and a picture's file has at most {MOST_BYTES}; remove it")


def _opened(data: Path | bytes, source: str, use: Callable[[Image.Image], T]) -> T:
    """Return use(picture); a PNG that cannot be read as it is is read with as much of its metadata as can be."""
    try:
        return _use(data, use)
    except Exception as error:  # on damaged bytes a decoder may raise anything
        for plain in _with_less_metadata(data):
            with contextlib.suppress(Exception):
                return _use(plain, use)
        raise ValueError(f"{source}: {_reason(error)}") from error


def _use(data: Path | bytes, use: Callable[[Image.Image], T]) -> T:
    with Image.open(io.BytesIO(data) if isinstance(data, bytes) else data, formats=_READABLE) as picture:
        if picture.mode not in _MODES:
            raise _TooDeepError(_TOO_DEEP.format(picture.mode))
        return use(picture)


def _with_less_metadata(data: Path | bytes) -> Iterator[bytes]:
    """Yield a PNG with what may hold its orientation alone, with its EXIF alone, and without any metadata.

    Nothing is yielded for a file without metadata, and for one that is no PNG.
    """
    if isinstance(data, Path):
        with data.open("rb") as stream:
            if stream.read(len(_PNG)) != _PNG:
                return
        data = read_bytes(data)
    if not data.startswith(_PNG):
        return
    chunks, start = [(b"", _PNG)], len(_PNG)
    while start < len(data):  # each chunk: length of its data, type, data, checksum
        end = start + 12 + int.from_bytes(data[start : start + 4])
        chunks.append((data[start + 4 : start + 8], data[start:end]))
        start = end
    metadata = [(kind, chunk) for kind, chunk in chunks if kind in _METADATA]
    exif = {chunk for kind, chunk in metadata if kind == b"eXIf"}
    texts = {chunk for kind, chunk in metadata if kind in _TEXTS and chunk[8:].startswith(_ORIENTATION)}
    last = len(metadata)
    for kept in (exif | texts, exif, set[bytes]()):
        less = [chunk for kind, chunk in chunks if kind not in _METADATA or chunk in kept]
        if (number := len(less) - len(chunks) + len(metadata)) < last:
            last = number
            yield b"".join(less)


class _TooDeepError(ValueError):
    """More than 8 bits a channel."""


def _reason(error: Exception) -> str:
    if isinstance(error, _TooDeepError):
        return str(error)
    reason = "unknown format" if isinstance(error, UnidentifiedImageError) else " ".join(str(error).split())
    return f"not a readable picture ({reason.rstrip('.').lower():.200}); remove it or write it again"
