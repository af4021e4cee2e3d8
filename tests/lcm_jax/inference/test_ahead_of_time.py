"""A program in a file draws what the pipeline draws, traces no network, and refuses what it was not made for."""

from __future__ import annotations

import hashlib
import json
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from lcm_jax import Pipeline, load
from lcm_jax.cli.main import main
from lcm_jax.inference import ahead_of_time
from lcm_jax.inference.ahead_of_time import Exported, _call, _leaves, _parameters, write_program
from lcm_jax.nets import UNet

PROMPTS = ["red heart", "cat face"]


@pytest.fixture(scope="module")
def pipe(tiny_model: Path) -> Pipeline:
    return load(tiny_model)


@pytest.fixture(scope="module")
def file(pipe: Pipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two pictures of a call, with guidance."""
    path = tmp_path_factory.mktemp("exported") / "program"
    write_program(pipe, path, batch=2, guidance=3.0)
    assert [other.name for other in path.parent.iterdir()] == ["program"]
    return path


def test_it_draws_what_the_pipeline_draws_and_traces_no_network(
    pipe: Pipeline, file: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[dict[str, Any]] = [
        {"guidance": 3.0},
        {"guidance": 2.0, "steps": 2, "seed": 5, "negative_prompt": "dog"},
    ]
    plain = [pipe(PROMPTS, **call) for call in calls]
    assert not np.array_equal(*plain)

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a network is traced")

    monkeypatch.setattr(UNet, "__call__", refuse)
    exported = Exported(load(tiny_model), file)
    for call, pictures in zip(calls, plain, strict=True):
        drawn = exported(PROMPTS, **call)
        assert drawn.dtype == np.uint8
        assert np.abs(drawn.astype(int) - pictures).max() <= 1  # a half is rounded up or down


@pytest.mark.slow
def test_one_of_sd3(tiny_sd3: Path, tmp_path: Path) -> None:
    pipe = load(tiny_sd3)
    write_program(pipe, tmp_path / "program", sampler="euler")
    plain = pipe("red heart", sampler="euler", seed=3, steps=3)
    drawn = Exported(pipe, tmp_path / "program")("red heart", seed=3, steps=3)
    assert np.abs(drawn.astype(int) - plain).max() <= 1


def rewritten(file: Path, path: Path, change: Callable[[dict[str, Any]], Any], body: bytes | None = None) -> Path:
    """The file with another header, or another program."""
    with zipfile.ZipFile(file) as original, zipfile.ZipFile(path, "w") as other:
        header = json.loads(original.read("header.json"))
        change(header)
        other.writestr("header.json", json.dumps(header))
        other.writestr("program.bin", original.read("program.bin") if body is None else body)
    return path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"jax": "0.1"}, "compiled for jax 0.1, and this is"),
        ({"platform": "tpu"}, "compiled for platform tpu, and this is cpu: run lcm-jax compile again"),
        ({"device": "TPU v5 lite"}, "compiled for device TPU v5 lite, and this is cpu"),
        ({"model": "0" * 64}, r"compiled for model 00000000000000000\.\.\., and this is"),
        ({"version": 2}, "it has the version 2, and this reads 1"),
        ({"colour": "red"}, "no file of lcm-jax compile that can be read"),
        ({"program": "0" * 64}, "its program is damaged"),
    ],
)
def test_what_it_was_not_made_for_is_refused(
    pipe: Pipeline, file: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Exported(pipe, rewritten(file, tmp_path / "other", lambda header: header.update(change)))


@pytest.mark.parametrize(
    "change",
    [
        {"size": "16x16"},
        {"size": [16]},
        {"size": [16, 10**9]},
        {"size": [16, float("nan")]},
        {"batch": 0},
        {"batch": "2"},
        {"batch": 10**12},
        {"guided": 1},
        {"jax": {"a": 1}},
        {"model": None},
        {"platform": "npu"},
        {"sampler": "best"},
        {"sampler": "\x1b[31m" * 1000},
        {"program": 5},
        {"version": {}},
        {"version": "1\n" * 4000},
    ],
    ids=lambda change: str(change)[:40],
)
def test_a_header_of_wrong_types_and_sizes_is_refused(
    pipe: Pipeline, file: Path, tmp_path: Path, change: dict[str, Any]
) -> None:
    with pytest.raises(ValueError, match="other: no file of lcm-jax compile that can be read") as error:
        Exported(pipe, rewritten(file, tmp_path / "other", lambda header: header.update(change)))
    assert str(error.value).isprintable()
    assert len(str(error.value)) < 500


def with_program(file: Path, path: Path, body: bytes) -> Path:
    """The file with another program, whose digest fits."""
    return rewritten(file, path, lambda h: h.update(program=hashlib.sha256(body).hexdigest()), body)


@pytest.mark.parametrize("target", ["xla_ffi_python_cpu_callback", "a@tpu_custom_call("])
def test_a_program_that_calls_other_code_is_refused(pipe: Pipeline, file: Path, tmp_path: Path, target: str) -> None:
    """It takes and returns what the model does, and calls code of this process, or of a library, on the way."""
    call = _call(pipe, Exported(pipe, file).header, [""] * 2, None, steps=4, guidance=1.0, seed=0)
    arguments = jax.eval_shape(lambda *trees: trees, _parameters(pipe), _leaves(call))

    def hostile(*_: Any) -> jax.Array:
        return jax.ffi.ffi_call(target, jax.ShapeDtypeStruct((2, 16, 16, 3), np.uint8))()

    allowed = [jax.export.DisabledSafetyCheck.custom_call(target)]
    exported = jax.export.export(jax.jit(hostile, keep_unused=True), disabled_checks=allowed)(*arguments)
    path = with_program(file, tmp_path / "other", bytes(exported.serialize()))
    with pytest.raises(ValueError, match=r"it calls code outside of itself: 'stablehlo.custom_call @"):
        Exported(pipe, path)


def test_a_program_of_other_arguments_or_pictures_is_refused(pipe: Pipeline, file: Path, tmp_path: Path) -> None:
    exported = jax.export.export(jax.jit(lambda x: x + 1))(jax.ShapeDtypeStruct((3,), np.float32))
    path = with_program(file, tmp_path / "other", bytes(exported.serialize()))
    with pytest.raises(ValueError, match="it takes other arguments than the model's"):
        Exported(pipe, path)
    for change in ({"size": [32, 32]}, {"batch": 3}):
        with pytest.raises(ValueError, match=r"it takes other arguments than|it does not return pictures of the size"):
            Exported(pipe, rewritten(file, tmp_path / "other", lambda header, new=change: header.update(new)))


@pytest.mark.parametrize("body", [b"", b"\0" * 1000, b"module {}", bytes(range(256)) * 40])
def test_what_is_no_program_is_refused(pipe: Pipeline, file: Path, tmp_path: Path, body: bytes) -> None:
    with pytest.raises(ValueError, match=r"^[^\n]*no file of lcm-jax compile that can be read[^\n]*$"):
        Exported(pipe, with_program(file, tmp_path / "other", body))


def test_what_would_not_fit_the_memory_is_not_unpacked(
    pipe: Pipeline, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert ahead_of_time._MOST_PROGRAM <= 1 << 28
    monkeypatch.setattr(ahead_of_time, "_MOST_PROGRAM", 1 << 23)
    with zipfile.ZipFile(file) as original, zipfile.ZipFile(tmp_path / "bomb", "w", zipfile.ZIP_DEFLATED) as other:
        other.writestr("header.json", original.read("header.json"))
        other.writestr("program.bin", bytes(1 << 24))
    assert (tmp_path / "bomb").stat().st_size < 1 << 20
    tracemalloc.start()
    with pytest.raises(ValueError, match=r"its program\.bin would have 16777216 bytes, at most 8388608 are allowed"):
        Exported(pipe, tmp_path / "bomb")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 22


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_another_compression_is_refused(pipe: Pipeline, file: Path, tmp_path: Path, method: int) -> None:
    with zipfile.ZipFile(file) as original, zipfile.ZipFile(tmp_path / "other", "w", method) as other:
        for name in ("header.json", "program.bin"):
            other.writestr(name, original.read(name))
    with pytest.raises(ValueError, match="is compressed in a way that lcm-jax does not use"):
        Exported(pipe, tmp_path / "other")


def test_names_in_the_archive_lead_nowhere(pipe: Pipeline, file: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(file) as original, zipfile.ZipFile(tmp_path / "other", "w") as other:
        other.writestr("../escape", b"x")
        for name in ("header.json", "program.bin"):
            other.writestr(name, original.read(name))
    Exported(pipe, tmp_path / "other")
    assert not (tmp_path.parent / "escape").exists()


def test_a_part_of_a_file_is_refused(pipe: Pipeline, file: Path, tmp_path: Path) -> None:
    (tmp_path / "part").write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match="part: no file of lcm-jax compile that can be read"):
        Exported(pipe, tmp_path / "part")
    with pytest.raises(FileNotFoundError):
        Exported(pipe, tmp_path / "none")


def test_calls_it_was_not_made_for_are_refused(pipe: Pipeline, file: Path) -> None:
    exported = Exported(pipe, file)
    with pytest.raises(ValueError, match="draws 2 pictures in a call, and this asks for 1"):
        exported("red heart", guidance=3.0)
    with pytest.raises(ValueError, match="compiled with guidance, and this asks for a scale of 1"):
        exported(PROMPTS, guidance=1.0)
    with pytest.raises(ValueError, match="batch is 0; it must be at least 1"):
        write_program(pipe, file, batch=0)
    with pytest.raises(ValueError, match="sampler 'best' is unknown"):
        write_program(pipe, file, sampler="best")
    with pytest.raises(ValueError, match="platform 'npu' is unknown"):
        write_program(pipe, file, platform="npu")


def test_a_program_for_another_platform(pipe: Pipeline, tmp_path: Path) -> None:
    write_program(pipe, tmp_path / "program", platform="tpu")
    with pytest.raises(ValueError, match="compiled for platform tpu"):
        Exported(pipe, tmp_path / "program")
    with zipfile.ZipFile(tmp_path / "program") as archive:
        program = jax.export.deserialize(bytearray(archive.read("program.bin")))
    assert program.platforms == ("tpu",)


def test_the_command_line(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LCM_JAX_CACHE", str(tmp_path / "cache"))
    file, picture, model = tmp_path / "program", tmp_path / "hearts", ["--model", str(tiny_model)]
    assert main(["compile", *model, "--guidance", "3", "--batch", "2", "-o", str(file)]) == 0  # that of `file` above
    assert "2 x 16x16 pixels, ddim, for cpu" in capsys.readouterr().out
    draw = [
        "sample",
        *model,
        "--guidance",
        "3",
        "--prompt",
        *PROMPTS,
        "--compiled",
        str(file),
        "--out",
        str(picture),
    ]
    assert main(draw) == 0
    assert len(list(picture.iterdir())) == 2
    assert main([*draw, "--size", "32", "32"]) == 2
    assert "--size is (32, 32), and" in capsys.readouterr().err
    assert main([*draw, "--shift", "3"]) == 2
    assert "--shift is no option of --compiled" in capsys.readouterr().err
