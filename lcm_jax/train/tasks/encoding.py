"""Records of a source encoded in its order: pictures are read ahead, and what was encoded before is copied."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

from lcm_jax.data.array_cache import Origin
from lcm_jax.data.record_store import Known, Made
from lcm_jax.data.records import OnDemand, Record, Source, read_digested

READERS = min(64, os.cpu_count() or 1)  # threads that decode pictures


@runtime_checkable
class Encode(Protocol):
    """Encodes at most `batch` records: `Conditioner.encode`."""

    def __call__(
        self, records: Sequence[Record], batch: int, *, synthetic: bool = False
    ) -> Iterator[dict[str, np.ndarray]]: ...


class _Pending(NamedTuple):
    """A record on its way: read, or `copied` from where it was encoded before."""

    origin: Origin
    record: Record | None
    copied: dict[str, Any] | None


def encode_records(
    encode: Encode,
    source: Source,
    keys: Sequence[str],
    indices: Iterable[int],
    known: Known,
    *,
    batch: int,
    synthetic: bool = False,
    with_texts: bool = False,
    leave_out: Callable[[str], None] | None = None,
    progressed: Callable[[], object] = lambda: None,
) -> Iterator[Made]:
    """Yield the encodings of the records `indices`, in this order, each with what it was made of.

    A record whose key, or whose bytes and captions, are in `known` is copied from there.

    Args:
        encode: encodes a batch of records.
        keys: the keys of all records of the source.
        batch: records that are encoded at a time.
        synthetic: as for `Conditioner.encode`. with_texts: the captions are added.
        leave_out: is called with one line for a picture that cannot be read; None: that is a ValueError, raised when
            all records before it have been yielded.
        progressed: is called for each record.
    """

    def read(index: int) -> _Pending:
        found = known.find(key=keys[index])
        if found is not None:
            return _Pending(found[0], None, dict(found[1]))
        record, digest = read_digested(source, index)
        name = source.items[index].name if isinstance(source, OnDemand) else f"record {index}"
        origin = Origin(keys[index], digest, name)
        found = known.find(digest=digest)
        return _Pending(origin, record, None) if found is None else _Pending(origin, None, dict(found[1]))

    def flush(group: list[_Pending]) -> Iterator[Made]:
        records = [pending.record for pending in group if pending.record is not None]
        encoded = encode(records, batch, synthetic=synthetic) if records else iter(())
        for origin, record, copied in group:
            if record is None:
                yield origin, copied or {}
            else:
                texts = {name: text for name, text in record.items() if isinstance(text, str)} if with_texts else {}
                yield origin, {**next(encoded), **texts}
        group.clear()

    group: list[_Pending] = []
    with ThreadPoolExecutor(READERS) as pool:
        for result in _prefetch(pool, read, indices, 2 * batch):
            progressed()
            try:
                pending = result.result()
            except ValueError as error:
                if leave_out is None:
                    yield from flush(group)
                    raise
                leave_out(" ".join(str(error).split()))
                continue
            group.append(pending)
            if sum(pending.record is not None for pending in group) == batch or len(group) > 4 * batch:
                yield from flush(group)
        yield from flush(group)


def _prefetch(
    pool: ThreadPoolExecutor, read: Callable[[int], _Pending], indices: Iterable[int], most: int
) -> Iterator[Future[_Pending]]:
    """Yield the finished or failed reading of each index in order, with at most `most` of them read ahead."""
    waiting: deque[Future[_Pending]] = deque()
    try:
        for index in indices:
            waiting.append(pool.submit(read, index))
            if len(waiting) > most:
                yield waiting.popleft()
        while waiting:
            yield waiting.popleft()
    finally:
        for future in waiting:
            future.cancel()
