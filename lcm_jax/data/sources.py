"""Random-access sources of captioned pictures, whose records are all of one form.

    load_source("openmoji", "train", 64)             OpenMoji drawings (splits: train, validation, compositional)
    load_source("openmoji-outline", "train", 64)     the same drawings with black lines alone
    load_source("folder:pictures", "train", 512)     pictures with .txt captions beside them, or a metadata.jsonl
    load_source("tar:shards/train-*.tar")            samples in tar files, in webdataset's layout (lcm_jax.data.tars)
    load_source("tfds:mnist", "test", 32)            any data set of tensorflow-datasets with pictures
    load_source("tfds:prepared/mnist/3.0.1")         the same, by the folder of its array_record files
    load_source("encoded", encoded=True)             latents that `lcm-jax encode` has made from one of these
    load_source("mine:some text", "train", 64)       a source of your own, after `register("mine", open_mine)`

Opening a source checks all of it and raises an error of one line, before any work begins. With check=False an
unreadable picture raises ValueError only when it is asked for.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NotRequired, Protocol, TypedDict, runtime_checkable

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
from lcm_jax.runtime.user_code import is_same_definition

OPENMOJI: Mapping[str, openmoji.Style] = {"openmoji": "colour", "openmoji-outline": "outline"}
IN_MEMORY_BYTES = 256 * 2**20  # OpenMoji is decoded once up to this size (128 pixels), else on each reading


class Texts(TypedDict):
    """The captions of a record."""

    caption: str
    synthetic_caption: NotRequired[str]  # a second text, see lcm_jax.data.mixing


class Record(Texts):
    """A captioned picture: uint8 (height, width, 3)."""

    image: UInt8[np.ndarray, "h w 3"]


@runtime_checkable
class Source(Protocol):
    """Random access to records, which a Loader shuffles; a Cache of encoded records is one too."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


def load_source(
    name: str, split: str = "train", size: int = 64, *, check: bool = True, encoded: bool = False
) -> Source:
    """Open a source by its name, see above, or by a plain path of a folder; pictures are uint8 (size, size, 3).

    size: edge of the squares in pixels. check: whether every picture is checked now. encoded: whether the source may be
    one of latents.

    Raises ValueError or FileNotFoundError, in one line, for a source that cannot be used.
    """
    if size < 1:
        raise ValueError(f"size={size}: give the edge of the pictures in pixels, at least 1")
    (source,) = load_buckets(name, split, [(size, size)], check=check).values()
    if isinstance(source, Cache) and not encoded:
        data = source.produced_by["data"]
        raise ValueError(f"{name}: holds latents, and pictures are needed; give what it was made of, {data}")
    return source


def load_buckets(name: str, split: str, sizes: Sequence[Size], *, check: bool = True) -> dict[Size, Source]:
    """Open a data set as one source for each of `sizes` that has pictures, in the order of `sizes`.

    Each picture goes to the size nearest to its shape (lcm_jax.data.buckets). Latents have one size. Raises as
    `load_source` does.
    """
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
        if any((path / MANIFEST).is_file() for path in (folder, folder / split)):
            return open_encoded(folder, split, sizes)
        return open_folder(folder, split, sizes, check=check)
    if kind in OPENERS:
        if len(sizes) > 1:
            raise ValueError(f"{name}: the registered sources have one size; leave buckets out")
        return {size: _checked(OPENERS[kind](rest, split, size[0]), name) for size in sizes}
    known = ", ".join([*OPENMOJI, *(f"{kind}:TEXT" for kind in OPENERS)])
    raise ValueError(
        f"no data source {name!r}: give {known}, folder:PATH (an existing folder), tar:FILES, tfds:NAME or the folder "
        "of an encoded data set"
    )


def _checked(source: Any, name: str) -> Source:
    """Return a registered source; ValueError, which names the source and the field, if its first record is wrong."""
    if not (hasattr(source, "__len__") and hasattr(source, "__getitem__")):
        raise ValueError(
            f"data {name}: its function returned a {type(source).__name__}, without __len__ or __getitem__"
        )
    if len(source) == 0:
        raise ValueError(f"data {name}: it has no records")
    record = source[0]
    image, caption = (record.get(field) if isinstance(record, Mapping) else None for field in ("image", "caption"))
    if not (isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3):
        found = f"{image.dtype} {image.shape}" if isinstance(image, np.ndarray) else type(image).__name__
        raise ValueError(f"data {name}, record 0: image must be a uint8 array (height, width, 3), and is {found}")
    if not isinstance(caption, str):
        raise ValueError(f"data {name}, record 0: caption must be a text, and is {type(caption).__name__}")
    return source


Opener = Callable[[str, str, int], Source]
"""(text after the colon, split, edge in pixels) -> records {"image": uint8 (size, size, 3), "caption": text}."""

