"""Files damaged at random, 1,000 of them: each load ends in one line that names the file, or in what the file holds.

What can be promised. A file that was cut or grew is refused. Damage to the data cannot be seen in a format without
checksums, save that a value may no longer be finite: it is refused then, and else read as it stands. Damage to the
header is refused or harmless (white space): it never moves a value to another place. What no reader can see is damage
that spells another whole header of the same network: two names of one shape swapped, F8_E4M3 for F8_E5M2, another alpha
in a LoRA's metadata. No single byte can do the first two; the one byte that makes integers of floats is refused.
"""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors import SafetensorError, deserialize

from lcm_jax import lora
from lcm_jax.nets import RULES_UNET
from lcm_jax.weights.lora.files import load_lora, save_lora
from lcm_jax.weights.safetensors_files import load_tensors, save_tensors
from lcm_jax.weights.torch_params import from_torch, to_torch

RULES = ((r"layers/", "layers/*/"), (r"_(\d+)(?=/)", r".\1"))
DTYPES = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
CASES = {"whole": 400, "shards": 300, "lora": 300}


def network() -> dict[str, Any]:
    rng = np.random.default_rng(0)

    def f(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(ml_dtypes.bfloat16).astype(np.float32)

    return {
        "conv": {"kernel": f(3, 3, 4, 5), "bias": f(5)},
        "blocks_0": {"norm": {"scale": f(5), "bias": f(5)}},
        "blocks_11": {"fc": {"kernel": f(5, 7), "bias": f(7)}},
        "layers": {"fc": {"kernel": f(3, 5, 7), "bias": f(3, 7)}},
        "table": {"embedding": f(6, 5)},
        "logit_scale": f(),
    }


PARAMS = network()
LIKE = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, PARAMS))


def tensors(dtype: Any = None) -> dict[str, np.ndarray]:
    """As PyTorch would name them; half of them in another precision where dtype is given."""
    plain, other = to_torch(PARAMS, RULES), to_torch(PARAMS, RULES, dtype=dtype)
    return {name: (other if i % 2 else plain)[name] for i, name in enumerate(plain)}


def header_end(data: bytes) -> int:
    return 8 + int.from_bytes(data[:8], "little")


def damage(rng: np.random.Generator, data: bytes, end: int) -> bytes:
    """Cut, lengthened, or with up to eight bytes changed: anywhere, before `end`, or after it."""
    kind = rng.choice(["cut", "grow", "any", "header", "data"], p=[0.15, 0.05, 0.2, 0.4, 0.2])
    if kind == "cut":
        return data[: rng.integers(len(data))]
    if kind == "grow":
        return data + rng.bytes(rng.integers(1, 20))
    low, high = {"any": (0, len(data)), "header": (0, end), "data": (end, len(data))}[kind]
    changed = bytearray(data)
    for index in rng.integers(low, high, size=rng.choice([1, 1, 2, 8])):
        bit = rng.random() < 0.5  # half of them single bits, half of them characters that JSON is made of
        changed[index] = changed[index] ^ 1 << rng.integers(8) if bit else rng.choice(list(b'0123456789"{}[]:,\\ aF'))
    return bytes(changed)


def attempt(load: Callable[[], Any], folder: Path, size: int) -> Any:
    """What a load gives; None where it is refused as it should be. Its memory is bounded by the size of the files."""

    def measured() -> tuple[Any, str | None, int]:
        tracemalloc.reset_peak()
        before, found, message = tracemalloc.get_traced_memory()[0], None, None
        try:
            found = load()
        except (ValueError, FileNotFoundError) as error:
            message = str(error)
        return found, message, tracemalloc.get_traced_memory()[1] - before

    found, message, memory = measured()
    if memory >= 16 * size + (1 << 18):  # a first call makes what stays, such as the checks of its types
        found, message, memory = measured()
    assert memory < 16 * size + (1 << 18)
    if message is not None:
        assert str(folder) in message
        assert len(message.splitlines()) == 1
        assert len(message) < 3000
    return found


def same(found: Any, expected: Any) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def finite(tree: Any) -> bool:
    return all(np.isfinite(np.asarray(leaf)).all() for leaf in jax.tree.leaves(tree))


@pytest.fixture(autouse=True)
def _traced() -> Any:
    tracemalloc.start()
    yield
    tracemalloc.stop()


def undamaged_header(original: bytes, damaged: bytes) -> dict[str, np.ndarray] | None:
    """The library's reading of the damaged data under the whole header; None where it would not fit."""
    if len(damaged) != len(original):
        return None
    found = dict(deserialize(original[: header_end(original)] + damaged[header_end(original) :]))
    return {k: np.frombuffer(v["data"], DTYPES[v["dtype"]]).reshape(v["shape"]) for k, v in found.items()}


def into_network(values: dict[str, np.ndarray]) -> Any:
    """What from_torch should give: written again here, for one network."""
    expected = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(LIKE):
        keys = [key.key for key in path]
        name = ".".join(keys).replace("blocks_", "blocks.")
        name = name.replace("kernel", "weight").replace("scale", "weight").replace("embedding", "weight")
        name = name.replace("logit_weight", "logit_scale")
        names = [name.replace("layers.", f"layers.{i}.") for i in range(3)] if keys[0] == "layers" else [name]
        order = {4: (2, 3, 1, 0), 2: (1, 0)}
        parts = [np.asarray(values[n], np.float32) for n in names]
        parts = [p.transpose(order[p.ndim]) if keys[-1] == "kernel" else p for p in parts]
        expected[tuple(keys)] = np.stack(parts) if keys[0] == "layers" else parts[0]
        assert expected[tuple(keys)].shape == leaf.shape
    return jax.tree_util.tree_map_with_path(lambda path, _: expected[tuple(k.key for k in path)], LIKE)


def test_whole_files(tmp_path: Path) -> None:
    rng, path = np.random.default_rng(1), tmp_path / "x.safetensors"
    wholes = []
    for dtype in (None, np.float16, ml_dtypes.bfloat16):
        save_tensors(path, tensors(dtype), {"step": "7"})
        wholes.append(path.read_bytes())
        same(from_torch(load_tensors(path), LIKE, RULES), into_network(tensors(dtype)))
    refused = 0
    for case in range(CASES["whole"]):
        original = wholes[case % len(wholes)]
        damaged = damage(rng, original, header_end(original))
        path.write_bytes(damaged)
        found = attempt(lambda: from_torch(load_tensors(path), LIKE, RULES, source=str(path)), tmp_path, len(damaged))
        read = attempt(lambda: load_tensors(path), tmp_path, len(damaged))
        try:  # the library accepts whatever is accepted here, and reads the same
            theirs = dict(deserialize(damaged))
        except SafetensorError:
            assert read is None
        else:
            if read is not None:
                assert read.keys() == theirs.keys()
                assert all(read[name].tobytes() == bytes(theirs[name]["data"]) for name in theirs)
        truth = undamaged_header(original, damaged)
        refused += found is None
        if truth is None:
            assert found is None
        elif found is not None:
            same(found, into_network(truth))
        elif damaged[: header_end(original)] == original[: header_end(original)]:
            assert not finite(into_network(truth))
    assert 0.4 < refused / CASES["whole"] < 0.9  # the damage is neither always fatal nor always harmless


def test_shards(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    save_tensors(tmp_path / "model.safetensors", tensors(np.float16), max_shard_size=500)
    files = {path: path.read_bytes() for path in sorted(tmp_path.iterdir())}
    assert len(files) > 3
    index = tmp_path / "model.safetensors.index.json"
    size = sum(map(len, files.values()))
    refused = 0
    for _ in range(CASES["shards"]):
        path = index if rng.random() < 0.6 else rng.choice(list(files))
        original = files[path]
        end = len(original) if path == index else header_end(original)
        damaged = damage(rng, original + b" " * (path == index), end)
        path.write_bytes(damaged)
        load_all = lambda: from_torch(load_tensors(tmp_path, stem="model"), LIKE, RULES, source=str(tmp_path))  # noqa: E731
        found = attempt(load_all, tmp_path, size)
        path.write_bytes(original)
        refused += found is None
        if path == index:
            if found is not None:
                same(found, PARAMS_HALF)
            continue
        truth = undamaged_header(original, damaged)
        if truth is None:
            assert found is None
        elif found is not None:
            same(found, into_network(tensors(np.float16) | truth))
        elif damaged[:end] == original[:end]:
            assert not finite(truth)
    assert 0.4 < refused / CASES["shards"] < 0.9


PARAMS_HALF = into_network(tensors(np.float16))


def test_loras(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    kernels = {
        "down_blocks_0": {
            "resnets_1": {"conv1": {"kernel": np.zeros((3, 3, 4, 7), np.float32)}},
            "attentions_0": {"proj_in": {"kernel": np.zeros((1, 1, 4, 6), np.float32)}},
        }
    }
    adapters = lora.init(jax.random.key(0), kernels, rank=2, alpha=3.0, targets="kernel")
    adapters = {path: {**a, "up": a["up"] + 1} for path, a in adapters.items()}
    path, wholes = tmp_path / "x.safetensors", []
    for style in ("peft", "diffusers", "kohya"):
        save_lora(path, adapters, RULES_UNET, format=style)
        wholes.append(path.read_bytes())
    refused = 0
    for case in range(CASES["lora"]):
        original = wholes[case % len(wholes)]
        damaged = damage(rng, original, header_end(original))
        path.write_bytes(damaged)
        found = attempt(lambda: load_lora(path, kernels, RULES_UNET), tmp_path, len(damaged))
        refused += found is None
        truth = undamaged_header(original, damaged)
        text = original[8 : header_end(original)].decode()  # begins with the metadata, which may say what alpha is
        metadata = slice(8, 8 + json.JSONDecoder().raw_decode(text, text.index(":") + 1)[1])
        if truth is None:
            assert found is None
        elif found is not None:
            path.write_bytes(original[: header_end(original)] + damaged[header_end(original) :])
            expected = load_lora(path, kernels, RULES_UNET)
            if damaged[metadata] != original[metadata]:
                found, expected = ({n: {**a, "alpha": np.zeros(1)} for n, a in t.items()} for t in (found, expected))
            same(found, expected)
        elif damaged[: header_end(original)] == original[: header_end(original)]:
            assert not finite(truth)
    assert 0.4 < refused / CASES["lora"] < 0.9


@pytest.mark.parametrize("code", [b"I32", b"U32"])
def test_integers_do_not_pass_for_floats(tmp_path: Path, code: bytes) -> None:
    """The one change of a single byte that leaves a whole header of the same names, shapes and sizes."""
    path = tmp_path / "x.safetensors"
    save_tensors(path, tensors())
    path.write_bytes(path.read_bytes().replace(b"F32", code, 1))
    with pytest.raises(ValueError, match=r"x\.safetensors"):
        from_torch(load_tensors(path), LIKE, RULES, source=str(path))
