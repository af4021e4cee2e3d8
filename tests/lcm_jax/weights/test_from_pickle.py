"""The command that the error for a pickle prints ends in a folder that loads, for every published layout."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import lcm_jax
from lcm_jax.weights import from_pickle
from lcm_jax.weights.convert import convert
from lcm_jax.weights.model_files import read_model
from lcm_jax.weights.safetensors_files import load_tensors, read_safetensors

torch = pytest.importorskip("torch")


def to_torch(tensors: dict[str, np.ndarray]) -> dict[str, Any]:
    return {key: torch.from_numpy(np.array(tensor)) for key, tensor in tensors.items()}


def run_what_is_said(error: Exception) -> None:
    """Run the command in an error's message, in this process."""
    command = re.search(r"python -m lcm_jax\.weights\.from_pickle (.*) \(PyTorch", str(error))
    assert command is not None, error
    assert from_pickle.main(shlex.split(command[1])) == 0


def pickled(file: Path, stem: str, **options: Any) -> None:
    """Replace a network's safetensors file by a pickle of that name in its folder."""
    tensors = read_safetensors(file)
    torch.save(to_torch(tensors), file.with_name(f"{stem}.bin"), **options)
    file.unlink()


def test_a_whole_folder_of_pickles_loads_after_one_command(tiny_model: Path, tmp_path: Path) -> None:
    """diffusers' and transformers' names, one of them in PyTorch's old format, with a training's state beside them."""
    copy = shutil.copytree(tiny_model, tmp_path / "a copy")
    for name in ("unet", "vae"):
        old = {"_use_new_zipfile_serialization": name != "vae"}
        pickled(copy / name / "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model", **old)
    pickled(copy / "text_encoder" / "model.safetensors", "pytorch_model")
    torch.save({"state": {}}, copy / "optimizer.bin")
    with pytest.raises(ValueError, match="a pickle") as error:
        lcm_jax.load(copy)
    run_what_is_said(error.value)
    for name, stem in (("unet", "diffusion_pytorch_model"), ("text_encoder", "model")):
        found, want = load_tensors(copy / name, stem), load_tensors(tiny_model / name, stem)
        assert found.keys() == want.keys()
        assert all(np.array_equal(found[key], want[key]) for key in want)
    lcm_jax.load(copy)
    assert not list(copy.glob("optimizer*.safetensors"))


def test_shards_and_variants_and_shared_tensors(tiny_sd3: Path, tmp_path: Path) -> None:
    """T5 in shards, its embedding under two names that share memory; an index of pickles beside them."""
    copy = shutil.copytree(tiny_sd3, tmp_path / "copy")
    folder = copy / "text_encoder_3"
    tensors = to_torch(read_safetensors(folder / "model.safetensors"))
    (folder / "model.safetensors").unlink()
    tensors["encoder.embed_tokens.weight"] = tensors["shared.weight"]
    names = sorted(tensors)
    shards = {key: f"pytorch_model-0000{1 + (i % 2)}-of-00002.bin" for i, key in enumerate(names)}
    for shard in set(shards.values()):
        torch.save(
            {key: tensors[key] for key in names if shards[key] == shard} | {"x": tensors["shared.weight"].T},
            folder / shard,
        )
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": shards}))
    with pytest.raises(ValueError, match="a pickle") as error:
        lcm_jax.load(copy)
    run_what_is_said(error.value)
    found = load_tensors(folder, "model")
    assert found.keys() == {*names, "x"}
    assert np.array_equal(found["shared.weight"], tensors["shared.weight"].numpy())
    assert (folder / "model.safetensors.index.json").is_file()


def test_a_checkpoint_of_a_trainer_becomes_a_single_file(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A state dict inside a checkpoint, beside objects of a class that is not installed and an optimizer's tensors."""
    convert(tiny_model, tmp_path / "one.safetensors", "single")
    state = to_torch(read_safetensors(tmp_path / "one.safetensors"))
    module = types.ModuleType("trainer")
    with monkeypatch.context() as installed:
        installed.setitem(sys.modules, "trainer", module)
        callback: Any = type("Callback", (), {"__module__": "trainer"})
        module.Callback = callback  # type: ignore[attr-defined]
        made = callback()
        made.best = np.float32(0.5)
        content = {"callbacks": {callback: [made]}, "epoch": 3, "optimizer_states": [{"exp_avg": torch.ones(2)}]}
        torch.save({"state_dict": state, **content}, tmp_path / "model.ckpt")
    with pytest.raises(ValueError, match="a pickle") as error:
        lcm_jax.load(tmp_path / "model.ckpt", config=tiny_model)
    run_what_is_said(error.value)
    assert read_safetensors(tmp_path / "model.safetensors").keys() == state.keys()
    assert read_model(tmp_path / "model.safetensors", config=tiny_model).parts.keys() == {"unet", "vae", "text_encoder"}


def test_nested_dicts_become_dotted_names(tmp_path: Path) -> None:
    """IP-Adapter's two dicts, and A1111's textual inversion."""
    weight = torch.ones(2, 3)
    torch.save(
        {"image_proj": {"proj.weight": weight}, "ip_adapter": {"1.to_k_ip.weight": weight.T}}, tmp_path / "ip.bin"
    )
    torch.save({"string_to_param": {"*": torch.nn.Parameter(weight)}, "name": "cat", "step": 4}, tmp_path / "cat.pt")
    assert from_pickle.main([str(tmp_path)]) == 0
    assert read_safetensors(tmp_path / "ip.safetensors").keys() == {
        "image_proj.proj.weight",
        "ip_adapter.1.to_k_ip.weight",
    }
    assert read_safetensors(tmp_path / "cat.safetensors").keys() == {"string_to_param.*"}


def test_a_pickle_under_the_name_of_safetensors_is_kept_beside(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    torch.save({"a": torch.ones(2)}, path)
    with pytest.raises(ValueError, match="a pickle") as error:
        read_safetensors(path)
    run_what_is_said(error.value)
    assert read_safetensors(path).keys() == {"a"}
    assert (tmp_path / "model.ckpt").is_file()


def test_code_in_a_pickle_is_not_run(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return Path.touch, (tmp_path / "ran",)

    torch.save({"a": torch.ones(1), "evil": Evil()}, tmp_path / "evil.ckpt")
    torch.save({"a": torch.ones(1), "evil": Evil()}, tmp_path / "old.ckpt", _use_new_zipfile_serialization=False)
    from_pickle.main([str(tmp_path / "evil.ckpt")])
    from_pickle.main([str(tmp_path / "old.ckpt")])
    assert not (tmp_path / "ran").exists()


def test_what_holds_no_weights_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    torch.save([1, 2], tmp_path / "list.pt")
    for path, said in ((tmp_path / "list.pt", "holds no named tensors"), (tmp_path / "none", "none"), (tmp_path, "")):
        assert from_pickle.main([str(path)]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert said in error
    assert not list(tmp_path.glob("*.safetensors"))
