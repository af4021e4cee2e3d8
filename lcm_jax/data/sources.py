"""Random-access sources of captioned pictures, whose records are all of one form.

    load_source("openmoji", "train", 64)             OpenMoji drawings (splits: train, validation, compositional)
    load_source("openmoji-outline", "train", 64)     the same drawings with black lines alone
    load_source("folder:pictures", "train", 512)     pictures, .txt captions or metadata.jsonl (lcm_jax.data.folders)
    load_source("tar:shards/train-*.tar")            samples in tar files, in webdataset's layout (lcm_jax.data.tars)
    load_source("tfds:mnist", "test", 32)            any data set of tensorflow-datasets with pictures
    load_source("tfds:prepared/mnist/3.0.1")         the same, by the folder of its array_record files
    load_source("encoded", encoded=True)             latents that `lcm-jax encode` has made from one of these
    load_source("mine:some text", "train", 64)       a source of your own, after `register("mine", open_mine)`

Opening a source checks all of it and raises an error of one line, before any work begins. With check=False an
unreadable picture raises ValueError only when it is asked for.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import tensorflow_datasets as tfds

from lcm_jax.data import openmoji
from lcm_jax.data.array_cache import MANIFEST, Cache, open_cache
from lcm_jax.data.folders import open_folder
from lcm_jax.data.records import InMemory, OnDemand, Source, Texts, by_bucket
from lcm_jax.data.tars import open_tars
from lcm_jax.runtime.cache import cache_dir
from lcm_jax.runtime.image_io import Size
from lcm_jax.runtime.user_code import is_same_definition

OPENMOJI: Mapping[str, openmoji.Style] = {"openmoji": "colour", "openmoji-outline": "outline"}
IN_MEMORY_BYTES = 256 * 2**20  # OpenMoji is decoded once up to this size (128 pixels), else on each reading


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


def has_split(name: str, split: str) -> bool:
    """Return whether a data set says that it has a split of that name; the functions of registered sources do not."""
    kind, colon, rest = name.partition(":")
    if name in OPENMOJI:
        return split in openmoji.SPLITS
    if colon and kind == "tfds":
        return split in _tfds_builder(rest).info.splits
    return (Path(rest if colon and kind in ("folder", "tar") else name) / split).is_dir()


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
    >>> from lcm_jax.data import InMemory
    >>> from lcm_jax.data.sources import OPENERS, register
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


# --- OpenMoji


def open_openmoji(split: str, size: int, style: openmoji.Style = "colour") -> Source:
    """Open the OpenMoji drawings; record i is `openmoji.split_items(split)[i]`, which has its role, tones and group."""
    items = openmoji.split_items(split)
    builder = openmoji.prepare(size, cache_dir(), style)
    stored = builder.as_data_source(split=split, decoders={"image": tfds.decode.SkipDecoding()})
    pictures = {str(row["codepoints"], "ascii"): row["image"] for row in stored.__getitems__(range(len(stored)))}
    files = [StoredPicture(item.codepoints, pictures[item.codepoints], item.caption) for item in items]
    source = OnDemand(items=files, size=(size, size), is_fixed=True)
    if len(items) * size * size * 3 > IN_MEMORY_BYTES:
        return source
    images = np.stack([source[index]["image"] for index in range(len(source))])
    images.setflags(write=False)  # records are views, and a transform must not change the data set
    return InMemory(images=images, captions=tuple(item.caption for item in items), is_fixed=True)


class StoredPicture(NamedTuple):
    """A picture's file in memory, with its caption."""

    name: str
    data: bytes
    caption: str

    def read(self) -> bytes:
        """Return the file's bytes."""
        return self.data

    def texts(self) -> Texts:
        """Return the caption."""
        return {"caption": self.caption}

    def stamp(self) -> Sequence[Any]:
        """Return the caption and a digest of the bytes."""
        return [hashlib.sha256(self.data).hexdigest(), self.caption]

    def check(self) -> None:
        """Do nothing: what is in memory does not change."""


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
    builder = _tfds_builder(name, data_dir)
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
    with openmoji.silent():
        builder.download_and_prepare()
    if split not in builder.info.splits:
        raise ValueError(f"tfds:{name}: no split {split!r}; choose one of {', '.join(builder.info.splits)}")
    stored = builder.as_data_source(split=split, decoders={image: tfds.decode.SkipDecoding()})
    if len(stored) == 0:
        raise ValueError(f"tfds:{name}: empty dataset; split {split!r} holds no picture")
    data_set = Stored(
        name=name,
        rows=stored,
        image=image,
        caption=caption,
        words=getattr(features[caption], "int2str", lambda text: text.decode()),
        stamp=[builder.info.full_name, split, *map(_file_stamp, builder.info.splits[split].filepaths)],
    )
    items = [Row(data_set, index) for index in range(len(stored))]
    return {size: OnDemand(items=part, size=size) for size, part in by_bucket(sizes, items, check=False).items()}


@dataclass(frozen=True, kw_only=True, eq=False)
class Stored:
    """A prepared data set of tensorflow-datasets: its rows, the names of two features, and what its files are."""

    name: str
    rows: Sequence[Any]
    image: str
    caption: str
    words: Callable[[Any], str]
    stamp: Sequence[Any]


class Row(NamedTuple):
    """A row of a data set of tensorflow-datasets."""

    data_set: Stored
    number: int

    @property
    def name(self) -> str:
        """The row's name for messages."""
        return f"tfds:{self.data_set.name}[{self.number}]"

    def read(self) -> bytes:
        """Return the bytes of the picture's file."""
        data: bytes = self.data_set.rows[self.number][self.data_set.image]
        return data

    def texts(self) -> Texts:
        """Return the caption."""
        return {"caption": self.data_set.words(self.data_set.rows[self.number][self.data_set.caption])}

    def stamp(self) -> Sequence[Any]:
        """Return the data set's name and files, and the row's number."""
        return [*self.data_set.stamp, self.number]

    def check(self) -> None:
        """Do nothing: tensorflow-datasets writes a prepared data set once."""


def _file_stamp(path: Any) -> Sequence[Any]:
    found = Path(path).stat()
    return [str(Path(path).resolve()), found.st_size, found.st_mtime_ns]


def _tfds_builder(name: str, data_dir: Path | None = None) -> tfds.core.DatasetBuilder:
    try:
        if (Path(name) / "dataset_info.json").is_file():
            return tfds.builder_from_directory(name)
        return tfds.builder(name, data_dir=data_dir or cache_dir() / "tfds", file_format="array_record")
    except tfds.core.DatasetNotFoundError as error:
        raise ValueError(f"tfds:{name}: tensorflow-datasets knows no such data set; see its catalogue") from error


def _first(features: tfds.features.FeaturesDict, kind: type) -> str | None:
    """Return the name of the first feature of exactly this type; subclasses mean other things."""
    return next((key for key, feature in features.items() if type(feature) is kind), None)
