"""Folders there and back for every family, what is refused, and what a scheduler config may say."""

from __future__ import annotations

import json
import math
import re
import shutil
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lcm_jax.diffusion.samplers import SAMPLERS
from lcm_jax.diffusion.schedules import DDPM, Cosine, RectifiedFlow
from lcm_jax.diffusion.solvers import (
    DDIM,
    DEIS,
    LMS,
    PLMS,
    DPM2Ancestral,
    DPMppMultistep,
    DPMppSDE,
    DPMppSinglestep,
    UniPC,
)
from lcm_jax.runtime.atomic_files import write_json
from lcm_jax.typing import Kind, Schedule
from lcm_jax.weights.abstract_params import abstract_params
from lcm_jax.weights.diffusers_folder import Component, Folder, load_folder, save_folder
from lcm_jax.weights.hub import Location
from lcm_jax.weights.registry import FAMILIES
from lcm_jax.weights.safetensors_files import read_json
from lcm_jax.weights.scheduler_config import (
    CONTINUOUS,
    SCHEDULERS,
    read_scheduler,
    read_spacing,
    sampler_of,
    scheduler_config,
)
from mmdit.text import Tokenizer
from vae16 import AutoencoderTiny, TinyConfig, unscale

LATENT = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
KINDS = {
    "sd": "StableDiffusionPipeline",
    "lcm": "LatentConsistencyModelPipeline",
    "sdxl": "StableDiffusionXLPipeline",
    "refiner": "StableDiffusionXLImg2ImgPipeline",
}


def filled(kind: str, config: Any) -> Component:
    """A network with random parameters; nothing is compiled."""
    module = FAMILIES[kind].build(config)
    random = np.random.default_rng(0)
    like = abstract_params(kind, config)
    return Component(module, jax.tree.map(lambda leaf: jnp.asarray(random.normal(size=leaf.shape), leaf.dtype), like))


@pytest.fixture(scope="module")
def folders(tiny_components: dict[str, Component], tiny_model: Path) -> dict[str, Folder]:
    """A folder of each family, made here."""
    parts = {name: tiny_components[name] for name in ("unet", "vae")}
    net, text = (tiny_components[name].module.config for name in ("unet", "text_encoder"))
    first, second = filled("CLIPTextModel", text), filled("CLIPTextModelWithProjection", text)
    sizes = {"addition_embed_type": "text_time", "addition_time_embed_dim": 8}
    large = replace(net, **sizes, cross_attention_dim=32, projection_class_embeddings_input_dim=6 * 8 + 8)
    refining = replace(large, cross_attention_dim=16, projection_class_embeddings_input_dim=5 * 8 + 8)
    tokenizer = Tokenizer.load(tiny_model / "tokenizer")
    ddim, lcm = (scheduler_config(DDPM(**LATENT), "epsilon", name) for name in ("ddim", "lcm"))
    one = {"tokenizers": {"text_encoder": tokenizer}, "scheduler": ddim}
    two = {"tokenizers": {"text_encoder_2": tokenizer}, "scheduler": ddim}
    pair = {"tokenizers": {"text_encoder": tokenizer, "text_encoder_2": tokenizer}, "scheduler": ddim}

    def unet(config: Any) -> dict[str, Component]:
        return {"unet": filled("UNet2DConditionModel", config)}

    both = {"text_encoder": first, "text_encoder_2": second}
    return {
        "sd": Folder(components=parts | {"text_encoder": first}, **one),
        "lcm": Folder(
            components=parts | {"text_encoder": first} | unet(replace(net, time_cond_proj_dim=8)),
            **one | {"scheduler": lcm},
        ),
        "sdxl": Folder(components=parts | both | unet(large), **pair),
        "refiner": Folder(components=parts | {"text_encoder_2": second} | unet(refining), **two),
    }


