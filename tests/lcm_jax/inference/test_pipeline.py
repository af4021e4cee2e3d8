"""The pipeline: what it promises for prompts, seeds, steps, sizes, image-to-image, saving, and bad input."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import lcm_jax
from lcm_jax import Pipeline, lora
from lcm_jax.cli.main import main
from lcm_jax.nets import RULES_UNET, UNet
from lcm_jax.runtime.atomic_files import write_json
from lcm_jax.weights.diffusers_folder import Component, Folder
from lcm_jax.weights.lora.files import save_lora
from lcm_jax.weights.safetensors_files import load_tensors, read_json, save_tensors
from mmdit.text import CLIPTextModel


@pytest.fixture(scope="module")
def pipe(tiny_model: Path) -> Pipeline:
    return lcm_jax.load(tiny_model)


def test_shape_type_and_number(pipe: Pipeline) -> None:
    images = pipe(["red heart", "dog face"], steps=2, sampler="ddim", num_images=2)
    assert images.shape == (4, 16, 16, 3)
    assert images.dtype == np.uint8


def test_same_seed_same_pictures(pipe: Pipeline) -> None:
    first, again, other = (pipe("dog face", steps=2, sampler="ddim", seed=s) for s in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


def test_steps_guidance_and_prompt_do_not_recompile(pipe: Pipeline) -> None:
    pipe("dog face", steps=1, sampler="ddim", guidance=2.0)
    before = pipe._draw._cache_size()
    pipe("cat face", steps=7, sampler="ddim", guidance=3.0)
    assert pipe._draw._cache_size() == before


def test_guidance_one_is_the_conditional_model(pipe: Pipeline) -> None:
    plain, guided = (pipe("dog face", steps=3, sampler="ddim", guidance=g) for g in (1.0, 1.0 + 1e-6))
    assert np.abs(plain.astype(int) - guided).max() <= 1


def test_negative_prompt_takes_the_empty_prompts_place(pipe: Pipeline) -> None:
    plain = pipe("dog face", steps=2, sampler="ddim", guidance=4.0)
    np.testing.assert_array_equal(plain, pipe("dog face", negative_prompt="", steps=2, sampler="ddim", guidance=4.0))
    assert (plain != pipe("dog face", negative_prompt="red heart", steps=2, sampler="ddim", guidance=4.0)).any()


def test_latents_are_the_initial_noise(pipe: Pipeline) -> None:
    noise = np.random.default_rng(0).standard_normal((1, 8, 8, 4)).astype(np.float32)
    one, two = (pipe("dog face", steps=2, sampler="ddim", latents=noise, seed=s) for s in (0, 1))
    np.testing.assert_array_equal(one, two)


def test_weak_image_to_image_keeps_the_picture(pipe: Pipeline) -> None:
    image = np.full((16, 16, 3), 200, np.uint8)
    through_vae = np.asarray(pipe.model.decode(pipe.params["vae"], pipe.encode_image(image[None])))
    near = pipe("dog face", image=image, strength=0.04, steps=50, sampler="ddim").astype(int)
    far = pipe("dog face", image=image, strength=1.0, steps=50, sampler="ddim").astype(int)
    assert np.abs(near - through_vae).mean() < np.abs(far - through_vae).mean()


@pytest.mark.slow
def test_other_sizes(pipe: Pipeline) -> None:
    assert pipe("dog face", steps=1, sampler="ddim", size=(16, 24)).shape == (1, 16, 24, 3)


def test_save_and_load_give_the_same_pictures(pipe: Pipeline, tmp_path: Path) -> None:
    pipe.save(tmp_path / "copy")
    again = lcm_jax.load(tmp_path / "copy")
    np.testing.assert_array_equal(pipe("dog face", steps=2, sampler="ddim"), again("dog face", steps=2, sampler="ddim"))


def test_lora_is_merged_with_its_weight(pipe: Pipeline, tiny_model: Path, tmp_path: Path) -> None:
    adapters = lora.init(jax.random.key(0), pipe.params["unet"], rank=2, targets=r"to_[qk]/kernel$")
    adapters = jax.tree.map(lambda a: a + 0.3, adapters)
    save_lora(tmp_path / "pytorch_lora_weights.safetensors", adapters, RULES_UNET)
    merged = lcm_jax.load(tiny_model, lora=[(tmp_path, 0.5)]).params["unet"]
    want = lora.merge(pipe.params["unet"], adapters, 0.5)
    for a, b in zip(jax.tree.leaves(merged), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_denoiser_is_what_the_sampler_sees(pipe: Pipeline) -> None:
    x = jax.random.normal(jax.random.key(0), (1, 8, 8, 4))
    prediction = jax.jit(pipe.denoiser("dog face"))(x, 500.0)
    alpha, sigma = (float(f(500.0)) for f in (pipe.model.schedule.alpha, pipe.model.schedule.sigma))
    np.testing.assert_allclose(alpha * prediction.x0 + sigma * prediction.eps, x, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps is 0"),
        ({"size": (15, 16)}, "multiples of 2"),
        ({"size": (0, 16)}, "multiples of 2"),
        ({"sampler": "magic"}, "sampler 'magic' is unknown"),
        ({"strength": 0.5}, "without an image"),
        ({"latents": np.zeros((1, 2, 2, 4))}, "latents have shape"),
        pytest.param(
            {"image": np.zeros((16, 16, 4), np.uint8)}, "image: expected uint8", marks=pytest.mark.wrong_types
        ),
        ({"num_images": 0}, "nothing to draw"),
        ({"negative_prompt": ["a", "b"]}, "negative_prompt: 2 texts"),
        ({"original_size": (16, 16)}, "original_size is an option of SDXL, and this is a StableDiffusionPipeline"),
        ({"crop": (0, 0)}, "crop is an option of SDXL, and"),
        ({"aesthetic_score": 6.0}, "aesthetic_score is an option of SDXL's refiner"),
    ],
)
def test_bad_input_is_one_line(pipe: Pipeline, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        pipe("dog face", **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("file", ["unet/diffusion_pytorch_model.safetensors", "vae/config.json", "model_index.json"])
def test_missing_or_truncated_checkpoint_names_the_file(tiny_model: Path, tmp_path: Path, file: str) -> None:
    broken = shutil.copytree(tiny_model, tmp_path / "broken")
    data = (broken / file).read_bytes()
    (broken / file).write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=Path(file).name):
        lcm_jax.load(broken)
    (broken / file).unlink()
    with pytest.raises(FileNotFoundError, match=Path(file).name.split(".")[0]):
        lcm_jax.load(broken)


def test_parameters_wait_in_the_file_until_they_are_used(tiny_model: Path) -> None:
    pipe = lcm_jax.load(tiny_model)

    def waiting() -> set[str]:
        return {name for name, part in pipe.params.components.items() if callable(part._params)}

    assert waiting() == {"unet", "vae", "text_encoder"}
    pipe.encode_prompt(["red heart"])
    assert waiting() == {"unet", "vae"}
    pipe.params = jax.tree.map(lambda leaf: 2 * leaf, pipe.params)
    assert not waiting()
    plain = lcm_jax.load(tiny_model)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, 2 * b), pipe.params["unet"], plain.params["unet"])


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_values_that_are_not_finite_are_found_before_drawing(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], part: str
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    (file,) = (folder / part).glob("*.safetensors")
    tensors = {name: np.array(tensor) for name, tensor in load_tensors(file).items()}
    last = sorted(tensors)[-1]
    tensors[last].flat[0] = np.nan
    save_tensors(file, tensors)
    pipe = lcm_jax.load(folder)
    with pytest.raises(ValueError, match=rf"{part}: 1 tensors \({last}\) hold values that are not finite"):
        pipe("red heart")
    assert main(["sample", "--model", str(folder), "--prompt", "red heart", "--out", str(tmp_path / "a.png")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "a.png").exists()


def test_unknown_model_lists_the_bundled_ones() -> None:
    with pytest.raises(FileNotFoundError, match="openmoji-teacher"):
        lcm_jax.load("no-such-model")


def bare(tiny_components: dict[str, Component], *, encoders: tuple[str, ...] = (), **scheduler: Any) -> Pipeline:
    """A pipeline without parameters: SD, or SDXL's with these text encoders. Enough for what is said before drawing."""
    net, text = (tiny_components[name].module.config for name in ("unet", "text_encoder"))
    width = 6 * 8 + 8 if "text_encoder" in encoders else 5 * 8 + 8
    sizes = {"addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": width}
    if encoders:
        net = replace(net, addition_embed_type="text_time", **sizes)
    parts = {name: Component(CLIPTextModel(text), {}) for name in encoders or ("text_encoder",)}
    parts |= {"unet": Component(UNet(net), {}), "vae": Component(tiny_components["vae"].module, {})}
    return Pipeline(Folder(components=parts, tokenizers={}, scheduler=scheduler))


