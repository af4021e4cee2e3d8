"""Files that somebody made to break their reader: each is refused in one line, before anything is built or written."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import lcm_jax
from lcm_jax.nets import SD15, SDXL, UNetConfig
from lcm_jax.runtime.config_values import check_config, check_values
from lcm_jax.runtime.json_text import MOST_NESTED, parse_json
from lcm_jax.runtime.messages import few, shortened, shown
from lcm_jax.weights import abstract_params, hub
from lcm_jax.weights.component import config_of
from lcm_jax.weights.convert import convert
from lcm_jax.weights.hub import locate
from lcm_jax.weights.model_files import read_model
from lcm_jax.weights.registry import FAMILIES, check_components
from lcm_jax.weights.safetensors_files import read_safetensors, save_tensors
from lcm_jax.weights.scheduler_config import read_scheduler
from lcm_jax.weights.tokenizer_files import copy_tokenizer, tokenizer_files
from mmdit.text import Tokenizer

ROOT = Path(__file__).parents[3]


def linked(model: Path, copy: Path) -> Path:
    """A copy of a model whose large files are links to the first."""
    for path in sorted(path for path in model.rglob("*") if path.is_file()):
        target = copy / path.relative_to(model)
        target.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".safetensors":
            target.symlink_to(path)
        else:
            target.write_bytes(path.read_bytes())
    return copy


@pytest.fixture
def model(tiny_model: Path, tmp_path: Path) -> Path:
    return linked(tiny_model, tmp_path / "model")


def changed(file: Path, **values: Any) -> Path:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))
    return file


# Paths from files.


@pytest.mark.parametrize(
    "name", ["../precious", "/tmp/precious", "unet/../../precious", "..", ".", "", "a\nb", "prior"]
)
def test_a_component_of_another_name_is_refused_before_anything_is_read(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "config.json").write_text((model / "unet" / "config.json").read_text())
    before = {path: path.read_bytes() for path in precious.iterdir()}
    changed(model / "model_index.json", **{name: ["diffusers", "UNet2DConditionModel"]})
    monkeypatch.setattr("lcm_jax.weights.model_files.read_part", lambda *_, **__: pytest.fail("a network is read"))
    for to, target in (("diffusers", "out"), ("orbax", "out"), ("single", "out.safetensors")):
        with pytest.raises(ValueError, match=r"^[^\n]*model_index.json: names the component '[^\n]*$"):
            convert(model, tmp_path / target, to)
        assert not (tmp_path / target).exists()
    assert {path: path.read_bytes() for path in precious.iterdir()} == before


@pytest.mark.parametrize("value", [[], ["diffusers"], ["a", "b", "c"], [1, 2], [["x"], "y"], 1.5, "x", {}, True])
def test_a_component_that_is_no_pair_of_names_is_refused(value: list[Any]) -> None:
    with pytest.raises(ValueError, match=r"m: 'unet' is .*; give \[library, class\]"):
        check_components({"unet": value}, "m")


def test_links_out_of_the_model_are_not_copied(model: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text('{"token": "mine"}')
    (model / "tokenizer" / "notes.txt").symlink_to(secret)  # no file of a tokenizer: passed over
    convert(model, tmp_path / "out", "diffusers")
    assert not (tmp_path / "out" / "tokenizer" / "notes.txt").exists()
    assert {path.name for path in (tmp_path / "out" / "tokenizer").iterdir()} == set(
        tokenizer_files(model / "tokenizer")
    )
    (model / "tokenizer" / "special_tokens_map.json").symlink_to(secret)
    for to, target in (("diffusers", "second"), ("orbax", "second"), ("single", "second.safetensors")):
        with pytest.raises(ValueError, match=r"special_tokens_map\.json: a link out of the model's folder"):
            convert(model, tmp_path / target, to)
        assert not (tmp_path / target).exists()


def test_a_tokenizer_folder_that_is_a_link_out_of_the_model_is_not_copied(model: Path, tmp_path: Path) -> None:
    (model / "tokenizer").rename(tmp_path / "elsewhere")
    (model / "tokenizer").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="a link out of the model's folder"):
        copy_tokenizer(model / "tokenizer", tmp_path / "copy")


def test_the_links_of_the_hubs_cache_are_followed(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "models--a--b" / "blobs", tmp_path / "models--a--b" / "snapshots" / "0123"
    blobs.mkdir(parents=True)
    (snapshot / "tokenizer").mkdir(parents=True)
    (blobs / "1").write_text("{}")
    (snapshot / "tokenizer" / "vocab.json").symlink_to("../../../blobs/1")
    copy_tokenizer(snapshot / "tokenizer", tmp_path / "copy")
    assert (tmp_path / "copy" / "vocab.json").read_text() == "{}"
    assert not (tmp_path / "copy" / "vocab.json").is_symlink()


# Configs.

BAD_CONFIGS: list[tuple[str, dict[str, Any]]] = [
    ("unet", {"norm_eps": float("nan")}),
    ("unet", {"norm_eps": "1e-5"}),
    ("unet", {"norm_eps": 0}),
    ("unet", {"sample_size": 10**6}),
    ("unet", {"sample_size": [8, [8]]}),
    ("unet", {"block_out_channels": 16}),
    ("unet", {"block_out_channels": [16.0]}),
    ("unet", {"block_out_channels": []}),
    ("unet", {"block_out_channels": [2**40]}),
    ("unet", {"attention_head_dim": [None]}),
    ("unet", {"attention_head_dim": 0}),
    ("unet", {"layers_per_block": True}),
    ("unet", {"layers_per_block": 10**6}),
    ("unet", {"transformer_layers_per_block": [[10**9]]}),
    ("unet", {"down_block_types": {"a": 1}}),
    ("unet", {"in_channels": -4}),
    ("unet", {"freq_shift": None}),
    ("unet", {"use_linear_projection": "no"}),
    ("unet", {"_class_name": ["UNet2DConditionModel"]}),
    ("unet", {"act_fn": ["silu"]}),
    ("vae", {"scaling_factor": float("inf")}),
    ("vae", {"scaling_factor": 0}),
    ("vae", {"scaling_factor": None}),
    ("vae", {"shift_factor": float("nan")}),
    ("vae", {"norm_num_groups": 0}),
    ("vae", {"layers_per_block": "2"}),
    ("vae", {"block_out_channels": 8}),
    ("vae", {"down_block_types": 3}),
    ("vae", {"latent_channels": 10**30}),
    ("text_encoder", {"num_hidden_layers": 10**6}),
    ("text_encoder", {"num_attention_heads": 0}),
    ("text_encoder", {"layer_norm_eps": float("-inf")}),
    ("text_encoder", {"vocab_size": "600"}),
    ("text_encoder", {"hidden_act": ["gelu"]}),
    ("text_encoder", {"architectures": 5}),
    ("text_encoder", {"max_position_embeddings": 1e3}),
]


@pytest.mark.parametrize(("component", "values"), BAD_CONFIGS, ids=[f"{c}-{v}"[:60] for c, v in BAD_CONFIGS])
def test_configs_of_wrong_types_and_sizes_are_refused(model: Path, component: str, values: dict[str, Any]) -> None:
    file = changed(model / component / "config.json", **values)
    with pytest.raises(ValueError, match=r"^[^\n]*config\.json: [^\n]*$") as error:
        config_of(file)
    assert len(str(error.value)) < 1200


@pytest.mark.parametrize("kind", FAMILIES)
def test_the_defaults_and_published_configs_are_within_bounds(kind: str) -> None:
    check_config(FAMILIES[kind].config(), kind)
    if kind == "UNet2DConditionModel":
        for config in (SD15, SDXL):
            check_config(config, kind)
            check_values(UNetConfig, json.loads(json.dumps(config.to_dict())), kind)


def test_a_network_deeper_than_its_file_is_refused_before_it_is_traced(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(abstract_params, "_trace", lambda *_: pytest.fail("a network is traced"))
    changed(model / "text_encoder" / "config.json", num_hidden_layers=900)
    with pytest.raises(ValueError, match=r"text_encoder: does not fit .* its config asks for 900 layers, and"):
        lcm_jax.load(model)
    kind, config = config_of(changed(model / "text_encoder" / "config.json", num_hidden_layers=2000))
    with pytest.raises(ValueError, match="asks for 2000 layers; at most 1024"):
        abstract_params.abstract_params(kind, config)


@pytest.mark.parametrize("number", ["7", "99999999", "9" * 5000], ids=len)
def test_a_single_file_that_numbers_a_layer_beyond_all_others_is_refused(
    model: Path, tmp_path: Path, number: str
) -> None:
    convert(model, tmp_path / "x.safetensors", "single")
    tensors = read_safetensors(tmp_path / "x.safetensors")
    renamed = {name.replace("input_blocks.1.", f"input_blocks.{number}."): value for name, value in tensors.items()}
    save_tensors(tmp_path / "y.safetensors", renamed)
    with pytest.raises(ValueError, match=r"^[^\n]*y\.safetensors: [^\n]*$"):
        read_model(tmp_path / "y.safetensors")


@pytest.mark.parametrize(
    "values",
    [
        {"beta_start": float("nan")},
        {"beta_end": float("inf")},
        {"beta_start": -1},
        {"num_train_timesteps": 10**12},
        {"num_train_timesteps": "1000"},
        {"num_train_timesteps": None},
        {"steps_offset": [1]},
        {"timestep_spacing": 3},
        {"prediction_type": ["epsilon"]},
        {"prediction_type": "x" * 5000},
        {"rescale_betas_zero_snr": "yes"},
        {"_class_name": {"a": 1}},
        {"sampler": 4},
        {"schedule": [1]},
        {"beta_schedule": None, "original_inference_steps": 0},
        {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": float("nan")},
        {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 0},
        {"use_flow_sigmas": True, "flow_shift": "3"},
    ],
    ids=lambda values: str(values)[:60],
)
def test_scheduler_configs_of_wrong_types_and_sizes_are_refused(values: dict[str, Any]) -> None:
    good = {"_class_name": "DDIMScheduler", "beta_start": 0.00085, "beta_end": 0.012, "clip_sample": False}
    with pytest.raises(ValueError, match=r"^s/scheduler_config\.json: [^\n]*$") as error:
        read_scheduler(good | values, source="s/scheduler_config.json")
    assert len(str(error.value)) < 1000


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, "[" * 70 + "]" * 70, '{"a":' * 70 + "1" + "}" * 70])
def test_json_is_nested_no_deeper_than_files_are(text: str) -> None:
    with pytest.raises(ValueError, match="nested too deeply"):
        parse_json(text)
    assert parse_json("[" * MOST_NESTED + "]" * MOST_NESTED)


@pytest.mark.parametrize("length", ["77", None, float("nan"), -3, 1, [77]])
def test_a_tokenizer_without_a_length_is_refused(model: Path, length: Any) -> None:
    changed(model / "tokenizer" / "tokenizer_config.json", model_max_length=length)
    try:
        assert Tokenizer.load(model / "tokenizer").max_length == 77  # null is transformers' own default: none
        assert length is None
    except ValueError as error:
        assert "model_max_length" in str(error)  # noqa: PT017


def test_a_length_that_no_text_has_is_none(model: Path) -> None:
    changed(model / "tokenizer" / "tokenizer_config.json", model_max_length=999_999)
    assert Tokenizer.load(model / "tokenizer").max_length == 77


# Names.


def test_names_from_files_are_escaped_and_cut() -> None:
    assert shown("\x1b[31m\n\u202e") == r"'\x1b[31m\n\u202e'"
    assert shortened("a\nb\x1b") == r"a\nb\x1b"
    assert len(shown("x" * 10**6)) == 160
    line = few("layers", ["a\nb", "\ud800", "x" * 10**6])
    assert line.isprintable()
    assert len(line) < 300


def test_a_name_of_a_tensor_or_key_is_escaped_and_cut(tmp_path: Path, model: Path) -> None:
    save_tensors(tmp_path / "x.safetensors", {"a\x1b[31m\n" + "y" * 5000: np.zeros(2, np.float32)})
    data = (tmp_path / "x.safetensors").read_bytes().replace(b"F32", b"C64")
    (tmp_path / "x.safetensors").write_bytes(data)
    with pytest.raises(ValueError, match=r"\\x1b") as error:
        read_safetensors(tmp_path / "x.safetensors")
    assert str(error.value).isprintable()
    changed(model / "unet" / "config.json", **{"k\n" * 3000: "v\x1b" * 3000})
    with pytest.raises(ValueError, match=r"unknown key 'k\\nk") as error:
        config_of(model / "unet" / "config.json")
    assert str(error.value).isprintable()
    assert len(str(error.value)) < 1000
    changed(model / "model_index.json", **{"mood\n": "odd\x1b" * 3000})
    with pytest.raises(ValueError, match="unknown key"):
        lcm_jax.load(model)


def test_a_setting_that_is_not_known_is_shown_escaped_and_cut(model: Path) -> None:
    changed(model / "model_index.json", **{"mood\n": "odd\x1b" * 3000})
    with pytest.warns(UserWarning, match="is not known") as caught:
        lcm_jax.load(model)
    assert all(str(warning.message).isprintable() and len(str(warning.message)) < 500 for warning in caught)


@pytest.mark.parametrize(
    "name",
    ["here/model", "here/model.safetensors", "loras/style.safetensors", "models/sd15", "x/y/", "./x", "x/run.json"],
)
def test_what_looks_like_a_path_asks_no_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub, "snapshot_download", lambda *_, **__: pytest.fail("the hub is asked"))
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        locate(name)


def test_a_revision_says_that_a_name_is_a_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "model.safetensors").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub, "snapshot_download", lambda *_, **__: str(tmp_path))
    assert locate("here/model@main").path == tmp_path
    with pytest.raises(FileNotFoundError, match="a repository of the hub by this name is here/model@main"):
        locate("here/model")


def test_the_metadata_name_both_licences() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["license"] == "Apache-2.0 AND CC-BY-SA-4.0"
    assert set(project["license-files"]) == {"LICENSE", "NOTICE"}
    assert "Attribution-ShareAlike 4.0" in (ROOT / "NOTICE").read_text()


# Orbax folders.


@pytest.fixture(scope="module")
def orbax_folder(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("orbax") / "model"
    convert(tiny_model, folder, "orbax")
    return folder


def test_every_flipped_bit_of_an_orbax_folder_is_seen(orbax_folder: Path) -> None:
    rng = np.random.default_rng(0)
    for file in sorted(path for path in (orbax_folder / "params").rglob("*") if path.is_file()):
        data = file.read_bytes()
        for bit in rng.integers(8 * len(data), size=3):
            damaged = bytearray(data)
            damaged[bit // 8] ^= 1 << bit % 8
            file.write_bytes(damaged)
            with pytest.raises(ValueError, match=r"damaged|no list of checksums|missing|not listed"):
                read_model(orbax_folder)
        file.write_bytes(data)


def test_an_orbax_folder_without_checksums_loads_and_shows_what_does_not_fit(
    orbax_folder: Path, tmp_path: Path
) -> None:
    plain = linked(orbax_folder, tmp_path / "plain")
    (plain / "params" / "checksums.json").unlink()
    checked, loaded = read_model(orbax_folder), read_model(plain)
    for name, part in checked.parts.items():
        for key, tensor in part.tensors.items():
            np.testing.assert_array_equal(tensor, loaded.parts[name].tensors[key])
    changed(plain / "text_encoder" / "config.json", num_hidden_layers=900)
    with pytest.raises(ValueError, match="its config asks for 900 layers, and it has"):
        read_model(plain)
    changed(plain / "text_encoder" / "config.json", num_hidden_layers=3)
    with pytest.raises(ValueError, match=r"params: does not fit the network: \d+ missing \(text_encoder/"):
        read_model(plain)
    (plain / "params" / "manifest.ocdbt").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"^[^\n]*params: not a whole orbax checkpoint \([^\n]*$"):
        read_model(plain)


# Mutants.

MUTANTS = {"safetensors": 600, "lora": 200, "folder": 600, "orbax": 300, "program": 300}


@pytest.fixture
def mutants(tiny_model: Path, tmp_path: Path) -> Callable[..., None]:
    """Read mutants in a process of their own; fail with those that end it, hang it or are not refused in one line."""

    def run(counts: dict[str, int], orbax: Path, program: Path, seconds: float) -> None:
        wanted = ",".join(f"{kind}={count}" for kind, count in counts.items())
        script = Path(__file__).with_name("mutants.py")
        paths = map(str, (tiny_model, orbax, program, tmp_path / "work"))
        environment = os.environ | {"JAX_PLATFORMS": "cpu", "LCM_JAX_CACHE": str(tmp_path / "cache")}
        with (tmp_path / "errors").open("w") as errors:
            done = subprocess.run(
                [sys.executable, str(script), wanted, "1", *paths],
                stdout=subprocess.PIPE,
                stderr=errors,
                env=environment,
                timeout=seconds,
                text=True,
            )
        lines = [json.loads(line) for line in done.stdout.splitlines()]
        ended = [line for line in lines if "end" in line]
        said = (tmp_path / "errors").read_text()[-3000:]
        assert done.returncode == 0, f"killed with {done.returncode} at {lines[-1:]}: {said}"
        assert [line for line in ended if line["problem"]] == []
        assert {kind: sum(line["kind"] == kind for line in ended) for kind in counts} == counts

    return run


def test_some_mutants(mutants: Callable[..., None], orbax_folder: Path) -> None:
    counts = {"safetensors": 40, "lora": 40, "folder": 10, "orbax": 6}
    mutants(counts, orbax_folder, orbax_folder, seconds=600)


@pytest.mark.slow
@pytest.mark.parametrize("kind", MUTANTS)
def test_two_thousand_mutants(
    mutants: Callable[..., None], orbax_folder: Path, tiny_model: Path, tmp_path: Path, kind: str
) -> None:
    from lcm_jax.inference.ahead_of_time import write_program

    assert sum(MUTANTS.values()) == 2000
    if kind == "program":
        write_program(lcm_jax.load(tiny_model), tmp_path / "program", guidance=3.0)
    mutants({kind: MUTANTS[kind]}, orbax_folder, tmp_path / "program", seconds=3000)
