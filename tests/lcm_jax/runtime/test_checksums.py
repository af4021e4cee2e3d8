"""Checksums of a folder: every change of its files is seen, and nothing outside of it is read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lcm_jax.runtime.checksums import CHECKSUMS, check_checksums, write_checksums


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "saved" / "d").mkdir(parents=True)
    (tmp_path / "saved" / "d" / "weights").write_bytes(bytes(range(200)))
    (tmp_path / "saved" / "metadata").write_text("{}")
    (tmp_path / "saved" / "empty").touch()
    write_checksums(tmp_path / "saved")
    return tmp_path / "saved"


def test_a_folder_as_it_was_written_passes(folder: Path) -> None:
    assert check_checksums(folder)
    write_checksums(folder)  # again: the list does not list itself
    assert check_checksums(folder)


def test_a_folder_without_checksums_is_not_checked(folder: Path) -> None:
    (folder / CHECKSUMS).unlink()
    (folder / "metadata").write_text("changed")
    assert not check_checksums(folder)


def test_every_single_bit_counts(folder: Path) -> None:
    contents = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    for path, data in contents.items():
        for bit in range(0, 8 * len(data), 7):
            changed = bytearray(data)
            changed[bit // 8] ^= 1 << bit % 8
            path.write_bytes(changed)
            with pytest.raises(ValueError, match=r"^[^\n]+$") as error:
                check_checksums(folder)
            assert str(folder) in str(error.value)
        path.write_bytes(data)
    assert check_checksums(folder)


@pytest.mark.parametrize("change", ["missing", "shorter", "longer", "more"])
def test_files_that_came_went_or_grew_are_named(folder: Path, change: str) -> None:
    path = folder / "d" / "weights"
    if change == "missing":
        path.unlink()
    elif change == "more":
        path = folder / "d" / "second"
        path.write_bytes(b"")
    else:
        path.write_bytes(path.read_bytes()[:-1] if change == "shorter" else path.read_bytes() + b"0")
    with pytest.raises(ValueError, match=path.name):
        check_checksums(folder)


def test_processes_share_the_reading(folder: Path) -> None:
    (folder / "metadata").write_text("[]")  # of the same size: only the process that hashes it can tell
    failed = []
    for part in range(3):
        try:
            check_checksums(folder, part=part, parts=3)
        except ValueError:
            failed.append(part)
    assert len(failed) == 1


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{}", '{"format": 2, "files": {}}', '{"format": 1, "files": []}', '{"format": 1, "files": {"d": 3}}'],
)
def test_a_list_that_is_none_is_refused(folder: Path, content: str) -> None:
    (folder / CHECKSUMS).write_text(content)
    with pytest.raises(ValueError, match=r"checksums\.json: no list of checksums"):
        check_checksums(folder)


def test_nesting_is_bounded(folder: Path) -> None:
    (folder / CHECKSUMS).write_text("[" * 200_000)
    with pytest.raises(ValueError, match="no list of checksums"):
        check_checksums(folder)


def test_nothing_outside_is_read(folder: Path) -> None:
    secret = folder.parent / "secret"
    secret.write_text("x")
    value = json.loads((folder / CHECKSUMS).read_text())
    value["files"]["../secret"] = {"bytes": 1, "sha256": "0"}
    (folder / CHECKSUMS).write_text(json.dumps(value))
    with pytest.raises(ValueError, match=r"'\.\./secret' is missing"):
        check_checksums(folder)
