"""What a model is read from: half-precision files of some components, averages alone, a LoRA in a model's place."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

import lcm_jax
from lcm_jax.runtime.atomic_files import write_json
from lcm_jax.weights import hub
from lcm_jax.weights.convert import convert
from lcm_jax.weights.hub import locate
from lcm_jax.weights.model_files import read_model
from lcm_jax.weights.safetensors_files import load_tensors, read_json, save_tensors

EMA = {
    "decay": 0.9999,
    "min_decay": 0.0,
    "inv_gamma": 1.0,
    "power": 0.75,
    "optimization_step": 500,
    "update_after_step": 0,
    "use_ema_warmup": False,
}


@pytest.fixture
def copy(tiny_model: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_model, tmp_path / "copy")


def add_variant(folder: Path, stem: str) -> None:
    """Write other values as the file of the variant fp16."""
    tensors = load_tensors(folder, stem)
    save_tensors(folder / f"{stem}.fp16.safetensors", {k: np.float16(2.0 * t) for k, t in tensors.items()})


def test_a_variant_of_some_components_is_read_where_it_is(copy: Path) -> None:
    add_variant(copy / "unet", "diffusion_pytorch_model")
    with pytest.warns(UserWarning, match=r"vae, text_encoder have no file of variant 'fp16': the plain file is read"):
        model = read_model(copy, variant="fp16")
    assert model.parts["unet"].tensors["conv_in.weight"].dtype == np.float16
    assert model.parts["vae"].tensors["decoder.conv_in.weight"].dtype == np.float32
    plain = read_model(copy)
    assert plain.parts["unet"].tensors["conv_in.weight"].dtype == np.float32


def test_a_variant_that_no_component_has_is_an_error(copy: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"diffusion_pytorch_model\.fp61\.safetensors.*variant="):
        read_model(copy, variant="fp61")


def test_of_the_hub_the_plain_files_are_downloaded_where_the_variant_is_not(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_variant(copy / "unet", "diffusion_pytorch_model")
    snapshot = tmp_path / "snapshot"

    def download(repository: str, *, allow_patterns: list[str], **_: object) -> str:
        for file in copy.rglob("*"):
            path = file.relative_to(copy)
            if file.is_file() and any(Path(str(path)).match(p) or str(path) == p for p in allow_patterns):
                (snapshot / path).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(file, snapshot / path)
        return str(snapshot)

    monkeypatch.setattr(hub, "snapshot_download", download)
    with pytest.warns(UserWarning, match="the plain file is read"):
        model = read_model("owner/name", variant="fp16")
    assert model.parts.keys() == {"unet", "vae", "text_encoder"}
    assert not (snapshot / "unet" / "diffusion_pytorch_model.safetensors").exists()
    shutil.rmtree(snapshot)
    with pytest.raises(FileNotFoundError, match="fp61"):
        read_model("owner/name", variant="fp61")
    assert not list(snapshot.rglob("*.safetensors"))


COMMAND = r"python -m lcm_jax.weights.from_pickle"


def pickled(folder: Path) -> None:
    """Every file of weights is a pickle, as in folders before safetensors."""
    for file in sorted(folder.rglob("*.safetensors")):
        file.unlink()
        file.with_suffix(".bin").write_bytes(b"PK\x03\x04")


def test_a_folder_of_pickles_alone_says_how_it_is_converted(copy: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="the folder above has one: load that"):
        read_model(copy / "unet")
    pickled(copy / "vae")
    with pytest.raises(ValueError, match=rf"vae.*\.bin: a pickle.*{COMMAND} {copy} "):
        read_model(copy)
    pickled(copy)
    with pytest.raises(ValueError, match=rf"{COMMAND} {copy} "):
        read_model(copy)
    single = tmp_path / "single"
    single.mkdir()
    with pytest.raises(FileNotFoundError, match=r"no such file, so this is no folder of a model$"):
        read_model(single)
    (single / "v1.ckpt").touch()
    with pytest.raises(ValueError, match=rf"v1.ckpt: a pickle.*{COMMAND} {single} "):
        read_model(single)
    (single / "v1.safetensors").touch()
    with pytest.raises(FileNotFoundError, match=r"it has 1 single files \(v1.safetensors\): give one of them"):
        read_model(single)


@pytest.mark.parametrize("parts", [("vae",), ("unet", "vae", "text_encoder")])
def test_a_repository_of_pickles_says_how_it_is_converted(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, parts: tuple[str, ...]
) -> None:
    """They are not downloaded, so that the folder in the hub's cache has configs alone."""
    snapshot = tmp_path / "models--some-one--name" / "snapshots" / "0123"
    shutil.copytree(copy, snapshot)
    for part in parts:
        for file in (snapshot / part).glob("*.safetensors"):
            file.unlink()
    monkeypatch.setattr(hub, "snapshot_download", lambda *_, **__: str(snapshot))
    with pytest.raises(FileNotFoundError, match=rf"hf download some-one/name --local-dir DIR, {COMMAND} DIR") as raised:
        read_model("some-one/name")
    assert "\n" not in str(raised.value)
    assert hub.locate("some-one/name", weights=False).path == snapshot


