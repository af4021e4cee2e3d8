"""An encoded data set is what a training would have encoded, whoever writes its shards, however often stopped."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import tarfile
import time
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import tensorflow_datasets as tfds
from jax.sharding import Mesh
from PIL import Image

import lcm_jax.train.tasks.encoding
from lcm_jax.cli import main as cli
from lcm_jax.data import load_source, open_cache
from lcm_jax.data.array_cache import read_manifest
from lcm_jax.diffusion.schedules import DDPM
from lcm_jax.objectives import Diffusion
from lcm_jax.parallel.sharding import make_mesh
from lcm_jax.train.loop import LoopConfig, fit
from lcm_jax.train.optimizer import OptimizerConfig
from lcm_jax.train.precompute_latents import encode
from lcm_jax.train.tasks.autoencoder import AutoencoderTask
from lcm_jax.train.tasks.common import DataConfig
from lcm_jax.train.tasks.conditioner import Conditioner
from lcm_jax.train.tasks.diffusion import DiffusionTask
from lcm_jax.weights.diffusers_folder import Component

SHARDS = [f"0000{i}-of-00003.{kind}" for i in range(3) for kind in ("array_record", "json")]  # by `plain`


@pytest.fixture(scope="module", autouse=True)
def _once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A cache of their own, and networks that are loaded and compiled once for all tests."""
    patch, load, loaded = pytest.MonkeyPatch(), Conditioner.load, {}
    patch.setenv("LCM_JAX_CACHE", str(tmp_path_factory.mktemp("cache")))

    def once(vae: str, text: str, mesh: Mesh | None = None) -> Conditioner:
        if vae not in loaded:
            loaded[vae] = load(vae, text, make_mesh(devices=jax.local_devices()[:1]))
        return loaded[vae]

    patch.setattr(Conditioner, "load", once)
    yield
    patch.undo()


def run(model: Path, data: str, out: Path, **options: Any) -> Path:
    encode(str(model), data, out, **{"shards": 3, "say": lambda line: None, **options})
    return out


@pytest.fixture
def encoded(tiny_model: Path, pictures: Path, tmp_path: Path) -> Path:
    """The six pictures in three shards."""
    return run(tiny_model, f"folder:{pictures}", tmp_path / "encoded")


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def plain(names: Iterable[str]) -> list[str]:
    """The names of files without the part that stands for their content."""
    return [re.sub(r"-[0-9a-f]{16}\.", ".", name) for name in sorted(names)]


def shard_file(folder: Path, name: str) -> Path:
    """The file of a folder that `plain` gives this name."""
    (path,) = (path for path in folder.iterdir() if plain([path.name]) == [name])
    return path


def shards(folder: Path) -> dict[str, bytes]:
    return {name: data for name, data in files(folder).items() if name.endswith(".array_record")}


def diffusion(model: Path, net: Any, data: DataConfig) -> DiffusionTask:
    around = {"vae": str(model), "text": str(model), "data": data, "prompts": data}
    return DiffusionTask(net=net, objective=Diffusion(schedule=DDPM()), preview_steps=2, **around)


def test_a_training_reads_what_it_would_have_encoded(
    tiny_model: Path, tiny_components: dict[str, Component], pictures: Path, encoded: Path
) -> None:
    """Bit for bit, in the same order. Its previews' captions, and what they compare with, are there too."""
    conditioner = Conditioner.load(str(tiny_model), str(tiny_model))

    def batches(name: str) -> list[dict[str, np.ndarray]]:
        data = DataConfig(name=name, size=16)
        task = diffusion(tiny_model, tiny_components["unet"].module.config, data)
        sources = data.open_buckets()
        iterator = task.batches(sources, task.encode(conditioner, sources))(4, 0)
        return [next(iterator) for _ in range(4)]

    for inside, precomputed in zip(batches(f"folder:{pictures}"), batches(str(encoded)), strict=True):
        assert inside.keys() == precomputed.keys() == {"mean", "std", "context"}
        for name in inside:
            np.testing.assert_array_equal(inside[name], precomputed[name])
    source, plain = load_source(str(encoded), size=16, encoded=True), load_source(str(pictures), size=16)
    assert [source[i]["caption"] for i in range(6)] == [plain[i]["caption"] for i in range(6)]
    held_out = conditioner.encode_source(source, {}, first=5)
    assert (len(held_out), held_out[4].keys()) == (5, {"mean", "std", "context"})


