"""Latents and text embeddings of a data set, computed once, in shards that any number of hosts write and read.

Shard s of S holds pictures [s n / S, (s + 1) n / S) of n, so the shards in sequence are the data set in its order, and
a training reads from them what it would have encoded itself. Process p of P writes the shards p, p + P, ...; processes
do not communicate. A shard is a file such as `00003-of-00016-5d0c9f4a1e27b386.array_record`, whose last part stands for
the content of its pictures and captions (lcm_jax.data.records), and a .json that describes it and names them, written
when that file is complete. The manifest joins all of these; the process that finds none missing writes it.

The same command continues where one was killed: a shard that exists with the right checksum is left as it is. Where
pictures or captions have changed, shards get other names, and only the changed records are encoded: the others are
copied from the old shards, which are removed when the new manifest is written.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import jax

from lcm_jax.data import Cache, Record, Source, load_source
from lcm_jax.data.array_cache import MANIFEST, Origin, check_same, fingerprint, join, read_manifest, write_shard
from lcm_jax.data.mixing import SYNTHETIC
from lcm_jax.data.record_store import Known
from lcm_jax.data.records import record_keys
from lcm_jax.models.image_inputs import check_size
from lcm_jax.parallel.sharding import batch_parts, make_mesh
from lcm_jax.runtime.progress import progress
from lcm_jax.train.tasks.conditioner import Conditioner, encode_batch
from lcm_jax.train.tasks.encoding import encode_records

SHARD = 4096  # pictures in a shard, about, if the number of shards is not given
_SHARD_FILE = re.compile(r"\d{5}-of-\d{5}(-[0-9a-f]{16})?\.(array_record|json)")  # without its content before 0.3
_DESCRIBED = "[0-9]*-of-*.json"
_OF_CONTENT = {"content", "pictures", "known_by"}  # keys of a manifest that may differ from those of its shards


def encode(
    model: str,
    data: str,
    out: Path,
    *,
    split: str = "train",
    size: int | None = None,
    shards: int | None = None,
    batch: int | None = None,
    mesh: str = "",
    digest: bool = False,
    part: tuple[int, int] | None = None,
    say: Callable[[str], None] = partial(print, flush=True),
) -> Cache | None:
    """Encode the missing shards of this process; return the complete data set, or None if other shards are missing.

    Pictures that cannot be read are left out, counted, and listed in the manifest.

    Args:
        model: a bundled name, folder or hub id; its autoencoder and text encoders are used.
        data: the name of a data source, see `lcm_jax.data.load_source`.
        split: its split.
        out: the folder of the shards, shared by all processes.
        size: edge of the square pictures in pixels; None: the model's.
        shards: number of shards; None: one for every 4096 pictures. With fewer shards than processes some do nothing.
        batch: pictures at a time in this process; None: as many as make a megapixel on each device, at most 32.
        mesh: axes of this process's devices, see `MeshConfig.parse`; batches are sharded over data and fsdp, the
            networks over fsdp and tensor.
        digest: pictures are known by the bytes of their files, all of which are read first; False: by path, size and
            time of modification. Needed where each process has a copy of the files, of other times.
        part: (p, P) for processes that jax.distributed does not join; None: as jax.distributed says.
        say: is called with each line of progress.

    Raises ValueError for an option that cannot be used, and for a folder `out` that holds other files or an encoding
    of something else.
    """
    process, processes = part or (jax.process_index(), jax.process_count())
    if not 0 <= process < processes:
        raise ValueError(f"--part {process}/{processes}: the first number must be from 0 to {processes - 1}")
    if batch is not None and batch < 1:
        raise ValueError(f"--batch {batch}: it must be at least 1")
    local_mesh = make_mesh(mesh, batch_size=batch, devices=jax.local_devices())
    _check_folder(out)
    conditioner = Conditioner.load(model, model, local_mesh)
    vae = conditioner.vae.module.config
    side = vae.sample_size if size is None else size
    try:
        check_size((side, side), vae.downsample_factor, None)
    except ValueError as error:
        raise ValueError(f"--size: {error}") from None
    source = load_source(data, split, side, check=False)
    batch = encode_batch((side, side), batch_parts(local_mesh)) if batch is None else batch
    number = (_shards_of(out) or max(1, round(len(source) / SHARD))) if shards is None else shards
    if not 1 <= number <= min(len(source), 99999):
        raise ValueError(f"--shards {number}: it must be from 1 to the number of pictures, {len(source)}")
    synthetic = f"{SYNTHETIC}caption" in _first_readable(source, data)
    produced_by = {
        **conditioner.produced_by,
        **{"model": model, "scaling_factor": vae.scaling_factor, "shift_factor": vae.shift_factor},
        **{"data": data, "split": split, "size": side, "dtype": "float16"},
        **{"shards": number, "synthetic": synthetic},
    }
    out.mkdir(parents=True, exist_ok=True)
    keys = record_keys(source, json.dumps([data, split]), by_bytes=digest)
    parts = [Part.of(out, i, number, keys) for i in range(number)]
    content = fingerprint({"keys": keys})
    _check_same(out, {**produced_by, "content": content})
    local_parts = parts[process::processes]
    todo = [part for part in local_parts if not part.is_whole()]
    if len(todo) < len(local_parts):
        say(f"{out}: {len(local_parts) - len(todo)} of {len(local_parts)} shards are there")
    if todo:
        wanted = {part.described for part in parts}
        old = [read_manifest(path) for path in sorted(out.glob(_DESCRIBED)) if path not in wanted]
        _write(todo, conditioner, source, keys, Known(old), produced_by, batch, say)
    if missing := sum(not part.described.is_file() for part in parts):
        say(f"{out}: this process is done, others have {missing} of {number} shards to write")
        return None
    joined = join([read_manifest(part.described) for part in parts])
    made_from = {"content": content, "pictures": len(source), "known_by": "bytes" if digest else "path, size and time"}
    joined = replace(joined, produced_by={**produced_by, **made_from})
    joined.save()
    _remove_old(out, parts, say)
    left_out = f"; {len(joined.left_out)} are left out, such as {joined.left_out[0]}" if joined.left_out else ""
    say(f"{out}: {len(joined)} of {len(source)} pictures in {number} shards{left_out}")
    return joined


@dataclass(frozen=True, kw_only=True)
class Part:
    """A shard to write: its pictures and its files.

    index: from 0 to count - 1. pictures: number of pictures in the data set. content: what the shard's pictures and
    captions are known by.
    """

    folder: Path
    index: int
    count: int
    pictures: int
    content: str

    @classmethod
    def of(cls, folder: Path, index: int, count: int, keys: Sequence[str]) -> Part:
        """Return a shard of the data set whose records have these keys."""
        part = cls(folder=folder, index=index, count=count, pictures=len(keys), content="")
        return replace(part, content=fingerprint({"keys": [keys[i] for i in part.indices]}))

    @property
    def name(self) -> str:
        """The file name without its ending, such as "00003-of-00016-5d0c9f4a1e27b386"."""
        return f"{self.index:05}-of-{self.count:05}-{self.content}"

    @property
    def data(self) -> Path:
        """The array_record file."""
        return self.folder / f"{self.name}.array_record"

    @property
    def described(self) -> Path:
        """The .json file that describes this shard."""
        return self.folder / f"{self.name}.json"

    @property
    def indices(self) -> range:
        """The data set's indices of this shard's pictures."""
        return range(self.index * self.pictures // self.count, (self.index + 1) * self.pictures // self.count)

    def is_whole(self) -> bool:
        """Return whether the shard has been written and its checksum is right."""
        try:
            read_manifest(self.described).check()
        except (FileNotFoundError, ValueError):
            return False
        return True


def _write(
    parts: list[Part],
    conditioner: Conditioner,
    source: Source,
    keys: Sequence[str],
    known: Known,
    produced_by: dict[str, Any],
    batch: int,
    say: Callable[[str], None],
) -> None:
    done, total, start = 0, sum(len(part.indices) for part in parts), time.perf_counter()
    with progress(total, "encoding", "picture") as bar:
        for part in parts:
            left_out: list[str] = []
            origins: list[Origin] = []

            def records(
                part: Part = part, left_out: list[str] = left_out, origins: list[Origin] = origins
            ) -> Iterator[Mapping[str, Any]]:
                options: dict[str, Any] = {"batch": batch, "synthetic": produced_by["synthetic"], "with_texts": True}
                made = encode_records(
                    conditioner.encode,
                    source,
                    keys,
                    part.indices,
                    known,
                    leave_out=left_out.append,
                    progressed=bar.update,
                    **options,
                )
                for origin, record in made:
                    origins.append(origin)
                    yield record

            part.described.unlink(missing_ok=True)  # it may describe a damaged shard, which is written again
            shard = write_shard(part.data, records(), produced_by)
            replace(shard, left_out=tuple(left_out), origins=tuple(origins)).save(part.described.name)
            done += len(part.indices)
            rate = done / (time.perf_counter() - start)
            left = timedelta(seconds=round((total - done) / rate))
            bar.clear()
            say(f"{part.data}: {len(shard)} pictures, {len(left_out)} left out, {rate:.3g} pictures/s, {left} left")


def _read(source: Source, index: int) -> Record | str:
    """Return a record, or in one line the reason why it cannot be read."""
    try:
        record: Record = source[index]
    except ValueError as error:
        return " ".join(str(error).split())
    return record


def _first_readable(source: Source, name: str) -> Record:
    """Return the first record that can be read; raise ValueError if there is none."""
    for index in range(len(source)):
        with suppress(ValueError):
            return source[index]
    raise ValueError(f"{name}: none of its {len(source)} pictures can be read; the first: {_read(source, 0)}")


def _check_folder(out: Path) -> None:
    """Raise ValueError unless `out` is new, or a folder with nothing but an encoded data set in it."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out}: is a file; name a folder")
    foreign = sorted(path.name for path in out.iterdir() if not _is_encoded(path.name)) if out.exists() else []
    if foreign:
        raise ValueError(
            f"--out {out}: holds {foreign[0]}, which is no file of an encoded data set; name another folder"
        )


