"""What the tasks share: the pictures they read and the grids they show."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from lcm_jax.data import (
    BucketLoader,
    CaptionMix,
    Loader,
    LoaderIterator,
    Source,
    bucket_sizes,
    load_buckets,
    load_source,
)
from lcm_jax.data.loader import Augment, Transform
from lcm_jax.runtime.image_io import Size


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Captioned pictures: "openmoji", "openmoji-outline", "folder:PATH", "tar:FILES", "tfds:NAME", or the folder that
    `lcm-jax encode` wrote of one of these, for tasks that train on latents.

    Squares of `size`, or with `buckets` pictures of all shapes of about as many pixels, each batch of one shape (see
    lcm_jax.data.buckets). Buckets and synthetic captions are for the data of diffusion and of its distillation.
    """

    name: str = "openmoji"
    split: str = "train"
    size: int = 64  # pixels
    buckets: bool = False
    aspect: float = 2.0  # of buckets: the longer side over the shorter, at most
    multiple: int = 16  # of buckets: what sides are multiples of; the larger, the fewer buckets and compilations
    synthetic: float | None = None  # share of synthetic captions; None: half of them where the data has them, else none

    def __post_init__(self) -> None:
        _ = self.sizes  # raises ValueError
        if self.synthetic is not None and not 0.0 <= self.synthetic <= 1.0:
            raise ValueError(f"data.synthetic is {self.synthetic}: the share of synthetic captions, from 0 to 1")

    @property
    def sizes(self) -> tuple[Size, ...]:
        """Of the pictures."""
        return bucket_sizes(self.size, self.multiple, self.aspect) if self.buckets else ((self.size, self.size),)

    def open(self, *, encoded: bool = False) -> Source:
        """The squares. encoded: their latents are welcome too."""
        if self.buckets or self.synthetic:
            raise ValueError(
                f"{self.name} with buckets={self.buckets}, synthetic={self.synthetic}: only task.data of diffusion and "
                "of its distillation takes them; leave them out here"
            )
        return load_source(self.name, self.split, self.size, encoded=encoded)

    def open_buckets(self) -> dict[Size, Source]:
        """A source for each size that has pictures."""
        return load_buckets(self.name, self.split, self.sizes)

    def mix(self, source: Source) -> CaptionMix | None:
        """What mixes in the source's synthetic captions."""
        there = "synthetic_caption" in source[0]
        rate = (0.5 if there else 0.0) if self.synthetic is None else self.synthetic
        if rate and not there:
            raise ValueError(
                f"data.synthetic is {rate}, but {self.name} has no synthetic captions: "
                'give every line of its metadata.jsonl a "synthetic" text'
            )
        return CaptionMix(rate=rate) if rate else None


class StartBatches(Protocol):
    """Batches of a size, in the order of a seed; of each batch only `rows` are read (None: all)."""

    def __call__(self, batch_size: int, seed: int, rows: Sequence[int] | None = None) -> LoaderIterator: ...


def captions(source: Source, most: int | None = None) -> list[str]:
    """The first captions of a source, or all."""
    count = len(source) if most is None else min(most, len(source))
    return [source[i]["caption"] for i in range(count)]


def loader(*sources: Any, transform: Transform | None = None, augment: Augment | None = None) -> StartBatches:
    """A resumable iterator over random-access records, each passed through `augment`, then `transform`.

    Of several sources every batch is of one (BucketLoader).
    """

    def start(batch_size: int, seed: int, rows: Sequence[int] | None = None) -> LoaderIterator:
        options: dict[str, Any] = {"transform": transform, "augment": augment, "rows": rows}
        if len(sources) == 1:
            return iter(Loader(sources[0], batch_size, seed, **options))
        return iter(BucketLoader.of(sources, batch_size, seed, **options))

    return start