def test_the_refiner_wants_a_picture(tiny_components: dict[str, Component]) -> None:
    with pytest.raises(ValueError, match="SDXL's refiner, which redraws pictures: give it an image"):
        bare(tiny_components, encoders=("text_encoder_2",))("dog face")


def test_only_the_refiner_takes_a_score(tiny_components: dict[str, Component]) -> None:
    base = bare(tiny_components, encoders=("text_encoder", "text_encoder_2"))
    with pytest.raises(ValueError, match=r"aesthetic_score is an option of SDXL's refiner.* StableDiffusionXLPipeline"):
        base("dog face", aesthetic_score=6.0)


def test_epsilon_says_nothing_at_pure_noise(tiny_components: dict[str, Component]) -> None:
    pipe = bare(tiny_components, rescale_betas_zero_snr=True, timestep_spacing="trailing")
    with pytest.raises(ValueError, match="timestep 999, which is pure noise"):
        pipe("dog face", sampler="ddim")


def test_steps_offset_of_sd_is_the_one_it_was_trained_with(tiny_components: dict[str, Component]) -> None:
    assert bare(tiny_components, steps_offset=0).spacing.steps_offset == 1
    sdxl = bare(tiny_components, encoders=("text_encoder", "text_encoder_2"), steps_offset=0)
    assert sdxl.spacing.steps_offset == 0


