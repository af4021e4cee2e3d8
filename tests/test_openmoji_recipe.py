"""The whole recipe of the bundled model, every registered config for one step through the command line."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from lcm_jax import cli, configs

pytestmark = pytest.mark.slow


def train(name: str, runs: Path, pictures: Path, *overrides: str) -> Path:
    data = ["--task.data.name", f"folder:{pictures}", "--steps", "1", "--batch-size", "2", "--warmup", "1"]
    arguments = ["train", "--config", name, "--workdir", str(runs / name), *data, *overrides]
    assert cli.main(arguments) == 0
    return runs / name / "export"


def test_every_config_in_a_chain(pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LCM_JAX_CACHE", str(tmp_path / "cache"))
    shown = ["--task.validation.name", f"folder:{pictures}", "--task.validation.split", "train"]
    prompts = ["--task.prompts.name", f"folder:{pictures}", "--task.prompts.split", "train"]
    done = {"openmoji_vae", "openmoji_clip", "openmoji_teacher"}
    vae = train("openmoji_vae", tmp_path, pictures, *shown)
    clip = train("openmoji_clip", tmp_path, pictures, *shown)
    around = ["--task.vae", str(vae), "--task.text", str(clip), *prompts]
    teacher = train("openmoji_teacher", tmp_path, pictures, *around)
    for name in ("openmoji_lcm", "openmoji_lcm_lora", "openmoji_lcf"):
        export = train(name, tmp_path, pictures, *around, "--task.teacher", str(teacher))
        options = ["--lora", str(export)] if name == "openmoji_lcm_lora" else []
        model = teacher if options else export
        out = tmp_path / f"{name}.png"
        assert cli.main(["sample", "--model", str(model), *options, "--prompt", "red heart", "--out", str(out)]) == 0
        assert out.is_file()
        done.add(name)
    assert done == set(configs.CONFIGS), "a registered config is missing from this chain"

    scores = tmp_path / "scores.json"
    arguments = ["evaluate", "--model", str(teacher), "--clip", str(clip), "--data", f"folder:{pictures}"]
    assert cli.main([*arguments, "--split", "train", "--steps", "2", "--batch-size", "2", "--out", str(scores)]) == 0
    assert np.isfinite(json.loads(scores.read_text())["rows"][0]["frechet"])
