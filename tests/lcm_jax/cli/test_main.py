"""The command line: files it writes, and one clear line with exit code 2 for bad input."""

from __future__ import annotations

import contextlib
import json
import logging
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

from lcm_jax import Pipeline, configs, load
from lcm_jax.cli import main as cli
from lcm_jax.cli.arguments import EXAMPLES, parser
from lcm_jax.nets import RULES_DINOV2, Dinov2, Dinov2Config
from lcm_jax.train.overrides import flatten, override
from lcm_jax.weights.component import Part, write_part
from lcm_jax.weights.safetensors_files import read_json
from lcm_jax.weights.torch_params import to_torch


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


@pytest.fixture
def tiny_pipe(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> Pipeline:
    """The pipeline that the command line loads, so that one compiled program serves it and Python."""
    global _TINY
    _TINY = _TINY or load(tiny_model)
    monkeypatch.setattr(cli, "load", lambda *_, **__: _TINY)
    return _TINY


_TINY: Pipeline | None = None


@pytest.mark.parametrize("options", [{}, {"steps": 3, "guidance": 1.5, "seed": 4}])
def test_python_and_the_shell_draw_the_same_pixels(
    options: dict[str, Any], tiny_pipe: Pipeline, tmp_path: Path
) -> None:
    typed = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    out = tmp_path / "a.png"
    assert cli.main(["sample", "--prompt", "dog face", "--out", str(out), *typed]) == 0
    (drawn,) = tiny_pipe("dog face", **options)
    np.testing.assert_array_equal(np.asarray(Image.open(out)), drawn)
    defaults = {"steps": 50, "guidance": 4.0, "sampler": "ddim", "seed": 0}
    np.testing.assert_array_equal(drawn, tiny_pipe("dog face", **defaults | options)[0])


@pytest.mark.filterwarnings("ignore:mask is 37x50")
def test_an_image_of_any_size_is_fitted(tiny_pipe: Pipeline, tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    photo, mask = (Image.fromarray(random.integers(0, 255, (37, 50, 3), np.uint8)) for _ in range(2))
    photo.save(tmp_path / "photo.bmp")
    mask.save(tmp_path / "mask.png")
    asked = ["sample", "--prompt", "dog face", "--out", str(tmp_path / "own.png")]
    files = ["--image", str(tmp_path / "photo.bmp"), "--mask", str(tmp_path / "mask.png")]
    with pytest.warns(UserWarning, match="image is 37x50 and its middle becomes 16x16"):
        assert cli.main([*asked, *files]) == 0
    with pytest.warns(UserWarning, match="image is 37x50 and its middle becomes 16x16"):
        (drawn,) = tiny_pipe("dog face", image=photo, mask=mask)
    assert drawn.shape == (16, 16, 3)
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "own.png")), drawn)


def test_sample_names_do_not_collide(
    tiny_pipe: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Pipeline, "__call__", lambda pipe, prompt, **_: np.zeros((len(prompt), 8, 8, 3), np.uint8))
    for seed in ("0", "0", "5"):
        assert cli.main(["sample", "--out", str(tmp_path), "--seed", seed, "--prompt", "dog face", "dog face?"]) == 0
    said = capsys.readouterr()
    assert len(list(tmp_path.iterdir())) == 6
    assert sorted(map(Path, said.out.splitlines())) == sorted(tmp_path.iterdir()), "stdout has the paths alone"
    assert "next: " in said.err


