"""Files of tensors: whole, sharded, every dtype; broken, hostile and pickled ones end in one line naming the file."""

from __future__ import annotations

import json
from pathlib import Path

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open

from lcm_jax.weights.files import load_tensors, read_json, read_metadata, save_tensors, write_json

TENSORS = {
    "odd": np.arange(3, dtype=np.uint8),  # leaves what follows unaligned
    "a": np.arange(6, dtype=np.float32).reshape(2, 3).T,
    "half": np.arange(4, dtype=ml_dtypes.bfloat16),
    "tiny": np.arange(4, dtype=ml_dtypes.float8_e4m3fn),
    "scalar": np.array(3, np.int64),
    "empty": np.zeros((0, 4), np.float16),
}


def equal(left: dict, right: dict) -> None:
    assert left.keys() == right.keys()
    for name, tensor in right.items():
        assert (left[name].dtype, left[name].shape) == (tensor.dtype, tensor.shape), name
        np.testing.assert_array_equal(left[name], tensor)


def shards(folder: Path, stem: str = "model") -> Path:
    save_tensors(folder / f"{stem}-1.safetensors", {"a": TENSORS["a"]})
    save_tensors(folder / f"{stem}-2.safetensors", {"half": TENSORS["half"]})
    index = folder / f"{stem}.safetensors.index.json"
    write_json(index, {"weight_map": {"a": f"{stem}-1.safetensors", "half": f"{stem}-2.safetensors"}})
    return index


def test_there_and_back(tmp_path: Path) -> None:
    path = tmp_path / "new" / "diffusion_pytorch_model.safetensors"
    save_tensors(path, TENSORS)
    equal(load_tensors(path), TENSORS)
    equal(load_tensors(str(path.parent)), TENSORS)
    save_tensors(path, {"b": jnp.ones((2, 2), jnp.bfloat16)})  # over the old file
    assert load_tensors(path)["b"].dtype == ml_dtypes.bfloat16
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    assert all(t.flags.aligned for t in load_tensors(path).values())


def test_metadata_says_pytorch(tmp_path: Path) -> None:
    save_tensors(tmp_path / "x.safetensors", {"a": np.zeros(2)}, {"step": "7"})
    assert read_metadata(tmp_path / "x.safetensors") == {"format": "pt", "step": "7"}
    with safe_open(tmp_path / "x.safetensors", framework="np") as file:
        assert file.metadata() == {"format": "pt", "step": "7"}


def test_sharded_and_variants(tmp_path: Path) -> None:
    index = shards(tmp_path)
    wanted = {"a": TENSORS["a"], "half": TENSORS["half"]}
    equal(load_tensors(index), wanted)
    equal(load_tensors(tmp_path, stem="model"), wanted)
    with pytest.raises(FileNotFoundError, match=r"model\.fp16\.safetensors.*choose by variant"):
        load_tensors(tmp_path, stem="model", variant="fp16")
    save_tensors(tmp_path / "model.fp16.safetensors", {"odd": TENSORS["odd"]})
    assert load_tensors(tmp_path, stem="model", variant="fp16").keys() == {"odd"}


@pytest.mark.parametrize(
    "entry", ["../model-1.safetensors", "/model-1.safetensors", "..\\model-1.safetensors", "..", 3]
)
def test_an_index_cannot_leave_its_folder(tmp_path: Path, entry: object) -> None:
    index = tmp_path / "sub" / "model.safetensors.index.json"
    save_tensors(tmp_path / "model-1.safetensors", {"a": TENSORS["a"]})
    write_json(index, {"weight_map": {"a": entry}})
    with pytest.raises(ValueError, match="must be file names in the same folder"):
        load_tensors(index)


def test_an_index_that_does_not_fit(tmp_path: Path) -> None:
    index = shards(tmp_path)
    write_json(index, {"weight_map": {"b": "model-1.safetensors"}})
    with pytest.raises(ValueError, match=r"b is not in model-1\.safetensors"):
        load_tensors(index)
    write_json(index, {"weight_map": {"b": "model-9.safetensors"}})
    with pytest.raises(FileNotFoundError, match=r"model-9\.safetensors: no such file"):
        load_tensors(index)
    write_json(index, {"weight_map": {"b": "model-9.bin"}})
    (tmp_path / "model-9.bin").touch()
    with pytest.raises(ValueError, match="pickle"):
        load_tensors(index)
    write_json(index, {})
    with pytest.raises(ValueError, match="no weight_map"):
        load_tensors(index)


def one_line(error: pytest.ExceptionInfo[Exception], path: Path) -> None:
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_broken_files(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_tensors(path, TENSORS)
    whole = path.read_bytes()
    header = int.from_bytes(whole[:8], "little")
    for data in (b"", b"abc", whole[:20], whole[:-1], whole + b"0", b"PK\3\4" + whole, whole[:8] + b"!" * header):
        path.write_bytes(data)
        with pytest.raises(ValueError, match="not a whole safetensors file") as error:
            load_tensors(path)
        one_line(error, path)
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(ValueError, match="git lfs pull"):
        load_tensors(path)


@pytest.mark.parametrize("suffix", [".bin", ".ckpt", ".pt", ".pth", ".pkl"])
def test_pickles_are_refused_with_a_way_out(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"diffusion_pytorch_model{suffix}"
    path.write_bytes(b"\x80\x04.")
    for where in (path, tmp_path):
        with pytest.raises(ValueError, match=r"can run code.*save_file") as error:
            load_tensors(where)
        one_line(error, path)


def test_absent_and_unknown_files(tmp_path: Path) -> None:
    for path in (tmp_path / "x.safetensors", tmp_path / "nowhere", tmp_path):
        with pytest.raises(FileNotFoundError) as error:
            load_tensors(path)
        one_line(error, path)
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    with pytest.raises(ValueError, match=r"unknown kind of weights '\.gguf'"):
        load_tensors(tmp_path / "x.gguf")


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    write_json(tmp_path / "config.json", {"a": 1})
    save_tensors(tmp_path / "x.safetensors", {"a": np.zeros(2)})
    with pytest.raises(TypeError):
        write_json(tmp_path / "config.json", {"a": object()})
    with pytest.raises(Exception, match=r"(?i)dtype|object"):
        save_tensors(tmp_path / "x.safetensors", {"a": np.array([object()])})
    assert read_json(tmp_path / "config.json") == {"a": 1}
    assert load_tensors(tmp_path / "x.safetensors").keys() == {"a"}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "x.safetensors"]


def test_json(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    write_json(path, {"name": "雪", "sizes": [1, 2]})
    assert read_json(path) == {"name": "雪", "sizes": [1, 2]} == json.loads(path.read_text(encoding="utf-8"))
    for data, message in (
        (b"{", "not valid JSON"),
        (b"\xff", "not valid JSON"),
        (b"[1]", "a JSON list, not an object"),
    ):
        path.write_bytes(data)
        with pytest.raises(ValueError, match=message) as error:
            read_json(path)
        one_line(error, path)
    with pytest.raises(FileNotFoundError, match="no such file"):
        read_json(tmp_path / "none.json")


def test_files_are_readable_by_others_as_the_umask_allows(tmp_path: Path) -> None:
    save_tensors(tmp_path / "a.safetensors", {"x": np.zeros(2, np.float32)})
    (tmp_path / "plain").write_text("")
    assert (tmp_path / "a.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode
