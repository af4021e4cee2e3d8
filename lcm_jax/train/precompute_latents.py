"""Latents and text embeddings of a whole data set, computed once, in shards that any number of hosts write and read.

Shard s of S holds pictures [s n / S, (s + 1) n / S) of n, so that the shards one after another are the data set in its
order: a training reads from them what it would have encoded itself. Process p of P writes the shards p, p + P, ... and
asks nothing of the others. A shard is `00003-of-00016.array_record`, and, written when that is whole, a .json that
describes it alone; the manifest, which is all of these together, is written by whoever finds none missing.

The same command goes on where one was killed: a shard that is there with its checksum right is left as it is.
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
from lcm_jax.parallel.sharding import make_mesh, parts_of
from lcm_jax.train.tasks.conditioner import Conditioner, encode_batch

SHARD = 4096  # pictures, about, where the number of shards is not given
READERS = min(64, os.cpu_count() or 1)  # threads that decode pictures
_OWN = re.compile(rf"\..*|{re.escape(MANIFEST)}|\d{{5}}-of-\d{{5}}\.(array_record|json)")


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
    """Encode what is missing of this process's shards; the whole data set, or None where others have shards to write.

    Pictures that cannot be read are left out, counted, and listed in the manifest.

    Args:
        model: whose autoencoder and text encoders are used: a bundled name, folder or hub id.
        data, split: as of `lcm_jax.data.load_source`.
        out: folder for the shards, seen by all processes.
        size: pixels of the squares; the model's own by default.
        shards: how many; one for every 4096 pictures by default. At least as many as processes keeps all of them busy.
        batch: pictures at a time in this process; by default as many as make a megapixel on each device, at most 32.
        mesh: of this process's devices; batches are cut over data and fsdp, the networks over fsdp and tensor.
        part: (p, P) for processes that are not joined by jax.distributed, which says so itself.
    """
    process, processes = part or (jax.process_index(), jax.process_count())
    if not 0 <= process < processes:
        raise ValueError(f"--part {process}/{processes}: the first number must be from 0 to {processes - 1}")
    if batch is not None and batch < 1:
        raise ValueError(f"--batch {batch}: it must be at least 1")
    here = make_mesh(mesh, batch_size=batch, devices=jax.local_devices())
    _check_folder(out)
    conditioner = Conditioner.load(model, model, here)
    vae = conditioner.vae.module.config
    side = vae.sample_size if size is None else size
    try:
        check_size((side, side), vae.downsample_factor, None)
    except ValueError as error:
        raise ValueError(f"--size: {error}") from None
    source = load_source(data, split, side, check=False)
    batch = encode_batch((side, side), parts_of(here)) if batch is None else batch
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
    for described in sorted(out.glob("*.json")):
        check_same(read_manifest(described), produced_by)
    mine = parts[process::processes]
    todo = [each for each in mine if not each.is_whole()]
    if len(todo) < len(mine):
        say(f"{out}: {len(mine) - len(todo)} of {len(mine)} shards are there")
    if todo:
        _write(todo, conditioner, source, produced_by, batch, say)
    if missing := sum(not each.described.is_file() for each in parts):
        say(f"{out}: this process is done, others have {missing} of {number} shards to write")
        return None
    whole = join([read_manifest(each.described) for each in parts])
    whole.save()
    left_out = f"; {len(whole.left_out)} are left out, such as {whole.left_out[0]}" if whole.left_out else ""
    say(f"{out}: {len(whole)} of {len(source)} pictures in {number} shards{left_out}")
    return whole


@dataclass(frozen=True, kw_only=True)
class Part:
    """A shard to be: which of the pictures it is for, and where it lies."""

    folder: Path
    index: int
    count: int
    pictures: int

    @property
    def name(self) -> str:
        return f"{self.index:05}-of-{self.count:05}"

    @property
    def data(self) -> Path:
        return self.folder / f"{self.name}.array_record"

    @property
    def described(self) -> Path:
        return self.folder / f"{self.name}.json"

    @property
    def indices(self) -> range:
        """Of its pictures in the data set."""
        return range(self.index * self.pictures // self.count, (self.index + 1) * self.pictures // self.count)

    def is_whole(self) -> bool:
        """Whether it has been written, and its checksum is right."""
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
    done, total, begun = 0, sum(len(part.indices) for part in parts), time.perf_counter()
    bar = tqdm(total=total, desc="encoding", unit="picture", disable=None, dynamic_ncols=True)
    with ThreadPoolExecutor(READERS) as pool, bar:
        for part in parts:
            left_out: list[str] = []

            def records(part: Part = part, left_out: list[str] = left_out) -> Iterator[dict[str, Any]]:
                read = _ahead(pool, lambda index: _read(source, index), part.indices, 2 * batch)
                for group in _groups(read, batch, left_out, bar):
                    arrays = conditioner.encode(group, batch, synthetic=produced_by["synthetic"])
                    for record, row in zip(group, arrays, strict=True):
                        yield {**row, **{name: text for name, text in record.items() if name != "image"}}

            part.described.unlink(missing_ok=True)  # of a damaged shard, which is written again
            shard = replace(write_shard(part.data, records(), produced_by), left_out=tuple(left_out))
            shard.save(part.described.name)
            done += len(part.indices)
            rate = done / (time.perf_counter() - begun)
            rest = timedelta(seconds=round((total - done) / rate))
            bar.clear()
            say(f"{part.data}: {len(shard)} pictures, {len(left_out)} left out, {rate:.3g} pictures/s, {rest} left")


def _groups(read: Iterable[Record | str], batch: int, left_out: list[str], bar: Any) -> Iterator[list[Record]]:
    """The records, `batch` at a time; what could not be read is added to `left_out`."""
    group: list[Record] = []
    for record in read:
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
    """A record, or in one line why it cannot be read."""
    try:
        return source[index]
    except ValueError as error:
        return " ".join(str(error).split())


def _ahead(pool: ThreadPoolExecutor, read: Callable[[int], Any], indices: Iterable[int], most: int) -> Iterator[Any]:
    """`read` of each index in order, at most `most` of them ahead."""
    waiting: deque[Future[Any]] = deque()
    for index in indices:
        waiting.append(pool.submit(read, index))
        if len(waiting) > most:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _first_readable(source: Source, name: str) -> Record:
    for index in range(len(source)):
        with suppress(ValueError):
            return source[index]
    raise ValueError(f"{name}: none of its {len(source)} pictures can be read; the first: {_read(source, 0)}")


def _check_folder(out: Path) -> None:
    """An encoded data set has a folder to itself."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out}: is a file; name a folder")
    strange = sorted(path.name for path in out.iterdir() if not _OWN.fullmatch(path.name)) if out.exists() else []
    if strange:
        raise ValueError(f"--out {out}: holds {strange[0]}, which is none of an encoded data set; name another folder")
