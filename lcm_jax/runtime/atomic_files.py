"""Atomic writers: a file or folder is written under a temporary name beside its path, and renamed when complete."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any


def _beside(path: Path) -> Path:
    """Return a temporary path beside `path`, of a name that `remove_leftovers` knows."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")


_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{8}")


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary files and folders that a writer of this module left in `folder` when it was killed.

    Call it only where nothing else is writing there. A folder that does not exist has none.
    """
    for path in folder.glob(".*") if folder.is_dir() else ():
        if _TEMPORARY.fullmatch(path.name):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


@contextlib.contextmanager
def written_aside(*paths: Path) -> Iterator[list[Path]]:
    """Yield temporary paths to write to, renamed to `paths` in order at the end, or removed on failure.

    paths: files of one folder, which is created if it is missing; files that exist are replaced.

    >>> import tempfile
    >>> from pathlib import Path
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = Path(folder) / "notes.txt"
    ...     with written_aside(path) as (temporary,):
    ...         characters = temporary.write_text("complete")
    ...     print(path.read_text())
    complete
    """
    paths[0].parent.mkdir(parents=True, exist_ok=True)
    temporaries = [_beside(path) for path in paths]
    try:
        yield temporaries
        for temporary, path in zip(temporaries, paths, strict=True):
            os.replace(temporary, path)
    finally:
        for temporary in temporaries:
            temporary.unlink(missing_ok=True)


def dump_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON object as indented UTF-8 text, straight to `path`: `write_json` is the atomic one."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_json(path: str | os.PathLike[str], value: Mapping[str, Any]) -> None:
    """Write a JSON object atomically: after a failure, `path` is as it was before.

    >>> import tempfile
    >>> from pathlib import Path
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_json(Path(folder) / "config.json", {"steps": 4})
    ...     print((Path(folder) / "config.json").read_text(), end="")
    {
      "steps": 4
    }
    """
    with written_aside(Path(path)) as (temporary,):
        dump_json(temporary, value)


def check_replaceable(path: Path, parts: Collection[str], what: str) -> None:
    """Raise ValueError if `path` is a file, or a folder that holds anything but `parts`, the entries of a `what`.

    >>> import tempfile
    >>> from pathlib import Path
    >>> from lcm_jax.runtime.atomic_files import check_replaceable
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     characters = (Path(folder) / "notes.txt").write_text("mine")
    ...     check_replaceable(Path(folder), ("unet", "vae"), "model")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ValueError: ... holds notes.txt, which is no part of a model: name a new folder, or an empty one
    """
    if path.exists() and not path.is_dir():
        raise ValueError(f"{path} is a file: name a folder")
    others = sorted(entry.name for entry in path.iterdir() if entry.name not in parts) if path.exists() else []
    if others:
        more = f" and {len(others) - 1} more" if len(others) > 1 else ""
        raise ValueError(
            f"{path} holds {others[0]}{more}, which is no part of a {what}: name a new folder, or an empty one"
        )


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a new, empty folder that replaces the folder `path` at the end, or is removed on failure.

    All that `path` held is gone then: where a user names it, call `check_replaceable` first.

    >>> import tempfile
    >>> from pathlib import Path
    >>> with tempfile.TemporaryDirectory() as parent:
    ...     with replacing(Path(parent) / "model") as folder:
    ...         characters = (folder / "config.json").write_text("{}")
    ...     print([file.name for file in (Path(parent) / "model").iterdir()])
    ['config.json']
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary, old = _beside(path), _beside(path)
    try:
        temporary.mkdir()
        yield temporary
        if path.exists():
            path.rename(old)
        temporary.rename(path)
    finally:
        for leftover in (temporary, old):
            shutil.rmtree(leftover, ignore_errors=True)