@pytest.mark.slow
def test_a_training_on_it_is_the_same(
    tiny_model: Path, tiny_components: dict[str, Component], pictures: Path, encoded: Path, tmp_path: Path
) -> None:
    def train(name: str, workdir: Path) -> Any:
        task = diffusion(tiny_model, tiny_components["unet"].module.config, DataConfig(name=name, size=16)).build()
        loop = LoopConfig(steps=3, batch_size=4, log_every=1, save_every=3, preview_every=3)
        state = fit(task, loop, OptimizerConfig(warmup=1), workdir)
        return state.params, (workdir / "previews.json").read_text()

    inside, precomputed = train(f"folder:{pictures}", tmp_path / "inside"), train(str(encoded), tmp_path / "ahead")
    jax.tree.map(np.testing.assert_array_equal, inside[0], precomputed[0])
    assert inside[1] == precomputed[1]


def test_the_manifest_says_what_is_there(tiny_model: Path, pictures: Path, encoded: Path) -> None:
    manifest = json.loads((encoded / "manifest.json").read_text())
    made = manifest["produced_by"]
    assert (made["model"], made["data"], made["size"], made["dtype"]) == (
        *(str(tiny_model), f"folder:{pictures}"),
        *(16, "float16"),
    )
    assert made["scaling_factor"] == 0.18215
    assert [shard["records"] for shard in manifest["shards"]] == [2, 2, 2]
    assert (manifest["count"], manifest["left_out"]) == (6, [])
    assert (made["pictures"], made["known_by"]) == (6, "path, size and time")
    assert plain(files(encoded)) == [*SHARDS, "manifest.json"]
    origins = [
        origin for name in SHARDS[1::2] for origin in json.loads(shard_file(encoded, name).read_text())["origins"]
    ]
    assert [name for _, _, name in origins] == [str(pictures / f"{i}.png") for i in range(6)]


def test_two_processes_write_what_one_does(tiny_model: Path, pictures: Path, encoded: Path, tmp_path: Path) -> None:
    other, said = tmp_path / "other", list[str]()
    assert encode(str(tiny_model), f"folder:{pictures}", other, shards=3, part=(1, 2), say=said.append) is None
    assert plain(shards(other)) == ["00001-of-00003.array_record"]
    assert said[-1] == f"{other}: this process is done, others have 2 of 3 shards to write"
    run(tiny_model, f"folder:{pictures}", other, part=(0, 2))
    assert files(other) == files(encoded)


def test_tars_are_encoded_as_a_folder_is(tiny_model: Path, pictures: Path, encoded: Path, tmp_path: Path) -> None:
    stems = sorted(path.stem for path in pictures.glob("*.png"))
    for i in range(2):
        with tarfile.open(tmp_path / f"train-{i}.tar", "w") as tar:
            for stem in stems[3 * i : 3 * i + 3]:
                tar.add(pictures / f"{stem}.png", f"deep/{stem}.PNG")
                tar.addfile(tarfile.TarInfo(f"deep/{stem}.json"), io.BytesIO())
                tar.add(pictures / f"{stem}.txt", f"deep/{stem}.txt")
    other = run(tiny_model, f"tar:{tmp_path}/train-*.tar", tmp_path / "other")
    assert list(shards(other).values()) == list(shards(encoded).values())


