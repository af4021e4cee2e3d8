"""Loaders: batches in an order that depends on (seed, position) alone, for any number of processes.

Sample n of the global order is example pi_e(n mod N) of epoch e = n // N, with pi_e a permutation drawn from the seed
(grain's index shuffle). Batch k is samples [k B, (k + 1) B), of which each process reads the rows that its devices
need, so the global batch is the same array for any number of processes. A batch may continue from one epoch into the
next: nothing is dropped, each example comes once an epoch, and a data set may be smaller than a batch.

A BucketLoader takes every batch from one of several such orders, for examples of different shapes.
"""

from __future__ import annotations

import sys
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import grain
import numpy as np

from lcm_jax.data.records import Source

Batch = dict[str, Any]  # arrays (b, ...); texts as a list of b strings
Transform = Callable[[Any], Mapping[str, Any]]
Augment = Callable[[Any, np.random.Generator], Mapping[str, Any]]


@dataclass(frozen=True)
class Loader:
    """An endless sequence of batches: `loader[k]` is batch k, `iter(loader)` starts at batch 0 and can be resumed.

    Args:
        source: random access to records (dicts of arrays, numbers and texts).
        batch_size: examples in the global batch.
        seed: of the order of the examples, from 0 to 2**32 - 1.
        transform: record -> record, applied to each example.
        augment: (record, generator) -> record, applied before `transform`. The generator depends on the seed and the
            sample's number, so its numbers are the same after a resume and for any number of processes.
        rows: the indices of each batch that are read, in this order; None: all.
        shuffle: False keeps the order of the source.
        threads: threads that read ahead of the iterator; 0: a batch is read when it is asked for.

    Raises ValueError for an empty source, and for a number that cannot be used.
    """

    source: Source | Sequence[Mapping[str, Any]]
    batch_size: int
    seed: int
    transform: Transform | None = None
    augment: Augment | None = None
    rows: Sequence[int] | None = None
    shuffle: bool = True
    threads: int = 0

    def __post_init__(self) -> None:
        if len(self.source) == 0:
            raise ValueError("empty dataset: the loader's source holds no example")
        if self.batch_size < 1:
            raise ValueError(f"batch_size={self.batch_size} must be positive")
        if self.rows is not None and not (self.rows and set(self.rows) <= set(range(self.batch_size))):
            raise ValueError(f"rows={self.rows} must be some of the rows of a batch, 0 to {self.batch_size - 1}")
        _check_seed(self.seed)
        if self.threads < 0:
            raise ValueError(f"threads={self.threads} must not be negative")

    @cached_property
    def _batches(self) -> grain.MapDataset[Batch]:
        ordered = grain.MapDataset.source(self.source).seed(self.seed)
        if self.shuffle:
            ordered = ordered.shuffle()
        samples = ordered.repeat()
        if self.augment is not None:
            samples = samples.random_map(self.augment)
        rows = range(self.batch_size) if self.rows is None else self.rows
        examples = grain.MapDataset.source(_Part(samples, self.batch_size, rows))
        if self.transform is not None:
            examples = examples.map(self.transform)
        return examples.batch(len(rows), drop_remainder=True, batch_fn=_stack)

    @property
    def identity(self) -> dict[str, Any]:
        """Everything that the order depends on, as plain JSON values."""
        return {"seed": self.seed, "examples": len(self.source)}

    def __getitem__(self, index: int) -> Batch:
        if index < 0:
            raise IndexError(f"batch {index}: the sequence is endless; give an index of at least 0")
        return self._batches[index]

    def __iter__(self) -> LoaderIterator:
        return LoaderIterator(self)