def test_settings_of_a_moving_average_in_a_config_are_passed_over(copy: Path) -> None:
    for name in ("unet", "vae"):
        write_json(copy / name / "config.json", read_json(copy / name / "config.json") | EMA)
    want = read_model(copy.parent / "copy")
    assert all(part.config is not None for part in want.parts.values())


def test_a_folder_with_the_average_alone_uses_it(copy: Path) -> None:
    (copy / "unet").rename(copy / "unet_ema")
    write_json(copy / "unet_ema" / "config.json", read_json(copy / "unet_ema" / "config.json") | EMA)
    with pytest.warns(UserWarning, match=r"holds only the moving average of its unet \(unet_ema\): it is used"):
        model = read_model(copy)
    assert model.parts["unet"].source == str(copy / "unet_ema")


@pytest.mark.parametrize("kind", ["StableDiffusionInpaintPipeline", "StableDiffusionImg2ImgPipeline"])
def test_the_class_of_another_task_does_not_matter(copy: Path, kind: str) -> None:
    write_json(copy / "model_index.json", read_json(copy / "model_index.json") | {"_class_name": kind})
    assert lcm_jax.load(copy).spacing.steps_offset == 1


def test_a_lora_in_a_models_place_says_how_to_use_it(tmp_path: Path) -> None:
    for name in ("openmoji-lcm-lora", locate("openmoji-lcm-lora").path / "pytorch_lora_weights.safetensors"):
        with pytest.raises(ValueError, match=r"a LoRA, not a model; load the model .* with lora='.*' \(--model MODEL"):
            lcm_jax.load(name)


@pytest.mark.parametrize(
    ("name", "what", "said"),
    [
        ("OpenMoji", "model", "model 'OpenMoji': no such file or folder; did you mean openmoji?"),
        ("openmoji_techer", "model", "did you mean openmoji-teacher?"),
        (
            "Openmoji-LCM-Lora",
            "LoRA",
            "LoRA 'Openmoji-LCM-Lora': no such file or folder; did you mean openmoji-lcm-lora?",
        ),
        ("nosuch", "LoRA", "LoRA 'nosuch': no such file or folder; bundled LoRAs are openmoji-lcm-lora, openmoji-sd3-"),
        ("nosuch", "model", "bundled models are openmoji, openmoji-teacher, openmoji-sd3"),
    ],
)
def test_a_name_that_is_nowhere(name: str, what: str, said: str) -> None:
    with pytest.raises(FileNotFoundError) as error:
        locate(name, what=what)
    assert said in str(error.value)
    with pytest.raises(FileNotFoundError, match=f"^{what} '{name}'"):
        lcm_jax.load("openmoji", lora=name) if what == "LoRA" else lcm_jax.load(name)


def test_convert_overrides_the_scheduler(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"scheduler: 'shfit' is no key .*did you mean shift"):
        convert(tiny_model, tmp_path / "out", "diffusers", scheduler={"shfit": 1.0})
    assert not (tmp_path / "out").exists()
