"""Captioned pictures as records, the sources that give them, and keys that say when their content has changed.

A key is what a record's content is known by without decoding it: of a file its path, size and time of modification, and
its captions; by request its bytes. What is computed of a record is kept under its key (`lcm_jax.data.record_store`), so
that latents of yesterday's pictures or captions are never found for today's.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, NotRequired, Protocol, TypedDict, runtime_checkable

import numpy as np
from jaxtyping import UInt8

from lcm_jax.data.buckets import nearest_bucket
from lcm_jax.runtime.image_io import Size, check_picture, read_picture
from lcm_jax.runtime.messages import raise_all
from lcm_jax.runtime.progress import progress

MOST_CAPTION = 2**16  # bytes of a caption; the longest context of a text encoder has a few thousand
CAPTION_SUFFIXES = (".txt", ".caption")
_MARK = "\ufeff"  # the byte-order mark that Windows writes before UTF-8; to a tokenizer it is three tokens
_KEY = 32  # hex digits


class Texts(TypedDict):
    """The captions of a record."""

    caption: str
    synthetic_caption: NotRequired[str]  # a second text, see lcm_jax.data.mixing


class Record(Texts):
    """A captioned picture: uint8 (height, width, 3)."""

    image: UInt8[np.ndarray, "h w 3"]


@runtime_checkable
class Source(Protocol):
    """Random access to records, which a Loader shuffles; a Cache of encoded records is one too.

    A source may also have `key(index)`, a text that changes whenever the record does. Without it all records are read
    to know which of them have been encoded before. And it may have `texts(index)`, the record's captions as `Texts`:
    without it a record is read, and its picture decoded, for its captions alone.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


@runtime_checkable
class Item(Protocol):
    """A picture in a file, and its captions."""

    @property
    def name(self) -> str:
        """The file's name for messages."""

    def read(self) -> bytes:
        """Return the bytes of the picture's file; raise ValueError if they are none or far too many."""

    def texts(self) -> Texts:
        """Return the captions; raise ValueError if they cannot be used."""

    def stamp(self) -> Sequence[Any]:
        """Return what the item's content was known by when it was opened, as plain JSON values."""

    def check(self) -> None:
        """Raise ValueError if the file has changed since it was opened."""


@dataclass(frozen=True, kw_only=True)
class InMemory:
    """A source of pictures that are decoded already.

    is_fixed: the source's name, split and size say all about it, as it is a part of the library.
    """

    images: UInt8[np.ndarray, "n h w 3"]
    captions: tuple[str, ...]
    is_fixed: bool = False

    def __len__(self) -> int:
        return len(self.captions)

    def __getitem__(self, index: int, /) -> Record:
        return {"image": self.images[index], "caption": self.captions[index]}

    def texts(self, index: int) -> Texts:
        """Return the caption of a record."""
        return {"caption": self.captions[index]}


@dataclass(frozen=True, kw_only=True)
class OnDemand:
    """A source of pictures that are decoded, scaled and cropped to `size` (height, width) on each reading.

    is_fixed: as for InMemory.
    """

    items: Sequence[Item]
    size: Size
    is_fixed: bool = False

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int, /) -> Record:
        if not -len(self) <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        item = self.items[index]
        return {"image": read_picture(item.read(), self.size, item.name), **item.texts()}

    def texts(self, index: int) -> Texts:
        """Return the captions of a record, without reading its picture."""
        return self.items[index].texts()

    def key(self, index: int) -> str:
        """Return a text that changes whenever the record does, from the file's path, size and time and the captions."""
        return _digest(json.dumps(self.items[index].stamp()).encode())


def record_keys(source: Source, name: str, count: int | None = None, *, by_bytes: bool = False) -> list[str]:
    """Return a key for each of the first `count` records, or for all: two that are equal are of the same content.

    For a source without `key`, and with `by_bytes`, the records are read.

    name: that of the source and its split, which a source's own `key` need not repeat.
    """
    count = len(source) if count is None else count
    if isinstance(source, OnDemand) and not by_bytes:
        return [source.key(index) for index in range(count)]
    key = getattr(source, "key", None)
    if callable(key) and not by_bytes:
        return [_digest(json.dumps([name, str(key(index))]).encode()) for index in range(count)]
    indices = progress(range(count), "reading", "picture")
    if isinstance(source, OnDemand):
        return [_content(item.read(), item.texts()) for item in map(source.items.__getitem__, indices)]
    return [_record_digest(source[index]) for index in indices]


def read_texts(source: Source, index: int) -> Texts:
    """Return the captions of a record: by the source's own `texts` where it has one, else from the whole record.

    >>> import numpy as np
    >>> from lcm_jax.data.records import InMemory, read_texts
    >>> read_texts(InMemory(images=np.zeros((1, 2, 2, 3), np.uint8), captions=("a dog",)), 0)
    {'caption': 'a dog'}
    """
    texts = getattr(source, "texts", None)
    read: Texts = texts(index) if callable(texts) else source[index]
    return read