@dataclass(frozen=True)
class BucketLoader:
    """An endless sequence of batches, each from one bucket, that is from one of the `loaders`; create it by `of`.

    Bucket b, of n_b examples, has given floor((e n_b + o_b) / B) batches of size B when epoch e begins. The batches
    of one epoch, of all buckets, come in an order drawn from the seed and the epoch. So in each epoch the buckets share
    the batches in proportion to their examples; examples short of a batch wait for the next epoch, and none is dropped.
    A bucket's own batches are those of a Loader: one permutation of its examples after another. The offset o_b is drawn
    from 0 .. B - 1, so that the expected number of batches is (e n_b) / B even for the smallest bucket and the first
    epochs.

    The order is the same for every process, so their parts of a batch are from one bucket.
    """

    loaders: tuple[Loader, ...]
    seed: int

    @classmethod
    def of(cls, sources: Sequence[Any], batch_size: int, seed: int, **options: Any) -> BucketLoader:
        """Return a loader with one bucket for each source.

        options: those of Loader. Each bucket's seed is drawn from `seed`.
        """
        _check_seed(seed)
        seeds = map(int, np.random.SeedSequence((seed, _BUCKETS)).generate_state(len(sources)))
        pairs = zip(sources, seeds, strict=True)
        return cls(tuple(Loader(source, batch_size, bucket_seed, **options) for source, bucket_seed in pairs), seed)

    @property
    def batch_size(self) -> int:
        """The number of examples in the global batch."""
        return self.loaders[0].batch_size

    @property
    def threads(self) -> int:
        """The number of threads that read ahead."""
        return self.loaders[0].threads

    @property
    def identity(self) -> dict[str, Any]:
        """Everything that the order depends on, as plain JSON values."""
        return {"seed": self.seed, "examples": list(map(int, self._counts)), "batch_size": self.batch_size}

    def position(self, index: int) -> tuple[int, int]:
        """Return the bucket of batch `index`, and its number among that bucket's batches."""
        examples = int(self._counts.sum())
        # an epoch before which batch `index` has been given
        latest = (index + 1 + len(self.loaders)) * self.batch_size // examples + 1
        epoch = bisect_right(range(1, latest + 1), index, key=lambda epoch: int(self._batches_before(epoch).sum()))
        before = self._batches_before(epoch)
        order = np.repeat(np.arange(len(self.loaders)), self._batches_before(epoch + 1) - before)
        order = np.random.default_rng((self.seed, epoch, _ORDER)).permutation(order)
        row = index - int(before.sum())
        bucket = int(order[row])
        return bucket, int(before[bucket] + np.count_nonzero(order[:row] == bucket))

    @cached_property
    def _counts(self) -> np.ndarray:
        return np.asarray([len(loader.source) for loader in self.loaders])

    @cached_property
    def _offsets(self) -> np.ndarray:
        return np.random.default_rng((self.seed, _OFFSETS)).integers(self.batch_size, size=len(self.loaders))

    def _batches_before(self, epoch: int) -> np.ndarray:
        """Return the number of batches that each bucket has given before an epoch."""
        return (epoch * self._counts + self._offsets) // self.batch_size

    @cached_property
    def _batches(self) -> grain.MapDataset[Batch]:
        return grain.MapDataset.source(_Scheduled(self))

    def __getitem__(self, index: int) -> Batch:
        if index < 0:
            raise IndexError(f"batch {index}: the sequence is endless; give an index of at least 0")
        bucket, number = self.position(index)
        return self.loaders[bucket][number]

    def __iter__(self) -> LoaderIterator:
        return LoaderIterator(self)


_ORDER, _BUCKETS, _OFFSETS = 1, 2, 3  # keys of what is drawn from a BucketLoader's seed


class LoaderIterator(Iterator[Batch]):
    """An iterator over a loader's batches; its state is plain JSON, and any number of processes can resume it."""

    def __init__(self, loader: Loader | BucketLoader) -> None:
        self._loader = loader
        options = grain.ReadOptions(num_threads=loader.threads, prefetch_buffer_size=2 if loader.threads else 0)
        self._iterator = iter(loader._batches.to_iter_dataset(options))

    def __next__(self) -> Batch:
        return next(self._iterator)

    def get_state(self) -> dict[str, Any]:
        """Return the state: `position`, the number of samples given so far over all processes, and the identity."""
        return {
            "position": self._iterator.get_state()["next_index"] * self._loader.batch_size,
            **self._loader.identity,
        }

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Continue from a state; raise ValueError if it belongs to another order."""
        for key, value in self._loader.identity.items():
            if state.get(key) != value:
                raise ValueError(
                    f"loader state has {key}={state.get(key)}, this loader {value}; "
                    "give it the data, the seed and the batch size it was saved with"
                )
        batch, remainder = divmod(int(state["position"]), self._loader.batch_size)
        if remainder:
            raise ValueError(
                f"loader state position={state['position']} is no multiple of batch_size={self._loader.batch_size}; "
                "resume with the batch size it was saved with"
            )
        self._iterator.set_state({"next_index": batch})


class _Part:
    """A source of the samples of some rows of every batch, one batch after another."""

    def __init__(self, ordered: grain.MapDataset, batch_size: int, rows: Sequence[int]) -> None:
        self._ordered, self._batch_size, self._rows = ordered, batch_size, rows

    def __len__(self) -> int:
        return sys.maxsize // self._batch_size * len(self._rows)

    def __getitem__(self, index: int) -> Any:
        batch, i = divmod(index, len(self._rows))
        return self._ordered[batch * self._batch_size + self._rows[i]]


class _Scheduled:
    """A source that grain reads, of the batches of a BucketLoader."""

    def __init__(self, loader: BucketLoader) -> None:
        self._loader = loader

    def __len__(self) -> int:
        return sys.maxsize // self._loader.batch_size

    def __getitem__(self, index: int) -> Batch:
        return self._loader[index]


def _check_seed(seed: int) -> None:
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed={seed} must lie in [0, 2**32)")


def _stack(records: Sequence[Mapping[str, Any]]) -> Batch:
    def column(key: str) -> Any:
        values = [record[key] for record in records]
        return values if isinstance(values[0], str) else np.stack(values)

    return {key: column(key) for key in records[0]}
