"""Batches in an order that is a function of (seed, position) alone, for any number of processes.

Sample n of the global order is example pi_e(n mod N) of epoch e = n // N, with pi_e a permutation drawn from the seed
(grain's index shuffle). Batch k is samples [k B, (k + 1) B), and process p of P reads its p-th contiguous part of it,
so the global batch is the same array however many processes share the work. Epochs follow one another without a seam:
nothing is dropped, each example comes once an epoch, and a data set smaller than a batch will do.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import grain
import numpy as np

from lcm_jax.data.sources import Source

Batch = dict[str, Any]  # arrays (b, ...); texts as a list of b strings
Transform = Callable[[Any], Mapping[str, Any]]
Augment = Callable[[Any, np.random.Generator], Mapping[str, Any]]


@dataclass(frozen=True)
class Loader:
    """An endless sequence of batches: `loader[k]` is batch k, `iter(loader)` starts at batch 0 and can be resumed.

    Args:
        source: random access to records (dicts of arrays, numbers and texts).
        batch_size: of the global batch; each process yields batch_size / process_count rows.
        seed: of the order of the examples.
        transform: record -> record, applied to each example.
        augment: (record, generator) -> record, before it. The generator is a function of the seed and the sample's
            number, so what it decides is the same after a resume and for any number of processes.
        process_index, process_count: which part of each batch is read here.
        shuffle: False keeps the order of the source.
        threads: that read ahead of the iterator, 0 to read when asked.
    """

    source: Source | Sequence[Mapping[str, Any]]
    batch_size: int
    seed: int
    transform: Transform | None = None
    augment: Augment | None = None
    process_index: int = 0
    process_count: int = 1
    shuffle: bool = True
    threads: int = 0

    def __post_init__(self) -> None:
        if len(self.source) == 0:
            raise ValueError("empty dataset: the loader's source holds no example")
        if self.batch_size < 1 or self.process_count < 1 or self.batch_size % self.process_count:
            raise ValueError(
                f"batch_size={self.batch_size} must be a positive multiple of process_count={self.process_count}"
            )
        if not 0 <= self.process_index < self.process_count:
            raise ValueError(f"process_index={self.process_index} must lie in [0, process_count={self.process_count})")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed={self.seed} must lie in [0, 2**32)")
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
        part = _Part(samples, self.batch_size, self.process_index, self.batch_size // self.process_count)
        rows = grain.MapDataset.source(part)
        if self.transform is not None:
            rows = rows.map(self.transform)
        return rows.batch(part.rows, drop_remainder=True, batch_fn=_stack)

    def __getitem__(self, index: int) -> Batch:
        if index < 0:
            raise IndexError(f"batch {index}: an endless sequence has no end to count from")
        return self._batches[index]

    def __iter__(self) -> LoaderIterator:
        return LoaderIterator(self)


class LoaderIterator(Iterator[Batch]):
    """Batches in order. The state is a JSON-able dict that any number of processes resumes."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader
        options = grain.ReadOptions(num_threads=loader.threads, prefetch_buffer_size=2 if loader.threads else 0)
        self._iterator = iter(loader._batches.to_iter_dataset(options))

    def __next__(self) -> Batch:
        return next(self._iterator)

    def get_state(self) -> dict[str, int]:
        """`position`: the number of samples that the global order has given so far."""
        position = self._iterator.get_state()["next_index"] * self._loader.batch_size
        return {"position": position, "seed": self._loader.seed, "examples": len(self._loader.source)}

    def set_state(self, state: Mapping[str, int]) -> None:
        """Goes on from there. Raises ValueError where the order would not be the one the state belongs to."""
        here = self.get_state()
        for key in ("seed", "examples"):
            if state.get(key) != here[key]:
                raise ValueError(
                    f"loader state has {key}={state.get(key)}, this loader {here[key]}; give it the same data"
                )
        batch, rest = divmod(int(state["position"]), self._loader.batch_size)
        if rest:
            raise ValueError(
                f"loader state position={state['position']} is no multiple of batch_size={self._loader.batch_size}; "
                "resume with the batch size it was saved with"
            )
        self._iterator.set_state({"next_index": batch})


class _Part:
    """Row i of one process: sample (i // rows) * batch_size + process * rows + i % rows of the global order."""

    def __init__(self, ordered: Sequence[Any], batch_size: int, process: int, rows: int) -> None:
        self._ordered, self._batch_size, self._process, self.rows = ordered, batch_size, process, rows

    def __len__(self) -> int:
        return sys.maxsize // self._batch_size * self.rows

    def __getitem__(self, index: int) -> Any:
        batch, row = divmod(index, self.rows)
        return self._ordered[batch * self._batch_size + self._process * self.rows + row]


def _stack(records: Sequence[Mapping[str, Any]]) -> Batch:
    def column(key: str) -> Any:
        values = [record[key] for record in records]
        return values if isinstance(values[0], str) else np.stack(values)

    return {key: column(key) for key in records[0]}
