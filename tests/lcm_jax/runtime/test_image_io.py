"""Picture files become what they show."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageOps

from lcm_jax.cli.main import read_image
from lcm_jax.runtime.image_io import check_picture, read_picture


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
