"""Arrays written once come back bit for bit, and a damaged or foreign cache is refused."""

from __future__ import annotations

import json
import re
import resource

import numpy as np
import pytest

from lcm_jax.data import Loader, cached, open_cache, write_cache
from lcm_jax.data.array_cache import join, write_shard

RNG = np.random.default_rng(0)
RECORDS = [
    {
        "mean": RNG.normal(size=(4, 4, 2)).astype(np.float16),
        "caption": f"número {i}",
        "tokens": np.arange(i, i + 5, dtype=np.int32),
        "weight": np.float32(i),
    }
    for i in range(7)
]
MADE = {"source": "openmoji", "size": 64, "vae": [1, 2.5, None]}


@pytest.fixture
def folder(tmp_path):
    write_cache(tmp_path / "cache", RECORDS, MADE)
    return tmp_path / "cache"


def test_records_come_back_bit_for_bit(folder):
    cache = open_cache(folder)
    assert len(cache) == 7
    assert cache.produced_by == MADE
    for i in (0, 6, 3, -1):
        for name, value in RECORDS[i].items():
            found = cache[i][name]
            assert type(found) is str or (found.dtype, found.shape) == (value.dtype, value.shape)
            np.testing.assert_array_equal(found, value)
    with pytest.raises(IndexError):
        cache[7]
    assert [path.name for path in folder.parent.iterdir()] == ["cache"]


def test_manifest_says_what_is_there(folder):
    manifest = json.loads((folder / "manifest.json").read_text())
    assert (manifest["count"], manifest["texts"], manifest["produced_by"]) == (7, ["caption"], MADE)
    assert manifest["fields"]["mean"] == {"dtype": "float16", "shape": [4, 4, 2]}


def test_cache_is_a_source_for_the_loader(folder):
    batch = Loader(open_cache(folder), 3, 0, threads=2)[1]
    assert batch["mean"].shape == (3, 4, 4, 2)
    assert batch["caption"] == [f"número {int(w)}" for w in batch["weight"]]


def test_cached_computes_once_for_each_description(tmp_path):
    calls = []

    def produce():
        calls.append(1)
        return iter(RECORDS)

    cached(tmp_path, MADE, produce, total=7)
    again = cached(tmp_path, dict(reversed(MADE.items())), produce)
    assert (len(again), len(calls)) == (7, 1)
    cached(tmp_path, MADE | {"size": 128}, produce)
    assert len(calls) == 2


def test_an_interrupted_writing_leaves_nothing(tmp_path):
    def broken():
        yield RECORDS[0]
        raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        write_cache(tmp_path / "cache", broken(), MADE)
    assert list(tmp_path.iterdir()) == []


def test_a_finished_cache_is_kept(folder):
    write_cache(folder, RECORDS[:2], MADE)
    assert len(open_cache(folder)) == 7
    (folder.parent / "other").mkdir()
    (folder.parent / "other" / "file").touch()
    with pytest.raises(FileExistsError, match="is no cache"):
        write_cache(folder.parent / "other", RECORDS, MADE)


@pytest.mark.parametrize(
    ("records", "words"),
    [
        ([], "empty dataset"),
        ([{"x": np.array([None])}], "field 'x': dtype object cannot be cached"),
        ([{"x": np.zeros(2)}, {"x": np.zeros(3)}], "record 1: fields"),
        ([{"x": np.zeros(2)}, {"y": np.zeros(2)}], "record 1: fields"),
        ([{"x": np.array([1, np.inf], np.float16)}], "record 0: field 'x' is not finite"),
    ],
)
def test_bad_records_are_refused(tmp_path, records, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        write_cache(tmp_path / "cache", records, MADE)
    assert list(tmp_path.iterdir()) == []


def test_bad_caches_are_refused(folder, tmp_path):
    with pytest.raises(ValueError, match="produced_by must be plain JSON"):
        write_cache(tmp_path / "x", RECORDS, {"a": object()})
    with pytest.raises(FileNotFoundError, match="no cache here"):
        open_cache(tmp_path / "nowhere")
    manifest = folder / "manifest.json"
    content = manifest.read_text()
    manifest.write_text(content.replace('"format": 2', '"format": 9'))
    with pytest.raises(ValueError, match="cache format 9, this version reads 2"):
        open_cache(folder)
    manifest.write_text(content[:40])
    with pytest.raises(ValueError, match="not a manifest of a cache"):
        open_cache(folder)
    manifest.write_text(content)
    data = folder / "data.array_record"
    bits = bytearray(data.read_bytes())
    bits[len(bits) // 2] ^= 1
    data.write_bytes(bits)
    remedy = re.escape(f"; remove {folder}, and it is made again")
    with pytest.raises(ValueError, match=f"SHA-256.* where the manifest says .*{remedy}"):
        open_cache(folder)
    data.write_bytes(bits[:-5])
    with pytest.raises(ValueError, match="bytes where the manifest says"):
        open_cache(folder)
    data.unlink()
    with pytest.raises(FileNotFoundError, match=r"data.array_record: missing"):
        open_cache(folder)


def test_shards_are_one_source(tmp_path):
    """Also those without a record, in the order in which they are joined."""
    parts = [RECORDS[:3], [], RECORDS[3:4], RECORDS[4:]]
    content = join([write_shard(tmp_path / f"{i}.array_record", part, MADE) for i, part in enumerate(parts)])
    content.save()
    cache = open_cache(tmp_path)
    assert [record["caption"] for record in cache] == [record["caption"] for record in RECORDS]
    assert cache[-3]["weight"] == 4
    other = write_shard(tmp_path / "4.array_record", [{"x": np.zeros(2)}], MADE)
    with pytest.raises(ValueError, match=r"4\.array_record: fields"):
        join([content, other])
    with pytest.raises(ValueError, match="was made with size=65, not 64"):
        join([content, write_shard(tmp_path / "4.array_record", [], MADE | {"size": 65})])


def test_a_full_disk_is_said_and_leaves_nothing(tmp_path):
    """A limit on the size of files stands for it."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(
            OSError, match=re.escape("x.array_record: cannot be written (write() failed: File too large)")
        ):
            write_shard(tmp_path / "x.array_record", ({"x": RNG.normal(size=9000)} for _ in range(9)), MADE)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == []
