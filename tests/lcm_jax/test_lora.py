from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lcm_jax import lora
from lcm_jax.nets.presets import SD15, SDXL
from lcm_jax.nets.unet import UNet, abstract_params

RNG = np.random.default_rng(0)
new_adapters = jax.jit(partial(lora.init, rank=2, alpha=3.0))


def array(*shape):
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


@pytest.fixture(scope="module")
def params():
    return {
        "block": {
            "attn1": {"to_q": {"kernel": array(6, 5)}, "to_out_0": {"kernel": array(5, 6), "bias": array(6)}},
            "conv1": {"kernel": array(3, 3, 4, 7), "bias": array(7)},
            "norm1": {"scale": array(4)},
        },
        "layers": {"ff": {"net_2": {"kernel": array(2, 8, 3)}}, "conv2": {"kernel": array(2, 3, 3, 4, 5)}},
        "time_embedding": {"linear_1": {"kernel": array(4, 4)}},
    }


@pytest.fixture(scope="module")
def adapters(params):
    """Adapters with both halves filled, alpha unequal to the rank."""
    start = new_adapters(jax.random.key(0), params)
    return {path: {**a, "up": array(*a["up"].shape)} for path, a in start.items()}


def test_targets_are_those_of_lcm_lora(adapters):
    assert sorted(adapters) == [
        "block/attn1/to_out_0/kernel",
        "block/attn1/to_q/kernel",
        "block/conv1/kernel",
        "layers/conv2/kernel",
        "layers/ff/net_2/kernel",
    ]


@pytest.mark.parametrize(("config", "millions"), [(SD15, 67.25), (SDXL, 196.75)], ids=["sd15", "sdxl"])
def test_lcm_lora_has_the_published_number_of_parameters(config, millions):
    like = abstract_params(UNet(config, scan=True))
    adapters = jax.eval_shape(lambda p: lora.init(jax.random.key(0), p, rank=64), like)
    assert round(lora.count(adapters) / 1e6, 2) == millions


def test_fresh_adapters_change_nothing(params):
    fresh = new_adapters(jax.random.key(1), params)
    jax.tree.map(np.testing.assert_array_equal, lora.merge(params, fresh), params)
    bound = (3 * 3 * 4) ** -0.5
    down = np.abs(fresh["layers/conv2/kernel"]["down"])
    assert 0.8 * bound < down.max() <= bound


def test_dense_and_stacked_merge_is_the_product(params, adapters):
    merged = lora.merge(params, adapters, 0.5)
    a = adapters["block/attn1/to_q/kernel"]
    expected = params["block"]["attn1"]["to_q"]["kernel"] + 0.5 * 3 / 2 * (a["down"] @ a["up"])
    np.testing.assert_allclose(merged["block"]["attn1"]["to_q"]["kernel"], expected, rtol=1e-5, atol=1e-6)
    a = adapters["layers/ff/net_2/kernel"]
    for i in range(2):
        expected = params["layers"]["ff"]["net_2"]["kernel"][i] + 0.5 * 3 / 2 * (a["down"][i] @ a["up"][i])
        np.testing.assert_allclose(merged["layers"]["ff"]["net_2"]["kernel"][i], expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(merged["block"]["norm1"]["scale"], params["block"]["norm1"]["scale"])


def conv(x, kernel):
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def test_convolution_merge_is_two_convolutions(params, adapters):
    x = array(1, 6, 5, 4)
    merged = lora.merge(params, adapters)
    after, before, stacked = (
        merged["layers"]["conv2"]["kernel"],
        params["layers"]["conv2"]["kernel"],
        adapters["layers/conv2/kernel"],
    )
    cases = [
        (merged["block"]["conv1"]["kernel"], params["block"]["conv1"]["kernel"], adapters["block/conv1/kernel"]),
        *((after[i], before[i], {name: x[i] for name, x in stacked.items()}) for i in range(2)),
    ]
    for kernel, base, a in cases:
        expected = conv(x, base) + a["alpha"] / 2 * conv(conv(x, a["down"]), a["up"])
        np.testing.assert_allclose(conv(x, kernel), expected, rtol=1e-4, atol=1e-4)


def test_several_adapters_add_up_in_any_order(params, adapters):
    other = lora.init(jax.random.key(3), params, rank=1, targets="to_q/kernel")
    other = jax.tree.map(lambda z: z + 0.3, other)
    both = lora.merge_all(params, [(adapters, 0.8), (other, 1.0)])
    swapped = lora.merge_all(params, [(other, 1.0), (adapters, 0.8)])
    in_turn = lora.merge(lora.merge(params, adapters, 0.8), other)
    for tree in (swapped, in_turn):
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), both, tree)


def test_merge_then_subtract_is_the_identity(params, adapters):
    back = lora.merge(lora.merge(params, adapters, 0.7), adapters, -0.7)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), back, params)


def test_half_precision_parameters_keep_their_dtype(params, adapters):
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    merged = lora.merge(half, adapters)
    assert {x.dtype for x in jax.tree.leaves(merged)} == {jnp.dtype(jnp.bfloat16)}
    assert {x.dtype for x in jax.tree.leaves(jax.eval_shape(partial(lora.init, rank=2), jax.random.key(0), half))} == {
        jnp.dtype(jnp.float32)
    }


def test_gradients_reach_down_and_up_and_not_alpha(params, adapters):
    def loss(a, scale):
        return sum(jnp.sum(jnp.square(x)) for x in jax.tree.leaves(lora.merge(params, a, scale)))

    for adapter in jax.jit(jax.grad(loss))(adapters, 0.5).values():
        assert np.all(adapter["alpha"] == 0)
        assert np.any(adapter["down"] != 0)
        assert np.any(adapter["up"] != 0)


def test_bad_input_is_named(params, adapters):
    with pytest.raises(ValueError, match=r"'to_nothing' match none of 6 kernels: block/attn1/to_q/kernel.*1 more"):
        lora.init(jax.random.key(0), params, rank=2, targets="to_nothing")
    with pytest.raises(ValueError, match="rank must be at least 1"):
        lora.init(jax.random.key(0), params, rank=0)
    with pytest.raises(ValueError, match="no kernel for 1 adapters: block/other/kernel"):
        lora.merge(params, adapters | {"block/other/kernel": adapters["block/conv1/kernel"]})
    with pytest.raises(ValueError, match=r"do not fit for 1 adapters: block/conv1/kernel \(kernel \(3, 3, 4, 7\)"):
        lora.merge(params, adapters | {"block/conv1/kernel": adapters["block/attn1/to_q/kernel"]})
