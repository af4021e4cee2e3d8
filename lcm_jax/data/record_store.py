"""A store of what was computed of records: each is kept under the key of its content, and found by it alone.

The store of one description (networks, size, dtype) is a folder of array_record files, each with a .json that names the
origins of its records. A source is looked up key by key: its records are those of today's pictures and captions, in
today's order. What is missing, because it is new or has changed, is made and added in a file of its own, and nothing is
changed: a source that is again as it was is found again. A file of which no record was used for `KEPT_DAYS` days is
removed, unless another run reads from its store: no reader loses a file.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
import uuid
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from threading import Lock
from typing import Any

from filelock import FileLock, Timeout

from lcm_jax.data.array_cache import (
    Cache,
    Columns,
    Origin,
    ProducedBy,
    check_same,
    fingerprint,
    join,
    read_manifest,
    write_shard,
)

SHARD = 1024  # records of a file, at most; a process that is killed loses what it has made of one
KEPT_DAYS = 30  # after which what no run has used is removed
_VERSION = 1
_CLEANING, _USE = ".cleaning.lock", ".use"  # held while files are removed or a run begins to read; held by each run

Made = tuple[Origin, Mapping[str, Any]]
"""What a record was made of, and what was made."""


class Known:
    """Records in files of one folder, found by the key or the digest of what they were made of."""

    def __init__(self, shards: Sequence[Cache]) -> None:
        self._shards, self._lock = shards, Lock()
        self._whole: dict[int, bool] = {}
        self._keys: dict[str, tuple[int, int]] = {}
        self._digests: dict[str, tuple[int, int]] = {}
        for number, shard in enumerate(shards):
            for row, origin in enumerate(shard.origins):
                self._keys.setdefault(origin.key, (number, row))
                self._digests.setdefault(origin.digest, (number, row))

    def __contains__(self, key: str) -> bool:
        return key in self._keys

    def find(self, key: str = "", digest: str = "") -> Made | None:
        """Return the record of a key or of a digest; None if there is none, or if its file is damaged."""
        found = self._keys.get(key) or self._digests.get(digest)
        if found is None:
            return None
        number, row = found
        if not self._is_whole(number):
            return None
        try:
            return self._shards[number].origins[row], self._shards[number][row]
        except ValueError:  # its file has been removed in the meantime
            return None

    def _is_whole(self, number: int) -> bool:
        with self._lock:  # the threads that read pictures look records up
            if number not in self._whole:
                try:
                    self._shards[number].check()
                    self._whole[number] = True
                except (ValueError, FileNotFoundError):
                    self._whole[number] = False
            return self._whole[number]

    def select(self, keys: Sequence[str]) -> Columns:
        """Return a source of the records of all keys, in their order, after checking the files that hold them."""
        places = [self._keys[key] for key in keys]
        used = sorted({number for number, _ in places})
        for number in used:
            self._shards[number].check()
        starts, start = {}, 0
        for number in used:
            starts[number] = start
            start += len(self._shards[number])
        cache = join([self._shards[number] for number in used])
        return Columns(
            source=cache, names=tuple(cache.fields), indices=[starts[number] + row for number, row in places]
        )


def stored(
    root: Path, produced_by: ProducedBy, keys: Sequence[str], make: Callable[[list[int], Known], Iterator[Made]]
) -> Columns:
    """Return what was made of each key's record, in the order of the keys; make and keep what is missing.

    produced_by: must name everything that changes the records but their content. make: yields the records of some
    indices of `keys`, in any order; what it has yielded before an error is kept.
    """
    folder = root / fingerprint({"store": _VERSION, **produced_by})
    with _reading(folder) as hold:
        known = _open(folder, produced_by)
        if any(key not in known for key in keys):
            with FileLock(folder / f".{fingerprint({'keys': list(keys)})}.lock"):  # others with the same work wait
                known = _open(folder, produced_by)
                first = {key: index for index, key in reversed(list(enumerate(keys)))}
                missing = sorted(index for key, index in first.items() if key not in known)
                made = make(missing, known) if missing else iter(())
                while missing and _write(folder, made, produced_by) == SHARD:
                    pass
            known = _open(folder, produced_by)
        selected = known.select(keys)
        hold(selected.source)
    for store in sorted(root.iterdir()):
        with contextlib.suppress(OSError, NotImplementedError):
            _remove_unused(store)
    return selected


_HELD: dict[Path, set[Path]] = {}  # the lock of each source that this process reads -> its files


@contextlib.contextmanager
def _reading(folder: Path) -> Iterator[Callable[[Cache], None]]:
    """Return a context in which no file of a store is removed, and a function that holds those of a cache after it.

    They are held until the cache is no longer referred to, or the process ends. Where a store cannot be written, or its
    disk has no locks, nothing is held: there nothing is removed either.
    """
    lock = FileLock(folder / f".{uuid.uuid4().hex}{_USE}", thread_local=False)
    path = Path(lock.lock_file)

    def release() -> None:
        _HELD.pop(path, None)
        if lock.is_locked:
            lock.release()
            path.unlink(missing_ok=True)

    def hold(cache: Cache) -> None:
        files = {cache.folder / shard.file for shard in cache.shards}
        with contextlib.suppress(OSError):
            for file in files:
                os.utime(file)  # the time of its last use
        _HELD[path] = files
        weakref.finalize(cache, release)

    with contextlib.suppress(OSError, NotImplementedError):
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / _CLEANING):
            lock.acquire()
    try:
        yield hold
    except BaseException:
        release()
        raise


def _remove_unused(folder: Path) -> None:
    """Remove the files of a store that are old enough, unless another process reads from it; say so in a line."""
    before = time.time() - KEPT_DAYS * 24 * 3600
    is_old = any(path.stat().st_mtime < before for path in folder.glob("*.array_record") if _is_file_of_store(path))
    if not is_old:
        return
    with FileLock(folder / _CLEANING):
        held = {file for lock, files in _HELD.items() if lock.parent == folder for file in files}
        for path in folder.glob(f".*{_USE}"):
            if path in _HELD:
                continue
            try:
                with FileLock(path, timeout=0):
                    pass
            except Timeout:  # another run reads
                return
            path.unlink(missing_ok=True)  # of a run that was killed
        removed = [path for path in folder.glob("*.array_record") if _is_file_of_store(path) and path not in held]
        removed = [path for path in removed if path.stat().st_mtime < before]
        size = sum(path.stat().st_size for path in removed)
        for path in removed:
            path.with_suffix(".json").unlink()  # first: a file without it is not looked for
            path.unlink()
    if removed:
        text = "%s: removed %d files (%.1f MB) of which no run has used a record for %d days"
        logging.getLogger("lcm_jax").info(text, folder, len(removed), size / 1e6, KEPT_DAYS)


def _is_file_of_store(path: Path) -> bool:
    return path.with_suffix(".json").is_file()


def _open(folder: Path, produced_by: ProducedBy) -> Known:
    """Return the records of a folder, in the order in which its files were written."""
    described = sorted(folder.glob("*.json"), key=lambda path: (path.stat().st_mtime_ns, path.name))
    shards = [shard for shard in map(read_manifest, described) if (folder / shard.shards[0].file).is_file()]
    for shard in shards:
        check_same(shard, produced_by)
    return Known(shards)


def _write(folder: Path, made: Iterator[Made], produced_by: ProducedBy) -> int:
    """Write the next records, as many as make a file, and return their number; those before an error are kept."""
    origins: list[Origin] = []
    errors: list[BaseException] = []

    def records() -> Iterator[Mapping[str, Any]]:
        try:
            while len(origins) < SHARD:
                origin, record = next(made)
                origins.append(origin)
                yield record
        except StopIteration:
            return
        except (Exception, KeyboardInterrupt) as error:
            errors.append(error)

    path = folder / f"{uuid.uuid4().hex}.array_record"
    shard = write_shard(path, records(), produced_by)
    if origins:
        replace(shard, origins=tuple(origins)).save(f"{path.stem}.json")
    else:
        path.unlink()
    if errors:
        raise errors[0]
    return len(origins)
