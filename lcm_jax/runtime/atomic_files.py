"""Files and folders that appear whole or not at all: they are written aside and renamed."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def written_aside(*paths: Path) -> Iterator[list[Path]]:
    """Names beside `paths` (of one folder) to write to, renamed to them in order at the end and removed on failure."""
    paths[0].parent.mkdir(parents=True, exist_ok=True)
    asides = [path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}") for path in paths]
    try:
        yield asides
        for aside, path in zip(asides, paths, strict=True):
            os.replace(aside, path)
    finally:
        for aside in asides:
            aside.unlink(missing_ok=True)


def dump_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_json(path: str | os.PathLike[str], value: Mapping[str, Any]) -> None:
    """Writes a JSON object at once or not at all."""
    with written_aside(Path(path)) as (aside,):
        dump_json(aside, value)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A new folder beside `path` that takes its place at the end, or is removed on failure."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside, old = (path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}") for _ in range(2))
    try:
        aside.mkdir()
        yield aside
        if path.exists():
            path.rename(old)
        aside.rename(path)
    finally:
        for rest in (aside, old):
            shutil.rmtree(rest, ignore_errors=True)
