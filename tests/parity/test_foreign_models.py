"""Models as diffusers and its training leave them, and ours as diffusers takes them: dtypes, classes, averages."""

from __future__ import annotations

import inspect
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import lcm_jax
from lcm_jax.weights.convert import convert
from lcm_jax.weights.model_files import read_model
from lcm_jax.weights.safetensors_files import read_json, read_safetensors, save_tensors
from lcm_jax.weights.scheduler_config import (
    READERS,
    SCHEDULERS,
    followed,
    has_zero_terminal_snr,
    read_scheduler,
    with_zero_terminal_snr,
)

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
training_utils = pytest.importorskip("diffusers.training_utils")

NOISE = np.random.default_rng(0).standard_normal((1, 8, 8, 4)).astype(np.float32)


def oracle(folder: Path, **options: Any) -> Any:
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder, local_files_only=True, **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe: Any, steps: int) -> np.ndarray:
    latents = torch.from_numpy(NOISE.transpose(0, 3, 1, 2).copy())
    with torch.no_grad():
        made = pipe("red heart", num_inference_steps=steps, guidance_scale=1.0, latents=latents, output_type="np")
    return np.round(made.images * 255)


def test_the_table_of_readers_is_that_of_diffusers_classes() -> None:
    hidden = ("DPMSolverSDEScheduler",)  # a stand-in without torchsde
    for name in SCHEDULERS:
        if hasattr(diffusers, name) and name not in hidden:
            read = inspect.signature(getattr(diffusers, name).__init__).parameters
            assert {key for key, names in READERS.items() if name in names} == READERS.keys() & read.keys(), name


@pytest.mark.parametrize("name", [name for name in SCHEDULERS if hasattr(diffusers, name) and "Flow" not in name])
def test_zero_terminal_snr_is_followed_by_the_class_that_is_written(name: str) -> None:
    if name == "DPMSolverSDEScheduler":
        pytest.skip("needs torchsde")
    config = with_zero_terminal_snr({"_class_name": name, "prediction_type": "v_prediction"})
    made = getattr(diffusers, config["_class_name"]).from_config(config)
    assert made.config.prediction_type == "v_prediction"
    assert float(made.alphas_cumprod[-1]) < 1e-6
    made.set_timesteps(4)
    assert int(made.timesteps[0]) == 999


@pytest.mark.parametrize("name", [name for name in SCHEDULERS if hasattr(diffusers, name)])
def test_keys_that_the_class_does_not_read_are_passed_over_as_by_diffusers(name: str) -> None:
    if name == "DPMSolverSDEScheduler":
        pytest.skip("needs torchsde")
    keys = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "prediction_type": "v_prediction"}
    config = {"_class_name": name, **keys}  # betas are left out: they are the class's own
    made = getattr(diffusers, name).from_config(config)
    read = inspect.signature(getattr(diffusers, name).__init__).parameters
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        schedule, kind = read_scheduler(config, source="file")
    said = " ".join(str(warning.message) for warning in caught)
    for key, value in keys.items():
        assert (f"{key}={value!r} is passed over, as by diffusers' {name}" in said) == (key not in read)
        assert (key in followed(config)) == (key in read)
    assert has_zero_terminal_snr(config) == ("rescale_betas_zero_snr" in read)
    assert kind == ("flow" if "Flow" in name else "v_prediction")
    if "Flow" not in name:
        ours, theirs = np.asarray(schedule.alpha(np.arange(1000.0))) ** 2, made.alphas_cumprod.numpy()
        # some classes of diffusers keep the last entry above 0; ours is 0 there
        np.testing.assert_allclose(ours[:-1], theirs[:-1], rtol=2e-4, atol=1e-9)
        assert (ours[-1] < 1e-6) == (theirs[-1] < 1e-6) == ("rescale_betas_zero_snr" in read)


def test_a_folder_in_half_precision_is_drawn_by_diffusers_as_it_stands(tiny_model: Path, tmp_path: Path) -> None:
    """Without a dtype diffusers takes float32 for its networks, and transformers what the config says."""
    convert(tiny_model, tmp_path / "half", "diffusers", dtype=np.float16)
    pipe = oracle(tmp_path / "half")
    assert {pipe.unet.dtype, pipe.vae.dtype, pipe.text_encoder.dtype} == {torch.float32}
    assert draw(pipe, 1).shape == (1, 16, 16, 3)
    assert oracle(tmp_path / "half", dtype=torch.float16).text_encoder.dtype == torch.float16


