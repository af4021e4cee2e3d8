"""Captioned pictures in tar files, in the layout of webdataset.

The files of one sample share their name up to the first dot: `0001.jpg` and `0001.txt`. A tar that is not compressed
allows random access once its headers, of 512 bytes before each file, have been read.
"""

from __future__ import annotations

import glob
import tarfile
from pathlib import Path
from typing import NamedTuple

from lcm_jax.runtime.image_io import SUFFIXES

_BLOCK = 512
_TEXT = ".txt"


class Member(NamedTuple):
    """A file inside a tar: `size` bytes at byte `start`."""

    tar: Path
    name: str
    start: int
    size: int

    def read(self) -> bytes:
        """Return the file's bytes."""
        with self.tar.open("rb") as stream:
            stream.seek(self.start)
            return stream.read(self.size)


class Sample(NamedTuple):
    """A picture's file and its caption's."""

    picture: Member
    text: Member

    @property
    def name(self) -> str:
        """The picture's name for messages, TAR:FILE."""
        return f"{self.picture.tar}:{self.picture.name}"

    def caption(self) -> str:
        """Return the caption; raise ValueError if it is empty or not UTF-8 text."""
        try:
            caption = self.text.read().decode().strip()
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{self.text.tar}:{self.text.name}: caption is not UTF-8 text; save it as UTF-8"
            ) from error
        if not caption:
            raise ValueError(f"{self.text.tar}:{self.text.name}: empty caption; write one or remove the sample")
        return caption


def find_tars(pattern: str) -> list[Path]:
    """Return the tar files of a file name, a folder (all its *.tar), or a pattern such as train-*.tar, by name.

    Raises FileNotFoundError if there are none.
    """
    path = Path(pattern)
    if path.is_dir():
        tars = sorted(path.glob("[!.]*.tar"))
    else:
        tars = [path] if path.is_file() else sorted(map(Path, glob.glob(pattern, recursive=True)))
    if not tars:
        raise FileNotFoundError(f"tar:{pattern}: no such file, and no .tar in a folder or pattern of that name")
    return tars


def read_samples(path: Path) -> list[Sample]:
    """Return the samples of a tar, in its order; files other than pictures and .txt are skipped.

    Raises ValueError for a tar that is damaged, compressed or cut off, and for a sample without picture or caption.
    """
    samples: dict[str, dict[str, Member]] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for info in tar:
                folder, slash, file = info.name.rpartition("/")
                stem, dot, suffix = file.partition(".")
                kind = f"{dot}{suffix.lower()}"
                if info.isreg() and (kind in SUFFIXES or kind == _TEXT):
                    member = Member(path, info.name, info.offset_data, info.size)
                    role = "text" if kind == _TEXT else "picture"
                    first = samples.setdefault(f"{folder}{slash}{stem}", {}).setdefault(role, member)
                    if first is not member:
                        raise ValueError(f"{path}: {info.name} and {first.name} are of one sample; rename one of them")
            end = tar.offset
    except tarfile.TarError as error:
        raise ValueError(
            f"{path}: not a plain tar ({error}); unpack a compressed one, write a damaged one again"
        ) from error
    # tarfile treats anything that it cannot read as the end
    with path.open("rb") as stream:
        stream.seek(end)
        if stream.read(_BLOCK) != bytes(_BLOCK):
            raise ValueError(f"{path}: damaged or cut off at byte {end}; write it again")
    for key, parts in samples.items():
        for role, name in (("text", ".txt caption"), ("picture", "picture")):
            if role not in parts:
                raise ValueError(f"{path}: sample {key} has no {name}; add it, or remove the sample")
    return [Sample(**parts) for parts in samples.values()]
