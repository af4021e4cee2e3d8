"""Checksums of the files of a folder, in a file of its own there: damage that no format of the folder would show.

The file is `checksums.json`: for each file, by its path relative to the folder, its size in bytes and its SHA-256. A
folder without it was written by something else, and nothing is said about its files.
"""

from __future__ import annotations

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from lcm_jax.runtime.atomic_files import write_json
from lcm_jax.runtime.json_text import parse_json

CHECKSUMS = "checksums.json"
_FORMAT = 1
_MOST = 16 << 20  # bytes of checksums.json: some hundred thousand files
_THREADS = 8


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file's bytes as 64 hex digits."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def write_checksums(folder: Path) -> None:
    """Write the sizes and SHA-256 of all files under `folder` into its checksums.json, which is replaced if it exists.

    Call it when the folder is complete: a file that changes later does not pass `check_checksums`.

    >>> import tempfile
    >>> from pathlib import Path
    >>> from lcm_jax.runtime.checksums import check_checksums, write_checksums
    >>> with tempfile.TemporaryDirectory() as name:
    ...     folder = Path(name)
    ...     characters = (folder / "weights").write_text("0123")
    ...     print(check_checksums(folder))
    ...     write_checksums(folder)
    ...     print(check_checksums(folder))
    False
    True
    """
    files = _files(folder)
    with ThreadPoolExecutor(_THREADS) as pool:
        sums = pool.map(sha256, files.values())
        listed = {
            name: {"bytes": path.stat().st_size, "sha256": digest}
            for (name, path), digest in zip(files.items(), sums, strict=True)
        }
    write_json(folder / CHECKSUMS, {"format": _FORMAT, "files": listed})


def check_checksums(folder: Path, *, part: int = 0, parts: int = 1) -> bool:
    """Compare the files under `folder` with its checksums.json; return False if it has none.

    The sizes of all files are compared, and the SHA-256 of every `parts`-th of them from `part` on: this process among
    those that open the folder together, so that a large one is read once by all of them and not once by each. Raises
    ValueError, in one line, that names the first file that is damaged, missing or not listed.
    """
    source = folder / CHECKSUMS
    if not source.is_file():
        return False
    listed = _read(source)
    files = _files(folder)  # only these are opened: a name in checksums.json leads nowhere by itself
    for name in sorted(files.keys() | listed.keys()):
        if name not in files:
            raise ValueError(f"{folder}: {name!r:.160} is missing, but {CHECKSUMS} lists it; copy the folder again")
        if name not in listed:
            raise ValueError(f"{files[name]}: not listed in {CHECKSUMS}, so it came later; remove it")
        if (size := files[name].stat().st_size) != listed[name][0]:
            raise ValueError(
                f"{files[name]}: damaged, {size} bytes where {CHECKSUMS} says {listed[name][0]}; copy the folder again"
            )
    names = sorted(files)[part::parts]
    with ThreadPoolExecutor(_THREADS) as pool:
        for name, digest in zip(names, pool.map(sha256, (files[name] for name in names)), strict=True):
            if digest != listed[name][1]:
                raise ValueError(
                    f"{files[name]}: damaged, its SHA-256 is not that in {CHECKSUMS}; copy the folder again"
                )
    return True


def _files(folder: Path) -> dict[str, Path]:
    """Return the files under a folder by their paths relative to it; links to folders are not entered."""
    found = {
        (Path(parent) / name).relative_to(folder).as_posix(): Path(parent) / name
        for parent, _, names in os.walk(folder)
        for name in names
    }
    return {name: path for name, path in found.items() if name != CHECKSUMS and path.is_file()}


def _read(source: Path) -> dict[str, tuple[int, str]]:
    """Return path -> (bytes, SHA-256) of a checksums.json."""
    try:
        if source.stat().st_size > _MOST:
            raise ValueError(f"larger than {_MOST >> 20} MiB")
        value = parse_json(source.read_bytes())
        if value["format"] != _FORMAT:
            raise ValueError(f"format {value['format']!r:.20}, this version reads {_FORMAT}")
        listed = {name: (entry["bytes"], entry["sha256"]) for name, entry in value["files"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{source}: no list of checksums ({error!s:.160}); copy the folder again, or remove this file to load the "
            "folder unchecked"
        ) from None
    return listed
