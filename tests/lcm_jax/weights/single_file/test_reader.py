"""Single files as other programs write them: markers, averages alone, old and short names of text encoders."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import lcm_jax
from lcm_jax.nets import UNetConfig
from lcm_jax.runtime.atomic_files import write_json
from lcm_jax.weights import model_files
from lcm_jax.weights.component import Part, names_of
from lcm_jax.weights.convert import convert
from lcm_jax.weights.model_files import read_model
from lcm_jax.weights.safetensors_files import read_json, read_metadata, read_safetensors, save_tensors
from lcm_jax.weights.single_file.reader import _canonical, _guessed, read_single, write_single
from mmdit.text import CLIPTextConfig
from vae16 import AutoencoderConfig

TEXT, UNET = "cond_stage_model.transformer.", "model.diffusion_model."
Edit = Callable[[dict[str, Any]], dict[str, Any]]


@pytest.fixture(scope="module")
def single(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model in one file, written here."""
    path = tmp_path_factory.mktemp("single") / "model.safetensors"
    convert(tiny_model, path, "single")
    return path


def foreign(single: Path, target: Path, edit: Edit = lambda tensors: tensors, **metadata: str) -> Path:
    """The file as another program would have written it: without our header, its tensors changed by `edit`."""
    save_tensors(target, edit(dict(read_safetensors(single))), metadata)
    return target


def marked(*keys: str) -> Edit:
    return lambda tensors: tensors | {key: np.zeros(0, np.float32) for key in keys}


def renamed(old: str, new: str) -> Edit:
    return lambda tensors: {key.replace(old, new): tensor for key, tensor in tensors.items()}


def assert_same_networks(path: Path, config: Path, single: Path) -> None:
    found, want = read_model(path, config=config), read_single(single, configs=None)
    for name, part in want.parts.items():
        for key, tensor in part.tensors.items():
            np.testing.assert_array_equal(found.parts[name].tensors[key], tensor, err_msg=f"{name}/{key}")


# What a file declares of its scheduler.


def test_v_prediction_and_zero_terminal_snr_are_read_from_the_markers(
    single: Path, tiny_model: Path, tmp_path: Path
) -> None:
    path = foreign(single, tmp_path / "v.safetensors", marked("v_pred", "ztsnr"))
    with pytest.warns(UserWarning, match=r"declares prediction_type='v_prediction', rescale_betas_zero_snr=True"):
        model = read_model(path, config=tiny_model)
    assert model.scheduler["prediction_type"] == "v_prediction"
    assert model.scheduler["rescale_betas_zero_snr"] is True
    assert model.scheduler["timestep_spacing"] == "trailing"
    assert not {"v_pred", "ztsnr"} & set(model.dropped)


@pytest.mark.parametrize(
    ("metadata", "keys", "kind", "to"),
    [
        ({"modelspec.prediction_type": "v"}, (), "v_prediction", "diffusers"),
        ({"modelspec.prediction_type": "epsilon"}, (), "epsilon", "diffusers"),
        ({}, (), "epsilon", "diffusers"),
        ({}, ("v_pred",), "v_prediction", "diffusers"),
        ({}, ("v_pred",), "v_prediction", "orbax"),
    ],
)
def test_what_a_file_declares_goes_into_every_folder(
    single: Path, tiny_model: Path, tmp_path: Path, metadata: dict, keys: tuple, kind: str, to: str
) -> None:
    path = foreign(single, tmp_path / "x.safetensors", marked(*keys), **metadata)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        convert(path, tmp_path / "out", to, config=tiny_model)
    scheduler = read_json(tmp_path / "out" / "scheduler" / "scheduler_config.json")
    assert scheduler == read_json(tiny_model / "scheduler" / "scheduler_config.json") | {"prediction_type": kind}
    assert read_model(tmp_path / "out").scheduler == scheduler


def test_markers_that_contradict_the_header_are_followed_and_named(
    single: Path, tiny_model: Path, tmp_path: Path
) -> None:
    path = foreign(single, tmp_path / "x.safetensors", marked("v_pred"), **{"modelspec.prediction_type": "epsilon"})
    with (
        pytest.warns(UserWarning, match="says v_prediction, modelspec.prediction_type in its header 'epsilon'"),
        pytest.warns(UserWarning, match="the file is followed"),
    ):
        assert read_model(path, config=tiny_model).scheduler["prediction_type"] == "v_prediction"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        forced = read_model(path, config=tiny_model, scheduler={"prediction_type": "epsilon"})
    assert forced.scheduler["prediction_type"] == "epsilon"


def test_a_bare_unet_keeps_its_marker(single: Path, tiny_model: Path, tmp_path: Path) -> None:
    def bare(tensors: dict[str, Any]) -> dict[str, Any]:
        return {key.removeprefix(UNET): t for key, t in tensors.items() if key.startswith(UNET)} | marked("v_pred")({})

    path = foreign(single, tmp_path / "unet.safetensors", bare)
    with (
        pytest.warns(UserWarning, match="holds no vae, text_encoder: read from"),
        pytest.warns(UserWarning, match="declares prediction_type='v_prediction'"),
    ):
        model = read_model(path, config=tiny_model)
    assert model.scheduler["prediction_type"] == "v_prediction"


@pytest.mark.parametrize(
    "scheduler",
    [
        {"prediction_type": "v_prediction"},
        {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
        {"prediction_type": "sample", "beta_schedule": "linear", "_class_name": "HeunDiscreteScheduler"},
    ],
)
def test_a_scheduler_comes_back_from_a_single_file_as_it_was(tiny_model: Path, tmp_path: Path, scheduler: dict) -> None:
    summary = convert(tiny_model, tmp_path / "1.safetensors", "single", scheduler=scheduler)
    tensors, metadata = read_safetensors(tmp_path / "1.safetensors"), read_metadata(tmp_path / "1.safetensors")
    is_v = scheduler["prediction_type"] == "v_prediction"
    assert ("v_pred" in tensors) == is_v
    assert ("ztsnr" in tensors) == ("rescale_betas_zero_snr" in scheduler)
    assert metadata.get("modelspec.prediction_type") == ("v" if is_v else None)
    lost = [entry for entry in summary.dropped if entry.startswith("scheduler's ")]
    assert (["prediction_type" in lost[0], "beta_schedule" in lost[1]] == [True, True]) if not is_v else not lost
    convert(tmp_path / "1.safetensors", tmp_path / "2", "diffusers")
    want = read_json(tiny_model / "scheduler" / "scheduler_config.json") | scheduler
    assert read_json(tmp_path / "2" / "scheduler" / "scheduler_config.json") == want
    assert read_json(tmp_path / "2" / "model_index.json")["scheduler"] == ["diffusers", want["_class_name"]]


# The description in the header.


def test_a_file_written_here_loads_by_itself(single: Path, tiny_model: Path) -> None:
    """The network has heads and a tokenizer that no published model has: all of it is in the header."""
    alone, folder = lcm_jax.load(single), lcm_jax.load(tiny_model)
    assert alone.model == folder.model
    assert (
        alone.folder.tokenizers["text_encoder"](["red heart"]).tolist()
        == folder.folder.tokenizers["text_encoder"](["red heart"]).tolist()
    )


def test_sd3_in_one_file_loads_by_itself(tiny_sd3: Path, tmp_path: Path) -> None:
    summary = convert(tiny_sd3, tmp_path / "sd3.safetensors", "single", scheduler={"shift": 2.0})
    assert "scheduler's shift=2.0 (in the header, which other programs do not read)" in summary.dropped
    found, want = read_model(tmp_path / "sd3.safetensors"), read_model(tiny_sd3)
    assert {name: part.config for name, part in found.parts.items()} == {n: p.config for n, p in want.parts.items()}
    assert found.tokenizers.keys() == want.tokenizers.keys()
    assert found.scheduler == want.scheduler | {"shift": 2.0}
    short = lcm_jax.load(tmp_path / "sd3.safetensors", t5=False)
    assert "text_encoder_3" not in short.params


@pytest.mark.parametrize(
    "damaged",
    [
        "no json",
        "[]",
        "{}",
        '{"index": {}, "scheduler": {}, "configs": [], "tokenizers": {}}',
        '{"index": {"unet": {"a": 1}, "vae": [1, 2]}, "scheduler": {}, "configs": {}, "tokenizers": {}}',
        '{"index": {}, "scheduler": {}, "configs": {}, "tokenizers": {"tokenizer": {"vocab.json": 1}}}',
    ],
)
def test_a_damaged_description_is_one_line(single: Path, tiny_model: Path, tmp_path: Path, damaged: str) -> None:
    path = foreign(single, tmp_path / "x.safetensors", lcm_jax=damaged)
    with pytest.raises(ValueError, match=r"x\.safetensors: the description in its header") as error:
        read_model(path)
    assert "\n" not in str(error.value)
    with pytest.warns(UserWarning, match=r"the description in its header .* is passed over"):
        assert read_model(path, config=tiny_model).parts.keys() == {"unet", "vae", "text_encoder"}


def test_the_scheduler_of_a_file_goes_before_that_of_a_given_folder(tiny_model: Path, tmp_path: Path) -> None:
    changes = {"beta_schedule": "linear", "prediction_type": "sample"}  # which no mark of other programs holds
    convert(tiny_model, tmp_path / "x.safetensors", "single", scheduler=changes)
    with pytest.warns(UserWarning, match=r"x\.safetensors: the scheduler in its header is used, not that of .*tiny"):
        model = read_model(tmp_path / "x.safetensors", config=tiny_model)
    assert model.scheduler == read_json(tiny_model / "scheduler" / "scheduler_config.json") | changes


def test_a_description_writes_no_files_of_other_names(single: Path, tmp_path: Path) -> None:
    values = json.loads(read_metadata(single)["lcm_jax"])
    values["tokenizers"]["tokenizer"]["../evil.py"] = "1"
    path = foreign(single, tmp_path / "x.safetensors", lcm_jax=json.dumps(values))
    with pytest.raises(ValueError, match=r"has the file '\.\./evil\.py'"):
        read_model(path)


# Averages alone, and what training leaves behind.


@pytest.mark.parametrize("form", ["flat", "dotted"])
def test_an_average_alone_is_the_network(single: Path, tiny_model: Path, tmp_path: Path, form: str) -> None:
    def average(tensors: dict[str, Any]) -> dict[str, Any]:
        changed: dict[str, Any] = {"model_ema.decay": np.float32(0.9999), "model_ema.num_updates": np.int64(7)}
        for key, tensor in tensors.items():
            name = key.removeprefix(UNET)
            name = "diffusion_model" + name.replace(".", "") if form == "flat" else f"diffusion_model.{name}"
            changed[f"model_ema.{name}" if key.startswith(UNET) else key] = tensor
        return changed

    path = foreign(single, tmp_path / "ema.safetensors", average)
    with pytest.warns(UserWarning, match=r"ema\.safetensors: holds only the moving average of its network"):
        assert_same_networks(path, tiny_model, single)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        summary = convert(path, tmp_path / "out", "diffusers", config=tiny_model)
    assert summary.dropped == ("model_ema.decay", "model_ema.num_updates")


def test_an_average_beside_its_network_is_left_out(single: Path, tiny_model: Path, tmp_path: Path) -> None:
    extra = {"model_ema.diffusion_modelout2bias": np.ones(4, np.float32), "model_ema.decay": np.float32(0.9)}
    path = foreign(single, tmp_path / "both.safetensors", lambda tensors: tensors | extra)
    assert_same_networks(path, tiny_model, single)
    assert set(extra) <= set(read_model(path, config=tiny_model).dropped)


def test_an_autoencoder_with_its_training_is_read(single: Path, tiny_model: Path, tmp_path: Path) -> None:
    """As the published VAE files: bare keys, and beside them the loss and the average of their training."""

    def bare(tensors: dict[str, Any]) -> dict[str, Any]:
        vae = {k.removeprefix("first_stage_model."): 2.0 * t for k, t in tensors.items() if k.startswith("first_")}
        training = ("loss.logvar", "loss.discriminator.main.0.weight", "model_ema.encoderconv_inweight")
        return vae | dict.fromkeys(training, np.ones(2, np.float32)) | {"model_ema.decay": np.float32(0.9)}

    path = foreign(single, tmp_path / "vae.safetensors", bare)
    with pytest.warns(UserWarning, match=r"vae\.safetensors: holds no unet, text_encoder: read from"):
        model = read_model(path, config=tiny_model)
    want = read_single(single).parts["vae"].tensors["decoder.conv_in.weight"]
    np.testing.assert_array_equal(model.parts["vae"].tensors["decoder.conv_in.weight"], 2.0 * want)


def test_a_full_model_with_the_loss_of_its_autoencoder_is_read(single: Path, tiny_model: Path, tmp_path: Path) -> None:
    extra = {f"first_stage_model.{key}": np.ones(2, np.float32) for key in ("loss.logvar", "loss.a.weight")}
    path = foreign(single, tmp_path / "x.safetensors", lambda tensors: tensors | extra)
    assert_same_networks(path, tiny_model, single)


# Text encoders.


def test_a_text_encoder_without_text_model_is_read(single: Path, tiny_model: Path, tmp_path: Path) -> None:
    """NovelAI's file, and files from transformers 5."""
    path = foreign(single, tmp_path / "nai.safetensors", renamed(f"{TEXT}text_model.", TEXT))
    assert not any("text_model" in key for key in read_safetensors(path))
    assert_same_networks(path, tiny_model, single)


@pytest.mark.parametrize("key", ["text_projection.weight", "text_projection"])
def test_a_projection_that_sd1_does_not_use_is_left_out(
    single: Path, tiny_model: Path, tmp_path: Path, key: str
) -> None:
    """The config folder's encoder has no projection, as SD1's: the file's is left out."""
    folder = tmp_path / "plain"
    convert(tiny_model, folder, "diffusers")
    config = folder / "text_encoder" / "config.json"
    config.write_text(config.read_text().replace("CLIPTextModelWithProjection", "CLIPTextModel"))
    assert read_model(folder).parts["text_encoder"].kind == "CLIPTextModel"
    lcm_jax.load(folder)  # the folder's own file has one too
    path = foreign(single, tmp_path / "x.safetensors", renamed(f"{TEXT}text_projection.weight", TEXT + key))
    model = read_model(path, config=folder)
    assert "text_projection.weight" not in model.parts["text_encoder"].tensors
    assert TEXT + key in model.dropped


def test_sd_turbo_names_its_text_encoder_as_sdxl_does(tmp_path: Path) -> None:
    keys = ["conditioner.embedders.0.model.ln_final.weight", "model.diffusion_model.out.2.bias"]
    tensors = {key: np.zeros(1, np.float32) for key in keys}
    assert "cond_stage_model.model.ln_final.weight" in _canonical(tensors)
    refiner = tensors | {"model.diffusion_model.label_emb.0.0.weight": np.zeros(1, np.float32)}
    assert _canonical(refiner).keys() == refiner.keys()


# Files of published families, without configs.


@pytest.fixture(scope="module")
def published(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The folder that stands for SD1's published one, with its PNDM, and the tensors of a small file of that family."""
    folder = shutil.copytree(tiny_model, tmp_path_factory.mktemp("published") / "sd1")
    index = read_json(folder / "model_index.json") | {"scheduler": ["diffusers", "PNDMScheduler"]}
    write_json(folder / "model_index.json", index)
    scheduler = {"_class_name": "PNDMScheduler", "skip_prk_steps": True, "steps_offset": 1, "set_alpha_to_one": False}
    latent = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    write_json(folder / "scheduler" / "scheduler_config.json", scheduler | latent)
    clip = CLIPTextConfig(vocab_size=600, intermediate_size=16, num_hidden_layers=1, num_attention_heads=12)
    net = UNetConfig(
        sample_size=64, block_out_channels=(32, 32), down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), layers_per_block=1, cross_attention_dim=768,
    )  # fmt: skip
    vae = AutoencoderConfig(block_out_channels=(32, 32), layers_per_block=1)
    kinds = {
        "unet": ("UNet2DConditionModel", net),
        "vae": ("AutoencoderKL", vae),
        "text_encoder": ("CLIPTextModel", clip),
    }
    parts = {}
    for name, (kind, config) in kinds.items():
        tensors = {key: np.zeros(shape, np.float16) for key, shape in names_of(kind, config).items()}
        parts[name] = Part(kind, config, tensors, name)
    path = tmp_path_factory.mktemp("published") / "x.safetensors"
    write_single(path, parts, scheduler={"_class_name": "DDIMScheduler"})
    return folder, dict(read_safetensors(path))


@pytest.mark.parametrize(
    ("keys", "changed"),
    [
        ((), {}),
        (("v_pred",), {"prediction_type": "v_prediction"}),
        (
            ("v_pred", "ztsnr"),
            {
                "prediction_type": "v_prediction",
                "rescale_betas_zero_snr": True,
                "timestep_spacing": "trailing",
                "_class_name": "DDIMScheduler",  # diffusers' PNDM would let pass over it
                "clip_sample": False,
            },
        ),
    ],
)
def test_a_file_without_configs_takes_its_familys_scheduler_and_its_own_marks(
    published: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keys: tuple, changed: dict
) -> None:
    folder, tensors = published
    monkeypatch.setitem(model_files.PUBLISHED, "sd1", str(folder))
    save_tensors(tmp_path / "x.safetensors", tensors | marked(*keys)({}), {})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        convert(tmp_path / "x.safetensors", tmp_path / "out", "diffusers")
    scheduler = read_json(tmp_path / "out" / "scheduler" / "scheduler_config.json")
    assert scheduler == read_json(folder / "scheduler" / "scheduler_config.json") | changed
    assert read_json(tmp_path / "out" / "model_index.json")["scheduler"] == ["diffusers", scheduler["_class_name"]]
    save_tensors(tmp_path / "y.safetensors", {k: t for k, t in tensors.items() if k.startswith(UNET)})
    with pytest.raises(FileNotFoundError, match=r"y.safetensors: holds no vae, text_encoder; give config="):
        read_model(tmp_path / "y.safetensors")


@pytest.mark.parametrize(("deviation", "kind"), [(0.2, "v_prediction"), (0.01, "epsilon")])
def test_sd2_tells_its_prediction_by_its_weights(deviation: float, kind: str) -> None:
    bias = np.random.default_rng(0).normal(0.0, deviation, 640).astype(np.float16)
    assert _guessed({"model.diffusion_model.output_blocks.11.1.transformer_blocks.0.norm1.bias": bias}) == kind
