"""Random-access sources of captioned pictures, all giving the same record.

    load_source("openmoji", "train", 64)             OpenMoji drawings (splits: train, validation, compositional)
    load_source("openmoji-outline", "train", 64)     the same drawn with black lines alone
    load_source("folder:pictures", "train", 512)     pictures with .txt captions beside them, or a metadata.jsonl
    load_source("tfds:mnist", "test", 32)            any data set of tensorflow-datasets with pictures

Everything that can be wrong with a source is said when it is opened, in one line, before any work begins.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NotRequired, Protocol, TypedDict

import numpy as np
import tensorflow_datasets as tfds
from jaxtyping import UInt8
from tqdm import tqdm

from lcm_jax.data import openmoji
from lcm_jax.data.buckets import nearest_bucket
from lcm_jax.data.images import Size, check_picture, read_picture
from lcm_jax.places import cache_dir

OPENMOJI: Mapping[str, openmoji.Style] = {"openmoji": "colour", "openmoji-outline": "outline"}
SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp"})
IN_MEMORY_BYTES = 256 * 2**20  # OpenMoji up to 128 pixels is decoded once; larger sizes are decoded on each reading


class Texts(TypedDict):
    caption: str
    synthetic_caption: NotRequired[str]  # a second text, see lcm_jax.data.mixing


class Record(Texts):
    image: UInt8[np.ndarray, "h w 3"]


class Source(Protocol):
    """Random access to records; what a Loader shuffles."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Record: ...


def load_source(name: str, split: str = "train", size: int = 64) -> Source:
    """Opens a source by name, see above; pictures come as uint8 (size, size, 3). A bare path of a folder works too."""
    if size < 1:
        raise ValueError(f"size={size}: give the edge of the pictures in pixels, at least 1")
    (source,) = load_buckets(name, split, [(size, size)]).values()
    return source


def load_buckets(name: str, split: str, sizes: Sequence[Size]) -> dict[Size, Source]:
    """The same with each picture in that of the sizes which is nearest its shape (lcm_jax.data.buckets): a source for
    every size that has pictures, in the order given."""
    kind, colon, rest = name.partition(":")
    if name in OPENMOJI:
        if len(sizes) > 1:
            raise ValueError(f"{name}: its drawings are square and have one size; leave buckets out")
        return {size: open_openmoji(split, size[0], OPENMOJI[name]) for size in sizes}
    if colon and kind == "folder":
        return open_folder(Path(rest), split, sizes)
    if colon and kind == "tfds":
        return open_tfds(rest, split, sizes)
    if Path(name).is_dir():
        return open_folder(Path(name), split, sizes)
    known = ", ".join(OPENMOJI)
    raise ValueError(f"no data source {name!r}: give {known}, folder:PATH (an existing folder) or tfds:NAME")


@dataclass(frozen=True, kw_only=True)
class InMemory:
    """Pictures decoded ahead."""

    images: UInt8[np.ndarray, "n h w 3"]
    captions: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.captions)

    def __getitem__(self, index: int, /) -> Record:
        return {"image": self.images[index], "caption": self.captions[index]}


@dataclass(frozen=True, kw_only=True)
class OnDemand:
    """Pictures decoded on each reading; `read(index)` gives one record."""

    read: Callable[[int], Record]
    length: int

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int, /) -> Record:
        if not -self.length <= index < self.length:
            raise IndexError(f"record {index} of {self.length}")
        return self.read(index % self.length)


def _on_demand(pictures: Sequence[Path | bytes], texts: Sequence[Texts], size: Size) -> OnDemand:
    return OnDemand(read=lambda i: {"image": read_picture(pictures[i], size), **texts[i]}, length=len(pictures))


def _by_bucket(sizes: Sequence[Size], pictures: Iterable[Size]) -> dict[Size, list[int]]:
    """Which pictures, of these sizes, come in which of `sizes`."""
    found: dict[Size, list[int]] = {size: [] for size in sizes}
    for index, picture in enumerate(pictures):
        found[nearest_bucket(sizes, picture)].append(index)
    return {size: indices for size, indices in found.items() if indices}


