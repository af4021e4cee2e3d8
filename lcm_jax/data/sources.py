"""Random-access sources of captioned pictures, all giving the same record.

    load_source("openmoji", "train", 64)             OpenMoji drawings (splits: train, validation, compositional)
    load_source("openmoji-outline", "train", 64)     the same drawn with black lines alone
    load_source("folder:pictures", "train", 512)     pictures with .txt captions beside them, or a metadata.jsonl
    load_source("tar:shards/train-*.tar")            samples in tar files, as webdataset has them (lcm_jax.data.tars)
    load_source("tfds:mnist", "test", 32)            any data set of tensorflow-datasets with pictures
    load_source("tfds:prepared/mnist/3.0.1")         the same by the folder of its array_record files
    load_source("encoded", encoded=True)             latents that `lcm-jax encode` has made of one of these

Everything that can be wrong with a source is said when it is opened, in one line, before any work begins; with
check=False a picture that cannot be read is a ValueError when it is asked for.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NotRequired, Protocol, TypedDict

import jax
import numpy as np
import tensorflow_datasets as tfds
from jaxtyping import UInt8
from tqdm import tqdm

from lcm_jax.data import openmoji
from lcm_jax.data.array_cache import MANIFEST, Cache, open_cache
from lcm_jax.data.buckets import nearest_bucket
from lcm_jax.data.tars import find_tars, read_samples
from lcm_jax.runtime.cache import cache_dir
from lcm_jax.runtime.image_io import SUFFIXES, Size, check_picture, read_picture

OPENMOJI: Mapping[str, openmoji.Style] = {"openmoji": "colour", "openmoji-outline": "outline"}
IN_MEMORY_BYTES = 256 * 2**20  # OpenMoji up to 128 pixels is decoded once; larger sizes are decoded on each reading


class Texts(TypedDict):
    caption: str
    synthetic_caption: NotRequired[str]  # a second text, see lcm_jax.data.mixing


class Record(Texts):
    image: UInt8[np.ndarray, "h w 3"]


class Source(Protocol):
    """Random access to records; what a Loader shuffles. A Cache of encoded ones stands for it where latents will do."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


def load_source(
    name: str, split: str = "train", size: int = 64, *, check: bool = True, encoded: bool = False
) -> Source:
    """Opens a source by name, see above; pictures come as uint8 (size, size, 3). A bare path of a folder works too.

    encoded: whether the latents of pictures are welcome in their place.
    """
    if size < 1:
        raise ValueError(f"size={size}: give the edge of the pictures in pixels, at least 1")
    (source,) = load_buckets(name, split, [(size, size)], check=check).values()
    if isinstance(source, Cache) and not encoded:
        made_of = source.produced_by["data"]
        raise ValueError(f"{name}: holds latents and pictures are needed here; give what it was made of, {made_of}")
    return source


def load_buckets(name: str, split: str, sizes: Sequence[Size], *, check: bool = True) -> dict[Size, Source]:
    """The same with each picture in that of the sizes which is nearest its shape (lcm_jax.data.buckets): a source for
    every size that has pictures, in the order given. Latents have one size."""
    kind, colon, rest = name.partition(":")
    if name in OPENMOJI:
        if len(sizes) > 1:
            raise ValueError(f"{name}: its drawings are square and have one size; leave buckets out")
        return {size: open_openmoji(split, size[0], OPENMOJI[name]) for size in sizes}
    if colon and kind == "folder":
        return open_folder(Path(rest), split, sizes, check=check)
    if colon and kind == "tar":
        return open_tars(rest, split, sizes, check=check)
    if colon and kind == "tfds":
        return open_tfds(rest, split, sizes)
    if Path(name).is_dir():
        folder = Path(name)
        if any((place / MANIFEST).is_file() for place in (folder, folder / split)):
            return open_encoded(folder, split, sizes)
        return open_folder(folder, split, sizes, check=check)
    known = ", ".join(OPENMOJI)
    raise ValueError(
        f"no data source {name!r}: give {known}, folder:PATH (an existing folder), tar:FILES, tfds:NAME or the folder "
        "of an encoded data set"
    )


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


def _by_bucket(
    sizes: Sequence[Size], count: int, measure: Callable[[int], Size], title: str, *, check: bool
) -> dict[Size, Sequence[int]]:
    """Which of `count` pictures come in which of `sizes`. All are measured, unless that is for a check alone and there
    is to be none."""
    if len(sizes) == 1 and not check:
        return {sizes[0]: range(count)}
    found: dict[Size, list[int]] = {size: [] for size in sizes}
    for index in tqdm(range(count), title, disable=None, leave=False):
        found[nearest_bucket(sizes, measure(index))].append(index)
    return {size: indices for size, indices in found.items() if indices}


