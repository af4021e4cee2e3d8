"""Folders of pictures, with captions in files beside them or in a metadata.jsonl."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lcm_jax.data.records import (
    CAPTION_SUFFIXES,
    MOST_CAPTION,
    Item,
    OnDemand,
    Source,
    Texts,
    by_bucket,
    check_caption,
    check_caption_bytes,
    decode_caption,
    plain_files,
    same_name,
    split_folder,
)
from lcm_jax.runtime.image_io import SUFFIXES, Size, read_bytes
from lcm_jax.runtime.json_text import parse_json
from lcm_jax.runtime.messages import raise_all

_MOST_LINE = 16 * MOST_CAPTION  # characters of a line of metadata.jsonl, which may hold more than captions


class PictureFile(NamedTuple):
    """A file of a picture, with its captions; `folder` has no links in it."""

    path: Path
    folder: str
    size: int  # bytes
    modified: int  # nanoseconds
    captions: Texts

    @property
    def name(self) -> str:
        """The path."""
        return str(self.path)

    def read(self) -> bytes:
        """Return the file's bytes."""
        return read_bytes(self.path)

    def texts(self) -> Texts:
        """Return the captions."""
        return self.captions

    def stamp(self) -> Sequence[Any]:
        """Return the path, the size, the time of modification and the captions."""
        return [self.folder, self.path.name, self.size, self.modified, self.captions]

    def check(self) -> None:
        """Raise ValueError if the file has changed since the folder was opened."""
        found = self.path.stat()
        if (found.st_size, found.st_mtime_ns) != (self.size, self.modified):
            raise ValueError(f"{self.path}: has changed since the folder was opened; start again")


