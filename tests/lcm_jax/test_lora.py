from __future__ import annotations

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import traverse_util

from lcm_jax import lora
from lcm_jax.diffusion.schedules import RectifiedFlow
from lcm_jax.models.latent_diffusion import as_apply
from lcm_jax.nets import UNetConfig
from lcm_jax.nets.presets import SD15, SDXL
from lcm_jax.nets.unet import UNet, abstract_params, example_inputs
from lcm_jax.objectives import LatentConsistencyDistillation
from lcm_jax.train.train_step import TrainState, make_train_step
from lcm_jax.typing import Nets
from mmdit import model as mmdit
from mmdit.config import MMDiTConfig
from mmdit.text import CLIPTextConfig, CLIPTextModel

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


@pytest.mark.parametrize(
    ("config", "millions"),
    [(SD15, 67.25), pytest.param(SDXL, 196.75, marks=pytest.mark.slow)],
    ids=["sd15", "sdxl"],
)
def test_lcm_lora_has_the_published_number_of_parameters(config, millions):
    like = abstract_params(UNet(config, scan=True))
    adapters = jax.eval_shape(lambda p: lora.init(jax.random.key(0), p, rank=64), like)
    assert round(lora.count(adapters) / 1e6, 2) == millions


def targeted(like, targets):
    """Path without its kernel, and how many layers are stacked in it."""
    adapters = jax.eval_shape(lambda p: lora.init(jax.random.key(0), p, rank=1, targets=targets), like)
    return {path.removesuffix("/kernel"): a["alpha"].shape for path, a in adapters.items()}


def test_targets_of_the_mmdit_are_its_attentions():
    config = MMDiTConfig(
        num_layers=2, attention_head_dim=4, num_attention_heads=2, caption_projection_dim=8, dual_attention_layers=(0,)
    )
    found = targeted(mmdit.abstract_params(mmdit.MMDiT(config)), lora.MMDIT_TARGETS)
    block = {"attn/to_q", "attn/to_k", "attn/to_v", "attn/to_out_0"}
    block |= {"attn/add_q_proj", "attn/add_k_proj", "attn/add_v_proj"}
    first = block | {"attn/to_add_out", "attn2/to_q", "attn2/to_k", "attn2/to_v", "attn2/to_out_0"}
    assert found.keys() == {f"transformer_blocks_0/{x}" for x in first} | {f"transformer_blocks_1/{x}" for x in block}


def test_targets_of_clip_are_its_attentions():
    config = CLIPTextConfig(
        vocab_size=9, hidden_size=4, intermediate_size=4, num_hidden_layers=3, num_attention_heads=2, projection_dim=4
    )
    model = CLIPTextModel(config, projection=True, scan=True)
    like = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
    names = (f"text_model/encoder/layers/self_attn/{x}_proj" for x in ("q", "k", "v", "out"))
    assert targeted(like, lora.CLIP_TARGETS) == dict.fromkeys(names, (3,))


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
    with pytest.raises(ValueError, match=r"'to_nothing' match none of 6 kernels \(block/attn1/to_out_0/kernel, .*\)"):
        lora.init(jax.random.key(0), params, rank=2, targets="to_nothing")
    with pytest.raises(ValueError, match="rank must be at least 1"):
        lora.init(jax.random.key(0), params, rank=0)
    with pytest.raises(ValueError, match=r"no kernel for 1 adapters \(block/other/kernel\)"):
        lora.merge(params, adapters | {"block/other/kernel": adapters["block/conv1/kernel"]})
    with pytest.raises(ValueError, match=r"do not fit for 1 adapters \(block/conv1/kernel \(kernel \(3, 3, 4, 7\)"):
        lora.merge(params, adapters | {"block/conv1/kernel": adapters["block/attn1/to_q/kernel"]})


def as_matrices(kernel):
    """A kernel as the matrices that a LoRA approximates, one for each stacked layer."""
    kernel = np.asarray(kernel, np.float64)
    return kernel.reshape(*kernel.shape[: lora.stacked_axes(kernel)], -1, kernel.shape[-1])


def changed(params, scale=0.3):
    """The parameters with noise on all kernels, and their flat differences."""
    flat = traverse_util.flatten_dict(params, sep="/")
    change = {path: scale * array(*x.shape) for path, x in flat.items() if path.endswith("kernel")}
    new = {path: x + change[path] if path in change else x for path, x in flat.items()}
    return traverse_util.unflatten_dict(new, sep="/"), change