@pytest.mark.parametrize(
    ("scheduler", "sampler"),
    [("EulerAncestralDiscreteScheduler", "euler_a"), ("LCMScheduler", "lcm"), ("DDIMScheduler", "ddim")],
)
def test_the_folders_sampler(tiny_components: dict[str, Component], scheduler: str, sampler: str) -> None:
    assert bare(tiny_components, _class_name=scheduler).default_sampler == sampler


def test_a_scheduler_that_another_sampler_stands_in_for_is_a_warning(tiny_components) -> None:
    with pytest.warns(
        UserWarning, match=r"scheduler_config.json asks for PNDMScheduler.*'ddim' \(DDIMScheduler\) draws"
    ):
        assert bare(tiny_components, _class_name="PNDMScheduler").default_sampler == "ddim"


@pytest.mark.parametrize("key", ["use_karras_sigmas", "clip_sample", "thresholding"])
def test_scheduler_values_with_another_result_name_key_value_and_file(
    tiny_model: Path, tmp_path: Path, key: str
) -> None:
    copy = shutil.copytree(tiny_model, tmp_path / "copy")
    file = copy / "scheduler" / "scheduler_config.json"
    write_json(file, read_json(file) | {key: True})
    with pytest.raises(ValueError, match=rf"{file}: {key}.*True") as caught:
        lcm_jax.load(copy)
    assert "\n" not in str(caught.value)