def test_a_prepared_data_set_is_encoded_from_its_array_record_files(
    tiny_model: Path, pictures: Path, encoded: Path, tmp_path: Path
) -> None:
    class TinyPictures(tfds.core.GeneratorBasedBuilder):
        """The pictures of the folder."""

        VERSION = tfds.core.Version("1.0.0")

        def _info(self) -> tfds.core.DatasetInfo:
            features = {"image": tfds.features.Image(shape=(16, 16, 3)), "text": tfds.features.Text()}
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

        def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
            return {"train": self._generate_examples()}

        def _generate_examples(self) -> Iterator[tuple[str, dict[str, Any]]]:
            for path in pictures.glob("*.png"):
                yield path.stem, {"image": path, "text": path.with_suffix(".txt").read_text()}

    builder = TinyPictures(data_dir=tmp_path / "tfds", file_format="array_record")
    builder.download_and_prepare()
    other = open_cache(run(tiny_model, f"tfds:{builder.data_dir}", tmp_path / "other"))
    expected = {record["caption"]: record["mean"] for record in open_cache(encoded)}
    found = {record["caption"]: record["mean"] for record in other}
    assert found.keys() == expected.keys()
    for caption, mean in expected.items():  # at another row of its batch
        np.testing.assert_allclose(found[caption], mean, rtol=2e-3, atol=2e-3)


