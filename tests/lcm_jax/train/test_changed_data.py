"""Pictures and captions that change under one name: a training reads today's, and only what has changed is encoded."""

from __future__ import annotations

import gc
import io
import json
import os
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from filelock import FileLock
from PIL import Image

from lcm_jax.data import InMemory, Source, load_source, open_cache, openmoji
from lcm_jax.data import sources as data_sources
from lcm_jax.data.array_cache import fingerprint
from lcm_jax.data.record_store import SHARD
from lcm_jax.data.records import record_keys
from lcm_jax.parallel.sharding import make_mesh
from lcm_jax.runtime.cache import cache_dir
from lcm_jax.train.precompute_latents import encode
from lcm_jax.train.tasks.conditioner import ENCODE_BATCH, Conditioner

COLORS = {f"{color} square": color for color in ("red", "lime", "blue", "white", "black", "olive")}


@pytest.fixture(scope="module")
def conditioner(tiny_model: Path) -> Conditioner:
    return Conditioner.load(str(tiny_model), str(tiny_model), make_mesh(devices=jax.local_devices()[:1]))


@pytest.fixture(autouse=True)
def _empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LCM_JAX_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def encoded_captions(conditioner: Conditioner, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The captions of the records that are encoded, in the order in which that happens."""
    encoded_captions: list[str] = []
    original = Conditioner.encode

    def counting(self: Conditioner, records: Any, batch: int, **options: Any) -> Iterator[dict[str, np.ndarray]]:
        encoded_captions.extend(record["caption"] for record in records)
        return original(self, records, batch, **options)

    monkeypatch.setattr(Conditioner, "encode", counting)
    monkeypatch.setattr(Conditioner, "load", lambda *_: conditioner)
    return encoded_captions


def png(color: str) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (16, 16), color).save(stream, "BMP")  # files of one size
    return stream.getvalue()


@dataclass
class Data:
    """Files of a data set, in a folder, in a tar, or in the first with a table of captions."""

    kind: str
    folder: Path
    files: dict[str, tuple[str, str]] = field(
        default_factory=lambda: {f"{i}.png": (color, text) for i, (text, color) in enumerate(COLORS.items())}
    )  # file -> colour, caption

    @property
    def name(self) -> str:
        return f"tar:{self.folder}/a.tar" if self.kind == "tar" else f"folder:{self.folder}"

    def write(self, files: dict[str, tuple[str, str]] | None = None) -> None:
        """Write what differs from `files`, which are there."""
        if self.kind == "tar":
            self.folder.mkdir(exist_ok=True)
            with tarfile.open(self.folder / "a.tar", "w") as tar:
                for name, (color, text) in self.files.items():
                    for member, data in ((name, png(color)), (f"{name[:-4]}.txt", text.encode())):
                        info = tarfile.TarInfo(member)  # of the time 0
                        info.size = len(data)
                        tar.addfile(info, io.BytesIO(data))
            return
        files = files or {}
        for name in files.keys() - self.files.keys():
            (self.folder / name).unlink()
            (self.folder / name).with_suffix(".txt").unlink()
        for name, (color, text) in self.files.items():
            path = self.folder / name
            path.parent.mkdir(exist_ok=True)
            if files.get(name, ("", ""))[0] != color:
                path.write_bytes(png(color))
            if files.get(name, ("", ""))[1] != text:
                path.with_suffix(".txt").write_text(text)


Train = Callable[[Data], list[dict[str, Any]]]


@pytest.fixture(params=["inside", "ahead"])
def train(request: pytest.FixtureRequest, conditioner: Conditioner, tmp_path: Path) -> Train:
    """Gives the records that a training reads: of the data, or of what `lcm-jax encode` makes of it."""

    def inside(data: Data) -> list[dict[str, Any]]:
        source = load_source(data.name, "train", 16)
        records = conditioner.encode_source(source, {"data": data.name, "split": "train", "size": 16})
        return [{**records[i], "caption": source[i]["caption"]} for i in range(len(records))]

    def ahead(data: Data) -> list[dict[str, Any]]:
        encode("tiny", data.name, tmp_path / "encoded", shards=2, size=16, say=lambda line: None)
        records = open_cache(tmp_path / "encoded")
        return [records[i] for i in range(len(records))]

    return inside if request.param == "inside" else ahead


def fresh(conditioner: Conditioner, data: Data) -> list[dict[str, Any]]:
    """The records of the data, encoded one by one and without a cache."""
    records = [
        {"image": np.asarray(Image.new("RGB", (16, 16), color)), "caption": text} for color, text in data.files.values()
    ]
    made = list(conditioner.encode(records, ENCODE_BATCH))
    return [{**arrays, "caption": record["caption"]} for arrays, record in zip(made, records, strict=True)]


def assert_same(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    assert [record["caption"] for record in found] == [record["caption"] for record in expected]
    for ours, theirs in zip(found, expected, strict=True):
        for name in ("mean", "std", "context"):
            np.testing.assert_allclose(ours[name], theirs[name], rtol=2e-3, atol=2e-3)


CHANGES = {
    "nothing": ({}, []),
    "a caption": ({"1.png": ("lime", "grass")}, ["grass"]),
    "a picture": ({"2.png": ("navy", "blue square")}, ["blue square"]),
    "two pictures change places": (
        {"0.png": ("lime", "red square"), "1.png": ("red", "lime square")},
        ["red square", "lime square"],
    ),
    "one more before": ({"00.png": ("gold", "gold square")}, ["gold square"]),
    "one less": ({"3.png": None}, []),
    "one more, one less, one edited": (
        {"0.png": None, "7.png": ("gold", "gold square"), "4.png": ("black", "night")},
        ["night", "gold square"],
    ),
}


@pytest.mark.parametrize("kind", ["folder", "tar"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_training_reads_the_pictures_and_captions_of_today(
    kind: str, change: str, train: Train, conditioner: Conditioner, encoded_captions: list[str], tmp_path: Path
) -> None:
    """Only what has changed is encoded, though a tar is written anew as a whole."""
    data = Data(kind, tmp_path / "data")
    data.write()
    assert_same(train(data), fresh(conditioner, data))
    before, (changes, expected) = dict(data.files), CHANGES[change]
    data.files = dict(sorted({k: v for k, v in {**data.files, **changes}.items() if v is not None}.items()))
    data.write(before)
    encoded_captions.clear()
    found = train(data)
    assert sorted(encoded_captions) == sorted(expected)
    assert_same(found, fresh(conditioner, data))
    data.files, after = before, data.files
    data.write(after)
    encoded_captions.clear()
    assert_same(train(data), fresh(conditioner, data))


def test_another_projects_folder_of_the_same_name(
    train: Train,
    conditioner: Conditioner,
    encoded_captions: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of the same sizes and times, too."""
    for project, text in (("a", "red square"), ("b", "blue square")):
        (tmp_path / project).mkdir()
        monkeypatch.chdir(tmp_path / project)
        data = Data("folder", Path("pictures"), {"0.png": (COLORS[text], "a square"), "1.png": ("white", "white")})
        data.folder.mkdir()
        data.write()
        for path in data.folder.iterdir():
            os.utime(path, ns=(0, 0))
        records = train(Data("folder", data.folder, data.files)) if project == "a" else None
    encoded_captions.clear()
    records = train(data)
    assert encoded_captions == ["a square"]
    assert_same(records, fresh(conditioner, data))


def test_files_that_were_moved_or_touched_are_not_encoded_again(
    train: Train, conditioner: Conditioner, encoded_captions: list[str], tmp_path: Path
) -> None:
    """Their bytes are read, and they are those that were encoded."""
    data = Data("folder", tmp_path / "data")
    data.write()
    train(data)
    encoded_captions.clear()
    for path in data.folder.iterdir():
        os.utime(path)
    touched = train(data)
    (data.folder / "0.png").rename(data.folder / "6.png")
    (data.folder / "0.txt").rename(data.folder / "6.txt")
    data.files = {**{k: v for k, v in data.files.items() if k != "0.png"}, "6.png": data.files["0.png"]}
    renamed = train(data)
    assert encoded_captions == []
    expected = fresh(conditioner, data)
    assert_same(touched, [expected[-1], *expected[:-1]])
    assert_same(renamed, expected)


def test_unchanged_pictures_are_not_read_again(
    conditioner: Conditioner, encoded_captions: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = Data("folder", tmp_path / "data")
    data.write()
    source = load_source(data.name, "train", 16)
    conditioner.encode_source(source, {})
    monkeypatch.setattr("lcm_jax.train.tasks.encoding.read_digested", None)
    assert len(conditioner.encode_source(load_source(data.name, "train", 16), {})) == 6


def test_bytes_of_the_same_size_and_time_are_told_apart_where_that_is_asked(tmp_path: Path) -> None:
    data = Data("folder", tmp_path / "data")
    data.write()
    path = data.folder / "0.png"
    time = path.stat().st_mtime_ns

    def keys(*, by_bytes: bool) -> list[str]:
        return record_keys(load_source(data.name, "train", 16), "", by_bytes=by_bytes)

    plain, by_bytes = keys(by_bytes=False), keys(by_bytes=True)
    path.write_bytes(png("navy"))
    os.utime(path, ns=(time, time))
    assert keys(by_bytes=False) == plain
    assert [old != new for old, new in zip(by_bytes, keys(by_bytes=True), strict=True)] == [True] + [False] * 5
    for name in data.files:  # copies of other times
        os.utime(data.folder / name)
    assert keys(by_bytes=True)[1:] == by_bytes[1:]
    assert not set(keys(by_bytes=False)) & set(plain)


def test_what_was_encoded_before_an_error_stays(
    conditioner: Conditioner, encoded_captions: list[str], tmp_path: Path
) -> None:
    """Here a picture becomes damaged after the source was opened; it is named."""
    data = Data("folder", tmp_path / "data")
    data.write()
    source = load_source(data.name, "train", 16)
    (data.folder / "3.png").write_bytes(png("white")[:400])
    with pytest.raises(ValueError, match=r"3\.png: not a readable picture"):
        conditioner.encode_source(source, {})
    assert encoded_captions == list(COLORS)[:3]
    encoded_captions.clear()
    (data.folder / "3.png").write_bytes(png("white"))
    found = conditioner.encode_source(load_source(data.name, "train", 16), {})
    assert encoded_captions == list(COLORS)[3:]
    assert len(found) == 6


def test_a_picture_that_changes_while_it_is_read_is_not_taken_for_the_one_before(
    conditioner: Conditioner, encoded_captions: list[str], tmp_path: Path
) -> None:
    data = Data("folder", tmp_path / "data")
    data.write()
    source = load_source(data.name, "train", 16)
    (data.folder / "1.png").write_bytes(png("navy"))
    with pytest.raises(ValueError, match=r"1\.png: has changed since the folder was opened; start again"):
        conditioner.encode_source(source, {})


def test_encode_leaves_shards_that_are_as_they_were(
    encoded_captions: list[str], conditioner: Conditioner, tmp_path: Path
) -> None:
    """It removes those that are not, and until it is done nothing can be taken for today's data."""
    data, out, said = Data("folder", tmp_path / "data"), tmp_path / "encoded", list[str]()
    data.write()
    encode("tiny", data.name, out, shards=3, size=16, say=said.append)
    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    (data.folder / "5.txt").write_text("oil")
    assert encode("tiny", data.name, out, shards=3, size=16, part=(0, 2), say=said.append) is not None
    after = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    same = [name for name in after if before.get(name) == after[name]]
    assert len(same) == 4
    assert len(after) == len(before) == 7
    assert said[-2] == f"{out}: 1 shards of pictures or captions that have changed are removed"
    (data.folder / "5.txt").write_text("oil paint")
    assert encode("tiny", data.name, out, shards=3, size=16, part=(1, 2), say=said.append) is None
    assert not (out / "manifest.json").exists()
    with pytest.raises(ValueError, match="was made with shards=3, not 2"):
        encode("tiny", data.name, out, shards=2, size=16, say=said.append)
    assert encode("tiny", data.name, out, size=16, say=said.append) is not None  # as many shards as there are
    assert open_cache(out)[5]["caption"] == "oil paint"


def test_an_encoding_of_an_earlier_version_is_made_again(
    encoded_captions: list[str], conditioner: Conditioner, tmp_path: Path
) -> None:
    """It does not say from which pictures it was made."""
    data, out = Data("folder", tmp_path / "data"), tmp_path / "encoded"
    data.write()
    cache = encode("tiny", data.name, out, shards=1, size=16, say=lambda line: None)
    assert cache is not None
    file = out / cache.shards[0].file
    old = {key: value for key, value in cache.produced_by.items() if key not in ("content", "known_by", "settings")}
    for path in out.glob("*.json"):
        path.unlink()
    file.rename(out / "00000-of-00001.array_record")
    shard = replace(cache, shards=(replace(cache.shards[0], file="00000-of-00001.array_record"),), produced_by=old)
    shard.save("00000-of-00001.json")
    shard.save()
    assert len(load_source(str(out), "train", 16, encoded=True)) == 6  # a training still reads it
    encoded_captions.clear()
    encode("tiny", data.name, out, size=16, say=lambda line: None)
    assert encoded_captions == list(COLORS)
    assert sorted(path.suffix for path in out.iterdir()) == [".array_record", ".json", ".json"]
    assert json.loads((out / "manifest.json").read_text())["produced_by"]["pictures"] == 6


@pytest.fixture
def registered() -> Iterator[dict[str, Any]]:
    """A source "mine:" whose pictures the test gives."""
    content: dict[str, Any] = {}
    data_sources.register("mine", lambda text, split, size: content["source"])
    yield content
    del data_sources.OPENERS["mine"]


def in_memory(*colors: str) -> InMemory:
    images = np.stack([np.asarray(Image.new("RGB", (16, 16), color)) for color in colors])
    return InMemory(images=images, captions=tuple(f"{i}" for i in range(len(colors))))


def test_a_registered_source_is_known_by_its_records(
    registered: dict[str, Any], conditioner: Conditioner, encoded_captions: list[str]
) -> None:
    def train(*colors: str) -> Source:
        registered["source"] = in_memory(*colors)
        encoded_captions.clear()
        return conditioner.encode_source(load_source("mine:x", "train", 16), {"data": "mine:x"})

    train("red", "lime", "blue")
    assert encoded_captions == ["0", "1", "2"]
    train("red", "lime", "blue")
    assert encoded_captions == []
    train("red", "navy")
    assert encoded_captions == ["1"]


def test_a_registered_source_may_have_keys_of_its_own(
    registered: dict[str, Any], conditioner: Conditioner, encoded_captions: list[str]
) -> None:
    """Then no record is read again; the keys of one source are not those of another."""

    class Keyed:
        def __init__(self, *colors: str) -> None:
            self.records, self.reads = in_memory(*colors), 0

        def __len__(self) -> int:
            return len(self.records)

        def __getitem__(self, index: int) -> Any:
            self.reads += 1
            return self.records[index]

        def key(self, index: int) -> int:
            return index

    for name, color, expected in (("mine:x", "red", ["0", "1"]), ("mine:x", "red", []), ("mine:y", "lime", ["0"])):
        registered["source"] = keyed = Keyed(color, "blue")
        encoded_captions.clear()
        records = conditioner.encode_source(load_source(name, "train", 16), {"data": name})
        assert encoded_captions == expected
        assert expected or keyed.reads == 2  # its check when it is opened, and the size of its pictures
        alone = next(conditioner.encode([in_memory(color)[0]], ENCODE_BATCH))
        np.testing.assert_allclose(records[0]["mean"], alone["mean"], rtol=2e-3, atol=2e-3)


def test_openmoji_is_known_by_its_name_and_the_networks(
    conditioner: Conditioner, encoded_captions: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Latents of the library's own drawings are found by their name, and made again for other weights and configs."""
    source = InMemory(images=in_memory("red", "lime").images, captions=("red", "lime"), is_fixed=True)
    described = {"data": "openmoji", "split": "train", "size": 16}
    conditioner.encode_source(source, described)
    conditioner.encode_source(source, described, first=1)
    made = {"format": 2, "kind": "latents", "version": 1, "weights": conditioner.digest}
    made |= {"settings": conditioner.settings, **described}
    for folder in (made, made | {"first": 1}):
        assert (cache_dir() / "latents" / fingerprint(folder) / "data.array_record").is_file()
    encoded_captions.clear()
    replace(conditioner, settings="another config of the autoencoder").encode_source(source, described)
    assert encoded_captions == ["red", "lime"]
    few = {split: openmoji.split_items(split)[:2] for split in openmoji.SPLITS}
    monkeypatch.setattr(openmoji, "split_items", few.__getitem__)
    assert all(getattr(load_source(name, "validation", 64), "is_fixed", False) for name in data_sources.OPENMOJI)


def test_what_no_run_has_used_for_long_is_removed(
    conditioner: Conditioner, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Replaced pictures: their files go after a while, but not those that this run, or another one, reads."""
    caplog.set_level("INFO", "lcm_jax")
    folder = tmp_path / "pictures"
    folder.mkdir()

    def write(color: str) -> None:
        (folder / "a.bmp").write_bytes(png(color))
        (folder / "a.txt").write_text(color)

    def encoded() -> Source:
        return conditioner.encode_source(load_source(f"folder:{folder}", "train", 16), {"data": "x"})

    def shards() -> set[Path]:
        return set((cache_dir() / "latents").glob("*/*.array_record"))

    def age() -> None:
        for path in shards():
            os.utime(path, (0, 0))

    write("red")
    (red,) = encoded().source.shards  # type: ignore[attr-defined]
    write("lime")
    held = encoded()
    assert len(shards()) == 2, "what was replaced is kept for a while"
    store = next(iter(shards())).parent
    age()
    write("blue")
    with FileLock(store / ".another-run.use"):
        encoded()
        assert len(shards()) == 3, "another run reads"
    age()
    write("white")
    encoded()
    assert store / red.file not in shards()
    assert len(shards()) == 2, "blue is gone too; lime is held by this process"
    assert not (store / ".another-run.use").exists()
    assert held[0]["mean"].shape == (8, 8, 4)
    assert {path.stem for path in store.glob("*.json")} == {path.stem for path in shards()}
    said = [record.getMessage() for record in caplog.records if "removed" in record.getMessage()]
    assert len(said) == 1
    assert "removed 2 files" in said[0]
    del held
    gc.collect()
    age()
    write("black")
    encoded()
    assert len(shards()) == 1
    gc.collect()
    assert not list(store.glob(".*.use"))


@pytest.mark.slow
def test_more_records_than_a_file_holds(conditioner: Conditioner, encoded_captions: list[str], tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    count = 2 * SHARD + 3
    source = InMemory(
        images=random.integers(0, 255, (count, 16, 16, 3), np.uint8), captions=tuple(map(str, range(count)))
    )
    found = conditioner.encode_source(source, {})
    assert len(found) == count
    assert len(encoded_captions) == count
    again = conditioner.encode_source(source, {})
    assert len(encoded_captions) == count
    np.testing.assert_array_equal(found[count - 1]["mean"], again[count - 1]["mean"])