@pytest.fixture(scope="module")
def saved(folders: dict[str, Folder], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("folders")
    for kind, folder in folders.items():
        save_folder(root / kind, folder)
    return {kind: root / kind for kind in folders}


@pytest.fixture
def copy(saved: dict[str, Path], tmp_path: Path) -> Any:
    """A copy of a saved folder with changed entries of its model_index.json; None takes one out."""

    def make(kind: str, **changes: Any) -> Path:
        path = shutil.copytree(saved[kind], tmp_path / kind)
        if "prior" in changes:
            shutil.copytree(path / "text_encoder", path / "prior")
        index = read_json(path / "model_index.json") | changes
        write_json(path / "model_index.json", {key: value for key, value in index.items() if value is not None})
        return path

    return make


def read(path: Path, **options: Any) -> Folder:
    return load_folder(Location(path=path), **options)


def assert_equal(a: Any, b: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize("kind", KINDS)
def test_there_and_back(folders: dict[str, Folder], saved: dict[str, Path], kind: str) -> None:
    made, loaded = folders[kind], read(saved[kind])
    assert made.pipeline == loaded.pipeline == KINDS[kind]
    assert loaded.components.keys() == made.components.keys()
    for name, component in made.components.items():
        assert loaded.components[name].module.config == component.module.config
        assert_equal(loaded.components[name].params, component.params)
    assert list(loaded.tokenizers) == [name for name in made.components if name.startswith("text")]
    for a, b in zip(made.tokenizers.values(), loaded.tokenizers.values(), strict=True):
        np.testing.assert_array_equal(a("dog face"), b("dog face"))
    assert loaded.scheduler == made.scheduler
    assert loaded.is_sdxl == (kind in ("sdxl", "refiner"))
    assert loaded.is_refiner == made.is_refiner == (kind == "refiner")
    assert loaded.zeros_for_empty_prompt == made.zeros_for_empty_prompt == (kind == "sdxl")


def test_what_the_index_says_is_kept(copy: Any, tmp_path: Path) -> None:
    settings = {"_class_name": "StableDiffusionXLImg2ImgPipeline", "requires_aesthetics_score": False}
    folder = read(copy("sdxl", **settings, force_zeros_for_empty_prompt=False))
    assert not folder.zeros_for_empty_prompt
    save_folder(tmp_path / "again", folder)
    index = read_json(tmp_path / "again" / "model_index.json")
    assert index.items() >= {**settings, "force_zeros_for_empty_prompt": False}.items()


def test_settings_that_the_index_leaves_out_are_diffusers_defaults(copy: Any) -> None:
    folder = read(copy("refiner", requires_aesthetics_score=None, force_zeros_for_empty_prompt=None))
    assert folder.zeros_for_empty_prompt
    assert not folder.is_refiner


def test_the_scheduler_config_is_written_back_as_it_was(copy: Any, tmp_path: Path) -> None:
    path = copy("sd")
    config = {"_class_name": "PNDMScheduler", "_diffusers_version": "0.6.0", **LATENT, "skip_prk_steps": True}
    config |= {"steps_offset": 1, "lambda_min_clipped": -math.inf, "trained_betas": None, "prediction_type": "epsilon"}
    (path / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
    save_folder(tmp_path / "again", read(path))
    assert read_json(tmp_path / "again" / "scheduler" / "scheduler_config.json") == config
    assert read_json(tmp_path / "again" / "model_index.json")["scheduler"] == ["diffusers", "PNDMScheduler"]


@pytest.mark.parametrize("quant", [False, True])
def test_a_unets_folder_has_no_shift_of_latents(folders: dict[str, Folder], tmp_path: Path, quant: bool) -> None:
    """diffusers would ignore it: what is drawn here with one is drawn there without."""
    config = replace(folders["sd"].components["vae"].module.config, shift_factor=0.6)
    vae = filled("AutoencoderKL", replace(config, use_quant_conv=quant, use_post_quant_conv=quant))
    save_folder(tmp_path, replace(folders["sd"], components={**folders["sd"].components, "vae": vae}))
    again = read(tmp_path).components["vae"]
    assert again.module.config.shift_factor == 0.0
    z = jax.random.normal(jax.random.key(0), (1, 2, 3, 4))

    def decoded(part: Component) -> Any:
        decode = jax.jit(partial(part.module.apply, method="decode"))
        return decode({"params": part.params}, unscale(z, part.module.config))

    want, got = decoded(vae), decoded(again)
    np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max())


def test_a_unets_folder_is_read_without_its_shift(saved: dict[str, Path], copy: Any) -> None:
    path = copy("sd")
    write_json(path / "vae" / "config.json", read_json(path / "vae" / "config.json") | {"shift_factor": 0.1})
    with pytest.warns(UserWarning, match=r"vae: shift_factor=0.1 is ignored") as caught:
        component = read(path).components["vae"]
    assert len(caught) == 1
    assert component.module.config.shift_factor == 0.0
    assert_equal(component.params, read(saved["sd"]).components["vae"].params)


def test_a_tiny_autoencoder_cannot_lose_its_shift(folders: dict[str, Folder], tmp_path: Path) -> None:
    tiny = Component(AutoencoderTiny(TinyConfig(shift_factor=0.1)), {})
    with pytest.raises(ValueError, match=r"tiny autoencoder has shift_factor=0\.1"):
        save_folder(tmp_path / "x", replace(folders["sd"], components={**folders["sd"].components, "vae": tiny}))
    assert not (tmp_path / "x").exists()


def test_an_sd3_folder_has_a_number_for_its_shift(tiny_sd3: Path) -> None:
    assert read_json(tiny_sd3 / "vae" / "config.json")["shift_factor"] == 0.0


def test_variants_lie_side_by_side(folders: dict[str, Folder], tmp_path: Path) -> None:
    save_folder(tmp_path / "half", folders["sdxl"], dtype=jnp.float16, variant="fp16")
    names = {path.name for path in (tmp_path / "half").rglob("*.safetensors")}
    assert names == {"diffusion_pytorch_model.fp16.safetensors", "model.fp16.safetensors"}
    loaded = read(tmp_path / "half", variant="fp16")
    for name, component in folders["sdxl"].components.items():
        half = jax.tree.map(lambda x: np.asarray(x).astype(np.float16).astype(np.float32), component.params)
        assert_equal(loaded.components[name].params, half)
    with pytest.raises(FileNotFoundError, match="variant="):
        read(tmp_path / "half")


def test_weights_that_overflow_in_float16_stay_in_float32(saved: dict[str, Path]) -> None:
    components = read(saved["sd"], dtype=jnp.float16).components
    kinds = {name: {x.dtype.name for x in jax.tree.leaves(part.params)} for name, part in components.items()}
    assert kinds == {"unet": {"float16"}, "text_encoder": {"float16"}, "vae": {"float32"}}
    assert components["vae"].module.dtype == jnp.float32


def test_components_of_another_folder_stand_in(folders: dict[str, Folder], saved: dict[str, Path], copy: Any) -> None:
    path = copy("sd")
    shutil.copytree(saved["lcm"] / "unet", path / "unet_student")
    shutil.copytree(saved["lcm"] / "scheduler", path / "scheduler_student")
    where = {"unet": "unet_student", "scheduler": "scheduler_student"}
    folder = load_folder(Location(path=path, subfolders=where))
    assert_equal(folder.components["unet"].params, folders["lcm"].components["unet"].params)
    assert folder.scheduler["_class_name"] == "LCMScheduler"


def test_a_failed_save_leaves_the_old_folder(folders: dict[str, Folder], saved: dict[str, Path], copy: Any) -> None:
    path = copy("sd")
    broken = replace(folders["sd"], scheduler={"prediction_type": object()})
    with pytest.raises((TypeError, KeyError)):
        save_folder(path, broken)
    assert_equal(read(path).components["unet"].params, folders["sd"].components["unet"].params)
    assert [p.name for p in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("sd", {"_class_name": "KandinskyPipeline"}, "_class_name 'KandinskyPipeline' is not supported"),
        ("sd", {"prior": ["transformers", "CLIPTextModel"]}, "names the component 'prior', which is not supported"),
        ("sd", {"unet": [None, None]}, "names no unet"),
        ("sdxl", {"text_encoder_2": None}, "names no text_encoder_2; StableDiffusionXLPipeline needs one"),
        ("sd", {"_class_name": KINDS["sdxl"]}, "names no text_encoder_2"),
        ("sdxl", {"_class_name": KINDS["sd"], "text_encoder_2": None}, "addition_embed_type='text_time' does not fit"),
    ],
)
def test_folders_that_are_refused(copy: Any, kind: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        read(copy(kind, **changes))
    assert str(caught.value).count(".json: ") == 1
    assert "\n" not in str(caught.value)


def test_a_component_without_its_folder_is_named(copy: Any) -> None:
    with pytest.raises(FileNotFoundError, match=r"names image_encoder, but .*image_encoder has no config.json"):
        read(copy("sd", image_encoder=["transformers", "CLIPVisionModelWithProjection"]))


def test_a_component_that_is_not_known_is_named(copy: Any) -> None:
    with pytest.raises(ValueError, match=r"names the component 'controlnet', which is not supported"):
        read(copy("sd", controlnet=["diffusers", "ControlNetModel"]))


def test_a_missing_tokenizer_is_named(copy: Any) -> None:
    path = copy("sdxl")
    shutil.rmtree(path / "tokenizer_2")
    with pytest.raises(FileNotFoundError, match="tokenizer_2"):
        read(path)


def test_unknown_settings_are_a_warning(copy: Any) -> None:
    with pytest.warns(UserWarning, match=r"model_index.json: mood='odd' is not known") as caught:
        read(copy("sd", mood="odd"))
    assert len(caught) == 1


PUBLISHED = {
    "sd15": {"_class_name": "PNDMScheduler", "set_alpha_to_one": False, "skip_prk_steps": True, "steps_offset": 1},
    "sd21": {"_class_name": "DDIMScheduler", "prediction_type": "v_prediction", "steps_offset": 1},
    "sdxl": {
        "_class_name": "EulerDiscreteScheduler",
        "interpolation_type": "linear",
        "sample_max_value": 1.0,
        "timestep_spacing": "leading",
        "use_karras_sigmas": False,
    },
    "turbo": {"_class_name": "EulerAncestralDiscreteScheduler", "timestep_spacing": "trailing"},
    "lcm": {"_class_name": "LCMScheduler", "original_inference_steps": 50, "timestep_scaling": 10.0},
    "dpm": {
        "_class_name": "DPMSolverMultistepScheduler",
        "algorithm_type": "dpmsolver++",
        "dynamic_thresholding_ratio": 0.995,
        "euler_at_final": False,
        "final_sigmas_type": "zero",
        "lambda_min_clipped": -math.inf,
        "lower_order_final": True,
        "solver_order": 2,
        "solver_type": "midpoint",
        "thresholding": False,
        "variance_type": None,
    },
    "unipc": {
        "_class_name": "UniPCMultistepScheduler",
        "disable_corrector": [],
        "predict_x0": True,
        "solver_p": None,
        "solver_type": "bh2",
    },
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_scheduler_configs_are_read_without_a_word(name: str) -> None:
    config = LATENT | {"clip_sample": False, "trained_betas": None, "_diffusers_version": "0.24.0"} | PUBLISHED[name]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        schedule, kind = read_scheduler(config)
    assert schedule == DDPM(**LATENT)
    assert kind == config.get("prediction_type", "epsilon")
    assert config["_class_name"] in SCHEDULERS


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("thresholding", True),
        ("interpolation_type", "log_linear"),
        ("timestep_type", "continuous"),
        ("algorithm_type", "sde-dpmsolver++"),
        ("solver_order", 4),
        ("solver_type", "logsnr"),
        ("lambda_min_clipped", -5.1),
        ("variance_type", "learned_range"),
        ("timestep_scaling", 1.0),
        ("_class_name", "EDMEulerScheduler"),
        ("beta_start", "0.1"),
        ("steps_offset", True),
        ("prediction_type", "edm"),
    ],
)
def test_scheduler_values_with_another_result_are_refused(key: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"^a/scheduler_config.json: {key}[ =]{re.escape(repr(value))}") as caught:
        read_scheduler(LATENT | {key: value}, source="a/scheduler_config.json")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("DDIMScheduler", "clip_sample", True),
        ("EulerDiscreteScheduler", "clip_sample", True),
        ("EulerDiscreteScheduler", "thresholding", True),
        ("DDIMScheduler", "algorithm_type", "sde-dpmsolver++"),
        ("LCMScheduler", "solver_order", 3),
        ("DDIMScheduler", "use_flow_sigmas", True),
        ("EulerDiscreteScheduler", "use_dynamic_shifting", True),
    ],
)
def test_keys_that_the_class_does_not_read_are_passed_over_with_a_warning(name: str, key: str, value: Any) -> None:
    config = LATENT | {"_class_name": name, key: value}
    with pytest.warns(UserWarning, match=rf"^a/scheduler_config.json: {key}.* passed over"):
        schedule, kind = read_scheduler(config, source="a/scheduler_config.json")
    assert (schedule, kind) == (DDPM(**LATENT), "epsilon")


