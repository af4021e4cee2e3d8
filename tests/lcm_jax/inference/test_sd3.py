"""Stable Diffusion 3 as a pipeline: options, what is left out, and bad input."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lcm_jax
from lcm_jax import Pipeline
from lcm_jax.diffusion.parameterization import bind
from lcm_jax.diffusion.samplers import SAMPLERS
from lcm_jax.diffusion.sampling import sample
from lcm_jax.diffusion.schedules import RectifiedFlow
from lcm_jax.diffusion.time_grids import pad
from lcm_jax.models.latent_diffusion import as_apply
from lcm_jax.runtime.atomic_files import write_json
from lcm_jax.weights.diffusers_folder import Component
from lcm_jax.weights.safetensors_files import read_json
from mmdit import SD3_MEDIUM, MMDiT, MMDiTConfig, abstract_params

OPTIONS: dict[str, Any] = {"sampler": "euler", "steps": 3, "guidance": 3.0}


def stirred(params: Any) -> Any:
    """A transformer's first parameters shut every gate, and a layer passed by would not show."""
    random = np.random.default_rng(1)
    return jax.tree.map(lambda x: x + 0.2 * random.standard_normal(x.shape, np.float32), params)


@pytest.fixture(scope="module")
def pipe(tiny_sd3: Path) -> Pipeline:
    made = lcm_jax.load(tiny_sd3)
    made.params["transformer"] = stirred(made.params["transformer"])
    return made


def test_what_the_folder_says(pipe: Pipeline) -> None:
    assert pipe.default_sampler == "euler"
    assert pipe.size == (16, 16)
    assert pipe.model.kind == "flow"
    assert pipe.model.schedule.shift == 3.0
    assert pipe("dog face", **OPTIONS).shape == (1, 16, 16, 3)


def test_the_folders_shift_said_again_changes_nothing(pipe: Pipeline) -> None:
    np.testing.assert_array_equal(pipe("dog", **OPTIONS), pipe("dog", **OPTIONS, shift=3.0, double_shift=True))


def test_skipping_with_scale_zero_is_plain_guidance(pipe: Pipeline) -> None:
    plain = pipe("dog", **OPTIONS)
    part = {"skip_layers": [0], "skip_interval": (0.0, 1.0)}
    np.testing.assert_array_equal(plain, pipe("dog", **OPTIONS, **part, skip_scale=0.0))
    assert (plain != pipe("dog", **OPTIONS, **part, skip_scale=5.0)).any()


def test_an_interval_without_a_step_is_a_warning(pipe: Pipeline) -> None:
    with pytest.warns(UserWarning, match=r"skip_interval=\(0.01, 0.2\) holds none of 3 steps"):
        pipe("dog", **OPTIONS, skip_layers=(1,))


def test_a_full_mask_is_image_to_image(pipe: Pipeline) -> None:
    image = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    drawn = pipe("dog", **OPTIONS, image=image, mask=np.full((16, 16), 255, np.uint8))
    np.testing.assert_array_equal(drawn, pipe("dog", **OPTIONS, image=image, strength=1.0))


def test_an_empty_mask_gives_the_picture_back(pipe: Pipeline) -> None:
    image = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    drawn = pipe("dog", **OPTIONS, image=image, mask=np.zeros((16, 16), np.uint8))
    through = np.asarray(pipe.model.decode(pipe.params["vae"], pipe.encode_image(image[None])))
    assert np.abs(drawn.astype(int) - through).max() <= 1


