"""Caches of arrays that are computed once per example (latents, text embeddings), in array_record files.

A cache is a folder of shards, which are array_record files, and `manifest.json`, which lists them. One record is the
bytes of its arrays, one after another in the manifest's order, then its texts as JSON: reading needs no pickle and
parses nothing but the texts. Files are written under another name and renamed when complete, the manifest last, so a
cache that exists is complete; the sizes and SHA-256 of its shards are checked when it is opened.

`cached` is for records that a description says all about; `lcm_jax.data.record_store` for those of pictures that change
under one name; `lcm_jax.train.precompute_latents` for a data set that many hosts write.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import uuid
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from array_record.python.array_record_data_source import ArrayRecordDataSource
from array_record.python.array_record_module import ArrayRecordWriter

from lcm_jax.runtime.atomic_files import write_json
from lcm_jax.runtime.checksums import sha256
from lcm_jax.runtime.progress import progress

MANIFEST = "manifest.json"
_FORMAT = 2
_DATA = "data.array_record"
_HASHING = 8  # threads that check shards

Example = Mapping[str, "np.ndarray | str"]
ProducedBy = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Field:
    """An array field of every record. `dtype` is a numpy name such as float16."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """The size of one record's array in bytes."""
        return np.dtype(self.dtype).itemsize * math.prod(self.shape)


@dataclass(frozen=True, kw_only=True)
class Shard:
    """An array_record file of the cache's folder, with its number of records, size in bytes and SHA-256."""

    file: str
    records: int
    bytes: int
    sha256: str


class Origin(NamedTuple):
    """The source of a cached record: its key and digest (see lcm_jax.data.records), and the name of its file."""

    key: str
    digest: str
    name: str


@dataclass(frozen=True, kw_only=True)
class Cache:
    """A source of cached records, shard after shard: read-only arrays, and texts as str.

    texts: names of the text fields. produced_by: description of how the records were made. origins: for a single shard
    what each record was made of, where that is known.
    """

    folder: Path
    shards: tuple[Shard, ...]
    fields: Mapping[str, Field]
    texts: tuple[str, ...]
    produced_by: ProducedBy
    left_out: tuple[str, ...] = ()  # a line for each example that could not be read and has no record
    origins: tuple[Origin, ...] = ()

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int, /) -> dict[str, Any]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"record {index} of {len(self)} in {self.folder}")
        data = self._read(index % len(self))
        record: dict[str, Any] = {}
        start = 0
        for name, field in self.fields.items():
            array = np.frombuffer(data, field.dtype, math.prod(field.shape), start)
            record[name] = array.reshape(field.shape)
            start += field.nbytes
        return record | dict(zip(self.texts, json.loads(data[start:]), strict=True))

    def check(self, part: int = 0, parts: int = 1) -> None:
        """Check the sizes of all shards, and the SHA-256 of the shards part, part + parts, ...

        Raises ValueError for the first damaged shard, and FileNotFoundError for a missing one.

        part, parts: this process among those that open the cache together, so that a large cache is read once by all
        of them and not once by each.
        """
        for shard in self.shards:
            path = self.folder / shard.file
            if not path.is_file():
                raise FileNotFoundError(f"{path}: missing, but the manifest names it; {self._remedy}")
            self._compare(shard, "bytes", path.stat().st_size, shard.bytes)
        shards = self.shards[part::parts]
        with ThreadPoolExecutor(_HASHING) as pool:
            sums = pool.map(lambda shard: sha256(self.folder / shard.file), shards)
            for shard, digest in zip(shards, sums, strict=True):
                self._compare(shard, "(SHA-256)", digest, shard.sha256)

    def save(self, name: str = MANIFEST) -> None:
        """Write the manifest into the folder, completely or not at all."""
        manifest = {
            "format": _FORMAT,
            "count": len(self),
            "fields": {name: asdict(field) for name, field in self.fields.items()},
            "texts": self.texts,
            "fingerprint": fingerprint(self.produced_by),
            "produced_by": json.loads(_canonical(self.produced_by)),
            "shards": [asdict(shard) for shard in self.shards],
            "left_out": self.left_out,
            **({"origins": self.origins} if self.origins else {}),
        }
        write_json(self.folder / name, manifest)

    def _compare(self, shard: Shard, unit: str, actual: Any, expected: Any) -> None:
        if actual != expected:
            raise ValueError(
                f"{self.folder / shard.file}: damaged, {actual} {unit} where the manifest says {expected}; "
                f"{self._remedy}"
            )

    def _read(self, index: int) -> bytes:
        try:
            return self._data[index]
        except Exception as error:  # any of the types that array_record's C++ code raises
            file = self.shards[bisect_right(self._ends, index) - 1].file
            reason = " ".join(str(error).split())
            raise ValueError(f"{self.folder / file}: cannot be read ({reason:.200}); {self._remedy}") from error

    @property
    def _remedy(self) -> str:
        if "shards" in self.produced_by:  # made by lcm_jax.train.precompute_latents
            return "run its lcm-jax encode again, which writes this file alone"
        if self.origins:
            return "remove this file, and its records are made again"
        return f"remove {self.folder}, and it is made again"

    @cached_property
    def _ends(self) -> list[int]:
        """The number of records before each shard, and in all."""
        return list(accumulate((shard.records for shard in self.shards), initial=0))

    @cached_property
    def _data(self) -> ArrayRecordDataSource:
        # a file whose number of records is given is not opened before it is read
        return ArrayRecordDataSource([f"{self.folder / shard.file}[0:{shard.records}]" for shard in self.shards])


