"""Folders written here, read by diffusers; and published scheduler configs, sampled by both."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lcm_jax
from lcm_jax.diffusion.consistency_function import consistency
from lcm_jax.diffusion.parameterization import bind
from lcm_jax.diffusion.samplers import SAMPLERS, Sampler, walk
from lcm_jax.diffusion.sampling import sample
from lcm_jax.diffusion.schedules import DDPM, OnGrid
from lcm_jax.diffusion.time_grids import Grid, pad
from lcm_jax.typing import Kind, Schedule
from lcm_jax.weights.abstract_params import abstract_params
from lcm_jax.weights.diffusers_folder import Component, Folder, load_component, save_folder
from lcm_jax.weights.registry import FAMILIES
from lcm_jax.weights.scheduler_config import read_scheduler, read_spacing, scheduler_config
from mmdit.text import Tokenizer

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
schedulers = pytest.importorskip("diffusers.schedulers")

LATENT = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def filled(kind: str, config: Any) -> Component:
    """A network with random parameters; nothing is compiled."""
    module = FAMILIES[kind].build(config)
    random = np.random.default_rng(0)
    like = abstract_params(kind, config)
    return Component(module, jax.tree.map(lambda leaf: jnp.asarray(random.normal(size=leaf.shape), leaf.dtype), like))


@pytest.fixture(scope="module")
def folders(tiny_components: dict[str, Component], tiny_model: Path) -> dict[str, Folder]:
    """Families whose networks were made here, by the class that diffusers has for them."""
    net, text = (tiny_components[name].module.config for name in ("unet", "text_encoder"))
    tokenizer = Tokenizer.load(tiny_model / "tokenizer")
    first, second = filled("CLIPTextModel", text), filled("CLIPTextModelWithProjection", text)
    sizes = {"addition_embed_type": "text_time", "addition_time_embed_dim": 8}
    nets = {
        "LatentConsistencyModelPipeline": replace(net, time_cond_proj_dim=8),
        "StableDiffusionXLPipeline": replace(
            net, **sizes, cross_attention_dim=32, projection_class_embeddings_input_dim=6 * 8 + 8
        ),
        "StableDiffusionXLImg2ImgPipeline": replace(net, **sizes, projection_class_embeddings_input_dim=5 * 8 + 8),
    }
    texts = {
        "LatentConsistencyModelPipeline": {"text_encoder": first},
        "StableDiffusionXLPipeline": {"text_encoder": first, "text_encoder_2": second},
        "StableDiffusionXLImg2ImgPipeline": {"text_encoder_2": second},
    }
    return {
        name: Folder(
            components={"unet": filled("UNet2DConditionModel", config), "vae": tiny_components["vae"], **texts[name]},
            tokenizers=dict.fromkeys(texts[name], tokenizer),
            scheduler=scheduler_config(DDPM(**LATENT), "epsilon", "lcm" if name.startswith("Latent") else "ddim"),
        )
        for name, config in nets.items()
    }


@pytest.mark.parametrize(
    ("name", "variant"),
    [
        ("LatentConsistencyModelPipeline", None),
        ("StableDiffusionXLPipeline", "fp16"),
        ("StableDiffusionXLImg2ImgPipeline", None),
    ],
)
def test_through_diffusers_and_back(folders: dict[str, Folder], tmp_path: Path, name: str, variant: str | None) -> None:
    half = variant == "fp16"
    save_folder(tmp_path / "ours", folders[name], dtype=jnp.float16 if half else None, variant=variant)
    pipe = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "ours", local_files_only=True, variant=variant)
    assert type(pipe).__name__ == name
    assert pipe.config.get("force_zeros_for_empty_prompt") == {"S": folders[name].zeros_for_empty_prompt}.get(name[0])
    assert pipe.config.get("requires_aesthetics_score", False) == folders[name].is_refiner
    pipe.save_pretrained(tmp_path / "theirs", variant=variant)
    for part, component in folders[name].components.items():
        loading = {"output_loading_info": True, "variant": variant}
        info = type(pipe.components[part]).from_pretrained(tmp_path / "ours" / part, **loading)[1]
        assert not info["missing_keys"]
        assert not info["unexpected_keys"]
        again = load_component(tmp_path / "theirs", part, variant=variant)
        want = jax.tree.map(np.asarray, component.params)
        if half:
            want = jax.tree.map(lambda x: x.astype(np.float16).astype(np.float32), want)
        jax.tree.map(np.testing.assert_array_equal, again.params, want)


@pytest.mark.slow
def test_diffusers_draws_what_we_save(tiny_model: Path) -> None:
    """Of a text encoder with a projection, which the picture does not depend on."""
    torch.set_num_threads(1)
    oracle = diffusers.DiffusionPipeline.from_pretrained(tiny_model, local_files_only=True)
    oracle.set_progress_bar_config(disable=True)
    noise = np.random.default_rng(0).standard_normal((1, 8, 8, 4)).astype(np.float32)
    latents = torch.from_numpy(noise.transpose(0, 3, 1, 2).copy())
    options = {"num_inference_steps": 5, "guidance_scale": 4.0, "output_type": "np"}
    with torch.no_grad():
        want = oracle("red heart", negative_prompt="dog face", latents=latents, **options).images
    pipe = lcm_jax.load(tiny_model)
    ours = pipe("red heart", negative_prompt="dog face", steps=5, guidance=4.0, sampler="ddim", latents=noise)
    assert np.abs(ours - np.round(want * 255)).max() <= 1


# The published scheduler configs, and what else they may say.
SCHEDULERS = {
    "lcm": diffusers.LCMScheduler,
    "pndm": diffusers.PNDMScheduler,
    "unipc": diffusers.UniPCMultistepScheduler,
    "deis": diffusers.DEISMultistepScheduler,
    "ddim": diffusers.DDIMScheduler,
    "euler": diffusers.EulerDiscreteScheduler,
    "euler_a": diffusers.EulerAncestralDiscreteScheduler,
    "dpm++2m": diffusers.DPMSolverMultistepScheduler,
}
COMMON = LATENT | {"clip_sample": False, "set_alpha_to_one": False, "skip_prk_steps": True, "steps_offset": 1}
ZERO_SNR = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "prediction_type": "v_prediction"}
CONFIGS = {
    "sd15": COMMON | {"_class_name": "PNDMScheduler"},
    "sd21": COMMON | {"_class_name": "DDIMScheduler", "prediction_type": "v_prediction"},
    "sdxl": COMMON | {"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "leading"},
    "turbo": COMMON | {"_class_name": "EulerAncestralDiscreteScheduler", "timestep_spacing": "trailing"},
    "lcm": COMMON | {"_class_name": "LCMScheduler", "original_inference_steps": 40},
    "zero snr": COMMON | {"_class_name": "DDIMScheduler", **ZERO_SNR},
    "zero snr, leading": COMMON | {"_class_name": "DDIMScheduler", **ZERO_SNR, "timestep_spacing": "leading"},
    "sigma min": COMMON | {"_class_name": "EulerDiscreteScheduler", "final_sigmas_type": "sigma_min"},
    "sigma min, full order": COMMON | {"final_sigmas_type": "sigma_min", "lower_order_final": False},
    "sigma min, Euler": COMMON | {"final_sigmas_type": "sigma_min", "euler_at_final": True},
}
X = np.random.default_rng(0).standard_normal((2, 4, 4, 3)).astype(np.float32)
NOISE = np.random.default_rng(1).standard_normal((30, *X.shape)).astype(np.float32)


def network(xp: Any, x: Any, t: Any) -> Any:
    return xp.tanh(0.8 * x + 0.002 * t - 0.7)


@functools.cache
def compiled(sampler: Sampler, schedule: Schedule, kind: Kind) -> Callable:
    def run(grid: Grid, x: jax.Array) -> jax.Array:
        on_grid = OnGrid(schedule, grid)
        denoise = bind(lambda params, x, t, cond: network(jnp, x, t), None, {}, on_grid, kind)
        denoise = consistency(denoise, on_grid) if sampler.consistency else denoise
        return sample(denoise, schedule, sampler.solver, grid, x, jax.random.key(0), noise=jnp.asarray(NOISE))

    return jax.jit(run)


def our_sample(config: dict[str, Any], name: str, steps: int) -> np.ndarray:
    (schedule, kind), spacing = read_scheduler(config), read_spacing(config)
    sampler = SAMPLERS[name].configured(spacing, kind)
    walked = walk(sampler, schedule, steps, spacing=spacing)
    x = jnp.asarray(sampler.init_noise_sigma(schedule, walked.times, spacing) * X)
    return np.asarray(compiled(sampler, schedule, kind)(pad(walked), x))


def their_sample(config: dict[str, Any], name: str, steps: int, folder: Path) -> np.ndarray:
    """By the scheduler that diffusers makes of the folder's, in our scale where it keeps x / alpha."""
    scheduler_class = getattr(diffusers, config.get("_class_name", "DPMSolverMultistepScheduler"))
    (folder / "scheduler_config.json").write_text(json.dumps(config))
    scheduler = SCHEDULERS[name].from_config(scheduler_class.from_pretrained(folder).config)
    scheduler.set_timesteps(steps)
    x = torch.from_numpy(X) * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        x = scheduler.step(network(torch, scheduler.scale_model_input(x, t), t), t, x).prev_sample
    keeps_ratio = name in ("euler", "euler_a")
    return (x / (1 + scheduler.sigmas[-1] ** 2) ** 0.5 if keeps_ratio else x).numpy()


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("title", CONFIGS)
def test_scheduler_configs(title: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if title.startswith("zero snr") and name in ("pndm", "deis"):
        pytest.skip("diffusers' class does not follow the folder's zero terminal SNR, and the sampler here does")
    for steps in (1, 2, 5, 20):
        drawn = iter(torch.from_numpy(NOISE))
        for module in (schedulers.scheduling_lcm, schedulers.scheduling_euler_ancestral_discrete):
            monkeypatch.setattr(module, "randn_tensor", lambda *_, drawn=drawn, **__: next(drawn))
        ours, theirs = our_sample(CONFIGS[title], name, steps), their_sample(CONFIGS[title], name, steps, tmp_path)
        # where the signal is zero, diffusers gives it 2^-12 of the noise
        tolerance = 1e-3 if title == "zero snr" and name not in ("lcm", "ddim") else 2e-5
        assert np.abs(ours - theirs).max() <= tolerance * np.abs(theirs).max()
