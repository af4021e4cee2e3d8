"""Picture files become what they show."""

from __future__ import annotations

import errno
import io
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageOps, PngImagePlugin, features

from lcm_jax.cli.main import read_image
from lcm_jax.runtime.image_io import FORMATS, SUFFIXES, check_picture, read_picture, write_picture

PIXELS = np.kron(np.random.default_rng(0).integers(0, 256, (3, 5, 3), np.uint8), np.ones((8, 8, 1), np.uint8))
OFFERED = [form for form in FORMATS if form != "AVIF" or features.check("avif")]


def turned(path: Path, orientation: int) -> np.ndarray:
    """Saves a picture that is 24 high and 40 wide as it lies in the file, and gives it as it is shown."""
    pixels = np.kron(np.random.default_rng(0).integers(0, 256, (3, 5, 3), np.uint8), np.ones((8, 8, 1), np.uint8))
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    options = {"quality": 100, "subsampling": 0} if path.suffix == ".jpg" else {}
    Image.fromarray(pixels).save(path, exif=exif, **options)
    with Image.open(path) as picture:
        return np.asarray(ImageOps.exif_transpose(picture).convert("RGB"))


@pytest.mark.parametrize("suffix", [".png", ".jpg"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_upright(suffix: str, orientation: int, tmp_path: Path) -> None:
    path = tmp_path / f"a{suffix}"
    upright = turned(path, orientation)
    assert upright.shape == ((40, 24, 3) if orientation >= 5 else (24, 40, 3))
    assert np.array_equal(read_picture(path), upright)
    assert np.array_equal(read_image(path), upright)
    assert check_picture(path) == upright.shape[:2]
    assert read_picture(path, (16, 16)).shape == (16, 16, 3)


def test_what_cannot_be_shown_in_8_bits_is_refused_under_its_option(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.new("I;16", (4, 4)).save(path)
    with pytest.raises(ValueError, match=r"--mask .*a\.png: picture mode I;16 is not RGB"):
        read_image(path, "--mask")
    with pytest.raises(FileNotFoundError, match=r"--image .*b\.png: no such file"):
        read_image(tmp_path / "b.png")
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(ValueError, match=r"--image .*a\.png: not a readable picture"):
        read_image(path)


def encoded(form: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(PIXELS).save(stream, form, **options)
    return stream.getvalue()


def by_pillow(data: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(data)) as picture:
        return np.asarray(ImageOps.exif_transpose(picture).convert("RGB"))


@pytest.mark.parametrize("form", OFFERED)
@pytest.mark.parametrize("orientation", [1, 3, 6])
def test_every_format_is_read_as_pillow_reads_it(form: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    data = encoded(form, exif=exif)
    expected = by_pillow(data)
    assert np.array_equal(read_picture(data), expected)
    assert check_picture(data) == expected.shape[:2]


def test_an_animation_is_its_first_picture() -> None:
    frames = [Image.new("RGB", (6, 4), color) for color in ("red", "lime")]
    for form in ("GIF", "WEBP", "PNG"):
        stream = io.BytesIO()
        frames[0].save(
            stream, form, save_all=True, append_images=frames[1:], **({"lossless": True} if form == "WEBP" else {})
        )
        assert (read_picture(stream.getvalue()) == (255, 0, 0)).all(), form
        assert check_picture(stream.getvalue()) == (4, 6)


def test_other_formats_are_not_decoded() -> None:
    for form in ("PPM", "TGA", "ICO", "PCX"):
        with Image.open(io.BytesIO(encoded(form))) as picture:
            picture.load()  # Pillow itself can
        with pytest.raises(ValueError, match=r"not a readable picture \(unknown format\)"):
            read_picture(encoded(form))


GARBAGE = np.random.default_rng(1).bytes(2_000_000)
SIDEWAYS = Image.Exif()
SIDEWAYS[ExifTags.Base.Orientation] = 6


def text(kind: str) -> PngImagePlugin.PngInfo:
    info = PngImagePlugin.PngInfo()
    if kind == "iTXt":
        info.add_itxt("workflow", "x" * 2_000_000, zip=True)
    else:
        info.add_text("workflow", "x" * 2_000_000, zip=kind == "zTXt")
    return info


@pytest.mark.parametrize(
    ("form", "options"),
    [
        ("PNG", {"exif": b"Exif\0\0no EXIF"}),
        ("PNG", {"exif": SIDEWAYS.tobytes()[:20]}),
        ("JPEG", {"exif": b"Exif\0\0MM\0*\xff\xff\xff\xff"}),
        ("WEBP", {"exif": b"Exif\0\0" + GARBAGE}),
        ("PNG", {"pnginfo": text("tEXt")}),
        ("PNG", {"pnginfo": text("zTXt")}),
        ("PNG", {"pnginfo": text("iTXt")}),
        ("PNG", {"icc_profile": GARBAGE}),
        ("WEBP", {"icc_profile": GARBAGE}),
        ("WEBP", {"xmp": GARBAGE}),
        ("JPEG", {"icc_profile": GARBAGE}),
    ],
)
def test_damaged_or_large_metadata_is_left_out(form: str, options: dict[str, Any], tmp_path: Path) -> None:
    """The pixels are those of the file without it."""
    data = encoded(form, **options)
    assert len(data) > len(encoded(form))
    path = tmp_path / "a"
    path.write_bytes(data)
    for source in (data, path):
        assert np.array_equal(read_picture(source), by_pillow(encoded(form)))
        assert check_picture(source) == PIXELS.shape[:2]


def test_damaged_metadata_prints_nothing(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(encoded("JPEG", exif=SIDEWAYS.tobytes()[:20]))
    code = "import pathlib, lcm_jax.runtime.image_io as io; print(io.read_picture(pathlib.Path('a.jpg')).shape)"
    ran = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert (ran.stdout, ran.stderr) == ("(24, 40, 3)\n", "")


def test_an_orientation_beside_damaged_metadata_counts_where_it_can_be_read() -> None:
    """Damage behind the orientation does not matter."""
    entries = struct.pack("<HHIHH", 0x112, 3, 1, 6, 0) + struct.pack("<HHII", 0x8769, 4, 1, 0x7FFFFFFF)
    exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + entries + bytes(4)
    for form in ("PNG", "JPEG", "WEBP"):
        assert read_picture(encoded(form, exif=exif)).shape == (40, 24, 3)
        assert check_picture(encoded(form, exif=exif)) == (40, 24)


def raw_profile(large: str = "") -> PngImagePlugin.PngInfo:
    """EXIF as ImageMagick writes it: hex digits in a text of a PNG; and another text, which is too large."""
    info = PngImagePlugin.PngInfo()
    exif = SIDEWAYS.tobytes()
    info.add_text("Raw profile type exif", f"\nexif\n{len(exif):8}\n{exif.hex()}\n", zip=True)
    info.add_text("workflow", large)
    return info


def xmp(large: str = "") -> PngImagePlugin.PngInfo:
    info = PngImagePlugin.PngInfo()
    info.add_itxt("XML:com.adobe.xmp", '<rdf:Description tiff:Orientation="6"/>')
    info.add_text("workflow", large)
    return info


@pytest.mark.parametrize(
    ("form", "options"),
    [
        *(("PNG", {"exif": SIDEWAYS, "pnginfo": text(kind)}) for kind in ("tEXt", "zTXt", "iTXt")),
        *((form, {"exif": SIDEWAYS, "icc_profile": GARBAGE}) for form in ("PNG", "WEBP", "JPEG")),
        *((form, {"exif": SIDEWAYS, "icc_profile": b"none"}) for form in ("PNG", "WEBP", "JPEG")),
        ("PNG", {"exif": SIDEWAYS, "icc_profile": GARBAGE, "pnginfo": text("zTXt")}),
        ("WEBP", {"exif": SIDEWAYS, "xmp": GARBAGE}),
        ("WEBP", {"exif": SIDEWAYS, "xmp": b"x" * 2_000_000, "icc_profile": GARBAGE}),
        ("PNG", {"pnginfo": raw_profile("x" * 2_000_000)}),
        ("PNG", {"pnginfo": xmp("x" * 2_000_000)}),
        ("PNG", {"exif": SIDEWAYS, "pnginfo": xmp("x" * 2_000_000), "icc_profile": GARBAGE}),
    ],
)
def test_a_whole_exif_counts_beside_metadata_that_is_too_large(
    form: str, options: dict[str, Any], tmp_path: Path
) -> None:
    data = encoded(form, **options)
    upright = by_pillow(encoded(form, exif=SIDEWAYS))
    assert upright.shape == (40, 24, 3)
    (tmp_path / "a").write_bytes(data)
    for source in (data, tmp_path / "a"):
        assert np.array_equal(read_picture(source), upright)
        assert check_picture(source) == (40, 24)


@pytest.mark.parametrize("large", ["", "x" * 2_000_000])
def test_an_orientation_behind_the_pixels_counts(large: str, tmp_path: Path) -> None:
    """A PNG may have its eXIf behind its pixels."""
    info = PngImagePlugin.PngInfo()
    info.add_text("workflow", large)
    data = encoded("PNG", exif=SIDEWAYS, pnginfo=info)
    start = data.index(b"eXIf") - 4
    end = start + 12 + int.from_bytes(data[start : start + 4])
    moved = data[:start] + data[end:-12] + data[start:end] + data[-12:]
    (tmp_path / "a").write_bytes(moved)
    assert read_picture(moved).shape == (40, 24, 3)
    assert check_picture(moved) == check_picture(tmp_path / "a") == (40, 24)


@pytest.mark.parametrize("form", OFFERED)
def test_a_file_that_is_cut_off_is_found_without_reading_its_pixels(form: str, tmp_path: Path) -> None:
    """Wherever it is cut: what `check_picture` lets through can be read."""
    data = encoded(form)
    path = tmp_path / "a"
    refused = 0
    for end in (*range(1, len(data), max(1, len(data) // 40)), *range(len(data) - 4, len(data))):
        path.write_bytes(data[:end])
        try:
            check_picture(path)
        except ValueError:
            refused += 1
        else:
            assert np.array_equal(read_picture(path), by_pillow(data))
    assert refused > 40


def test_a_jpeg_with_bytes_behind_its_end_is_a_picture() -> None:
    """As phones write them: zeros, or a film; also of two pictures in one file."""
    for more in (bytes(100), b"film" * 100):
        data = encoded("JPEG") + more
        assert check_picture(data) == PIXELS.shape[:2]
        assert np.array_equal(read_picture(data), by_pillow(encoded("JPEG")))
    stream, picture = io.BytesIO(), Image.fromarray(PIXELS)
    picture.save(stream, "MPO", save_all=True, append_images=[picture])
    assert check_picture(stream.getvalue()) == PIXELS.shape[:2]
    assert np.array_equal(read_picture(stream.getvalue()), by_pillow(encoded("JPEG")))


def test_a_file_larger_than_any_picture_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    with path.open("wb") as stream:
        stream.truncate(20 * 2**30)
    for read in (check_picture, read_picture):
        with pytest.raises(ValueError, match=r"a\.png: 21474836480 bytes, and a picture's file has at most"):
            read(path)


def test_pictures_are_written_completely_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for suffix in sorted(SUFFIXES - ({".avif"} if "AVIF" not in OFFERED else set())):
        path = tmp_path / f"a{suffix.upper()}"
        write_picture(path, PIXELS)
        assert read_picture(path).shape == PIXELS.shape
    before = (tmp_path / "a.PNG").read_bytes()

    def full(self: Image.Image, path: Path, form: str, **_: object) -> None:
        path.write_bytes(b"begun")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    for name in ("a.PNG", "new.png"):
        with pytest.raises(OSError, match="No space left"):
            write_picture(tmp_path / name, PIXELS)
    assert (tmp_path / "a.PNG").read_bytes() == before
    assert not (tmp_path / "new.png").exists()
    assert not list(tmp_path.glob(".*"))
    with pytest.raises(ValueError, match=r"a\.txt: no format of pictures has this ending"):
        write_picture(tmp_path / "a.txt", PIXELS)
