"""Latents and text embeddings of a data set, computed once, in shards that any number of hosts write and read.

Shard s of S holds pictures [s n / S, (s + 1) n / S) of n, so the shards in sequence are the data set in its order, and
a training reads from them what it would have encoded itself. Process p of P writes the shards p, p + P, ...; processes
do not communicate. A shard is a file such as `00003-of-00016.array_record`, and a .json that describes it, written when
that file is complete. The manifest joins all of these; the process that finds none missing writes it.

The same command continues where one was killed: a shard that exists with the right checksum is left as it is.
"""

from __future__ import annotations

import os
import re
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import jax
from tqdm import tqdm

from lcm_jax.data import Cache, Record, Source, load_source
from lcm_jax.data.array_cache import MANIFEST, check_same, join, read_manifest, write_shard
from lcm_jax.data.mixing import SYNTHETIC
from lcm_jax.models.image_inputs import check_size
from lcm_jax.parallel.sharding import batch_parts, make_mesh
from lcm_jax.train.tasks.conditioner import Conditioner, encode_batch

SHARD = 4096  # pictures in a shard, about, if the number of shards is not given
READERS = min(64, os.cpu_count() or 1)  # threads that decode pictures
_ENCODED = re.compile(rf"\..*|{re.escape(MANIFEST)}|\d{{5}}-of-\d{{5}}\.(array_record|json)")


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
    number = max(1, round(len(source) / SHARD)) if shards is None else shards
    if not 1 <= number <= min(len(source), 99999):
        raise ValueError(f"--shards {number}: it must be from 1 to the number of pictures, {len(source)}")
    synthetic = f"{SYNTHETIC}caption" in _first_readable(source, data)
    produced_by = {
        **conditioner.produced_by,
        **{"model": model, "scaling_factor": vae.scaling_factor, "shift_factor": vae.shift_factor},
        **{"data": data, "split": split, "pictures": len(source), "size": side, "dtype": "float16"},
        **{"shards": number, "synthetic": synthetic},
    }
    out.mkdir(parents=True, exist_ok=True)
    parts = [Part(folder=out, index=i, count=number, pictures=len(source)) for i in range(number)]
    for path in sorted(out.glob("*.json")):
        check_same(read_manifest(path), produced_by)
    local_parts = parts[process::processes]
    todo = [part for part in local_parts if not part.is_whole()]
    if len(todo) < len(local_parts):
        say(f"{out}: {len(local_parts) - len(todo)} of {len(local_parts)} shards are there")
    if todo:
        _write(todo, conditioner, source, produced_by, batch, say)
    if missing := sum(not part.described.is_file() for part in parts):
        say(f"{out}: this process is done, others have {missing} of {number} shards to write")
        return None
    joined = join([read_manifest(part.described) for part in parts])
    joined.save()
    left_out = f"; {len(joined.left_out)} are left out, such as {joined.left_out[0]}" if joined.left_out else ""
    say(f"{out}: {len(joined)} of {len(source)} pictures in {number} shards{left_out}")
    return joined


@dataclass(frozen=True, kw_only=True)
class Part:
    """A shard to write: its pictures and its files.

    index: from 0 to count - 1. pictures: number of pictures in the data set.
    """

    folder: Path
    index: int
    count: int
    pictures: int

    @property
    def name(self) -> str:
        """The file name without its ending, such as "00003-of-00016"."""
        return f"{self.index:05}-of-{self.count:05}"

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
    produced_by: dict[str, Any],
    batch: int,
    say: Callable[[str], None],
) -> None:
    done, total, start = 0, sum(len(part.indices) for part in parts), time.perf_counter()
    bar = tqdm(total=total, desc="encoding", unit="picture", disable=None, dynamic_ncols=True)
    with ThreadPoolExecutor(READERS) as pool, bar:
        for part in parts:
            left_out: list[str] = []

            def records(part: Part = part, left_out: list[str] = left_out) -> Iterator[dict[str, Any]]:
                examples = _prefetch(pool, lambda index: _read(source, index), part.indices, 2 * batch)
                for group in _groups(examples, batch, left_out, bar):
                    encoded = conditioner.encode(group, batch, synthetic=produced_by["synthetic"])
                    for record, arrays in zip(group, encoded, strict=True):
                        yield {**arrays, **{name: text for name, text in record.items() if name != "image"}}

            part.described.unlink(missing_ok=True)  # it may describe a damaged shard, which is written again
            shard = replace(write_shard(part.data, records(), produced_by), left_out=tuple(left_out))
            shard.save(part.described.name)
            done += len(part.indices)
            rate = done / (time.perf_counter() - start)
            left = timedelta(seconds=round((total - done) / rate))
            bar.clear()
            say(f"{part.data}: {len(shard)} pictures, {len(left_out)} left out, {rate:.3g} pictures/s, {left} left")


def _groups(examples: Iterable[Record | str], batch: int, left_out: list[str], bar: Any) -> Iterator[list[Record]]:
    """Yield the records, `batch` at a time; add the reasons of those that could not be read to `left_out`."""
    group: list[Record] = []
    for record in examples:
        bar.update()
        if isinstance(record, str):
            left_out.append(record)
            continue
        group.append(record)
        if len(group) == batch:
            yield group
            group = []
    if group:
        yield group


def _read(source: Source, index: int) -> Record | str:
    """Return a record, or in one line the reason why it cannot be read."""
    try:
        return source[index]
    except ValueError as error:
        return " ".join(str(error).split())


def _prefetch(pool: ThreadPoolExecutor, read: Callable[[int], Any], indices: Iterable[int], most: int) -> Iterator[Any]:
    """Yield read(index) of each index in order, with at most `most` of them read ahead."""
    waiting: deque[Future[Any]] = deque()
    for index in indices:
        waiting.append(pool.submit(read, index))
        if len(waiting) > most:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


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
    foreign = sorted(path.name for path in out.iterdir() if not _ENCODED.fullmatch(path.name)) if out.exists() else []
    if foreign:
        raise ValueError(
            f"--out {out}: holds {foreign[0]}, which is no file of an encoded data set; name another folder"
        )
