"""The command line: files it writes, and one clear line with exit code 2 for bad input."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lcm_jax import Pipeline, configs
from lcm_jax.cli import main as cli
from lcm_jax.train.overrides import flatten, override


def test_sample_writes_pictures(tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    arguments = ["sample", "--model", str(tiny_model), "--prompt", "dog face", "cat face", "--steps", "2"]
    assert cli.main([*arguments, "--guidance", "1", "--out", str(out)]) == 0
    assert sorted(p.name for p in out.iterdir()) == ["cat-face-0.png", "dog-face-0.png"]
    assert "dog-face-0.png" in capsys.readouterr().out


def test_sample_image_to_image(tiny_model: Path, tmp_path: Path) -> None:
    Image.fromarray(np.full((16, 16, 4), 128, np.uint8)).save(tmp_path / "in.png")
    out = tmp_path / "one.png"
    arguments = ["sample", "--model", str(tiny_model), "--prompt", "dog face", "--image", str(tmp_path / "in.png")]
    assert cli.main([*arguments, "--steps", "4", "--guidance", "1", "--out", str(out)]) == 0
    assert Image.open(out).size == (16, 16)


@pytest.mark.parametrize("drawn", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_sample_takes_the_options_of_sd3(
    drawn: bool, tiny_sd3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pipeline is called with them; what they do, it says itself."""
    asked: dict[str, Any] = {}

    def call(pipe: Pipeline, prompt: list[str], **options: Any) -> np.ndarray:
        assert "text_encoder_3" not in pipe.params
        asked.update(options, prompt=prompt)
        return np.zeros((1, 16, 16, 3), np.uint8)

    if not drawn:
        monkeypatch.setattr(Pipeline, "__call__", call)
    Image.fromarray(np.full((16, 16, 3), 128, np.uint8)).save(tmp_path / "in.png")
    Image.fromarray(np.eye(16, dtype=np.uint8) * 255).save(tmp_path / "mask.png")
    arguments = [
        "sample",
        "--model",
        str(tiny_sd3),
        "--prompt",
        "dog",
        "--steps",
        "4",
        "--out",
        str(tmp_path / "a.png"),
    ]
    options = ["--no-t5", "--t5-tokens", "5", "--shift", "2", "--single-shift", "--skip-layers", "0", "1"]
    options += ["--skip-scale", "1", "--skip-interval", "0", "0.8"]
    pictures = ["--image", str(tmp_path / "in.png"), "--mask", str(tmp_path / "mask.png"), "--strength", "0.9"]
    assert cli.main([*arguments, *options, *pictures]) == 0
    assert Image.open(tmp_path / "a.png").size == (16, 16)
    if not drawn:
        np.testing.assert_array_equal(asked["image"], np.full((16, 16, 3), 128))
        np.testing.assert_array_equal(asked["mask"], np.eye(16) * 255)
        expected = {"prompt": ["dog"], "steps": 4, "t5_tokens": 5, "shift": 2.0, "double_shift": False, "strength": 0.9}
        expected |= {"skip_layers": [0, 1], "skip_scale": 1.0, "skip_interval": (0.0, 0.8)}
        assert {name: asked[name] for name in expected} == expected