OPENERS: dict[str, Opener] = {}
"""The sources that users have registered."""


def register(kind: str, opener: Opener) -> Opener:
    """Register a data source of your own: "KIND:TEXT" is then a name of data, opened by `opener(TEXT, split, size)`.

    ValueError where the kind is taken.

    >>> import numpy as np
    >>> from lcm_jax.data import load_source
    >>> from lcm_jax.data.sources import InMemory, OPENERS, register
    >>> def open_grey(caption, split, size):
    ...     return InMemory(images=np.full((4, size, size, 3), 128, np.uint8), captions=(caption,) * 4)
    >>> _ = register("grey", open_grey)
    >>> source = load_source("grey:a grey square", "train", 8)
    >>> len(source), source[0]["image"].shape, source[0]["caption"]
    (4, (8, 8, 3), 'a grey square')
    >>> del OPENERS["grey"]
    """
    if not callable(opener):
        raise ValueError(
            f"data source {kind!r} is a {type(opener).__name__}: give a function (text, split, size) -> source"
        )
    if kind in ("folder", "tar", "tfds", *OPENMOJI) or not is_same_definition(OPENERS.get(kind, opener), opener):
        raise ValueError(f"data source {kind!r} is registered already: give yours another name")
    OPENERS[kind] = opener
    return opener


@dataclass(frozen=True, kw_only=True)
class InMemory:
    """A source of pictures that are decoded already."""

    images: UInt8[np.ndarray, "n h w 3"]
    captions: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.captions)

    def __getitem__(self, index: int, /) -> Record:
        return {"image": self.images[index], "caption": self.captions[index]}


@dataclass(frozen=True, kw_only=True)
class OnDemand:
    """A source of pictures that are decoded on each reading; `read(index)` returns one record."""

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
    """Return size -> indices of its pictures, of `count` in all.

    All pictures are measured, which also checks them; with one size and check=False none is.
    """
    if len(sizes) == 1 and not check:
        return {sizes[0]: range(count)}
    buckets: dict[Size, list[int]] = {size: [] for size in sizes}
    for index in tqdm(range(count), title, disable=None, leave=False):
        buckets[nearest_bucket(sizes, measure(index))].append(index)
    return {size: indices for size, indices in buckets.items() if indices}


def _split_of(folder: Path, split: str) -> Path:
    """Return PATH/SPLIT if that exists, else PATH itself for "train"; raise FileNotFoundError for other splits."""
    if (folder / split).is_dir():
        return folder / split
    if split != "train":
        raise FileNotFoundError(f"{folder / split}: no such folder; a split of a folder is a folder of that name in it")
    return folder


# --- OpenMoji


def open_openmoji(split: str, size: int, style: openmoji.Style = "colour") -> Source:
    """Open the OpenMoji drawings; record i is `openmoji.split_items(split)[i]`, which has its role, tones and group."""
    items = openmoji.split_items(split)
    builder = openmoji.prepare(size, cache_dir(), style)
    stored = builder.as_data_source(split=split, decoders={"image": tfds.decode.SkipDecoding()})
    pictures = {str(row["codepoints"], "ascii"): row["image"] for row in stored.__getitems__(range(len(stored)))}
    files = [pictures[item.codepoints] for item in items]
    captions = tuple(item.caption for item in items)
    if len(items) * size * size * 3 > IN_MEMORY_BYTES:
        return _on_demand(files, [{"caption": caption} for caption in captions], (size, size))
    images = np.stack([read_picture(data, (size, size)) for data in files])
    images.setflags(write=False)  # records are views, and a transform must not change the data set
    return InMemory(images=images, captions=captions)


# --- a folder of pictures