BH1 = UniPC(solver_order=3, solver_type="bh1")
DPM, SINGLE = "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler"


@pytest.mark.parametrize(
    ("config", "sampler", "solver"),
    [
        ({"_class_name": "PNDMScheduler", "skip_prk_steps": True}, "pndm", PLMS(kind="v_prediction")),
        ({"_class_name": "UniPCMultistepScheduler"}, "unipc", UniPC()),
        ({"_class_name": "UniPCMultistepScheduler", "solver_order": 3, "solver_type": "bh1"}, "unipc", BH1),
        ({"_class_name": "DEISMultistepScheduler", "solver_order": 3}, "deis", DEIS(solver_order=3)),
        ({"_class_name": "LMSDiscreteScheduler"}, "lms", LMS()),
        ({"_class_name": "KDPM2AncestralDiscreteScheduler"}, "dpm2_a", DPM2Ancestral()),
        ({"_class_name": "DPMSolverSDEScheduler"}, "dpm++sde", DPMppSDE()),
        ({"_class_name": "DDPMScheduler"}, "ddpm", DDIM(eta=1.0)),
        ({"_class_name": SINGLE}, "dpm++2s", DPMppSinglestep()),
        ({"_class_name": DPM}, "dpm++2m", DPMppMultistep()),
        ({"_class_name": DPM, "solver_order": 3}, "dpm++2m", DPMppMultistep(solver_order=3)),
        ({"_class_name": DPM, "solver_type": "heun"}, "dpm++2m", DPMppMultistep(solver_type="heun")),
        ({"_class_name": DPM, "algorithm_type": "sde-dpmsolver++"}, "dpm++2m_sde", DPMppMultistep(sde=True)),
        (
            {"_class_name": DPM, "algorithm_type": "sde-dpmsolver++", "solver_order": 3},
            "dpm++3m_sde",
            DPMppMultistep(sde=True, solver_order=3),
        ),
    ],
)
def test_a_scheduler_config_picks_the_very_same_sampler(config: dict[str, Any], sampler: str, solver: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_scheduler(config)
        assert sampler_of(config) == sampler
        assert SAMPLERS[sampler].configured(read_spacing(config), "v_prediction").solver == solver


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"_class_name": "PNDMScheduler"}, r"PNDMScheduler with skip_prk_steps false.*'pndm' draws in its place"),
        ({"_class_name": "DDPMScheduler", "variance_type": "fixed_large"}, r"variance_type fixed_large.*'ddpm' draws"),
        (
            {"_class_name": DPM, "algorithm_type": "sde-dpmsolver++", "solver_order": 1},
            r"order 1.*'dpm\+\+2m_sde' draws",
        ),
        ({"_class_name": SINGLE, "solver_type": "heun"}, r"solver_type heun.*'dpm\+\+2s' draws"),
    ],
)
def test_what_another_sampler_draws_is_a_warning_with_both_names(config: dict[str, Any], words: str) -> None:
    with pytest.warns(UserWarning, match=words):
        sampler_of(config)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"use_karras_sigmas": True, "use_beta_sigmas": True}, "use_karras_sigmas and use_beta_sigmas are both set"),
        (
            {"algorithm_type": "sde-dpmsolver++", "_class_name": SINGLE},
            r"algorithm_type='sde-dpmsolver\+\+' is not supported for DPM",
        ),
        ({"_class_name": "UniPCMultistepScheduler", "predict_x0": False}, "predict_x0=False is not supported"),
        (
            {"_class_name": "UniPCMultistepScheduler", "disable_corrector": [0]},
            r"disable_corrector=\[0\] is not supported",
        ),
    ],
)
def test_contradictory_schedulers_are_refused(config: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=f"^a/scheduler_config.json: {words}") as caught:
        read_scheduler({"_class_name": "EulerDiscreteScheduler", **config}, source="a/scheduler_config.json")
    assert "\n" not in str(caught.value)