def test_every_phase_has_a_name(tiny_pipe: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []

    @contextlib.contextmanager
    def phase(name: str) -> Iterator[None]:
        said.append(name)
        yield

    monkeypatch.setattr(cli, "phase", phase)
    monkeypatch.setattr("lcm_jax.inference.pipeline.phase", phase)
    assert cli.main(["sample", "--prompt", "dog face", "--out", str(tmp_path)]) == 0
    assert [name.split()[0] for name in said] == ["loading", "reading", "compiling", "drawing"]
    assert said[-1] == "drawing 1 picture of 16x16 pixels in 50 steps"


def test_phases_are_lines_of_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    log = logging.getLogger("lcm_jax")
    before = (log.level, log.propagate, [*log.handlers])
    try:
        cli._show_phases()
        for text in ("compiling", "drawing", "drawing", "compiling"):
            log.info(text)
        assert capsys.readouterr().err.splitlines() == [f"lcm-jax: {t}" for t in ("compiling", "drawing", "compiling")]
    finally:
        log.level, log.propagate, log.handlers[:] = before


def test_ctrl_c_is_one_line_and_130(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def stopped(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "load", stopped)
    for command in (["sample", "--prompt", "x"], ["evaluate"], ["compile", "-o", "a"], ["serve"]):
        assert cli.main(command) == 130
        assert capsys.readouterr().err == "lcm-jax: stopped by Ctrl-C\n"


def test_ctrl_c_before_the_command_begins() -> None:
    code = "import importlib, signal, time; import lcm_jax.cli.__main__ as m; "
    code += "signal.signal(signal.SIGINT, signal.default_int_handler); "  # which a job in the background ignores
    code += "importlib.import_module = lambda _: (signal.raise_signal(signal.SIGINT), time.sleep(60)); m.run()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (130, "lcm-jax: stopped by Ctrl-C\n")


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 8 bytes.\nmore"), "dtype bfloat16"),
        (MemoryError("Unable to allocate 1. TiB"), "Unable to allocate"),
    ],
)
def test_out_of_memory_is_one_line(
    error: Exception, words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(cli, "load", fail)
    assert cli.main(["sample", "--prompt", "x"]) == 2
    said = capsys.readouterr().err
    assert words in said
    assert said.count("\n") == 1


def test_an_absent_platform_is_said_before_any_work(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def absent() -> None:
        raise ValueError("JAX_PLATFORMS is cuda, and JAX finds no such device")

    monkeypatch.setattr(cli, "check_platform", absent)
    assert cli.main(["sample", "--model", "nothing", "--prompt", "x"]) == 2
    assert capsys.readouterr().err == "lcm-jax: JAX_PLATFORMS is cuda, and JAX finds no such device\n"


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("sampel", "COMMAND sampel is unknown; did you mean sample?"),
        ("Sample --prompt x", "did you mean sample?"),
        ("sample --prompt x --Steps 4", "unknown argument --Steps; did you mean --steps?"),
        ("sample --prompt x --num_images 4", "did you mean --num-images?"),
        ("sample --promt x", "unknown argument --promt; did you mean --prompt?"),
        ("sample --prompt x --num-inference-steps 4", "it is called --steps here"),
        ("sample --prompt x --guidance_scale 4", "it is called --guidance here"),
        ("sample --prompt x --height 64", "it is called --size HEIGHT WIDTH here"),
        ("sample --prompt x --steps many", "argument --steps: invalid int value"),
        ("sample --prompt x --dtype Float32", "did you mean float32?"),
        ("sample --prompt x --model OpenMoji-Teacher", "did you mean openmoji-teacher?"),
        ("sample --prompt x --sampler DDIM", "did you mean ddim?"),
        ("train --config OpenMoji_LCM", "did you mean openmoji_lcm?"),
        ("evaluate --batchsize 3", "did you mean --batch-size?"),
    ],
)
def test_a_slip_is_one_line_with_the_name_that_was_meant(
    typed: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code = cli.main(typed.split())
    except SystemExit as stopped:
        code = stopped.code
    assert code == 2
    error = capsys.readouterr().err
    assert error.startswith("lcm-jax: ")
    assert said in error
    assert error.count("\n") == 1


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
    for row in scores["rows"]:
        for name in ("frechet", "kid", "cmmd", "clip_score", "precision", "recall", "density", "coverage"):
            assert row[f"{name}_low"] <= row[name] <= row[f"{name}_high"], name
    assert scores["vae"]["psnr_low"] <= scores["vae"]["psnr"] <= scores["vae"]["psnr_high"]
    table = capsys.readouterr().out
    assert re.search(r"^FD-CLIP +[\d.]+ \[-?[\d.]+, [\d.]+\] +[\d.]+ \[", table, re.MULTILINE)
    assert re.search(r"PSNR [\d.]+ \[[\d.]+, [\d.]+\] dB", table)
    assert "95% intervals over pictures, by a bootstrap of 200 resamples" in table


def test_evaluate_takes_other_features_and_preferences(
    tiny_model: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = Dinov2Config(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, image_size=28)
    net = Dinov2(config)
    params = jax.jit(net.init)(jax.random.key(0), jnp.zeros((1, 28, 28, 3)))["params"]
    write_part(tmp_path / "dino", Part("Dinov2Model", config, to_torch(params, RULES_DINOV2), "dino"))

    towers = {name: read_json(tiny_model / name / "config.json") for name in ("text_encoder", "image_encoder")}
    shutil.copytree(tiny_model / "tokenizer", tmp_path / "pick" / "tokenizer")
    tensors = {"logit_scale": np.float32([4.0])}
    for name in towers:
        tensors |= load_file(tiny_model / name / "model.safetensors")
    save_file(tensors, tmp_path / "pick" / "model.safetensors")
    values = {"model_type": "clip", "projection_dim": towers["text_encoder"]["projection_dim"]}
    values |= {"text_config": towers["text_encoder"], "vision_config": towers["image_encoder"]}
    (tmp_path / "pick" / "config.json").write_text(json.dumps(values))

    out = tmp_path / "scores.json"
    arguments = ["evaluate", "--model", str(tiny_model), "--clip", str(tmp_path / "pick"), "--out", str(out)]
    arguments += ["--data", f"folder:{pictures}", "--split", "train", "--steps", "1", "--guidance", "1"]
    arguments += ["--features", f"dinov2:{tmp_path / 'dino'}", "--preference", str(tmp_path / "pick")]
    assert cli.main([*arguments, "--resamples", "0", "--batch-size", "4"]) == 0
    scores = json.loads(out.read_text())
    (row,) = scores["rows"]
    assert row["distance"] == "FD-DINOv2"
    assert scores["features"].startswith("dinov2:")
    assert row["clip_score"] == pytest.approx(100.0 * max(row["pickscore"] / np.exp(4.0), 0.0), abs=20.0)
    assert not any(name.endswith("_low") for name in row)
    table = capsys.readouterr().out
    assert re.search(r"^FD-DINOv2 +[\d.]+$", table, re.MULTILINE)
    assert re.search(r"^KD-DINOv2 x 1000 ", table, re.MULTILINE)
    assert re.search(r"^PickScore +-?[\d.]+$", table, re.MULTILINE)


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
    free = re.compile(
        r"(?!task|ema$|b1|b2)|task\.objective\.(?!schedule)|task\.lora"
    )  # sizes of a network depend on each other
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
        (["sample", "--model", "TINY", "--prompt", "x", "--size", "1", "2", "3"], "size is [1, 2, 3]: give"),
        (["sample", "--model", "TINY", "--prompt", "x", "--seed", "4294967296"], "seed is 4294967296"),
        (["sample", "--model", "TINY", "--prompt", "x", "y", "--out", "a.jpg"], "2 pictures do not fit"),
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
        (["train", "--config", "openmoji_teacher", "--task.dtype", "cuda"], "--task.dtype"),
        (["train", "--config", "openmoji_outline", "--task.preview-steps", "0"], "task.preview_steps is 0"),
        (["train", "--config", "openmoji_vae", "--mesh", "data=3,fsdp=5"], "data=3"),
        (["evaluate", "--model", "TINY", "--steps", "0"], "--steps 0"),
        (["evaluate", "--model", "TINY", "--inception", "none.safetensors"], "none.safetensors"),
        (
            ["evaluate", "--model", "TINY", "--features", "dino:x"],
            "--features dino:x: give KIND:PATH with a KIND of dino",
        ),
        (["evaluate", "--model", "TINY", "--features", "dinov2:none"], "DINOv2 'none': no such file or folder"),
        (
            ["evaluate", "--model", "TINY", "--preference", "imagereward:x"],
            "imagereward is unknown; give pickscore, hps",
        ),
        (["evaluate", "--model", "TINY", "--preference", "none"], "none"),
        (["evaluate", "--model", "TINY", "--resamples", "1"], "--resamples 1: it must be at least 2, or 0"),
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


def test_help_tells_the_defaults_there_are(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit):
        cli.main(["sample", "--help"])
    expected = re.findall(r"\(default: ([^)]*)\)", capsys.readouterr().out)
    assert "openmoji" in expected
    assert "0" in expected, "zero is a default"
    assert "0.01 0.2" in expected, "several values are shown as they are typed"
    assert not {"None", "", "[]", "False"} & set(expected)


def test_help_groups_commands_with_examples_and_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, words in (
        (["--help"], ("to draw:", *cli.RUNS)),
        (["sample", "--help"], ("examples:", "the model:")),
    ):
        with pytest.raises(SystemExit):
            cli.main(arguments)
        said = capsys.readouterr().out
        assert all(word in said for word in (*words, "exit codes: 0 done", "130 stopped by Ctrl-C"))


@pytest.mark.parametrize("command", sorted(EXAMPLES))
def test_the_examples_of_the_help_parse(command: str) -> None:
    """Every option of an example is one of the command; what follows --config is the config's own."""
    for line in EXAMPLES[command]:
        for part in line.partition("   #")[0].split(" && "):
            words = shlex.split(re.sub(r'eval "\$\((.*)\)"', r"\1", part))
            if "--help" not in words:
                _, rest = parser(cli.RUNS).parse_known_args(words[1:])
                assert not rest or "--config" in words
