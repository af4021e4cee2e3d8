"""Formats of whole models: there and back is bit-identical, and what cannot be written is said in one line."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np
import pytest

from lcm_jax import load, lora, save_lora
from lcm_jax.cli.main import main
from lcm_jax.weights.convert import convert, convert_lora, is_lora
from lcm_jax.weights.model_files import read_model
from lcm_jax.weights.safetensors_files import load_tensors, read_json, read_safetensors, save_tensors

PARTS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}


def tensors_of(folder: Path) -> dict[str, np.ndarray]:
    found = {}
    for part, stem in PARTS.items():
        found |= {f"{part}/{name}": tensor for name, tensor in load_tensors(folder / part, stem).items()}
    return found


def assert_same(one: Path, other: Path) -> None:
    left, right = tensors_of(one), tensors_of(other)
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert tensor.dtype == right[name].dtype
        np.testing.assert_array_equal(tensor, right[name], err_msg=name)


@pytest.mark.parametrize("way", ["single", "orbax", "diffusers"])
def test_there_and_back_is_bit_identical(tiny_model: Path, tmp_path: Path, way: str) -> None:
    middle = tmp_path / ("model.safetensors" if way == "single" else "model")
    summary = convert(tiny_model, middle, way)
    want = tensors_of(tiny_model)
    assert summary.tensors == len(want)
    assert summary.parameters == sum(tensor.size for tensor in want.values())
    assert dict(summary.dtypes) == {"float32": len(want)}
    convert(middle, tmp_path / "back", "diffusers", config=tiny_model if way == "single" else None)
    assert_same(tiny_model, tmp_path / "back")
    assert read_json(tmp_path / "back" / "scheduler" / "scheduler_config.json") == read_json(
        tiny_model / "scheduler" / "scheduler_config.json"
    )
    assert not list(tmp_path.glob(".*"))


def test_the_command_line_overrides_the_scheduler(tiny_model: Path, tmp_path: Path) -> None:
    changes = ["prediction_type=v_prediction", "rescale_betas_zero_snr=true", "beta_end=0.013"]
    assert main(["convert", str(tiny_model), str(tmp_path / "x"), "--to", "diffusers", "--scheduler", *changes]) == 0
    scheduler = read_json(tmp_path / "x" / "scheduler" / "scheduler_config.json")
    want = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "beta_end": 0.013}
    assert scheduler == read_json(tiny_model / "scheduler" / "scheduler_config.json") | want
    assert load(tmp_path / "x").model.kind == "v_prediction"


def test_a_single_file_has_the_original_names(tiny_model: Path, tmp_path: Path) -> None:
    convert(tiny_model, tmp_path / "model.safetensors", "single", dtype=np.float16)
    tensors = read_safetensors(tmp_path / "model.safetensors")
    for key in (
        "model.diffusion_model.input_blocks.1.0.in_layers.2.weight",
        "model.diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_k.weight",
        "first_stage_model.decoder.mid.attn_1.q.weight",
        "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight",
    ):
        assert tensors[key].dtype == np.float16


def test_every_format_draws_the_same_picture(tiny_model: Path, tmp_path: Path) -> None:
    want = load(tiny_model)("red heart", steps=1, sampler="ddim")
    convert(tiny_model, tmp_path / "model.safetensors", "single")
    convert(tiny_model, tmp_path / "orbax", "orbax")
    single = load(tmp_path / "model.safetensors", config=tiny_model)
    np.testing.assert_array_equal(single("red heart", steps=1, sampler="ddim"), want)
    np.testing.assert_array_equal(load(tmp_path / "orbax")("red heart", steps=1, sampler="ddim"), want)


@pytest.fixture(scope="module")
def adapters(tiny_components: dict) -> dict:
    params = tiny_components["unet"].params
    found = lora.init(jax.random.key(0), params, rank=2, alpha=1.0)
    return {name: leaf | {"up": jax.random.normal(jax.random.key(1), leaf["up"].shape)} for name, leaf in found.items()}


def test_a_lora_goes_through_every_format(tiny_model: Path, tmp_path: Path, adapters: dict) -> None:
    save_lora(tmp_path / "peft.safetensors", adapters)
    convert_lora(tmp_path / "peft.safetensors", tmp_path / "kohya.safetensors", "lora-kohya")
    convert_lora(tmp_path / "kohya.safetensors", tmp_path / "old.safetensors", "lora-diffusers", base=tiny_model)
    convert_lora(tmp_path / "old.safetensors", tmp_path / "back.safetensors", "lora-peft")
    want, got = read_safetensors(tmp_path / "peft.safetensors"), read_safetensors(tmp_path / "back.safetensors")
    assert want.keys() == got.keys()
    for name, tensor in want.items():
        np.testing.assert_array_equal(got[name], tensor)
    assert is_lora(tmp_path / "kohya.safetensors")
    assert not is_lora(tiny_model)


def test_the_lora_of_a_merged_model_is_found_again(tiny_model: Path, tmp_path: Path, adapters: dict) -> None:
    pipe = load(tiny_model)
    base = pipe.params["unet"]
    pipe.add_lora({"unet": adapters})
    pipe.save(tmp_path / "tuned")
    summary = convert_lora(tmp_path / "tuned", tmp_path / "found.safetensors", "lora-peft", base=tiny_model, rank=4)
    assert summary.components == ("unet",)
    again = lora.merge(base, load_of(tmp_path / "found.safetensors", base))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), again, pipe.params["unet"])


def load_of(path: Path, like: object) -> dict:
    from lcm_jax.weights.lora.files import load_lora

    return load_lora(path, like)


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["{model}", "{out}/x", "--to", "single"], "*.safetensors"),
        (["{model}", "{out}/x.safetensors", "--to", "diffusers"], "folder"),
        (["{out}/none", "{out}/x", "--to", "diffusers"], "no such file"),
        (["{model}", "{out}/x.safetensors", "--to", "lora-peft"], "--base"),
        (["{ckpt}", "{out}/x", "--to", "diffusers"], "pickle"),
        (["{other}", "{out}/x", "--to", "diffusers"], "first keys"),
        (["{model}", "{out}/x", "--to", "diffusers", "--scheduler", "shift"], "give KEY=VALUE"),
        (["{model}", "{out}/x", "--to", "orbax", "--scheduler", "Shift=1"], "did you mean shift?"),
        (["{model}", "{out}/x", "--to", "orbax", "--scheduler", "thresholding=true"], "thresholding=True is not"),
        (["{model}", "{out}/x.safetensors", "--to", "lora-peft", "--scheduler", "shift=1"], "writes a LoRA"),
        (["openmoji-lcm-lora", "{out}/x", "--to", "diffusers"], "a LoRA, not a model"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture, arguments: list[str], word: str
) -> None:
    places = {
        "model": tiny_model,
        "out": tmp_path / "out",
        "ckpt": tmp_path / "m.ckpt",
        "other": tmp_path / "o.safetensors",
    }
    (tmp_path / "out").mkdir()
    places["ckpt"].write_bytes(b"PK\x03\x04")
    save_tensors(places["other"], {"layer.weight": np.zeros(3, np.float32)})
    assert main(["convert", *(text.format(**places) for text in arguments)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert word in error
    assert not list((tmp_path / "out").iterdir())


def test_a_model_that_does_not_fit_its_config_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    model = read_model(tiny_model)
    unet = dict(model.parts["unet"].tensors)
    del unet["conv_in.bias"]
    folder = tmp_path / "broken"
    convert(tiny_model, folder, "diffusers")
    save_tensors(folder / "unet" / "diffusion_pytorch_model.safetensors", unet)
    with pytest.raises(ValueError, match=r"unet: does not fit the network: 1 missing \(conv_in\.bias\)"):
        convert(folder, tmp_path / "out", "diffusers")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("to", ["diffusers", "orbax", "save"])
def test_a_folder_of_other_things_is_never_replaced(tiny_model: Path, tmp_path: Path, to: str) -> None:
    target = tmp_path / "thesis"
    (target / "chapters").mkdir(parents=True)
    (target / "notes.txt").write_text("important")

    def write() -> None:
        if to == "save":
            load(tiny_model).save(target)
        else:
            convert(tiny_model, target, to)

    with pytest.raises(ValueError, match=r"holds chapters and 1 more, which is no part of a model: name a new folder"):
        write()
    assert (target / "notes.txt").read_text() == "important"
    (target / "chapters").rmdir()
    (target / "notes.txt").unlink()
    for _ in range(2):  # into an empty folder, and over the model that is there now
        write()
    assert (target / "model_index.json").is_file()