def test_a_flow_does_not_read_betas() -> None:
    config = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0, "trained_betas": [0.1]}
    with pytest.warns(UserWarning, match=r"trained_betas=\[0.1\] is passed over"):
        assert read_scheduler(config) == (RectifiedFlow(shift=3.0), "flow")


FLOWS = [
    {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0, "use_dynamic_shifting": False},
    {"_class_name": "FlowMatchHeunDiscreteScheduler", "shift": 3.0},
    {"_class_name": "FlowMatchLCMScheduler", "shift": 3.0, "scale_factors": None, "upscale_mode": "bicubic"},
    {
        "_class_name": "DPMSolverMultistepScheduler",
        "use_flow_sigmas": True,
        "flow_shift": 3.0,
        "prediction_type": "flow_prediction",
    },
]


@pytest.mark.parametrize("config", FLOWS, ids=lambda config: config["_class_name"])
def test_schedulers_of_a_flow_are_read_without_a_word(config: dict[str, Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_scheduler(config) == (RectifiedFlow(shift=3.0), "flow")


@pytest.mark.parametrize("sampler", ["euler", "lcm"])
def test_the_scheduler_of_a_flow_there_and_back(sampler: str) -> None:
    config = scheduler_config(RectifiedFlow(shift=2.5), "flow", sampler)
    assert read_scheduler(config) == (RectifiedFlow(shift=2.5), "flow")
    assert SCHEDULERS[config["_class_name"]] == sampler


@pytest.mark.parametrize(
    ("schedule", "kind"),
    [(Cosine(), "v_prediction"), (RectifiedFlow(shift=2.0), "edm"), (RectifiedFlow(), "v_prediction")],
)
def test_what_diffusers_has_no_scheduler_for_is_named_so_that_it_refuses(schedule: Schedule, kind: Kind) -> None:
    config = scheduler_config(schedule, kind, "euler")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_scheduler(config) == (schedule, kind)
    assert config["_class_name"] == CONTINUOUS
    with pytest.raises(ValueError, match="schedule 'spiral' is unknown: use one of cosine, rectified_flow"):
        read_scheduler(config | {"schedule": "spiral"})
    with pytest.raises(ValueError, match="'edm' on DDPM"):
        scheduler_config(DDPM(), "edm", "euler")


def test_unknown_scheduler_keys_are_a_warning() -> None:
    with pytest.warns(UserWarning, match=r"a/scheduler_config.json: mood='odd' is not known") as caught:
        assert read_scheduler(LATENT | {"mood": "odd"}, source="a/scheduler_config.json")[0] == DDPM(**LATENT)
    assert len(caught) == 1
