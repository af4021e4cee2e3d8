"""The rule-table engine: there and back is the identity, and every misfit is named."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lcm_jax.weights.torch_params import _leaves, from_torch, to_torch, torch_name

RULES = ((r"layers/", "layers/*/"), (r"_(\d+)(?=/)", r".\1"))


def tree(rng: np.random.Generator) -> dict:
    def f(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(np.float32)

    return {
        "conv": {"kernel": f(3, 3, 4, 5), "bias": f(5)},
        "blocks_0": {"norm": {"scale": f(5), "bias": f(5)}},
        "blocks_11": {"fc": {"kernel": f(5, 7)}},
        "layers": {"fc": {"kernel": f(3, 5, 7), "bias": f(3, 7)}, "gate": f(3)},
        "table": {"embedding": f(6, 5)},
        "logit_scale": f(),
    }


@pytest.fixture
def params() -> dict:
    return tree(np.random.default_rng(0))


def like(params: dict) -> dict:
    return jax.eval_shape(lambda: jax.tree.map(jnp.asarray, params))


def test_names() -> None:
    assert torch_name("down_blocks_0/resnets_1/conv1/kernel", RULES) == "down_blocks.0.resnets.1.conv1.weight"
    assert torch_name("layers/fc/kernel", RULES) == "layers.*.fc.weight"
    assert torch_name("logit_scale", RULES) == "logit_scale"


def test_there_and_back(params: dict) -> None:
    tensors = to_torch(params, RULES)
    assert tensors["conv.weight"].shape == (5, 4, 3, 3)
    assert tensors["layers.2.fc.weight"].shape == (7, 5)
    assert tensors["layers.1.gate"].shape == ()
    assert all(t.flags.c_contiguous for t in tensors.values())
    np.testing.assert_array_equal(tensors["conv.weight"][1, 2], params["conv"]["kernel"][:, :, 2, 1])
    np.testing.assert_array_equal(tensors["layers.1.fc.weight"], params["layers"]["fc"]["kernel"][1].T)
    back = from_torch(tensors, like(params), RULES)
    jax.tree.map(np.testing.assert_array_equal, params, back)
    assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(back))
    again = to_torch(back, RULES)
    assert again.keys() == tensors.keys()
    for key, tensor in tensors.items():
        np.testing.assert_array_equal(again[key], tensor)


def test_dtype_policy(params: dict) -> None:
    tensors = to_torch(params, RULES, dtype=jnp.bfloat16)
    assert all(t.dtype == jnp.bfloat16 for t in tensors.values())
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(from_torch(tensors, like(params), RULES)))
    loaded = from_torch(tensors, like(params), RULES, dtype=jnp.bfloat16)
    assert all(x.dtype == jnp.bfloat16 for x in jax.tree.leaves(loaded))


def test_every_misfit_is_named_in_one_error(params: dict) -> None:
    tensors = to_torch(params, RULES)
    del tensors["layers.1.fc.bias"]
    tensors["conv.weight"] = tensors["conv.weight"][:, :, :1]
    tensors |= {f"extra.{i:02d}.weight": np.zeros(1) for i in range(12)}
    with pytest.raises(ValueError, match=r"unet\.safetensors: does not fit the network") as error:
        from_torch(tensors, like(params), RULES, source="unet.safetensors")
    message = str(error.value)
    assert "1 missing (layers.1.fc.bias)" in message
    assert "12 unexpected (extra.00.weight" in message
    assert "and 2 more" in message
    assert "extra.10" not in message
    assert "1 mis-shaped (conv.weight: file (5, 4, 1, 3), network (5, 4, 3, 3))" in message
    assert "\n" not in message


def test_optional_keys_are_dropped(params: dict) -> None:
    tensors = to_torch(params, RULES) | {"text.position_ids": np.arange(4)}
    from_torch(tensors, like(params), RULES, optional=(r"position_ids$",))
    with pytest.raises(ValueError, match="1 unexpected"):
        from_torch(tensors, like(params), RULES)


def test_rules_that_collide_or_stack_a_scalar_are_refused() -> None:
    with pytest.raises(ValueError, match="another parameter already has"):
        to_torch({"a": {"bias": np.zeros(2)}, "b": {"bias": np.zeros(2)}}, ((r"^b/", "a/"),))
    with pytest.raises(ValueError, match="stacked axes"):
        to_torch({"layers": {"gate": np.zeros(())}}, RULES)


def test_each_device_is_given_its_slice(params: dict) -> None:
    tensors = to_torch(params, RULES)
    asked: list[tuple[str, tuple[int, ...]]] = []

    def sharding_of(path: str, shape: tuple[int, ...]) -> jax.sharding.Sharding:
        asked.append((path, shape))
        return jax.sharding.SingleDeviceSharding(jax.devices()[0])

    placed = from_torch(tensors, like(params), RULES, shardings=sharding_of)
    jax.tree.map(np.testing.assert_array_equal, params, placed)
    assert ("layers/fc/kernel", (3, 5, 7)) in asked
    leaf = _leaves(like(params), RULES, None)["layers/fc/kernel"]
    index = (slice(1, 3), slice(0, 2), slice(4, 7))
    np.testing.assert_array_equal(leaf.read(tensors, index), params["layers"]["fc"]["kernel"][index])
    convolution = _leaves(like(params), RULES, None)["conv/kernel"]
    window = (slice(0, 3), slice(1, 2), slice(0, 4), slice(2, 5))
    np.testing.assert_array_equal(convolution.read(tensors, window), params["conv"]["kernel"][window])


def test_parameters_are_no_views_of_the_file(params: dict, tmp_path: Path) -> None:
    """Those of a mesh neither: it may change while they are used."""
    tensors = {}
    for name, tensor in to_torch(params, RULES).items():
        tensors[name] = np.memmap(tmp_path / name, tensor.dtype, "w+", shape=tensor.shape or (1,)).reshape(tensor.shape)
        tensors[name][...] = tensor
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("rows",))
    on = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    placed = [
        from_torch(tensors, like(params), RULES, shardings=placement) for placement in (None, lambda path, shape: on)
    ]
    for tensor in tensors.values():
        tensor += 1
    for placement in placed:
        jax.tree.map(np.testing.assert_array_equal, params, placement)


def test_values_that_are_not_finite_are_refused(params: dict) -> None:
    tensors = to_torch(params, RULES)
    tensors["layers.1.fc.weight"][2, 3] = np.nan
    with pytest.raises(ValueError, match=r"1 tensors \(layers\.\*\.fc\.weight\) hold values that are not finite"):
        from_torch(tensors, like(params), RULES, source="unet")
    large = to_torch(params, RULES)
    large["conv.bias"][0] = 1e6
    with pytest.raises(ValueError, match=r"conv\.bias.* not finite in float16"):
        from_torch(large, like(params), RULES, dtype=jnp.float16)


def test_whole_numbers_do_not_pass_for_weights(params: dict) -> None:
    tensors = to_torch(params, RULES)
    tensors["conv.bias"] = tensors["conv.bias"].astype(np.int32)
    with pytest.raises(ValueError, match=r"1 of the wrong kind of dtype \(conv\.bias\)"):
        from_torch(tensors, like(params), RULES)


def test_another_depth_is_called_so(params: dict) -> None:
    tensors = to_torch(params, RULES)
    tensors |= {key.replace("layers.2", "layers.3"): t for key, t in tensors.items() if key.startswith("layers.2")}
    with pytest.raises(ValueError, match=r"network: depth: 4 layers in the file, 3 by its config \(num_layers"):
        from_torch(tensors, like(params), RULES)