def read_digested(source: Source, index: int) -> tuple[Record, str]:
    """Return a record and a digest of its content: of the bytes of the picture's file, and of the captions.

    Raises ValueError for a picture that cannot be read, and for one that has changed since the source was opened.
    """
    if not isinstance(source, OnDemand):
        record: Record = source[index]
        return record, _record_digest(record)
    item = source.items[index]
    data, texts = item.read(), item.texts()
    record = {"image": read_picture(data, source.size, item.name), **texts}
    item.check()
    return record, _content(data, texts)


def _record_digest(record: Record) -> str:
    texts = {name: text for name, text in record.items() if isinstance(text, str)}
    image = record["image"]
    return _content(np.ascontiguousarray(image).tobytes(), {**texts, "shape": image.shape})


def _content(data: bytes, texts: Any) -> str:
    return _digest(hashlib.sha256(data).digest() + json.dumps(texts, sort_keys=True).encode())


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:_KEY]


# --- captions and names


def decode_caption(data: bytes, name: str) -> str:
    """Return the caption of a file's bytes; raise ValueError if it is empty, too long or not UTF-8 text."""
    try:
        return check_caption(data.decode("utf-8"), name)
    except UnicodeDecodeError as error:
        raise ValueError(f"{name}: caption is not UTF-8 text; save it as UTF-8") from error


def check_caption(text: str, name: str) -> str:
    """Return a caption without byte-order marks and outer spaces; raise ValueError if nothing is left, or too much."""
    text = text.replace(_MARK, "").strip()
    if not text:
        raise ValueError(f"{name}: empty caption; write one, or remove it with its picture")
    try:
        check_caption_bytes(len(text.encode()), name)
    except UnicodeEncodeError as error:
        raise ValueError(f"{name}: caption holds half of a character ({error.reason}); write it again") from error
    return text


def check_caption_bytes(number: int, name: str) -> None:
    """Raise ValueError for more bytes than a caption has."""
    if number > MOST_CAPTION:
        raise ValueError(f"{name}: caption of {number} bytes; shorten it to at most {MOST_CAPTION}")


def same_name(name: str) -> str:
    r"""Return a file's name in the one form in which names are compared: a Mac and Windows write it otherwise.

    >>> same_name("./cafe\u0301\\1.png") == "caf\u00e9/1.png"
    True
    """
    return unicodedata.normalize("NFC", str(PurePosixPath(name.replace("\\", "/"))))


def is_passed_over(name: str) -> bool:
    """Return whether a file or folder is hidden, or made by a Mac beside the files themselves.

    >>> [name for name in ("a.png", "._a.png", ".git", "__MACOSX") if not is_passed_over(name)]
    ['a.png']
    """
    return name.startswith(".") or name == "__MACOSX"


# --- opening


def by_bucket(sizes: Sequence[Size], items: Sequence[Item], *, check: bool) -> dict[Size, list[Item]]:
    """Return size -> its items. All pictures and captions are checked; with one size and check=False none is."""
    if len(sizes) == 1 and not check:
        return {sizes[0]: list(items)}
    buckets: dict[Size, list[Item]] = {size: [] for size in sizes}
    problems = []
    for item in progress(items, "reading", "picture"):
        try:
            item.texts()
            buckets[nearest_bucket(sizes, check_item(item))].append(item)
        except ValueError as error:
            problems.append(str(error))
    raise_all(problems)
    return {size: items for size, items in buckets.items() if items}


def check_item(item: Item) -> Size:
    """Return the (height, width) of an item's picture after checking it."""
    path = getattr(item, "path", None)  # of a file of its own, of which little has to be read
    return check_picture(item.read() if path is None else path, item.name)


def split_folder(folder: Path, split: str) -> Path:
    """Return PATH/SPLIT if that exists, else PATH itself for "train"; raise FileNotFoundError for other splits."""
    if (folder / split).is_dir():
        return folder / split
    if split != "train":
        raise FileNotFoundError(f"{folder / split}: no such folder; a split of a folder is a folder of that name in it")
    return folder


def plain_files(folder: Path) -> Iterator[tuple[Path, os.stat_result]]:
    """Yield all files below a folder, but for those that are passed over; links to folders are not followed."""
    with os.scandir(folder) as entries:
        for entry in entries:
            if is_passed_over(entry.name):
                continue
            if entry.is_dir(follow_symlinks=False):
                yield from plain_files(Path(entry.path))
            else:
                with contextlib.suppress(FileNotFoundError):  # a link to nothing
                    yield Path(entry.path), entry.stat()
