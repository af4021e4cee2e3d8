"""The data that all tasks read: the config of a data source, its captions, and its batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol, get_args, runtime_checkable

from lcm_jax.data import (
    BucketLoader,
    CaptionMix,
    Loader,
    LoaderIterator,
    Source,
    bucket_sizes,
    has_split,
    load_buckets,
    load_source,
)
from lcm_jax.data.loader import Augment, Transform
from lcm_jax.data.records import Texts, read_texts
from lcm_jax.parallel.distributed import say
from lcm_jax.runtime.image_io import Size

HELD_OUT = 256  # pictures that a validation takes, at most
SHARE = 20  # one picture of so many is held out of a data set without a split for the validation

Dtype = Literal["float32", "bfloat16", "float16"]


def check_dtype(key: str, value: str) -> None:
    """Raise ValueError if the value of a key is no `Dtype`."""
    if value not in get_args(Dtype):
        raise ValueError(f"{key} is {value!r}; use one of {', '.join(get_args(Dtype))}")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """A data set of captioned pictures, by the name of its source.

    name: "openmoji", "openmoji-outline", "folder:PATH", "tar:FILES", "tfds:NAME", or, for tasks that train on latents,
    the folder that `lcm-jax encode` wrote from one of these; see `lcm_jax.data.load_source`.

    The pictures are squares of `size`. With `buckets` they have all shapes of about as many pixels, and each batch has
    one shape (see lcm_jax.data.buckets). Buckets and synthetic captions are for DiffusionTask and DistillationTask.

    Raises ValueError for sizes and shares that cannot be used.
    """

    name: str = "openmoji"
    split: str = "train"
    size: int = 64  # edge of the squares, in pixels
    buckets: bool = False
    aspect: float = 2.0  # for buckets: the largest ratio of the longer side to the shorter
    multiple: int = 16  # for buckets: sides are multiples of it; a larger one gives fewer buckets and compilations
    synthetic: float | None = None  # share of synthetic captions; None: 0.5 if the data has any, else 0

    def __post_init__(self) -> None:
        _ = self.sizes  # raises ValueError
        if self.synthetic is not None and not 0.0 <= self.synthetic <= 1.0:
            raise ValueError(f"data.synthetic is {self.synthetic}: the share of synthetic captions, from 0 to 1")

    @property
    def sizes(self) -> tuple[Size, ...]:
        """Every (height, width) that a picture can have, in pixels."""
        return bucket_sizes(self.size, self.multiple, self.aspect) if self.buckets else ((self.size, self.size),)

    def open(self, *, encoded: bool = False) -> Source:
        """Open the source of square pictures; with `encoded` it may be one of their latents instead.

        Raises ValueError if the config asks for buckets or synthetic captions.
        """
        if self.buckets or self.synthetic:
            raise ValueError(
                f"{self.name} with buckets={self.buckets}, synthetic={self.synthetic}: only task.data of diffusion and "
                "of its distillation takes them; leave them out"
            )
        return load_source(self.name, self.split, self.size, encoded=encoded)

    def open_buckets(self) -> dict[Size, Source]:
        """Open the sources of the pictures, one for each size that has any."""
        return load_buckets(self.name, self.split, self.sizes)

    def mix(self, source: Source) -> CaptionMix | None:
        """Return the mix of the source's captions with its synthetic ones, or None if none are used.

        Raises ValueError if the config asks for synthetic captions and the source has none.
        """
        has_synthetic = "synthetic_caption" in source[0]
        rate = (0.5 if has_synthetic else 0.0) if self.synthetic is None else self.synthetic
        if rate and not has_synthetic:
            raise ValueError(
                f"data.synthetic is {rate}, but {self.name} has no synthetic captions: "
                'give every line of its metadata.jsonl a "synthetic" text'
            )
        return CaptionMix(rate=rate) if rate else None


def check_preview_steps(steps: int) -> None:
    """Raise ValueError unless a preview has at least one step."""
    if steps < 1:
        raise ValueError(f"task.preview_steps is {steps}; it must be at least 1")


def held_out() -> DataConfig:
    """Return the config of what a task shows and measures by default: pictures of its own data, see `held_out_config`.

    The empty name and the size 0 stand for those of the data.
    """
    return DataConfig(name="", split="validation", size=0)


def resolved_config(config: DataConfig, data: DataConfig) -> DataConfig:
    """Return a config with the name and the size of `data` where it has none of its own."""
    return replace(config, name=config.name or data.name, size=config.size or data.size)


def held_out_config(config: DataConfig, data: DataConfig) -> DataConfig | None:
    """Return the config of the pictures to validate on; None: a share of `data`, which has no split for it.

    config: a split by name, or `held_out()`: the split "validation" of `data` where there is one.
    """
    chosen = resolved_config(config, data)
    # Without a folder `train` beside it a folder `validation` is a part of what is trained on.
    is_apart = all(has_split(chosen.name, split) for split in (data.split, chosen.split))
    is_share = not config.name and config.split == held_out().split and not is_apart
    return None if is_share else chosen


@dataclass(frozen=True)
class Subset:
    """A source of some of the records of another one."""

    source: Source
    indices: Sequence[int]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int, /) -> Any:
        return self.source[self.indices[index]]

    def texts(self, index: int) -> Texts:
        """Return the captions of a record."""
        return read_texts(self.source, self.indices[index])


def share(source: Source, name: str) -> tuple[Subset, Subset]:
    """Return a data set in two parts: what is trained on, and every `SHARE`-th picture, which is held out.

    name: of the data set, for messages. ValueError if it has one picture alone.
    """
    count = len(source)
    if count < 2:
        raise ValueError(
            f"{name}: holds one picture, and one is held out for the validation: add pictures, or name other data "
            "with task.prompts.name (task.validation.name)"
        )
    most = min(HELD_OUT, max(1, count // SHARE))
    apart = [(2 * i + 1) * count // (2 * most) for i in range(most)]  # evenly over the data, in their order
    say(f"{name} has no split for the validation: the training leaves out {most} of its {count} pictures for it")
    return Subset(source, sorted(set(range(count)) - set(apart))), Subset(source, apart)


def open_with_held_out(data: DataConfig, validation: DataConfig) -> tuple[Source, Source]:
    """Open the pictures to train on and those to validate on, see `held_out_config`."""
    source, config = data.open(), held_out_config(validation, data)
    return share(source, data.name) if config is None else (source, config.open())


@runtime_checkable
class StartBatches(Protocol):
    """A function that returns an iterator of batches, in an order given by `seed`.

    rows: the indices of each batch that are read; None: all.
    """

    def __call__(self, batch_size: int, seed: int, rows: Sequence[int] | None = None) -> LoaderIterator: ...


def captions(source: Source, most: int | None = None) -> list[str]:
    """Return the first `most` captions of a source, or all; no picture is decoded for them (`read_texts`)."""
    count = len(source) if most is None else min(most, len(source))
    return [read_texts(source, i)["caption"] for i in range(count)]


def loader(*sources: Any, transform: Transform | None = None, augment: Augment | None = None) -> StartBatches:
    """Return a function (batch_size, seed, rows) -> resumable iterator of batches of the sources' records.

    Each record is passed through `augment`, then `transform`. With several sources each batch comes from one of them
    (BucketLoader).
    """

    def start(batch_size: int, seed: int, rows: Sequence[int] | None = None) -> LoaderIterator:
        options: dict[str, Any] = {"transform": transform, "augment": augment, "rows": rows}
        if len(sources) == 1:
            return iter(Loader(sources[0], batch_size, seed, **options))
        return iter(BucketLoader.of(sources, batch_size, seed, **options))

    return start
