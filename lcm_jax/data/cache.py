"""Arrays computed once per example (latents, text embeddings), kept in one array_record file.

A cache is a folder of `data.array_record` and `manifest.json`. One record is the bytes of its arrays, one after another
in the manifest's order, then its texts as JSON: reading needs no pickle and parses nothing but the texts. The folder is
written under another name and renamed when complete, so a cache that exists is whole.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import uuid
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from array_record.python.array_record_data_source import ArrayRecordDataSource
from array_record.python.array_record_module import ArrayRecordWriter
from tqdm import tqdm

_FORMAT = 1
_DATA, _MANIFEST = "data.array_record", "manifest.json"

Example = Mapping[str, "np.ndarray | str"]
ProducedBy = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Field:
    """An array field of every record. `dtype` is a numpy name such as float16."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return np.dtype(self.dtype).itemsize * math.prod(self.shape)


@dataclass(frozen=True, kw_only=True)
class Cache:
    """A source of the cached records: read-only arrays, and texts as str."""

    folder: Path
    count: int
    fields: Mapping[str, Field]
    texts: tuple[str, ...]
    produced_by: ProducedBy

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int, /) -> dict[str, Any]:
        if not -self.count <= index < self.count:
            raise IndexError(f"record {index} of {self.count} in {self.folder}")
        data = self._data[index % self.count]
        record: dict[str, Any] = {}
        start = 0
        for name, field in self.fields.items():
            array = np.frombuffer(data, field.dtype, math.prod(field.shape), start)
            record[name] = array.reshape(field.shape)
            start += field.nbytes
        return record | dict(zip(self.texts, json.loads(data[start:]), strict=True))

    @cached_property
    def _data(self) -> ArrayRecordDataSource:
        return ArrayRecordDataSource(str(self.folder / _DATA))


def fingerprint(produced_by: ProducedBy) -> str:
    """Sixteen hex digits that name a JSON-able description of how the records were made."""
    return hashlib.sha256(_canonical(produced_by).encode()).hexdigest()[:16]


def cached(
    root: Path, produced_by: ProducedBy, produce: Callable[[], Iterable[Example]], *, total: int | None = None
) -> Cache:
    """Opens `root/<fingerprint of produced_by>`, made first from `produce()` if it is not there.

    `produced_by` must name all that changes the records (source, split, size, network and its weights, dtype): another
    description is another cache, never a stale one.
    """
    folder = root / fingerprint(produced_by)
    if not folder.exists():
        write_cache(folder, produce(), produced_by, total=total)
    cache = open_cache(folder)
    if cache.produced_by != json.loads(_canonical(produced_by)):
        raise ValueError(f"{folder}: manifest names other inputs than its folder's name; remove the folder")
    return cache


def write_cache(folder: Path, records: Iterable[Example], produced_by: ProducedBy, *, total: int | None = None) -> None:
    """Writes every record, then gives the folder its name. All records must have the first one's fields and shapes.

    Where another process finished the same folder meanwhile, its work is kept and this one's dropped.
    """
    description = json.loads(_canonical(produced_by))
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = folder.parent / f".{folder.name}-{uuid.uuid4().hex}"
    aside.mkdir()
    try:
        layout: _Layout | None = None
        count = 0
        writer = ArrayRecordWriter(str(aside / _DATA), "group_size:1")
        try:
            for count, record in enumerate(tqdm(records, "caching", total, disable=None, leave=False), start=1):
                layout = layout or _Layout.of(record)
                writer.write(layout.pack(record, count - 1))
        finally:
            writer.close()
        if layout is None:
            raise ValueError(f"{folder}: empty dataset; there is no record to cache")
        manifest = {
            "format": _FORMAT,
            "count": count,
            "bytes": (aside / _DATA).stat().st_size,
            "fields": {name: asdict(field) for name, field in layout.fields.items()},
            "texts": layout.texts,
            "fingerprint": fingerprint(produced_by),
            "produced_by": description,
        }
        (aside / _MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
        try:
            aside.rename(folder)
        except OSError as error:
            if not (folder / _MANIFEST).is_file():
                raise FileExistsError(f"{folder}: exists and is no cache; remove it") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def open_cache(folder: Path) -> Cache:
    """Reads the manifest and checks it against the data file. Raises FileNotFoundError or ValueError."""
    path = folder / _MANIFEST
    if not path.is_file() or not (folder / _DATA).is_file():
        raise FileNotFoundError(f"{folder}: no cache here (needs {_MANIFEST} and {_DATA}); write it first")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        version, size = manifest["format"], manifest["bytes"]
        fields = {
            name: Field(dtype=field["dtype"], shape=tuple(field["shape"])) for name, field in manifest["fields"].items()
        }
        cache = Cache(
            folder=folder,
            count=manifest["count"],
            fields=fields,
            texts=tuple(manifest["texts"]),
            produced_by=manifest["produced_by"],
        )
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: not a manifest of a cache ({error}); remove {folder}") from error
    if version != _FORMAT:
        raise ValueError(f"{path}: cache format {version}, this version reads {_FORMAT}; remove {folder}")
    found = (folder / _DATA).stat().st_size
    if found != size:
        raise ValueError(f"{folder / _DATA}: {found} bytes where the manifest says {size}; remove {folder}")
    return cache


@dataclass(frozen=True, kw_only=True)
class _Layout:
    """What every record of a cache looks like."""

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


def _canonical(produced_by: ProducedBy) -> str:
    try:
        return json.dumps(produced_by, sort_keys=True, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"produced_by must be plain JSON values: {error}") from error
