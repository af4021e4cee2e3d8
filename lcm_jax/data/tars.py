"""Captioned pictures in tar files, in the layout of webdataset.

The files of one sample share their name up to the first dot: `0001.jpg` and `0001.txt`. A tar that is not compressed
allows random access once its headers, of 512 bytes before each file, have been read.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import os
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from lcm_jax.data.records import (
    CAPTION_SUFFIXES,
    Item,
    OnDemand,
    Source,
    Texts,
    by_bucket,
    check_caption_bytes,
    decode_caption,
    is_passed_over,
    same_name,
    split_folder,
)
from lcm_jax.runtime.image_io import SUFFIXES, Size, check_file_size
from lcm_jax.runtime.progress import progress

_BLOCK = 512


class Tar(NamedTuple):
    """A tar file as it was when it was listed; `location` is its path without links."""

    path: Path
    location: str
    size: int  # bytes
    modified: int  # nanoseconds

    @classmethod
    def of(cls, path: Path) -> Tar:
        """Return the tar file of a path."""
        found = path.stat()
        return cls(path, str(path.resolve()), found.st_size, found.st_mtime_ns)

    def check(self, found: os.stat_result) -> None:
        """Raise ValueError if the tar has changed since it was listed, and its files lie elsewhere in it."""
        if (found.st_size, found.st_mtime_ns) != (self.size, self.modified):
            raise ValueError(f"{self.path}: has changed since it was opened; start again")


class Member(NamedTuple):
    """A file inside a tar: `size` bytes at byte `start`."""

    tar: Tar
    name: str
    start: int
    size: int

    def read(self) -> bytes:
        """Return the file's bytes; raise ValueError if the tar has been written anew since it was listed."""
        with self.tar.path.open("rb") as stream:
            self.tar.check(os.fstat(stream.fileno()))
            stream.seek(self.start)
            return stream.read(self.size)


class Sample(NamedTuple):
    """A picture's file and its caption's."""

    picture: Member
    text: Member

    @property
    def name(self) -> str:
        """The picture's name for messages, TAR:FILE."""
        return f"{self.picture.tar.path}:{self.picture.name}"

    def read(self) -> bytes:
        """Return the bytes of the picture's file; raise ValueError if they are none, or more than any picture has."""
        check_file_size(self.picture.size, self.name)
        return self.picture.read()

    def texts(self) -> Texts:
        """Return the caption; raise ValueError if it is empty, too long or not UTF-8 text."""
        name = f"{self.text.tar.path}:{self.text.name}"
        check_caption_bytes(self.text.size, name)
        return {"caption": decode_caption(self.text.read(), name)}

    def stamp(self) -> Sequence[Any]:
        """Return the tar's path, size and time, where the picture lies in it, and a digest of its caption."""
        tar, caption = self.picture.tar, b""
        with contextlib.suppress(ValueError):  # a caption that cannot be used is an error when it is read
            caption = self.texts()["caption"].encode()
        location = [self.picture.name, self.picture.start, self.picture.size, self.text.start, self.text.size]
        return [tar.location, tar.size, tar.modified, *location, hashlib.sha256(caption).hexdigest()]

    def check(self) -> None:
        """Raise ValueError if the tar has changed since it was listed."""
        self.picture.tar.check(self.picture.tar.path.stat())


def open_tars(pattern: str, split: str, sizes: Sequence[Size], *, check: bool = True) -> dict[Size, Source]:
    """Open a tar file, a folder of tar files (or of one folder for each split), or a pattern of their names."""
    folder = Path(pattern)
    if not folder.is_dir() and split != "train":
        raise ValueError(
            f"tar:{pattern}: names the files of one split; give those of {split!r}, and train as the split"
        )
    paths = find_tars(str(split_folder(folder, split)) if folder.is_dir() else pattern)
    samples: list[Item] = [sample for path in progress(paths, "reading", "tar") for sample in read_samples(path)]
    if not samples:
        raise ValueError(f"tar:{pattern}: empty dataset; a sample is a picture and a .txt of the same name")
    return {size: OnDemand(items=part, size=size) for size, part in by_bucket(sizes, samples, check=check).items()}


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
    """Return the samples of a tar, in its order; hidden files, and others than pictures and captions, are passed over.

    A hard link is the file that it names. Raises ValueError for a tar that is damaged, compressed or cut off, for a
    sample without picture or caption, and for a sparse file.
    """
    samples: dict[str, dict[str, Member]] = {}
    members: dict[str, Member] = {}
    tar_file = Tar.of(path)
    try:
        with tarfile.open(path, "r:") as tar:
            for info in tar:
                name = PurePosixPath(same_name(info.name))
                role = _role(name)
                if info.issparse() and role is not None:
                    raise ValueError(f"{path}: {info.name} is a sparse file; write the tar again without --sparse")
                member = _member(tar_file, info, members)
                if member is not None:
                    members[str(name)] = member
                if member is None or role is None:
                    continue
                stem = str(name.parent / name.name.partition(".")[0])
                first = samples.setdefault(stem, {}).setdefault(role, member)
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
        for part, title in (("text", ".txt caption"), ("picture", "picture")):
            if part not in parts:
                raise ValueError(f"{path}: sample {key} has no {title}; add it, or remove the sample")
    return [Sample(**parts) for parts in samples.values()]


def _member(tar: Tar, info: tarfile.TarInfo, before: Mapping[str, Member]) -> Member | None:
    """Return the file of an entry of a tar, or the one that a hard link names; None for folders and so on."""
    if info.islnk():
        target = before.get(same_name(info.linkname))
        if target is None and _role(PurePosixPath(same_name(info.name))) is not None:
            raise ValueError(f"{tar.path}: {info.name} is a link to {info.linkname}, which is not in the tar; add it")
        return None if target is None else target._replace(name=info.name)
    is_plain = info.isreg() and not info.issparse()
    return Member(tar, info.name, info.offset_data, info.size) if is_plain else None


def _role(name: PurePosixPath) -> str | None:
    """Return what a file is in a sample, "picture" or "text"; None for any other file, and for what is passed over."""
    if any(map(is_passed_over, name.parts)):
        return None
    _, dot, suffix = name.name.partition(".")
    kind = f"{dot}{suffix.lower()}"
    return "picture" if kind in SUFFIXES else "text" if kind in CAPTION_SUFFIXES else None