@dataclass(frozen=True, kw_only=True)
class Columns:
    """A source of the records `indices` of a cache, in this order, with only the fields `names`."""

    source: Cache
    names: tuple[str, ...]
    indices: Sequence[int]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int, /) -> dict[str, Any]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        record = self.source[self.indices[index]]
        return {name: record[name] for name in self.names}


def fingerprint(produced_by: ProducedBy) -> str:
    """Return sixteen hex digits that identify a description, of plain JSON values, of how records were made."""
    return hashlib.sha256(_canonical(produced_by).encode()).hexdigest()[:16]


def cached(
    root: Path, produced_by: ProducedBy, produce: Callable[[], Iterable[Example]], *, total: int | None = None
) -> Cache:
    """Open the cache `root/<fingerprint of produced_by and of the format>`; if it is missing, make it from `produce()`.

    produced_by: must name everything that changes the records (source, split, size, network and its weights, dtype).
    Another description gives another cache, so none is ever stale. total: the number of records, for the progress bar.
    """
    folder = root / fingerprint({"format": _FORMAT, **produced_by})
    if not folder.exists():
        write_cache(folder, produce(), produced_by, total=total)
    cache = open_cache(folder)
    if cache.produced_by != json.loads(_canonical(produced_by)):
        raise ValueError(f"{folder}: manifest names other inputs than its folder's name; remove the folder")
    return cache


def write_cache(folder: Path, records: Iterable[Example], produced_by: ProducedBy, *, total: int | None = None) -> None:
    """Write all records under another name, then rename the folder; all must have the first one's fields and shapes.

    If another process has finished the same folder in the meantime, its files are kept and these are dropped. Raises
    ValueError for a record that cannot be cached, and FileExistsError if the folder exists and is no cache.
    """
    _canonical(produced_by)
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.parent / f".{folder.name}-{uuid.uuid4().hex}"
    temporary.mkdir()
    try:
        shown = iter(progress(records, "encoding", "picture", total=total))
        cache = write_shard(temporary / _DATA, shown, produced_by)
        if len(cache) == 0:
            raise ValueError(f"{folder}: empty dataset; there is no record to cache")
        cache.save()
        try:
            temporary.rename(folder)
        except OSError as error:
            if not (folder / MANIFEST).is_file():
                raise FileExistsError(f"{folder}: exists and is no cache; remove it") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_shard(path: Path, records: Iterable[Example], produced_by: ProducedBy) -> Cache:
    """Write one array_record file and return a cache of it alone; the manifest is not written.

    The file is written under another name and then renamed. Files that a killed attempt has left are removed first.
    Raises ValueError for a record that cannot be cached, and OSError if the disk does not take the records.
    """
    for leftover in path.parent.glob(f".{path.name}-*"):
        leftover.unlink(missing_ok=True)
    temporary = path.parent / f".{path.name}-{uuid.uuid4().hex}"
    layout, count = _Layout(fields={}, texts=()), 0
    try:
        with _disk(path):
            writer = ArrayRecordWriter(str(temporary), "group_size:1")
        try:
            for count, record in enumerate(records, start=1):
                layout = layout if count > 1 else _Layout.of(record)
                data = layout.pack(record, count - 1)
                with _disk(path):
                    writer.write(data)
        finally:
            with _disk(path):
                writer.close()
        shard = Shard(file=path.name, records=count, bytes=temporary.stat().st_size, sha256=sha256(temporary))
        temporary.rename(path)
    finally:
        temporary.unlink(missing_ok=True)
    return Cache(folder=path.parent, shards=(shard,), fields=layout.fields, texts=layout.texts, produced_by=produced_by)