def _is_encoded(name: str) -> bool:
    return name.startswith(".") or name == MANIFEST or _SHARD_FILE.fullmatch(name) is not None


def _shards_of(out: Path) -> int | None:
    """Return the number of shards of what is in a folder, None if nothing is."""
    return next((int(path.name[9:14]) for path in sorted(out.glob(_DESCRIBED))), None)


def _check_same(out: Path, produced_by: Mapping[str, Any]) -> None:
    """Raise ValueError if a folder holds an encoding by other networks, of other data, or in another form.

    A manifest of pictures that have changed since is removed: a training must not read them for today's.
    """
    for path in sorted([*out.glob(_DESCRIBED), *out.glob(MANIFEST)]):
        found = read_manifest(path)
        # versions before 0.3 named less, and did not say from which pictures a shard was made: all is encoded again
        same = {key: value for key, value in found.produced_by.items() if key not in _OF_CONTENT and key in produced_by}
        wanted = {key: value for key, value in produced_by.items() if key in same}
        check_same(replace(found, produced_by=same), wanted)
        if path.name == MANIFEST and found.produced_by.get("content") != produced_by["content"]:
            path.unlink()


def _remove_old(out: Path, parts: Sequence[Part], say: Callable[[str], None]) -> None:
    current = {path for part in parts for path in (part.data, part.described)}
    old = [path for path in out.iterdir() if _SHARD_FILE.fullmatch(path.name) and path not in current]
    for path in old:
        path.unlink(missing_ok=True)
    shards = sum(path.suffix == ".array_record" for path in old)
    if shards:
        say(f"{out}: {shards} shards of pictures or captions that have changed are removed")
