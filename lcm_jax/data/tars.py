"""Captioned pictures in tar files, as webdataset has them.

The files of one sample share their name up to the first dot: `0001.jpg` and `0001.txt`. A tar that is not compressed
is read at random once its headers have been, which are 512 bytes before each file.
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
    """A file inside a tar."""

    tar: Path
    name: str
    start: int
    size: int

    def read(self) -> bytes:
        with self.tar.open("rb") as stream:
            stream.seek(self.start)
            return stream.read(self.size)


class Sample(NamedTuple):
    """A picture and its caption's file."""

    picture: Member
    text: Member

    @property
    def name(self) -> str:
        return f"{self.picture.tar}:{self.picture.name}"

    def caption(self) -> str:
        """ValueError where it is empty or no UTF-8."""
        try:
            caption = self.text.read().decode().strip()
        except UnicodeDecodeError as error:
            raise ValueError(f"{self.text.tar}:{self.text.name}: caption is not UTF-8 text") from error
        if not caption:
            raise ValueError(f"{self.text.tar}:{self.text.name}: empty caption")
        return caption


def find_tars(pattern: str) -> list[Path]:
    """A file, all *.tar of a folder, or what a pattern such as train-*.tar matches, by name."""
    place = Path(pattern)
    if place.is_dir():
        found = sorted(place.glob("[!.]*.tar"))
    else:
        found = [place] if place.is_file() else sorted(map(Path, glob.glob(pattern, recursive=True)))
    if not found:
        raise FileNotFoundError(f"tar:{pattern}: no such file, and no .tar in a folder or pattern of that name")
    return found


def read_samples(path: Path) -> list[Sample]:
    """The samples of a tar, in its order; files beside picture and .txt are passed over. ValueError for a tar that is
    damaged, compressed or cut off, and for half a sample."""
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
                    other = samples.setdefault(f"{folder}{slash}{stem}", {}).setdefault(role, member)
                    if other is not member:
                        raise ValueError(f"{path}: {info.name} and {other.name} are of one sample; rename one of them")
            end = tar.offset
    except tarfile.TarError as error:
        raise ValueError(
            f"{path}: not a plain tar ({error}); unpack a compressed one, write a damaged one again"
        ) from error
    # tarfile takes whatever it cannot read for the end
    with path.open("rb") as stream:
        stream.seek(end)
        if stream.read(_BLOCK) != bytes(_BLOCK):
            raise ValueError(f"{path}: damaged or cut off at byte {end}; write it again")
    for key, parts in samples.items():
        for role, name in (("text", ".txt caption"), ("picture", "picture")):
            if role not in parts:
                raise ValueError(f"{path}: sample {key} has no {name}; add it, or remove the sample")
    return [Sample(**parts) for parts in samples.values()]