def test_a_stopped_run_goes_on(
    tiny_model: Path, pictures: Path, encoded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the middle of the second shard, with files left behind as a kill leaves them."""
    data, other, read = f"folder:{pictures}", tmp_path / "other", lcm_jax.train.tasks.encoding.read_digested

    def stopping(source: Any, index: int) -> Any:
        if index == 3:
            raise KeyboardInterrupt
        return read(source, index)

    monkeypatch.setattr(lcm_jax.train.tasks.encoding, "read_digested", stopping)
    with pytest.raises(KeyboardInterrupt):
        run(tiny_model, data, other)
    assert plain(files(other)) == SHARDS[:2]
    monkeypatch.undo()
    second, third = shard_file(encoded, SHARDS[2]).name, shard_file(encoded, SHARDS[4]).name
    (other / f".{second}-0").write_bytes(b"half")
    (other / third).write_bytes(b"renamed, but its description was not written")
    first = shard_file(other, SHARDS[0]).stat()
    said: list[str] = []
    run(tiny_model, data, other, say=said.append)
    assert files(other) == files(encoded)
    assert shard_file(other, SHARDS[0]).stat() == first
    assert said[0] == f"{other}: 1 of 3 shards are there"


@pytest.mark.slow
def test_a_killed_run_goes_on(tiny_model: Path, tmp_path: Path) -> None:
    """SIGKILL at four moments; the shards are those of an undisturbed run, bit for bit."""
    random = np.random.default_rng(0)
    (tmp_path / "many").mkdir()
    for i in range(600):
        Image.fromarray(random.integers(0, 255, (16, 16, 3), np.uint8)).save(tmp_path / "many" / f"{i:03}.png")
        (tmp_path / "many" / f"{i:03}.txt").write_text(f"picture {i}")
    command = [sys.executable, "-m", "lcm_jax.cli", "encode", "--model", str(tiny_model), "--shards", "60"]
    command += ["--data", f"folder:{tmp_path / 'many'}", "--batch", "2"]

    def start(out: Path) -> subprocess.Popen[bytes]:
        return subprocess.Popen([*command, "--out", str(out)], env={**os.environ, "JAX_PLATFORMS": "cpu"})

    killed = tmp_path / "killed"
    for most in (1, 9, 20, 40):
        process = start(killed)
        deadline = time.monotonic() + 120
        while len(list(killed.glob("*.json"))) < most and time.monotonic() < deadline:
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        for described in killed.glob("*.json"):
            read_manifest(described).check()
        assert not (killed / "manifest.json").exists()
    assert start(killed).wait() == start(tmp_path / "whole").wait() == 0
    assert files(killed) == files(tmp_path / "whole")


@pytest.mark.slow
def test_eight_devices_encode_what_one_does(tiny_model: Path, pictures: Path, encoded: Path, tmp_path: Path) -> None:
    """Batches cut over all, networks over some; to the rounding of float16."""
    flags = {"JAX_PLATFORMS": "cpu"}
    flags["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    command = [
        sys.executable,
        "-m",
        "lcm_jax.cli",
        "encode",
        "--model",
        str(tiny_model),
        "--data",
        f"folder:{pictures}",
    ]
    for mesh in ("", "data=2,fsdp=4", "fsdp=4,tensor=2"):
        out = tmp_path / f"mesh {mesh}"
        options = ["--data", f"folder:{pictures}", "--out", str(out), "--batch", "8", "--shards", "2", "--mesh", mesh]
        subprocess.run([*command, *options], env={**os.environ, **flags}, check=True)
        for ours, theirs in zip(open_cache(out), open_cache(encoded), strict=True):
            for name in ("mean", "std", "context"):
                np.testing.assert_allclose(ours[name], theirs[name], rtol=2e-3, atol=2e-3)


def bomb() -> bytes:
    """A PNG that says it has 10^10 pixels."""
    chunks = ((b"IHDR", struct.pack(">IIBBBBB", 10**5, 10**5, 8, 2, 0, 0, 0)), (b"IDAT", zlib.compress(b"")))
    body = b"".join(struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks)
    return b"\x89PNG\r\n\x1a\n" + body


def test_bad_pictures_are_left_out_and_listed(tiny_model: Path, pictures: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(pictures, tmp_path / "pictures")
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    noise.save(tmp_path / "noise.jpg")
    (folder / "0.png").write_bytes((tmp_path / "noise.jpg").read_bytes()[:900])
    (folder / "1.png").write_bytes(b"not a picture")
    (folder / "3.png").write_bytes(bomb())
    Image.new("I;16", (16, 16)).save(folder / "5.png")
    said: list[str] = []
    cache = encode(str(tiny_model), f"folder:{folder}", tmp_path / "out", shards=3, say=said.append)
    assert cache is not None
    assert [shard.records for shard in cache.shards] == [0, 1, 1]
    assert [record["caption"] for record in open_cache(tmp_path / "out")] == [
        (folder / f"{i}.txt").read_text() for i in (2, 4)
    ]
    for line, (i, words) in zip(
        cache.left_out,
        ((0, "truncated"), (1, "unknown format"), (3, "decompression bomb"), (5, "mode I;16 is not RGB")),
        strict=True,
    ):
        assert line.startswith(f"{folder / f'{i}.png'}: ")
        assert words in line
    assert f"2 of 6 pictures in 3 shards; 4 are left out, such as {cache.left_out[0]}" in said[-1]
    for i in (2, 4):
        (folder / f"{i}.png").write_bytes(b"")
    with pytest.raises(ValueError, match="none of its 6 pictures can be read; the first: "):
        run(tiny_model, f"folder:{folder}", tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_a_damaged_shard_is_named_and_written_again(
    tiny_model: Path, pictures: Path, encoded: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before, shard = files(encoded), shard_file(encoded, SHARDS[2])
    stat = shard_file(encoded, SHARDS[0]).stat()
    data, record = bytearray(before[shard.name]), open_cache(encoded)[2]
    said: list[str] = []
    for at in np.flatnonzero(data)[::300]:  # between the ends of the file are zeros
        data[at] ^= 1
        shard.write_bytes(data)
        with pytest.raises(ValueError, match=re.escape(f"{shard}: damaged, ")) as error:
            DataConfig(name=str(encoded), size=16).open_buckets()
        assert "\n" not in str(error.value)
        try:  # as one who has not checked this part
            found = open_cache(encoded, part=0, parts=3)[2]
            jax.tree.map(np.testing.assert_array_equal, found, record)
        except ValueError as error:
            said.append(str(error))
        data[at] ^= 1
    assert said
    assert all(line.startswith(f"{shard}: cannot be read") for line in said)
    shard.write_bytes(data[:-100])
    with pytest.raises(ValueError, match=re.escape(f"{shard}: damaged, {len(data) - 100} bytes where the manifest")):
        open_cache(encoded, part=0, parts=3)
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=re.escape(f"{shard}: missing")):
        open_cache(encoded)
    run(tiny_model, f"folder:{pictures}", encoded)
    assert files(encoded) == before
    assert shard_file(encoded, SHARDS[0]).stat() == stat


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"size": 8}, "was made with size=16, not 8; give the same, or another folder"),
        ({"shards": 2}, "was made with shards=3, not 2"),
        ({"data": "tars"}, "was made with data="),
        ({"model": "other"}, "was made with model="),
    ],
)
def test_another_output_is_not_mixed_in(
    options: dict[str, Any], words: str, tiny_model: Path, pictures: Path, encoded: Path, tmp_path: Path
) -> None:
    (encoded / "manifest.json").unlink()
    before = files(encoded)
    model, data = tiny_model, f"folder:{pictures}"
    if options.pop("model", None):
        model = shutil.copytree(tiny_model, tmp_path / "other")
    if options.pop("data", None):
        data = str(shutil.copytree(pictures, tmp_path / "tars"))
    with pytest.raises(ValueError, match=re.escape(words)):
        run(model, data, encoded, **options)
    assert files(encoded) == before


def test_latents_of_other_networks_or_sizes_are_refused(tiny_model: Path, encoded: Path, pictures: Path) -> None:
    for options, words in (
        ({"size": 32}, "encoded with size=16, and size=32 is asked for"),
        ({"split": "validation"}, "encoded with split=train, and split=validation is asked for"),
        ({"buckets": True, "multiple": 4}, "encoded pictures have one size; leave buckets out"),
    ):
        with pytest.raises(ValueError, match=words):
            DataConfig(name=str(encoded), **{"size": 16, **options}).open_buckets()
    conditioner = replace(Conditioner.load(str(tiny_model), str(tiny_model)), digest="of other weights")
    with pytest.raises(ValueError, match=r"encoded with other weights, those of .*, than task\.vae and task\.text"):
        conditioner.encode_source(load_source(str(encoded), size=16, encoded=True), {})
    data = DataConfig(name=str(encoded), size=16)
    with pytest.raises(ValueError, match=re.escape(f"give what it was made of, folder:{pictures}")):
        AutoencoderTask(data=data, validation=data).build()


def test_the_command_line_encodes_and_refuses(
    tiny_model: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["encode", "--model", str(tiny_model), "--data", f"folder:{pictures}"]
    assert cli.main([*arguments, "--out", str(tmp_path / "out")]) == 0
    assert f"{tmp_path / 'out'}: 6 of 6 pictures in 1 shards" in capsys.readouterr().out
    for options, words in (
        (["--shards", "7"], "--shards 7: it must be from 1 to the number of pictures, 6"),
        (["--size", "9"], "--size: size 9x9: height and width must be positive multiples of 2 pixels"),
        (["--part", "2/2"], "--part 2/2: the first number must be from 0 to 1"),
        (["--part", "1"], "--part 1: give P/N"),
        (["--batch", "0"], "--batch 0: it must be at least 1"),
        (["--out", str(pictures)], "holds 0.png, which is no file of an encoded data set; name another folder"),
        (["--out", str(pictures / "0.png")], "is a file; name a folder"),
    ):
        assert cli.main([*arguments, "--out", str(tmp_path / "none"), *options]) == 2
        said = capsys.readouterr().err
        assert words in said
        assert said.count("\n") == 1
    assert not (tmp_path / "none").exists()