def test_extract_finds_a_low_rank_change_again(params, adapters):
    tuned = lora.merge(params, adapters, 0.7)
    found = lora.extract(params, tuned, rank=2)
    assert found.adapters.keys() == adapters.keys()
    assert found.untouched == []
    assert max(found.relative_error.values()) < 1e-5
    lora.check_adapters(found.adapters, params)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), lora.merge(params, found.adapters), tuned)
    larger = lora.extract(params, tuned, rank=3)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), lora.merge(params, larger.adapters), tuned)


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_extract_is_the_best_approximation_of_its_rank(params, rank):
    tuned, change = changed(params)
    found = lora.extract(params, tuned, rank=rank)
    for path, adapter in found.adapters.items():
        matrix, approximation = as_matrices(change[path]), as_matrices(lora.delta(adapter))
        assert adapter["down"].shape[-1] == min(rank, *matrix.shape[-2:])
        tail = np.linalg.svd(matrix, compute_uv=False)[..., rank:]
        error = np.linalg.norm(matrix - approximation)
        np.testing.assert_allclose(error, np.linalg.norm(tail), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(found.relative_error[path], error / np.linalg.norm(matrix), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("energy", [0.3, 0.7, 0.95])
def test_energy_is_the_smallest_rank_that_keeps_that_share(params, energy):
    tuned, change = changed(params)
    found = lora.extract(params, tuned, rank=100, energy=energy)
    ranks = set()
    for path, adapter in found.adapters.items():
        power = np.square(np.linalg.svd(as_matrices(change[path]), compute_uv=False))
        share = np.cumsum(power, axis=-1) / power.sum(axis=-1, keepdims=True)
        rank = adapter["down"].shape[-1]
        ranks.add(rank)
        assert np.all(share[..., rank - 1] >= energy)
        assert rank == 1 or np.any(share[..., rank - 2] < energy)
    assert len(ranks) > 1 or energy == 0.3
    capped = lora.extract(params, tuned, rank=2, energy=energy)
    assert {a["down"].shape[-1] for a in capped.adapters.values()} <= {1, 2}


def test_extract_says_what_it_leaves_out(params):
    tuned, _ = changed(params)
    tuned["block"]["attn1"]["to_q"] = params["block"]["attn1"]["to_q"]
    tuned["block"]["norm1"] = {"scale": params["block"]["norm1"]["scale"] + 1}
    found = lora.extract(params, tuned, rank=1)
    assert "block/attn1/to_q/kernel" not in found.adapters
    assert found.untouched == ["block/norm1/scale", "time_embedding/linear_1/kernel"]
    assert lora.extract(params, params, rank=1, energy=0.5) == ({}, {}, [])


def test_extract_from_half_precision(params, adapters):
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    found = lora.extract(half, lora.merge(params, adapters), rank=4)
    assert {x.dtype for x in jax.tree.leaves(found.adapters)} == {jnp.dtype(jnp.float32)}
    assert max(found.relative_error.values()) < 0.05


def test_checkpoints_that_do_not_belong_together_are_named(params):
    with pytest.raises(ValueError, match=r"energy is a share of the squared norm in \(0, 1\], got 90"):
        lora.extract(params, params, rank=2, energy=90)
    with pytest.raises(ValueError, match="rank must be at least 1, got 0"):
        lora.extract(params, params, rank=0)
    with pytest.raises(ValueError, match="'nothing' match none"):
        lora.extract(params, params, rank=1, targets="nothing")
    other = params | {"block": params["block"] | {"conv1": {"kernel": array(1, 1, 4, 7)}}}
    with pytest.raises(ValueError, match=r"two networks: 2 .* \(block/conv1/bias, block/conv1/kernel\)"):
        lora.extract(params, other, rank=2)
    broken = params | {"time_embedding": {"linear_1": {"kernel": array(4, 4) * np.nan}}}
    with pytest.raises(ValueError, match=r"time_embedding/linear_1/kernel: the difference .* NaN"):
        lora.extract(params, broken, rank=2)


@pytest.mark.parametrize("kind", ["unet", "mmdit", pytest.param("remat", marks=pytest.mark.slow)])
def test_branches_are_what_merging_gives(kind: str) -> None:
    """The output, and the gradient of the adapters."""
    if kind == "mmdit":
        config = MMDiTConfig(
            sample_size=4,
            num_layers=2,
            num_attention_heads=2,
            attention_head_dim=8,
            joint_attention_dim=16,
            caption_projection_dim=16,
            pooled_projection_dim=8,
        )
        net, inputs, targets = mmdit.MMDiT(config), mmdit.example_inputs(config, size=(4, 4)), lora.MMDIT_TARGETS
    else:
        config = UNetConfig(
            block_out_channels=(8, 8),
            norm_num_groups=4,
            attention_head_dim=2,
            cross_attention_dim=6,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            mid_block_type=None,
            up_block_types=("UpBlock2D", "UpBlock2D"),
            layers_per_block=1,
        )
        net, inputs = UNet(config, remat=kind == "remat"), example_inputs(config, size=(4, 4))
        targets = lora.DEFAULT_TARGETS
    shapes = jax.eval_shape(lambda: net.init(jax.random.key(0), *inputs)["params"])
    params = jax.tree.map(lambda leaf: 0.3 * RNG.normal(size=leaf.shape).astype(np.float32), shapes)
    x = jax.random.normal(jax.random.key(1), inputs[0].shape)
    adapters = lora.init(jax.random.key(2), params, rank=3, alpha=2.0, targets=targets)
    adapters = {path: {**a, "up": jnp.ones_like(a["up"]) * 0.1} for path, a in adapters.items()}
    apply = as_apply(net)

    def loss(tree: object) -> jax.Array:
        return jnp.mean(apply(tree, x, *inputs[1:]) ** 2)

    branched = jax.jit(jax.value_and_grad(lambda a: loss(lora.Adapted(params, a))))
    split, splits = branched(adapters)
    merged_value, merged_gradients = jax.jit(jax.value_and_grad(lambda a: loss(lora.merge(params, a))))(adapters)
    plain, _ = branched({path: {**a, "up": jnp.zeros_like(a["up"])} for path, a in adapters.items()})
    np.testing.assert_allclose(split, merged_value, rtol=1e-4)
    assert abs(split - plain) > 1e-3 * plain
    splits, merged_gradients = jax.tree.map(np.asarray, (splits, merged_gradients))
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(merged_gradients))
    for path, adapter in splits.items():
        assert not adapter["alpha"].any()
        for name in ("down", "up"):
            scale = np.abs(merged_gradients[path][name]).max()
            np.testing.assert_allclose(
                adapter[name], merged_gradients[path][name], rtol=2e-3, atol=2e-3 * scale + 1e-6 * largest
            )


def test_branches_of_stacked_layers_are_refused() -> None:
    adapters = {"a/kernel": {"down": jnp.zeros((2, 3, 1)), "up": jnp.zeros((2, 1, 3)), "alpha": jnp.zeros(2)}}
    with pytest.raises(ValueError, match="are of stacked layers: merge them"):
        lora.branches(adapters)


def test_dropout_is_of_the_adapters_input_and_unbiased() -> None:
    """The mean over masks is the branch without dropout, of one layer; each adapter has a mask of its own."""
    net, x = nn.Sequential([nn.Dense(3)]), array(5, 4)
    params = {"layers_0": {"kernel": array(4, 3), "bias": array(3)}}
    adapters = lora.init(jax.random.key(0), params, rank=2, targets="kernel$")
    adapters["layers_0/kernel"]["up"] = array(2, 3)

    def apply(dropout: lora.Dropout | None) -> jax.Array:
        with lora.branches(adapters, dropout):
            return net.apply({"params": params}, x)

    def dropped(key: jax.Array, rate: float = 0.5) -> jax.Array:
        return apply(lora.Dropout(key=key, rate=rate))

    merged_value, base = apply(None), net.apply({"params": params}, x)
    many = np.asarray(jax.jit(jax.vmap(dropped))(jax.random.split(jax.random.key(1), 4096)))
    deviation = np.std(many, axis=0)
    assert np.all(deviation > 0.1 * np.abs(merged_value - base))
    assert np.all(np.abs(np.mean(many, axis=0) - merged_value) < 5 * deviation / 64)
    np.testing.assert_array_equal(dropped(jax.random.key(2), 0.0), merged_value)
    np.testing.assert_array_equal(dropped(jax.random.key(2)), dropped(jax.random.key(2)))
    scaled = jnp.stack([lora.Dropout(key=jax.random.key(2), rate=0.25)(jnp.ones(4096), path) for path in ("a", "b")])
    np.testing.assert_allclose(jnp.mean(scaled > 0, axis=1), 0.75, atol=0.03)
    assert bool(jnp.any(scaled[0] != scaled[1]))


def test_training_adapters_holds_the_network_once() -> None:
    """What a step of LCM-LoRA takes beside the kernels is small against them; where adapters are merged it is not."""
    config = MMDiTConfig(  # its kernels are all of products: the host's compiler turns a convolution's over in a copy
        sample_size=4,
        num_layers=1,
        num_attention_heads=4,
        attention_head_dim=64,
        joint_attention_dim=256,
        caption_projection_dim=256,
        pooled_projection_dim=256,
        pos_embed_max_size=2,
    )
    net = mmdit.MMDiT(config)
    x, _, cond = jax.eval_shape(lambda: mmdit.example_inputs(config, size=(4, 4), tokens=2))
    base = jax.eval_shape(lambda: net.init(jax.random.key(0), *mmdit.example_inputs(config))["params"])
    init = partial(lora.init, rank=1, targets="(attn|ff).*kernel$")
    adapters = jax.eval_shape(init, jax.random.key(0), base)
    objective = LatentConsistencyDistillation(schedule=RectifiedFlow(), kind="flow", embed_w=False, target="online")
    optimizer = optax.adam(1e-3)

    def bytes_of_step(adapt: Any) -> int:
        def loss(adapter: Any, ema: Any, frozen: Any, batch: Any, key: Any, progress: Any) -> Any:
            teacher, null = frozen
            return objective(Nets(as_apply(net), adapt(teacher, adapter), teacher=teacher, null=null), batch, key)

        step = make_train_step(loss, optimizer, decay=0.9, seed=0)
        state = jax.eval_shape(partial(TrainState.create, optimizer=optimizer), adapters)
        memory = step.lower(state, (base, cond), {"x0": x, "cond": cond}).compile().memory_analysis()
        held = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
        return held + memory.temp_size_in_bytes

    once = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(base))
    assert bytes_of_step(lora.Adapted) < 1.3 * once
    assert bytes_of_step(lora.merge) > 1.5 * once