def _split_of(folder: Path, split: str) -> Path:
    """PATH/SPLIT where that exists, else PATH itself for "train"."""
    if (folder / split).is_dir():
        return folder / split
    if split != "train":
        raise FileNotFoundError(f"{folder / split}: no such folder; a split of a folder is a folder of that name in it")
    return folder


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


def open_folder(folder: Path, split: str, sizes: Sequence[Size], *, check: bool = True) -> dict[Size, Source]:
    """PATH/SPLIT where that exists, else PATH itself for "train". Captions: metadata.jsonl if it exists, else .txt.

    A metadata.jsonl may give every picture a second text, "synthetic", which becomes the record's synthetic_caption.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder; give a folder of pictures with captions")
    folder = _split_of(folder, split)
    pictures = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    table = folder / "metadata.jsonl"
    texts = _texts_from_table(table, pictures) if table.is_file() else _texts_beside(folder, pictures)
    if not pictures:
        raise ValueError(f"{folder}: empty dataset; put pictures ({', '.join(sorted(SUFFIXES))}) with captions in it")
    buckets = _by_bucket(sizes, len(pictures), lambda i: check_picture(pictures[i]), f"checking {folder}", check=check)
    return {
        size: _on_demand([pictures[i] for i in indices], [texts[i] for i in indices], size)
        for size, indices in buckets.items()
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


# --- tar files


def open_tars(pattern: str, split: str, sizes: Sequence[Size], *, check: bool = True) -> dict[Size, Source]:
    """A tar file, a folder of them (or of a folder for each split), or a pattern of their names."""
    folder = Path(pattern)
    if not folder.is_dir() and split != "train":
        raise ValueError(
            f"tar:{pattern}: names the files of one split; give those of {split!r}, and train as the split"
        )
    paths = find_tars(str(_split_of(folder, split)) if folder.is_dir() else pattern)
    samples = [s for path in tqdm(paths, "listing tars", disable=None, leave=False) for s in read_samples(path)]
    if not samples:
        raise ValueError(f"tar:{pattern}: empty dataset; a sample is a picture and a .txt of the same name")

    def measure(index: int) -> Size:
        samples[index].caption()
        return check_picture(samples[index].picture.read(), samples[index].name)

    def bucket(size: Size, indices: Sequence[int]) -> Source:
        def read(index: int) -> Record:
            sample = samples[indices[index]]
            return {
                "image": read_picture(sample.picture.read(), size, sample.name),
                "caption": sample.caption(),
            }

        return OnDemand(read=read, length=len(indices))

    buckets = _by_bucket(sizes, len(samples), measure, f"checking {pattern}", check=check)
    return {size: bucket(size, indices) for size, indices in buckets.items()}


# --- latents


def open_encoded(folder: Path, split: str, sizes: Sequence[Size]) -> dict[Size, Source]:
    """What `lcm-jax encode` wrote, PATH/SPLIT where that exists, else PATH; of several processes each checks a part."""
    folder = folder / split if (folder / split).is_dir() else folder
    cache = open_cache(folder, part=jax.process_index(), parts=jax.process_count())
    if len(sizes) > 1:
        raise ValueError(f"{folder}: encoded pictures have one size; leave buckets out")
    asked = {"split": split, "size": sizes[0][0]}
    for key, value in asked.items():
        if cache.produced_by.get(key) != value:
            raise ValueError(
                f"{folder}: encoded with {key}={cache.produced_by.get(key)}, and {key}={value} is asked for; "
                "change it, or encode the data again"
            )
    return {sizes[0]: cache}


# --- tensorflow-datasets


def open_tfds(name: str, split: str, sizes: Sequence[Size], data_dir: Path | None = None) -> dict[Size, Source]:
    """Pictures from the first Image feature; captions from the first Text, else the names of the first ClassLabel.

    name: in the catalogue, or the folder of a prepared data set in array_record files. For more than one size every
    picture's header is read first.
    """
    try:
        if (Path(name) / "dataset_info.json").is_file():
            builder = tfds.builder_from_directory(name)
        else:
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
    if builder.info.file_format != tfds.core.FileFormat.ARRAY_RECORD:
        form = builder.info.file_format.value
        raise ValueError(f"tfds:{name}: its files are {form}, which have no random access; prepare it as array_record")
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

    def measure(index: int) -> Size:
        return check_picture(stored[index][image], f"tfds:{name}[{index}]")

    buckets = _by_bucket(sizes, len(stored), measure, f"measuring {name}", check=False)
    return {size: bucket(size, indices) for size, indices in buckets.items()}


def _first(features: Mapping[str, Any], kind: type) -> str | None:
    """The first feature of exactly this kind (ClassLabel and Text have subclasses that mean something else)."""
    return next((key for key, feature in features.items() if type(feature) is kind), None)