def open_folder(folder: Path, split: str, sizes: Sequence[Size], *, check: bool = True) -> dict[Size, Source]:
    """Open PATH/SPLIT if that exists, else PATH itself for "train"; captions are in metadata.jsonl, or in files beside.

    A caption's file has the picture's name and the ending .txt or .caption. A metadata.jsonl may give every picture a
    second text, "synthetic", which becomes the record's synthetic_caption. Hidden files and folders are passed over.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder; give a folder of pictures with captions")
    folder = split_folder(folder, split)
    files = {path.relative_to(folder): found for path, found in plain_files(folder)}
    names = sorted(name for name in files if name.suffix.lower() in SUFFIXES)
    for name in names:
        _check_plain(folder / name, files[name])
    table = folder / "metadata.jsonl"
    texts = _texts_from_table(table, names) if table.is_file() else _texts_beside(folder, names, files)
    if not names:
        raise ValueError(f"{folder}: empty dataset; put pictures ({', '.join(sorted(SUFFIXES))}) with captions in it")
    root = folder.resolve()
    items: list[Item] = [
        PictureFile(
            path=folder / name,
            folder=str((root / name).parent),
            size=files[name].st_size,
            modified=files[name].st_mtime_ns,
            captions=texts[name],
        )
        for name in names
    ]
    return {size: OnDemand(items=part, size=size) for size, part in by_bucket(sizes, items, check=check).items()}


def _check_plain(path: Path, found: os.stat_result) -> None:
    if not stat.S_ISREG(found.st_mode):
        raise ValueError(f"{path}: not a plain file; remove it")


def _by_name(names: Sequence[Path], folder: Path) -> dict[str, Path]:
    """Return files by the form of their names that is compared."""
    by_name: dict[str, Path] = {}
    for name in names:
        first = by_name.setdefault(same_name(str(name)), name)
        if first is not name:
            raise ValueError(f"{folder / name}: has the name of {first} in another form of Unicode; rename one of them")
    return by_name


def _stem(name: Path) -> str:
    return same_name(str(name)[: -len(name.suffix)])


def _texts_beside(folder: Path, names: Sequence[Path], files: Mapping[Path, os.stat_result]) -> dict[Path, Texts]:
    captions: dict[str, Path] = {}
    for name in sorted(name for name in files if name.suffix.lower() in CAPTION_SUFFIXES):
        first = captions.setdefault(_stem(name), name)
        if first is not name:
            raise ValueError(f"{folder / name}: a second caption beside {first.name}; remove one of the two")
    pictures: dict[str, Path] = {}
    for name in names:
        first = pictures.setdefault(_stem(name), name)
        if first is not name:
            raise ValueError(f"{folder / name}: shares its caption file with {first.name}; rename one of the two")
    problems = [
        f"{folder / captions[stem]}: caption file without a picture; remove it or add the picture"
        for stem in sorted(captions.keys() - pictures.keys())
    ]
    texts: dict[Path, Texts] = {}
    for stem, name in pictures.items():
        if stem not in captions:
            problems.append(f"{folder / name}: picture without caption; write {name.stem}.txt or a metadata.jsonl")
            continue
        try:
            texts[name] = {"caption": _read_caption(folder / captions[stem], files[captions[stem]])}
        except ValueError as error:
            problems.append(str(error))
    raise_all(problems)
    return texts


def _read_caption(path: Path, found: os.stat_result) -> str:
    _check_plain(path, found)
    check_caption_bytes(found.st_size, str(path))
    with path.open("rb") as stream:
        return decode_caption(stream.read(MOST_CAPTION), str(path))


def _texts_from_table(table: Path, names: Sequence[Path]) -> dict[Path, Texts]:
    """Return the texts of metadata.jsonl: one {"file_name", "text", "synthetic"} a line, with paths relative to it.

    "synthetic" may be missing in all lines, but not in some: a cache holds the same fields for every picture.
    """
    pictures = _by_name(names, table.parent)
    texts: dict[Path, Texts] = {}
    for number, line in _lines(table):
        try:
            row = parse_json(line)
        except ValueError as error:
            raise ValueError(f"{table}:{number}: not JSON ({error!s:.200}); write one object a line") from error
        name, text = (row.get("file_name"), row.get("text")) if isinstance(row, dict) else (None, None)
        if not isinstance(name, str) or not isinstance(text, str) or not name:
            raise ValueError(f'{table}:{number}: needs text values for "file_name" and "text"; add them')
        path = pictures.get(same_name(name))
        if path is None:
            raise ValueError(
                f"{table}:{number}: caption of {name} without a picture; remove the line or add the picture"
            )
        if path in texts:
            raise ValueError(f"{table}:{number}: {name} is listed twice; remove one of its lines")
        texts[path] = {"caption": check_caption(text, f'{table}:{number}: "text"')}
        if "synthetic" in row:
            texts[path]["synthetic_caption"] = _second_text(row["synthetic"], f"{table}:{number}")
    for path in names:
        if path not in texts:
            raise ValueError(f"{table.parent / path}: picture without caption; add a line for it to metadata.jsonl")
    with_synthetic = {path for path in names if "synthetic_caption" in texts[path]}
    for path in names:
        if with_synthetic and path not in with_synthetic:
            raise ValueError(
                f'{table}: {path.name} has no "synthetic" text, others have; write one for all or for none'
            )
    return texts


def _lines(table: Path) -> Iterator[tuple[int, str]]:
    r"""Yield the number and text of each line that is not empty; a line of JSON ends at \n alone."""
    try:
        with table.open(encoding="utf-8-sig", newline="\n") as stream:
            for number, line in enumerate(iter(lambda: stream.readline(_MOST_LINE), ""), start=1):
                if len(line) == _MOST_LINE:
                    raise ValueError(f"{table}:{number}: a line of {_MOST_LINE} characters or more; shorten it")
                if line.strip():
                    yield number, line
    except UnicodeDecodeError as error:
        raise ValueError(f"{table}: not UTF-8 text; save it as UTF-8") from error


def _second_text(text: Any, line: str) -> str:
    if not isinstance(text, str):
        raise ValueError(f'{line}: "synthetic" is not a text; write one, or leave the key out of every line')
    return check_caption(text, f'{line}: "synthetic"')