def open_folder(folder: Path, split: str, sizes: Sequence[Size], *, check: bool = True) -> dict[Size, Source]:
    """Open PATH/SPLIT if that exists, else PATH itself for "train"; captions are in metadata.jsonl, or else in .txt.

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
        first = stems.setdefault(path.with_suffix(""), path)
        if first is not path:
            raise ValueError(f"{path}: shares its caption file with {first.name}; rename one of the two")
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
    """Return the texts of metadata.jsonl: one {"file_name", "text", "synthetic"} a line, with paths relative to it.

    "synthetic" may be missing in all lines, but not in some: a cache holds the same fields for every picture.
    """
    texts: dict[Path, Texts] = {}
    for number, line in enumerate(table.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{table}:{number}: not JSON ({error.msg}); write one object a line") from error
        name, text = (row.get("file_name"), row.get("text")) if isinstance(row, dict) else (None, None)
        if not isinstance(name, str) or not isinstance(text, str) or not name or not text.strip():
            raise ValueError(f'{table}:{number}: needs text values for "file_name" and "text"; add them')
        path = table.parent / name
        if path in texts:
            raise ValueError(f"{table}:{number}: {name} is listed twice; remove one of its lines")
        texts[path] = {"caption": text.strip()}
        if "synthetic" in row:
            texts[path]["synthetic_caption"] = _second_text(row["synthetic"], f"{table}:{number}")
    for path in sorted(texts.keys() - set(pictures)):
        raise ValueError(f"{table}: caption of {path.name} without a picture; remove the line or add the picture")
    for path in pictures:
        if path not in texts:
            raise ValueError(f"{path}: picture without caption; add a line for it to metadata.jsonl")
    with_synthetic = {path for path in pictures if "synthetic_caption" in texts[path]}
    for path in pictures:
        if with_synthetic and path not in with_synthetic:
            raise ValueError(
                f'{table}: {path.name} has no "synthetic" text, others have; write one for all or for none'
            )
    return [texts[path] for path in pictures]


def _second_text(text: Any, line: str) -> str:
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f'{line}: "synthetic" is not a text; write one, or leave the key out of every line')
    return text.strip()


# --- tar files


def open_tars(pattern: str, split: str, sizes: Sequence[Size], *, check: bool = True) -> dict[Size, Source]:
    """Open a tar file, a folder of tar files (or of one folder for each split), or a pattern of their names."""
    folder = Path(pattern)
    if not folder.is_dir() and split != "train":
        raise ValueError(
            f"tar:{pattern}: names the files of one split; give those of {split!r}, and train as the split"
        )
    paths = find_tars(str(_split_of(folder, split)) if folder.is_dir() else pattern)
    samples = [
        sample for path in tqdm(paths, "listing tars", disable=None, leave=False) for sample in read_samples(path)
    ]
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
    """Open what `lcm-jax encode` wrote: PATH/SPLIT if that exists, else PATH; each process checks a part of it.

    Raises ValueError if it was encoded with another split or size.
    """
    folder = folder / split if (folder / split).is_dir() else folder
    cache = open_cache(folder, part=jax.process_index(), parts=jax.process_count())
    if len(sizes) > 1:
        raise ValueError(f"{folder}: encoded pictures have one size; leave buckets out")
    for key, value in {"split": split, "size": sizes[0][0]}.items():
        if cache.produced_by.get(key) != value:
            raise ValueError(
                f"{folder}: encoded with {key}={cache.produced_by.get(key)}, and {key}={value} is asked for; "
                "change it, or encode the data again"
            )
    return {sizes[0]: cache}


# --- tensorflow-datasets


def open_tfds(name: str, split: str, sizes: Sequence[Size], data_dir: Path | None = None) -> dict[Size, Source]:
    """Open a data set of tensorflow-datasets: its first Image feature, with the first Text or ClassLabel as captions.

    name: in the catalogue, or the folder of a prepared data set in array_record files. With several sizes the header of
    every picture is read first.
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
        raise ValueError(f"tfds:{name}: needs an Image and a Text or ClassLabel feature, but has {', '.join(features)}")
    if features[image].np_dtype != np.uint8:
        raise ValueError(f"tfds:{name}: feature {image} is {features[image].np_dtype}, not uint8; convert it first")
    if builder.info.file_format != tfds.core.FileFormat.ARRAY_RECORD:
        file_format = builder.info.file_format.value
        raise ValueError(
            f"tfds:{name}: its files are {file_format}, which have no random access; prepare it as array_record"
        )
    with contextlib.redirect_stdout(sys.stderr):  # tfds prints to stdout, which belongs to the caller
        builder.download_and_prepare()
    if split not in builder.info.splits:
        raise ValueError(f"tfds:{name}: no split {split!r}; choose one of {', '.join(builder.info.splits)}")
    stored = builder.as_data_source(split=split, decoders={image: tfds.decode.SkipDecoding()})
    if len(stored) == 0:
        raise ValueError(f"tfds:{name}: empty dataset; split {split!r} holds no picture")
    words = getattr(features[caption], "int2str", lambda text: text.decode())

    def bucket(size: Size, indices: Sequence[int]) -> Source:
        def read(index: int) -> Record:
            number = indices[index]
            row = stored[number]
            return {"image": read_picture(row[image], size, f"tfds:{name}[{number}]"), "caption": words(row[caption])}

        return OnDemand(read=read, length=len(indices))

    def measure(index: int) -> Size:
        return check_picture(stored[index][image], f"tfds:{name}[{index}]")

    buckets = _by_bucket(sizes, len(stored), measure, f"measuring {name}", check=False)
    return {size: bucket(size, indices) for size, indices in buckets.items()}


def _first(features: tfds.features.FeaturesDict, kind: type) -> str | None:
    """Return the name of the first feature of exactly this type; subclasses mean other things."""
    return next((key for key, feature in features.items() if type(feature) is kind), None)