@pytest.mark.slow
@pytest.mark.parametrize("name", ["openmoji", "openmoji-teacher"])
def test_a_bundled_model_is_drawn_by_diffusers_as_it_is_converted(name: str, tmp_path: Path) -> None:
    convert(name, tmp_path / "folder", "diffusers")
    convert(name, tmp_path / "model.safetensors", "single")
    convert(tmp_path / "model.safetensors", tmp_path / "again", "diffusers")
    noise = torch.from_numpy(np.random.default_rng(0).standard_normal((1, 16, 8, 8)).astype(np.float32))
    made = []
    for folder in ("folder", "again"):
        with torch.no_grad():
            pipe = oracle(tmp_path / folder)
            made.append(pipe("red heart", num_inference_steps=1, latents=noise, output_type="np").images)
    assert made[0].std() > 0.2
    np.testing.assert_array_equal(made[0], made[1])


@pytest.mark.slow
def test_a_marked_single_file_draws_as_the_scheduler_that_diffusers_is_given(tiny_model: Path, tmp_path: Path) -> None:
    """v-prediction and zero terminal SNR, from a file with nothing but its markers, through a folder."""
    convert(tiny_model, tmp_path / "ours.safetensors", "single")
    markers = {key: np.zeros(0, np.float32) for key in ("v_pred", "ztsnr")}
    save_tensors(tmp_path / "a1111.safetensors", read_safetensors(tmp_path / "ours.safetensors") | markers)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        convert(tmp_path / "a1111.safetensors", tmp_path / "folder", "diffusers", config=tiny_model)
    right = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    plain = oracle(tiny_model)
    plain.scheduler = diffusers.DDIMScheduler.from_config(plain.scheduler.config, **right)
    want = draw(plain, 4)
    assert np.abs(want - draw(oracle(tiny_model), 4)).mean() > 5, "the markers must show"
    np.testing.assert_array_equal(draw(oracle(tmp_path / "folder"), 4), want)
    ours = lcm_jax.load(tmp_path / "folder")("red heart", steps=4, sampler="ddim", guidance=1.0, latents=NOISE)
    assert np.abs(ours - want).max() <= 1


def test_an_inpainting_pipeline_around_a_plain_network_is_read(tiny_model: Path, tmp_path: Path) -> None:
    pipe = diffusers.AutoPipelineForInpainting.from_pipe(oracle(tiny_model))
    pipe.save_pretrained(tmp_path / "inpaint")
    assert read_json(tmp_path / "inpaint" / "model_index.json")["_class_name"] == "StableDiffusionInpaintPipeline"
    assert lcm_jax.load(tmp_path / "inpaint").model == lcm_jax.load(tiny_model).model


def test_the_average_that_diffusers_training_saves_is_read(tiny_model: Path, tmp_path: Path) -> None:
    """EMAModel writes its settings into the network's config.json; its folder stands alone where the network was."""
    copy = shutil.copytree(tiny_model, tmp_path / "copy")
    unet = oracle(copy).unet
    average = training_utils.EMAModel(unet.parameters(), model_cls=type(unet), model_config=unet.config)
    average.save_pretrained(copy / "unet_ema")
    assert "inv_gamma" in read_json(copy / "unet_ema" / "config.json")
    shutil.rmtree(copy / "unet")
    with pytest.warns(UserWarning, match="holds only the moving average of its unet"):
        found = read_model(copy).parts["unet"]
    want = read_model(tiny_model).parts["unet"]
    assert found.config == want.config
    for key, tensor in want.tensors.items():
        np.testing.assert_array_equal(found.tensors[key], tensor)


@pytest.mark.parametrize(("name", "other"), [("unet", "vae"), ("vae", "unet")])
def test_a_variant_that_diffusers_saved_of_one_component(
    tiny_model: Path, tmp_path: Path, name: str, other: str
) -> None:
    copy = shutil.copytree(tiny_model, tmp_path / "copy")
    getattr(oracle(copy), name).half().save_pretrained(copy / name, variant="fp16")
    with pytest.warns(UserWarning, match=f"{other}.* have no file of variant 'fp16'"):
        model = read_model(copy, variant="fp16")
    assert {tensor.dtype for tensor in model.parts[name].tensors.values()} == {np.dtype(np.float16)}
    assert {tensor.dtype for tensor in model.parts[other].tensors.values()} == {np.dtype(np.float32)}


def test_clip_sample_of_a_stable_diffusion_folder_is_corrected_as_diffusers_does(
    tiny_model: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(tiny_model, tmp_path / "copy")
    file = copy / "scheduler" / "scheduler_config.json"
    file.write_text(file.read_text().replace('"clip_sample": false', '"clip_sample": true'))
    assert oracle(copy).scheduler.config.clip_sample is False
    with pytest.warns(UserWarning, match="clip_sample=True is passed over"):
        assert lcm_jax.load(copy).model == lcm_jax.load(tiny_model).model
