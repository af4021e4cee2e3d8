"""The bundled model in diffusers: teacher, student and LCM-LoRA draw there what they draw here."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import lcm_jax
from lcm_jax.weights.convert import convert, convert_lora

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
pytest.importorskip("peft")
lcm_scheduler = pytest.importorskip("diffusers.schedulers.scheduling_lcm")

PROMPTS = ["red heart", "man farmer, medium skin tone"]
NOISE = np.random.default_rng(0).standard_normal((2, 8, 8, 16)).astype(np.float32)


@pytest.fixture(autouse=True)
def _our_noise(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """diffusers' LCM steps with the noise that the seed gives here."""
    key = jax.random.split(jax.random.key(0))[1]
    drawn = (to_torch(jax.random.normal(jax.random.fold_in(key, i), NOISE.shape)) for i in range(100))
    monkeypatch.setattr(lcm_scheduler, "randn_tensor", lambda *_, **__: next(drawn))
    with torch.no_grad():
        yield


def to_torch(array: Any) -> Any:
    return torch.from_numpy(np.asarray(array).transpose(0, 3, 1, 2).copy())


def exported(name: str, folder: Path) -> Any:
    """A bundled model in float32 through `lcm-jax convert`, as diffusers loads it."""
    convert(name, folder, "diffusers", dtype=np.float32)
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def assert_same(pipe: Any, ours: np.ndarray, **options: Any) -> None:
    theirs = np.round(pipe(PROMPTS, latents=to_torch(NOISE), output_type="np", **options).images * 255)
    difference = np.abs(ours - theirs)
    assert theirs.std() > 50
    assert difference.mean() <= 0.1, difference.mean()
    assert difference.max() <= 1, difference.max()


@pytest.mark.slow
def test_teacher_with_its_own_sampler(tmp_path: Path) -> None:
    ours = lcm_jax.load("openmoji-teacher")(PROMPTS, sampler="ddim", steps=4, guidance=3.0, latents=NOISE)
    assert_same(exported("openmoji-teacher", tmp_path), ours, num_inference_steps=4, guidance_scale=3.0)


def test_student(tmp_path: Path) -> None:
    ours = lcm_jax.load("openmoji")(PROMPTS, steps=4, guidance=3.0, latents=NOISE)
    assert_same(exported("openmoji", tmp_path), ours, num_inference_steps=4, guidance_scale=3.0)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["lora-peft", "lora-kohya"])
def test_lcm_lora_on_the_teacher(form: str, tmp_path: Path) -> None:
    """Trained here, exported, and loaded by diffusers onto the exported teacher."""
    ours = lcm_jax.load("openmoji-teacher", lora="openmoji-lcm-lora")(PROMPTS, steps=4, guidance=1.0, latents=NOISE)
    pipe = exported("openmoji-teacher", tmp_path / "teacher")
    plain = lcm_jax.load("openmoji-teacher")(PROMPTS, sampler="lcm", steps=4, guidance=1.0, latents=NOISE)
    assert np.abs(plain.astype(int) - ours).mean() > 3, "the LoRA must show"
    convert_lora("openmoji-lcm-lora", tmp_path / "lora.safetensors", form, base="openmoji-teacher", dtype=np.float32)
    pipe.load_lora_weights(tmp_path, weight_name="lora.safetensors")
    pipe.scheduler = diffusers.LCMScheduler.from_config(pipe.scheduler.config)
    assert_same(pipe, ours, num_inference_steps=4, guidance_scale=1.0)