def test_a_long_prompt_is_a_warning(pipe: Pipeline) -> None:
    with pytest.warns(UserWarning, match="text_encoder_3 reads 5 tokens and leaves out the rest"):
        pipe.encode_prompt(["woman farmer, medium skin tone"], t5_tokens=5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": (18, 16)}, "size 18x16: height and width must be positive multiples of 4 pixels"),
        ({"size": (16, 28)}, "size 16x28: larger than the position grid, whose 6 patches .* reach 24 pixels"),
        ({"t5_tokens": 600}, "t5_tokens is 600: this model's T5 reads from 2 to 10 tokens"),
        ({"skip_layers": (7, 8, 9)}, r"skip_layers=\(7, 8, 9\): this model has the layers 0 to 1"),
        ({"mask": np.zeros((16, 16), bool)}, "mask is given without an image"),
        ({"shift": 0.0}, "shift is 0.0: it must be positive"),
        ({"crop": (0, 0)}, "crop is an option of SDXL, and this is a StableDiffusion3Pipeline"),
    ],
)
def test_bad_input_is_one_line(pipe: Pipeline, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        pipe("dog face", **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("options", [{"skip_layers": (1,)}, {"shift": 3.0}, {"double_shift": False}, {"t5_tokens": 77}])
def test_unets_have_none_of_its_options(tiny_model: Path, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="SD3"):
        lcm_jax.load(tiny_model)("dog face", **options)


@pytest.mark.parametrize("missing", ["text_encoder_3", "tokenizer_3", "text_encoder_3/model.safetensors"])
def test_a_missing_t5_says_how_to_do_without(tiny_sd3: Path, tmp_path: Path, missing: str) -> None:
    broken = shutil.copytree(tiny_sd3, tmp_path / "broken")
    part = broken / missing
    shutil.rmtree(part) if part.is_dir() else part.unlink()
    with pytest.raises(FileNotFoundError, match=r"_3.*to draw without T5, load with t5=False \(--no-t5\)") as caught:
        lcm_jax.load(broken)
    assert "\n" not in str(caught.value)
    assert "text_encoder_3" not in lcm_jax.load(broken, t5=False).params


def test_saved_without_t5_it_stays_without(tiny_sd3: Path, tmp_path: Path) -> None:
    without = lcm_jax.load(tiny_sd3, t5=False)
    without.save(tmp_path / "saved")
    index = read_json(tmp_path / "saved" / "model_index.json")
    assert index["text_encoder_3"] == index["tokenizer_3"] == [None, None]
    again = lcm_jax.load(tmp_path / "saved")
    np.testing.assert_array_equal(without("dog face", **OPTIONS), again("dog face", **OPTIONS))


def test_a_checkpoint_of_another_depth_is_called_so(tiny_sd3: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(tiny_sd3, tmp_path / "broken")
    config = broken / "transformer" / "config.json"
    write_json(config, read_json(config) | {"num_layers": 3})
    with pytest.raises(ValueError, match=r"transformer: .*depth: 2 transformer_blocks in the file, 3 by its config"):
        lcm_jax.load(broken)


@pytest.fixture(scope="module")
def student(tiny_sd3: Path, tiny_sd3_net: MMDiTConfig) -> Pipeline:
    """The tiny model with a w-embedding, drawn as a consistency model is."""
    folder = lcm_jax.load(tiny_sd3).folder
    net = MMDiT(dataclasses.replace(tiny_sd3_net, time_cond_proj_dim=8, num_layers=1))
    shapes = abstract_params(net)
    params = stirred(jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes))
    parts = {**folder.components, "transformer": Component(net, params)}
    scheduler = {"_class_name": "FlowMatchLCMScheduler", "shift": 3.0}
    return Pipeline(dataclasses.replace(folder, components=parts, scheduler=scheduler, extras={}))


def test_a_student_takes_the_guidance_scale_as_an_input(student: Pipeline, tmp_path: Path) -> None:
    assert student.default_sampler == "lcm"
    weak, strong = (student("dog face", steps=2, guidance=g) for g in (1.0, 6.0))
    assert (weak != strong).any()
    with pytest.raises(ValueError, match="skip_layers is an option of SD3 without a w-embedding"):
        student("dog face", skip_layers=(0,))
    with pytest.warns(UserWarning, match="time_cond_proj_dim"):
        student.save(tmp_path / "student")
    again = lcm_jax.load(tmp_path / "student")
    np.testing.assert_array_equal(again("dog face", steps=2, guidance=6.0), strong)


@pytest.mark.slow
def test_one_step_of_the_published_size() -> None:
    """SD3-medium, 2.03 billion random parameters in bfloat16, on a 512 x 512 picture's latents; 13 GB on a CPU."""
    net = MMDiT(SD3_MEDIUM, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, scan=True)
    leaves, tree = jax.tree.flatten(abstract_params(net))
    keys = jax.random.split(jax.random.key(0), len(leaves))
    draw = jax.jit(lambda key, shape: 0.02 * jax.random.normal(key, shape, jnp.bfloat16), static_argnums=1)
    params = jax.tree.unflatten(tree, [draw(key, leaf.shape) for key, leaf in zip(keys, leaves, strict=True)])
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 2_028_328_000 + 192**2 * 1536
    cond = {"context": jnp.ones((1, 77 + 256, 4096), jnp.bfloat16), "pooled": jnp.ones((1, 2048))}
    noise = jax.random.normal(jax.random.key(1), (1, 64, 64, 16))
    schedule = RectifiedFlow(shift=3.0)
    grid = pad(schedule.grid(28)[:2], capacity=1)

    @jax.jit
    def step(params: Any, x: jax.Array) -> jax.Array:
        denoise = bind(as_apply(net), params, cond, schedule, "flow")
        return sample(denoise, schedule, SAMPLERS["euler"].solver, grid, x, jax.random.key(2))

    x = np.asarray(step(params, noise))
    assert x.shape == noise.shape
    assert x.dtype == np.float32
    assert np.isfinite(x).all()
    assert np.abs(x - noise).max() > 1e-3


def test_a_syntax_without_weights_draws_the_same(tiny_sd3: Path) -> None:
    pipe = lcm_jax.load(tiny_sd3)
    options = {"steps": 2, "guidance": 3.0, "negative_prompt": "cat", "t5_tokens": 6}
    want, got = (pipe("dog face", prompt_syntax=syntax, **options) for syntax in (None, "a1111"))
    assert np.abs(got - want.astype(int)).max() <= 1
    long = ", ".join(["red heart"] * 8)  # the negative prompt is filled up with chunks of the empty prompt
    assert pipe(long, prompt_syntax="a1111", **options).shape == (1, 16, 16, 3)
    context = pipe.encode_prompt([long, "cat"], prompt_syntax="a1111", t5_tokens=6)["context"]
    assert context.shape == (2, 3 * 12 + 6, 32)
