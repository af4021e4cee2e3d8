"""The whole recipe of the bundled model, every registered config for one step through the command line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from lcm_jax import configs
from lcm_jax.cli import main as cli

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
    done = {"openmoji_vae", "openmoji_clip", "openmoji_tiny_vae", "openmoji_teacher"}
    vae = train("openmoji_vae", tmp_path, pictures, *shown)
    clip = train("openmoji_clip", tmp_path, pictures, *shown)
    tiny = train("openmoji_tiny_vae", tmp_path, pictures, "--task.vae", str(vae), *shown)
    around = ["--task.vae", str(vae), "--task.text", str(clip), *prompts]
    teacher = train("openmoji_teacher", tmp_path, pictures, *around)
    for name in ("openmoji_lcm", "openmoji_lcm_lora", "openmoji_lcf"):
        export = train(name, tmp_path, pictures, *around, "--task.teacher", str(teacher))
        is_lora = name == "openmoji_lcm_lora"
        model, options = (teacher, ["--lora", str(export)]) if is_lora else (export, ["--tiny-vae", str(tiny)])
        out = tmp_path / f"{name}.png"
        assert cli.main(["sample", "--model", str(model), *options, "--prompt", "red heart", "--out", str(out)]) == 0
        assert out.is_file()
        done.add(name)
    for name in ("openmoji_outline", "openmoji_dreambooth"):
        drawn = ["--task.class-pictures", "2", "--task.class-steps", "2"]
        export = train(name, tmp_path, pictures, "--task.model", str(teacher), *drawn)
        fast = str(tmp_path / "openmoji_lcm_lora" / "export")
        model, worn = (export, [fast]) if name == "openmoji_outline" else (teacher, [f"{export}:0.8", fast])
        out = tmp_path / f"{name}.png"
        drawing = ["sample", "--model", str(model), "--lora", *worn, "--prompt", "red heart", "--out", str(out)]
        assert cli.main(drawing) == 0
        assert out.is_file()
        done.add(name)
    inversion = train("openmoji_textual_inversion", tmp_path, pictures, "--task.model", str(teacher))
    out = tmp_path / "inversion.png"
    drawing = ["sample", "--model", str(teacher), "--embeddings", str(inversion), "--prompt", "cat <outline>"]
    assert cli.main([*drawing, "--steps", "2", "--out", str(out)]) == 0
    assert out.is_file()
    done.add("openmoji_textual_inversion")
    done |= mini_sd3(vae, clip, pictures, tmp_path, shown, prompts)
    registered = {name for name in configs.CONFIGS if name.startswith("openmoji")}
    assert done == registered, "a registered config is missing from this chain"

    scores = tmp_path / "scores.json"
    arguments = ["evaluate", "--model", str(teacher), "--clip", str(clip), "--data", f"folder:{pictures}"]
    assert cli.main([*arguments, "--split", "train", "--steps", "2", "--batch-size", "2", "--out", str(scores)]) == 0
    assert np.isfinite(json.loads(scores.read_text())["rows"][0]["frechet"])


def mini_sd3(vae: Path, clip: Path, pictures: Path, runs: Path, shown: list[str], prompts: list[str]) -> set[str]:
    """The configs of "openmoji-sd3", its text encoders put together as the bundle has them."""
    second = train("openmoji_clip2", runs, pictures, "--task.images", str(clip), *shown)
    third = train("openmoji_t5", runs, pictures, *shown)
    texts = runs / "texts"
    for export, suffix in ((clip, ""), (second, "_2"), (third, "_3")):
        for name in (f"text_encoder{suffix}", f"tokenizer{suffix}"):
            shutil.copytree(export / name, texts / name)
    around = ["--task.vae", str(vae), "--task.text", str(texts), *prompts]
    teacher = train("openmoji_sd3", runs, pictures, *around)
    done = {"openmoji_clip2", "openmoji_t5", "openmoji_sd3"}
    for name in ("openmoji_sd3_lcm", "openmoji_sd3_lcm_lora"):
        export = train(name, runs, pictures, *around, "--task.teacher", str(teacher))
        options = ["--lora", str(export)] if name.endswith("lora") else []
        model, out = teacher if options else export, runs / f"{name}.png"
        assert cli.main(["sample", "--model", str(model), *options, "--prompt", "red heart", "--out", str(out)]) == 0
        assert out.is_file()
        done.add(name)
    return done
