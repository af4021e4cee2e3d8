"""Names of pictures tell prompts and seeds apart, and no file is overwritten silently."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lcm_jax.cli.picture_files import names, write


def picture(value: int) -> np.ndarray:
    return np.full((1, 8, 8, 3), value, np.uint8)


def test_every_prompt_seed_and_number_has_a_name_of_its_own(tmp_path: Path) -> None:
    long = "a very long prompt " * 20
    prompts = ["red heart", "red heart!", "red, heart", "Red-heart", long, long + "x", "猫" * 100, "!", "?", ""]
    found = [path for seed in (0, 7) for path in names(tmp_path, prompts, 2, seed)]
    assert len({path.name.casefold() for path in found}) == 2 * 2 * len(prompts)
    assert all(path.parent == tmp_path and len(path.name.encode()) < 200 for path in found)
    assert names(tmp_path, ["red heart"], 2, 0) == [tmp_path / "red-heart-0.png", tmp_path / "red-heart-1.png"]
    assert names(tmp_path, ["red heart!"], 1, 0) == names(tmp_path, ["x", "red heart!"], 1, 0)[1:], "not by neighbours"


def test_a_picture_that_is_there_stays(tmp_path: Path) -> None:
    paths = names(tmp_path / "new", ["red heart"], 1, 0)
    written = [write(paths, picture(value), replace=False)[0] for value in (10, 20, 30)]
    assert [path.name for path in written] == ["red-heart-0.png", "red-heart-0-2.png", "red-heart-0-3.png"]
    assert [int(np.asarray(Image.open(path))[0, 0, 0]) for path in written] == [10, 20, 30]
    assert len(list((tmp_path / "new").iterdir())) == 3, "temporary files are gone"


def test_a_file_that_the_user_named_is_replaced_and_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "a.png"
    for value in (10, 20):
        assert write(names(out, ["x"], 1, 0), picture(value), replace=True) == [out]
    assert np.asarray(Image.open(out))[0, 0, 0] == 20
    assert capsys.readouterr().err == f"lcm-jax: {out} is replaced\n"


@pytest.mark.parametrize(
    ("suffix", "kind"), [("jpg", "JPEG"), ("JPEG", "JPEG"), ("png", "PNG"), ("webp", "WEBP"), ("bmp", "BMP")]
)
def test_a_suffix_is_the_format(suffix: str, kind: str, tmp_path: Path) -> None:
    (path,) = write(names(tmp_path / f"a.{suffix}", ["x"], 1, 3), picture(100), replace=True)
    assert path == tmp_path / f"a.{suffix}"
    assert Image.open(path).format == kind


def test_folders_keep_their_names(tmp_path: Path) -> None:
    (tmp_path / "a.png").mkdir()
    for folder in (tmp_path / "a.png", tmp_path / "v1.0", tmp_path / "out"):
        assert names(folder, ["x", "y"], 1, 0) == [folder / "x-0.png", folder / "y-0.png"]


@pytest.mark.parametrize(
    ("out", "prompts", "message"),
    [
        ("a.jpg", ["x", "y"], "2 pictures do not fit in one file; name a folder"),
        ("a.gif", ["x"], "a picture's file that ends in .avif, .bmp"),
        ("a.mp4", ["x"], "give a folder"),
        ("file", ["x"], "file is a file; name a folder"),
        ("file/a.png", ["x"], "file is a file; name a folder"),
    ],
)
def test_other_places_are_refused(out: str, prompts: list[str], message: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=message) as caught:
        names(tmp_path / out, prompts, 1, 0)
    assert "\n" not in str(caught.value)