# --- OpenMoji


def open_openmoji(split: str, size: int, style: openmoji.Style = "colour") -> Source:
    """Record i is `openmoji.split_items(split)[i]`, where its role, skin tones and group are found."""
    items = openmoji.split_items(split)
    builder = openmoji.prepare(size, cache_dir(), style)
    stored = builder.as_data_source(split=split, decoders={"image": tfds.decode.SkipDecoding()})
    pictures = {str(r["codepoints"], "ascii"): r["image"] for r in stored.__getitems__(range(len(stored)))}
    encoded = [pictures[item.codepoints] for item in items]
    captions = tuple(item.caption for item in items)
    if len(items) * size * size * 3 > IN_MEMORY_BYTES:
        return _on_demand(encoded, [{"caption": caption} for caption in captions], (size, size))
    images = np.stack([read_picture(data, (size, size)) for data in encoded])
    images.setflags(write=False)  # records are views, and a transform must not change the data set
    return InMemory(images=images, captions=captions)


# --- a folder of pictures


def open_folder(folder: Path, split: str, sizes: Sequence[Size]) -> dict[Size, Source]:
    """PATH/SPLIT where that exists, else PATH itself for "train". Captions: metadata.jsonl if it exists, else .txt.

    A metadata.jsonl may give every picture a second text, "synthetic", which becomes the record's synthetic_caption.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder; give a folder of pictures with captions")
    if (folder / split).is_dir():
        folder = folder / split
    elif split != "train":
        raise FileNotFoundError(f"{folder / split}: no such folder; a split of a folder is a folder of that name in it")
    pictures = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    table = folder / "metadata.jsonl"
    texts = _texts_from_table(table, pictures) if table.is_file() else _texts_beside(folder, pictures)
    if not pictures:
        raise ValueError(f"{folder}: empty dataset; put .png, .jpg or .webp pictures with captions in it")
    shown = map(check_picture, tqdm(pictures, desc=f"checking {folder}", disable=None, leave=False))
    return {
        size: _on_demand([pictures[i] for i in indices], [texts[i] for i in indices], size)
        for size, indices in _by_bucket(sizes, shown).items()
    }


def _texts_beside(folder: Path, pictures: Sequence[Path]) -> list[Texts]:
    texts = {path.with_suffix("") for path in folder.rglob("*.txt")}
    stems: dict[Path, Path] = {}
    for path in pictures:
        other = stems.setdefault(path.with_suffix(""), path)
        if other is not path:
            raise ValueError(f"{path}: shares its caption file with {other.name}; rename one of the two")
    for stem in sorted(texts - stems.keys()):
        raise ValueError(f"{stem}.txt: caption file without a picture; remove it or add the picture")
    for stem, path in stems.items():
        if stem not in texts:
            raise ValueError(f"{path}: picture without caption; write {path.stem}.txt or a metadata.jsonl")
    return [{"caption": _read_text(stem.parent / f"{stem.name}.txt")} for stem in stems]


def _read_text(path: Path) -> str:
    try:
        caption = path.read_text(encoding="utf-8").strip()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: caption is not UTF-8 text; save it as UTF-8") from error
    if not caption:
        raise ValueError(f"{path}: empty caption; write one or remove the file and its picture")
    return caption


def _texts_from_table(table: Path, pictures: Sequence[Path]) -> list[Texts]:
    """metadata.jsonl: one {"file_name": ..., "text": ..., "synthetic": ...} a line, paths relative to it.

    "synthetic" may be left out of all lines, not of some: a cache holds the same fields of every picture.
    """
    found: dict[Path, Texts] = {}
    for number, line in enumerate(table.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{table}:{number}: not JSON ({error.msg}); write one object a line") from error
        name, text = (row.get("file_name"), row.get("text")) if isinstance(row, dict) else (None, None)
        if not isinstance(name, str) or not isinstance(text, str) or not name or not text.strip():
            raise ValueError(f'{table}:{number}: needs text values for "file_name" and "text"')
        path = table.parent / name
        if path in found:
            raise ValueError(f"{table}:{number}: {name} is listed twice; remove one of its lines")
        found[path] = {"caption": text.strip()}
        if "synthetic" in row:
            found[path]["synthetic_caption"] = _second_text(row["synthetic"], f"{table}:{number}")
    for path in sorted(found.keys() - set(pictures)):
        raise ValueError(f"{table}: caption of {path.name} without a picture; remove the line or add the picture")
    for path in pictures:
        if path not in found:
            raise ValueError(f"{path}: picture without caption; add a line for it to metadata.jsonl")
    some = {path for path in pictures if "synthetic_caption" in found[path]}
    for path in pictures:
        if some and path not in some:
            raise ValueError(
                f'{table}: {path.name} has no "synthetic" text, others have; write one for all or for none'
            )
    return [found[path] for path in pictures]


def _second_text(text: Any, line: str) -> str:
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f'{line}: "synthetic" is no text; write one or leave the key out of every line')
    return text.strip()


# --- tensorflow-datasets


def open_tfds(name: str, split: str, sizes: Sequence[Size], data_dir: Path | None = None) -> dict[Size, Source]:
    """Pictures from the first Image feature; captions from the first Text, else the names of the first ClassLabel.

    For more than one size every picture's header is read first.
    """
    try:
        builder = tfds.builder(name, data_dir=data_dir or cache_dir() / "tfds", file_format="array_record")
    except tfds.core.DatasetNotFoundError as error:
        raise ValueError(f"tfds:{name}: tensorflow-datasets knows no such data set; see its catalogue") from error
    features = builder.info.features
    image = _first(features, tfds.features.Image)
    caption = _first(features, tfds.features.Text) or _first(features, tfds.features.ClassLabel)
    if image is None or caption is None:
        raise ValueError(f"tfds:{name}: needs an Image and a Text or ClassLabel feature, has {', '.join(features)}")
    if features[image].np_dtype != np.uint8:
        raise ValueError(f"tfds:{name}: feature {image} is {features[image].np_dtype}, not uint8; convert it first")
    with contextlib.redirect_stdout(sys.stderr):  # tfds announces itself on stdout, which belongs to the caller
        builder.download_and_prepare()
    if split not in builder.info.splits:
        raise ValueError(f"tfds:{name}: no split {split!r}; choose one of {', '.join(builder.info.splits)}")
    stored = builder.as_data_source(split=split, decoders={image: tfds.decode.SkipDecoding()})
    if len(stored) == 0:
        raise ValueError(f"tfds:{name}: empty dataset; split {split!r} holds no picture")
    words = getattr(features[caption], "int2str", lambda text: text.decode())

    def bucket(size: Size, indices: Sequence[int]) -> Source:
        def read(index: int) -> Record:
            at = indices[index]
            row = stored[at]
            return {"image": read_picture(row[image], size, f"tfds:{name}[{at}]"), "caption": words(row[caption])}

        return OnDemand(read=read, length=len(indices))

    if len(sizes) == 1:
        return {sizes[0]: bucket(sizes[0], range(len(stored)))}
    every = tqdm(range(len(stored)), desc=f"measuring {name}", disable=None, leave=False)
    shown = (check_picture(stored[i][image], f"tfds:{name}[{i}]") for i in every)
    return {size: bucket(size, indices) for size, indices in _by_bucket(sizes, shown).items()}


def _first(features: Mapping[str, Any], kind: type) -> str | None:
    """The first feature of exactly this kind (ClassLabel and Text have subclasses that mean something else)."""
    return next((key for key, feature in features.items() if type(feature) is kind), None)