def join(caches: Sequence[Cache]) -> Cache:
    """Return one cache of several caches in one folder; raise ValueError if they differ, naming what differs."""
    first = next((cache for cache in caches if len(cache)), caches[0])
    for cache in caches:
        check_same(cache, first.produced_by)
        if len(cache) and (cache.fields, cache.texts) != (first.fields, first.texts):
            raise ValueError(
                f"{cache.folder / cache.shards[0].file}: fields {dict(cache.fields)}, but those of "
                f"{first.shards[0].file} are {dict(first.fields)}; remove one of them and write it again"
            )
    return Cache(
        folder=first.folder,
        shards=tuple(shard for cache in caches for shard in cache.shards),
        fields=first.fields,
        texts=first.texts,
        produced_by=first.produced_by,
        left_out=tuple(line for cache in caches for line in cache.left_out),
    )


def check_same(cache: Cache, produced_by: ProducedBy) -> None:
    """Raise ValueError, naming the key, if a cache was made from something else than `produced_by`."""
    wanted = json.loads(_canonical(produced_by))
    for key in sorted(wanted.keys() | cache.produced_by.keys()):
        if wanted.get(key) != cache.produced_by.get(key):
            raise ValueError(
                f"{cache.folder}: {cache.shards[0].file} was made with {key}={cache.produced_by.get(key)}, not "
                f"{wanted.get(key)}; give the same, or another folder"
            )


def open_cache(folder: Path, *, part: int = 0, parts: int = 1) -> Cache:
    """Return the cache of a folder after checking it, see `Cache.check`; raise FileNotFoundError or ValueError."""
    cache = read_manifest(folder / MANIFEST)
    cache.check(part, parts)
    return cache


def read_manifest(path: Path) -> Cache:
    """Return the cache that a manifest describes; raise FileNotFoundError if it is missing, ValueError if it is bad."""
    folder = path.parent
    if not path.is_file():
        raise FileNotFoundError(f"{folder}: no cache here (needs {path.name}); write it first")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        version = manifest["format"]
        if version != _FORMAT:
            raise ValueError(f"{path}: cache format {version}, this version reads {_FORMAT}; remove {folder}")
        cache = Cache(
            folder=folder,
            shards=tuple(Shard(**shard) for shard in manifest["shards"]),
            fields={
                name: Field(dtype=field["dtype"], shape=tuple(field["shape"]))
                for name, field in manifest["fields"].items()
            },
            texts=tuple(manifest["texts"]),
            produced_by=manifest["produced_by"],
            left_out=tuple(manifest["left_out"]),
            origins=tuple(Origin(*origin) for origin in manifest.get("origins", ())),
        )
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: not a manifest of a cache ({error}); remove {folder}") from error
    return cache


@dataclass(frozen=True, kw_only=True)
class _Layout:
    """The fields of every record of a cache."""

    fields: Mapping[str, Field]
    texts: tuple[str, ...]

    @classmethod
    def of(cls, record: Example) -> _Layout:
        fields: dict[str, Field] = {}
        for name, value in record.items():
            if isinstance(value, str):
                continue
            array = np.asarray(value)
            if array.dtype.kind not in "biuf" or array.dtype.isbuiltin != 1:
                raise ValueError(f"field {name!r}: dtype {array.dtype} cannot be cached; use a plain numpy number type")
            fields[name] = Field(dtype=array.dtype.name, shape=array.shape)
        return cls(fields=fields, texts=tuple(name for name, value in record.items() if isinstance(value, str)))

    def pack(self, record: Example, index: int) -> bytes:
        if self.of(record) != self:
            raise ValueError(f"record {index}: fields {self.of(record)} differ from the first record's, {self}")
        for name in self.fields:
            if not np.isfinite(record[name]).all():
                raise ValueError(f"record {index}: field {name!r} is not finite; a wider dtype may be needed")
        arrays = b"".join(np.ascontiguousarray(record[name]).tobytes() for name in self.fields)
        return arrays + json.dumps([record[name] for name in self.texts]).encode()


@contextmanager
def _disk(path: Path) -> Iterator[None]:
    """Turn array_record's errors about the disk into an OSError of one line."""
    try:
        yield
    except RuntimeError as error:
        reason = " ".join(str(error).split(";")[0].split())
        raise OSError(f"{path}: cannot be written ({reason}); free disk space, and start again") from error


def _canonical(produced_by: ProducedBy) -> str:
    try:
        return json.dumps(produced_by, sort_keys=True, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"produced_by must be plain JSON values: {error}") from error