def test_evaluate_writes_scores(
    tiny_model: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "scores.json"
    arguments = ["evaluate", "--model", str(tiny_model), "--clip", str(tiny_model), "--data", f"folder:{pictures}"]
    options = ["--split", "train", "--steps", "1", "2", "--guidance", "1", "--batch-size", "4", "--out", str(out)]
    assert cli.main([*arguments, *options]) == 0
    scores = json.loads(out.read_text())
    assert [row["steps"] for row in scores["rows"]] == [1, 2]
    assert all(np.isfinite(row["frechet"]) and row["frechet"] >= 0 for row in scores["rows"])
    assert scores["vae"]["psnr"] > 0
    assert "PSNR" in capsys.readouterr().out


def test_train_passes_overrides(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    ran = {}
    monkeypatch.setattr(
        "lcm_jax.train.config.TrainConfig.run", lambda self, workdir: ran.update(config=self, workdir=workdir)
    )
    arguments = ["train", "--config", "openmoji_teacher", "--workdir", str(tmp_path), "--steps", "7"]
    assert cli.main([*arguments, "--task.objective.caption-dropout", "0.3", "--learning-rate", "0.5"]) == 0
    assert ran["workdir"] == tmp_path
    assert ran["config"].loop.steps == 7
    assert ran["config"].optimizer.learning_rate == 0.5
    assert ran["config"].task.objective.caption_dropout == 0.3


@pytest.mark.parametrize("name", sorted(configs.CONFIGS))
def test_every_config_takes_overrides(name: str) -> None:
    config = configs.get(name)
    assert override(config, [], name) == config
    assert override(config, ["--seed", "5"], name).loop.seed == 5
    free = re.compile(r"(?!task)|task\.objective\.(?!schedule)|task\.lora")  # sizes of a network depend on each other
    doubled = {key: 2 * value for key, value in flatten(config) if type(value) in (int, float) and free.match(key)}
    changed = override(config, [text for key, value in doubled.items() for text in (f"--{key}", str(value))], name)
    assert {key: value for key, value in flatten(changed) if key in doubled} == doubled


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sample", "--model", "nothing", "--prompt", "x"], "nothing"),
        (["sample", "--model", "TINY", "--prompt", "x", "--steps", "0"], "steps is 0"),
        (["sample", "--model", "TINY", "--prompt", "x", "--steps", "-3"], "steps is -3"),
        (["sample", "--model", "TINY", "--prompt", "x", "--size", "15", "16"], "multiples of 2"),
        (["sample", "--model", "TINY", "--prompt", "x", "--image", "none.png"], "none.png"),
        (["sample", "--model", "TINY", "--prompt", "x", "--mask", "none.png"], "--mask none.png"),
        (["sample", "--model", "TINY", "--prompt", "x", "--skip-layers", "1"], "skip_layers is an option of SD3"),
        (["sample", "--model", "TINY", "--prompt", "x", "--lora", "none.safetensors"], "none.safetensors"),
        (["sample", "--model", "TINY", "--prompt", "x", "--nonsense"], "--nonsense"),
        (["train", "--config", "nothing"], "no such config"),
        (["train", "--config", "openmoji_vae", "--stepz", "3"], "did you mean --steps"),
        (["train", "--config", "openmoji_vae", "--steps", "x"], "--steps"),
        (["train", "--config", "openmoji_vae", "--steps", "-1"], "steps"),
        (["train", "--config", "openmoji_vae", "--task.data.name", "folder:nowhere"], "nowhere"),
        (["train", "--config", "openmoji_teacher", "--task.vae", "nowhere"], "nowhere"),
        (["evaluate", "--model", "TINY", "--steps", "0"], "--steps 0"),
        (["evaluate", "--model", "TINY", "--inception", "none.safetensors"], "none.safetensors"),
    ],
)
def test_bad_input(
    arguments: list[str], message: str, tiny_model: Path, pictures: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    arguments = [str(tiny_model) if a == "TINY" else a for a in arguments]
    if arguments[0] == "evaluate":
        arguments += ["--clip", str(tiny_model), "--data", f"folder:{pictures}", "--split", "train"]
    assert cli.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("lcm-jax: ")
    assert message in error
    assert error.count("\n") == 1
    assert not [p for p in tmp_path.rglob("*") if p.is_file()], "something was written"


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "empty"),
        ({"a.txt": b"a caption"}, "a"),
        ({"a.png": b"", "a.txt": b"nothing"}, "a.png"),
        ({"a.png": "float", "a.txt": b"heights"}, "a.png"),
        ({"a.png": "rgb"}, "a.png"),
    ],
    ids=["no pictures", "caption without picture", "zero-sized", "not RGB", "picture without caption"],
)
def test_bad_data_is_refused_before_training(
    files: dict[str, bytes | str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, workdir = tmp_path / "data", tmp_path / "run"
    data.mkdir()
    for name, content in files.items():
        if isinstance(content, bytes):
            (data / name).write_bytes(content)
        elif content == "rgb":
            Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(data / name)
        else:
            Image.fromarray(np.zeros((8, 8), np.uint16)).save(data / name)
    arguments = ["train", "--config", "openmoji_vae", "--workdir", str(workdir)]
    assert cli.main([*arguments, "--task.data.name", f"folder:{data}"]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not workdir.exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(["train", "--help"], "--workdir"), (["distill", "--config", "openmoji_lcm", "-h"], "--task.objective.skip")],
)
def test_help_is_of_the_command_or_of_the_config(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    assert stopped.value.code == 0
    assert words in capsys.readouterr().out


def test_help_tells_the_defaults_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["sample", "--help"])
    expected = re.findall(r"\(default: ([^)]*)\)", capsys.readouterr().out)
    assert "openmoji" in expected
    assert "0" in expected, "zero is a default"
    assert not {"None", "", "[]", "False"} & set(expected)
