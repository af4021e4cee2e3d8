"""The pipeline: what it promises for prompts, seeds, steps, sizes, image-to-image, saving, and bad input."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import lcm_jax
from lcm_jax import Pipeline, lora
from lcm_jax.cli.main import main
from lcm_jax.diffusion.samplers import get_sampler, time_grid
from lcm_jax.diffusion.time_grids import Spacing
from lcm_jax.inference import pipeline as pipeline_module
from lcm_jax.nets import RULES_UNET, UNet
from lcm_jax.runtime.atomic_files import write_json
from lcm_jax.runtime.hardware import memory_of
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


def test_none_is_the_models_own(pipe: Pipeline) -> None:
    assert pipe.settings() == (50, 4.0, "ddim")
    assert pipe.settings(sampler="lcm") == (4, 1.0, "lcm")
    assert pipe.settings(steps=3, guidance=2.0, sampler="heun") == (3, 2.0, "heun")
    student = lcm_jax.load("openmoji")  # nothing is read before it draws
    assert student.settings() == (4, 4.0, "lcm"), "a w-embedding takes the scale"
    assert lcm_jax.load("openmoji-sd3-teacher").settings() == (28, 4.0, "euler")
    assert repr(pipe) == (
        "<Pipeline StableDiffusionPipeline: unet, vae, text_encoder; 16x16 pixels, ddim, 50 steps, guidance 4>"
    )


def test_a_call_without_options_draws_the_models_own(pipe: Pipeline) -> None:
    np.testing.assert_array_equal(pipe("dog face"), pipe("dog face", steps=50, guidance=4.0, sampler="ddim"))


def test_pictures_may_be_of_pil_and_of_any_size(pipe: Pipeline) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (16, 16, 3), np.uint8)
    white = np.zeros((16, 16), bool)
    white[4:, 2:] = True
    drawn = pipe("dog face", steps=4, image=pixels, mask=white)
    for image, mask in (
        (Image.fromarray(pixels), Image.fromarray(white)),
        ([pixels], [white]),
        (pixels[None], np.where(white, 255, 0).astype(np.uint8)),
    ):
        np.testing.assert_array_equal(drawn, pipe("dog face", steps=4, image=image, mask=mask))
    big = Image.fromarray(pixels).resize((48, 48), Image.Resampling.NEAREST)
    assert pipe("dog face", steps=4, image=big, mask=Image.fromarray(white)).shape == (1, 16, 16, 3)


@pytest.mark.wrong_types
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": None}, "prompt is None: give a text or a list of texts"),
        ({"prompt": 5}, "prompt is 5"),
        ({"prompt": ["a", 1]}, r"prompt is \['a', 1\]"),
        ({"negative_prompt": 3}, "negative_prompt is 3"),
        ({"steps": "4"}, "steps is '4': give a whole number"),
        ({"steps": 4.0}, "steps is 4.0: give a whole number"),
        ({"steps": True}, "steps is True"),
        ({"guidance": "4"}, "guidance is '4': give a number"),
        ({"guidance": float("nan")}, "guidance is nan"),
        ({"guidance": [1.0, 2.0]}, "guidance is"),
        ({"sampler": 7}, "sampler is 7: give a name"),
        ({"sampler": "DDIM"}, "did you mean ddim"),
        ({"seed": "a"}, "seed is 'a': give a whole number"),
        ({"seed": None}, "seed is None"),
        ({"seed": 2**32}, "seed is 4294967296: it must be between 0 and 4294967295"),
        ({"seed": -1}, "seed is -1"),
        ({"num_images": "2"}, "num_images is '2'"),
        ({"size": "big"}, "size is 'big': give"),
        ({"size": (16, 16, 16)}, "size is"),
        ({"size": 16.5}, "size is 16.5"),
        ({"latents": "x"}, "latents is a str"),
        ({"image": "photo.png"}, "image: expected uint8 .* or a PIL image; got str"),
        ({"image": []}, "image: the list of pictures is empty"),
        ({"image": np.zeros((0, 4, 3), np.uint8)}, "image: it has no pixels"),
        ({"image": np.zeros((16, 16, 3), np.uint8), "mask": np.zeros((16, 16, 3))}, "mask: expected uint8 or bool"),
        ({"image": np.zeros((16, 16, 3), np.uint8), "strength": "half"}, "strength is 'half'"),
        ({"gamma": "a", "sampler": "tcd"}, "gamma is 'a'"),
    ],
)
def test_wrong_kinds_are_one_line(pipe: Pipeline, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        pipe(**{"prompt": "dog face"} | options)
    assert "\n" not in str(caught.value)


@pytest.mark.wrong_types
def test_numbers_of_numpy_and_a_square_size_are_taken(pipe: Pipeline) -> None:
    plain = pipe("dog face", steps=2, seed=3)
    numbers = {"steps": np.int64(2), "seed": np.uint32(3), "size": 16, "negative_prompt": None}
    np.testing.assert_array_equal(plain, pipe("dog face", **numbers))


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("num_inference_steps", "it is called steps here"),
        ("guidance_scale", "it is called guidance here"),
        ("generator", "it is called seed here"),
        ("height", "size="),
        ("step", "did you mean steps?"),
        ("zzz", "known are prompt, negative_prompt, steps"),
    ],
)
def test_names_of_diffusers_get_a_hint(pipe: Pipeline, name: str, hint: str) -> None:
    with pytest.raises(TypeError, match=f"has no option {name}") as caught:
        pipe("dog face", **{name: 4})
    assert hint in str(caught.value)


@pytest.mark.wrong_types
def test_load_takes_what_is_meant_and_refuses_the_rest(tiny_model: Path) -> None:
    assert lcm_jax.load(tiny_model, dtype=jnp.bfloat16).model.net.dtype == jnp.bfloat16
    for options, message in (
        ({"dtype": "Float32"}, "did you mean float32"),
        ({"dtype": int}, "dtype 'int.*' is unknown"),
        ({"lora": 5}, "lora is 5: give a path"),
        ({"lora": [("a", "b")]}, "the weight of a is 'b'"),
    ):
        with pytest.raises(ValueError, match=message):
            lcm_jax.load(tiny_model, **options)
    with pytest.raises(ValueError, match="model None: give a name or a path"):
        lcm_jax.load(None)
    with pytest.raises(TypeError, match="torch_dtype; it is called dtype here"):
        lcm_jax.load(tiny_model, torch_dtype="float16")
    with pytest.raises(FileNotFoundError, match="did you mean openmoji-teacher"):
        lcm_jax.load("OpenMoji-Teacher")


def test_too_little_memory_says_what_needs_less(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def exhausted(*_: Any, **__: Any) -> None:
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 8 bytes.")

    pipe = lcm_jax.load(tiny_model)
    monkeypatch.setitem(pipe.__dict__, "_draw", exhausted)
    with pytest.raises(MemoryError, match=r"3 pictures of 16x24 pixels in float32: .*smaller size.*int8") as caught:
        pipe("dog face", num_images=3, size=(16, 24))
    assert "\n" not in str(caught.value)


def test_same_seed_same_pictures(pipe: Pipeline) -> None:
    first, again, other = (pipe("dog face", steps=2, sampler="ddim", seed=s) for s in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


def test_steps_guidance_and_prompt_do_not_recompile(pipe: Pipeline) -> None:
    pipe("dog face", steps=1, sampler="ddim", guidance=2.0)
    before = pipe._draw._cache_size()
    pipe("cat face", steps=7, sampler="ddim", guidance=3.0)
    for placed in ({"sigmas": "karras"}, {"sigmas": [9.0, 2.0]}, {"timesteps": [800, 20]}, {"spacing": "trailing"}):
        pipe("cat face", sampler="ddim", guidance=3.0, seed=1, **{"steps": 2} | placed)
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
    pipes = [lcm_jax.load(tiny_model, lora=given) for given in ([(tmp_path, 0.5)], (tmp_path, 0.5))]
    merged, pair = (made.params["unet"] for made in pipes)
    jax.tree.map(np.testing.assert_array_equal, merged, pair)
    assert pipes[0].settings() == (4, 1.0, "lcm"), "drawn as with an LCM-LoRA"
    want = lora.merge(pipe.params["unet"], adapters, 0.5)
    for a, b in zip(jax.tree.leaves(merged), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_denoiser_is_what_the_sampler_sees(pipe: Pipeline) -> None:
    x = jax.random.normal(jax.random.key(0), (1, 8, 8, 4))
    prediction = jax.jit(pipe.denoiser("dog face"))(x, 500.0)
    alpha, sigma = (float(f(500.0)) for f in (pipe.model.schedule.alpha, pipe.model.schedule.sigma))
    np.testing.assert_allclose(alpha * prediction.x0 + sigma * prediction.eps, x, atol=1e-5)


def test_an_eager_denoiser_is_compiled_once(pipe: Pipeline) -> None:
    denoise = pipe.denoiser("dog face", guidance=3.0)
    x = jax.random.normal(jax.random.key(0), (1, 8, 8, 4))
    first = denoise(x, 500.0)
    compiled: list[str] = []

    def listen(name: str, *_: Any, **__: Any) -> None:
        if "backend_compile" in name:
            compiled.append(name)

    jax.monitoring.register_event_duration_secs_listener(listen)
    again = denoise(x, 400.0), pipe.denoiser("cat face", guidance=2.0)(x, 500.0)
    jax.block_until_ready(again)
    assert not compiled
    jax.jit(lambda x: x * 1.2345)(x)
    assert compiled, "the listener sees compilations"
    assert (np.asarray(again[0].x0) != np.asarray(first.x0)).any()


@pytest.mark.parametrize("compile_", [jax.jit, lcm_jax.jit])
def test_the_users_own_jit_holds_no_weights(pipe: Pipeline, compile_: Any) -> None:
    denoise = pipe.denoiser("dog face", guidance=3.0)
    x = jax.random.normal(jax.random.key(0), (1, 8, 8, 4))
    step = lambda denoise, x, t: denoise(x, t).x0  # noqa: E731
    np.testing.assert_allclose(compile_(step)(denoise, x, 500.0), denoise(x, 500.0).x0, atol=1e-5)
    constants = jax.make_jaxpr(step)(denoise, x, 500.0).consts
    assert sum(np.size(constant) for constant in constants) < 5000, "tables of the schedule alone"
    assert sum(leaf.size for leaf in jax.tree.leaves(denoise)) > 5000


@pytest.mark.wrong_types
@pytest.mark.parametrize("shape", [(1, 8, 8, 3), (8, 8, 4), (2, 8, 8, 4), (1, 8, 8, 4, 1)])
def test_a_denoiser_names_both_shapes(pipe: Pipeline, shape: tuple[int, ...]) -> None:
    expected = rf"x has the shape {re.escape(str(shape))}, and this denoiser takes \(1, h, w, 4\)"
    with pytest.raises(ValueError, match=expected) as caught:
        pipe.denoiser("dog face")(jnp.zeros(shape), 500.0)
    assert "\n" not in str(caught.value)


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
    with pytest.warns(UserWarning, match=r"asks for PNDMScheduler with skip_prk_steps false.*'pndm' draws in its"):
        assert bare(tiny_components, _class_name="PNDMScheduler").default_sampler == "pndm"


def test_a_missing_steps_offset_is_corrected_where_the_class_has_one(tiny_components: dict[str, Component]) -> None:
    assert bare(tiny_components, _class_name="DDIMScheduler").spacing.steps_offset == 1  # diffusers' default, 0, too
    assert bare(tiny_components, _class_name="DPMSolverSinglestepScheduler").spacing.steps_offset == 0


KARRAS = Spacing(timestep_spacing="trailing", sigmas="karras")


def test_a_wrong_scheduler_value_is_overridden(tiny_model: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(tiny_model, tmp_path / "copy")
    file = copy / "scheduler" / "scheduler_config.json"
    write_json(file, read_json(file) | {"thresholding": True, "use_karras_sigmas": True})
    pipe = lcm_jax.load(copy, scheduler={"thresholding": False, "prediction_type": "v_prediction"})
    assert pipe.model.kind == "v_prediction"
    walked = pipe.walk(pipe.model, get_sampler("ddim"), 2, pipe.spacing, 1.0)  # as diffusers' DDIM, without Karras
    assert walked.times.tolist() == [999.0, 499.0, -1.0]
    walked = pipe.walk(pipe.model, get_sampler("euler"), 3, pipe.spacing, 1.0)  # which reads them
    assert walked.times.tolist() == time_grid(get_sampler("euler"), pipe.model.schedule, 3, spacing=KARRAS).tolist()
    with pytest.raises(ValueError, match=r"scheduler: 'predicton_type' is no key .*, did you mean prediction_type\?"):
        lcm_jax.load(copy, scheduler={"predicton_type": "sample"})


@pytest.mark.parametrize("key", ["lambda_min_clipped", "thresholding"])
def test_scheduler_values_with_another_result_name_key_value_and_file(
    tiny_model: Path, tmp_path: Path, key: str
) -> None:
    copy = shutil.copytree(tiny_model, tmp_path / "copy")
    file = copy / "scheduler" / "scheduler_config.json"
    write_json(file, read_json(file) | {"_class_name": "DPMSolverMultistepScheduler", key: True})
    with pytest.raises(ValueError, match=rf"{file}: {key}.*True.*--scheduler {key}=") as caught:
        lcm_jax.load(copy)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"size": 65536}, r"size 65536x65536: a picture of it would need more than \d+ GiB, and .* has \d+ GiB: give"),
        ({"size": (16, 2**30)}, "a picture of it would need more than"),
        ({"prompt": ["x"] * 64, "size": 4096}, r"64 pictures of it .*: give fewer pictures at a time"),
    ],
)
def test_what_cannot_fit_is_refused_before_it_is_compiled(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], words: str
) -> None:
    pipe = lcm_jax.load(tiny_model)
    monkeypatch.setattr(pipeline_module, "memory_of", lambda _: 2**30 if "prompt" in options else 64 * 2**30)
    monkeypatch.setattr(Pipeline, "_draw", None)
    with pytest.raises(ValueError, match=words) as raised:
        pipe(**{"prompt": "x"} | options)
    assert "\n" not in str(raised.value)


def test_a_lower_bound_of_memory_is_below_what_a_program_takes(tiny_model: Path) -> None:
    """The bound is never above what XLA says that the program needs, so that nothing that fits is refused."""
    pipe = lcm_jax.load(tiny_model)
    size = (64, 64)
    vae = pipe.model.vae
    latent = jax.ShapeDtypeStruct((1, *(side // vae.config.downsample_factor for side in size), 4), jnp.float32)
    program = jax.jit(lambda params, z: vae.apply({"params": params}, z, method="decode"))
    memory = program.lower(pipe.params["vae"], latent).compile().memory_analysis()
    needed = []
    for available in (memory.temp_size_in_bytes, 0):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(pipeline_module, "memory_of", lambda _, available=available: available)
            try:
                pipe.check_memory(size)
                needed.append(False)
            except ValueError:
                needed.append(True)
    assert needed == [False, True]


def test_the_memory_of_this_machine_is_known() -> None:
    memory = memory_of(jax.devices()[0])
    assert memory is None or 2**28 < memory < 2**50
