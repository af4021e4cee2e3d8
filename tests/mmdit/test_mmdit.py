"""Laws of the MMDiT: stacking and recomputing change nothing, it begins as zero, a picture takes the grid's middle."""

from __future__ import annotations

import dataclasses
import math
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lcm_jax.weights.torch_params import from_torch, to_torch
from mmdit import presets
from mmdit.blocks import Policy, Remat
from mmdit.config import MMDiTConfig
from mmdit.embed import PatchEmbed, guidance_embedding, patchify, position_grid, unpatchify
from mmdit.model import MMDiT, abstract_params, example_inputs
from mmdit.rules import RULES_MMDIT

TINY = MMDiTConfig(
    sample_size=8,
    patch_size=2,
    in_channels=3,
    out_channels=2,
    num_layers=3,
    attention_head_dim=8,
    num_attention_heads=2,
    caption_projection_dim=16,
    joint_attention_dim=12,
    pooled_projection_dim=6,
    pos_embed_max_size=6,
    dual_attention_layers=(2,),
    qk_norm="rms_norm",
    time_cond_proj_dim=8,
)
FAST = {"xla_backend_optimization_level": 0}  # halves the compilation, which is nearly all of the time here


def restack(params: dict, net: MMDiT) -> dict:
    """The parameters in the layout of another network of the same config."""
    return from_torch(to_torch(params, RULES_MMDIT), abstract_params(net), RULES_MMDIT)


@pytest.fixture(scope="module")
def inputs() -> tuple:
    x, t, cond = example_inputs(TINY, batch=2, size=(6, 8), tokens=3)
    leaves, tree = jax.tree.flatten((x, t, cond))
    rng = np.random.default_rng(1)
    return tree.unflatten([jnp.asarray(rng.standard_normal(leaf.shape), leaf.dtype) for leaf in leaves])


@pytest.fixture(scope="module")
def params(random_params, inputs: tuple) -> dict:
    return random_params(MMDiT(TINY).init, *inputs)["params"]


@pytest.fixture(scope="module")
def apply():
    return jax.jit(MMDiT(TINY).apply, compiler_options=FAST)


def evaluate(net: MMDiT, params: dict, inputs: tuple) -> tuple[jax.Array, dict]:
    def loss(params: dict) -> tuple[jax.Array, jax.Array]:
        y = net.apply({"params": params}, *inputs)
        return jnp.mean(jnp.square(y)), y

    (_, y), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True), compiler_options=FAST)(params)
    return y, to_torch(gradient, RULES_MMDIT)


@pytest.fixture(scope="module")
def plain(params: dict, inputs: tuple) -> tuple[jax.Array, dict]:
    return evaluate(MMDiT(TINY), params, inputs)


def test_scan_and_remat_change_nothing(params: dict, inputs: tuple, plain: tuple) -> None:
    """Blocks 0 and 1 are stacked; the last is recomputed alone."""
    net = MMDiT(TINY, scan=True, remat=True)
    same = restack(params, net)
    assert {name for name in same if "blocks" in name} == {"transformer_blocks", "transformer_blocks_2"}
    y, gradient = evaluate(net, same, inputs)
    np.testing.assert_allclose(y, plain[0], atol=1e-5)
    assert gradient.keys() == plain[1].keys()
    for name, value in plain[1].items():
        np.testing.assert_allclose(gradient[name], value, atol=1e-5 * max(1, np.abs(value).max()), err_msg=name)


@pytest.mark.parametrize("skip", [(), pytest.param((0, 3), marks=pytest.mark.slow)])
def test_every_run_of_equal_blocks_is_stacked(random_params, inputs: tuple, skip: tuple[int, ...]) -> None:
    """Dual, plain and last, as in SD3.5-medium; the order of the blocks' names in a file shows in the output."""
    config = dataclasses.replace(TINY, num_layers=5, dual_attention_layers=(0, 1))
    assert config.runs == ((0, 2), (2, 2), (4, 1))
    net, listed = MMDiT(config, scan=True), MMDiT(config)
    params = random_params(listed.init, *inputs)["params"]
    same = restack(params, net)
    blocks = {name for name in same if "blocks" in name}
    assert blocks == {"transformer_blocks", "transformer_blocks_from_2", "transformer_blocks_4"}
    assert restack(same, listed).keys() == params.keys()
    y, expected = (
        jax.jit(n.apply, static_argnames="skip_layers", compiler_options=FAST)({"params": p}, *inputs, skip_layers=skip)
        for n, p in ((net, same), (listed, params))
    )
    np.testing.assert_allclose(y, expected, atol=1e-5 * np.abs(expected).max())


def test_policies_say_what_is_computed_again(inputs: tuple) -> None:
    """Matrix products of a gradient: none again, only those of the attention, or all of a block."""
    config = dataclasses.replace(TINY, num_layers=1, dual_attention_layers=())
    params = abstract_params(MMDiT(config))

    def products(remat: Remat) -> int:
        def loss(params: dict) -> jax.Array:
            return MMDiT(config, remat=remat).apply({"params": params}, *inputs).sum()

        return str(jax.make_jaxpr(jax.grad(loss))(params)).count("dot_general[")

    count = {remat: products(remat) for remat in (False, True, *get_args(Policy))}
    assert count["nothing_saveable"] == count[True]
    assert count["everything_saveable"] == count["dots_saveable"] == count[False]
    assert count[True] > count["dots_with_no_batch_dims_saveable"] > count[False]


@pytest.mark.wrong_types
def test_unknown_policies_are_named(inputs: tuple) -> None:
    with pytest.raises(ValueError, match="remat='all' is unknown; use True, False or one of nothing_saveable"):
        jax.eval_shape(MMDiT(TINY, remat="all").init, jax.random.key(0), *inputs)


def test_the_grid_is_a_constant_and_all_else_is_trained(plain: tuple) -> None:
    """But for what the published weights carry in vain: the text's queries in the last block, which writes no text."""
    idle = {name for name, value in plain[1].items() if np.abs(value).max() < 1e-9}
    unread = ("add_q_proj.weight", "add_q_proj.bias", "norm_added_q.weight")
    assert idle == {"pos_embed.pos_embed", *(f"transformer_blocks.2.attn.{name}" for name in unread)}


def test_it_begins_as_zero_with_every_gate_shut(params: dict, inputs: tuple, apply) -> None:
    fresh = jax.jit(MMDiT(TINY).init, compiler_options=FAST)(jax.random.key(0), *inputs)["params"]
    assert not apply({"params": fresh}, *inputs).any()
    fresh |= {name: params[name] for name in ("proj_out", "norm_out")}
    y = apply({"params": fresh}, *inputs)
    other = inputs[2] | {"context": inputs[2]["context"] + 1}
    assert np.abs(y).max() > 0.1
    np.testing.assert_array_equal(apply({"params": fresh}, *inputs[:2], other), y)
    assert not fresh["time_text_embed"]["timestep_embedder"]["cond_proj"]["kernel"].any()
    np.testing.assert_array_equal(fresh["pos_embed"]["pos_embed"], position_grid(6, 4, 16))


def test_rows_do_not_see_each_other_but_see_all_their_inputs(params: dict, inputs: tuple, apply) -> None:
    x, t, cond = inputs
    first = apply({"params": params}, x, t, cond)[0]

    def change(leaf: jax.Array, row: int) -> jax.Array:
        return leaf.at[row].add(1.0)

    changed = jax.tree.map(lambda leaf: change(leaf, 1), (x, t, cond))
    np.testing.assert_array_equal(apply({"params": params}, *changed)[0], first)
    for name in cond:
        y = apply({"params": params}, x, t, cond | {name: change(cond[name], 0)})[0]
        assert np.abs(y - first).max() > 1e-3, name
    assert np.abs(apply({"params": params}, x, change(t, 0), cond)[0] - first).max() > 1e-3


def test_guidance_starts_as_nothing_and_can_be_left_out_and_time_can_be_a_scalar(
    params: dict, inputs: tuple, apply
) -> None:
    x, _, cond = inputs
    zeroed = jax.tree.map(lambda leaf: leaf, params)
    zeroed["time_text_embed"]["timestep_embedder"]["cond_proj"]["kernel"] *= 0
    without = apply({"params": params}, x, 250.0, {k: v for k, v in cond.items() if k != "guidance"})
    times = jnp.full(2, 250.0)
    np.testing.assert_allclose(apply({"params": zeroed}, x, times, cond), without, atol=1e-6)
    assert np.abs(apply({"params": params}, x, times, cond) - without).max() > 1e-3  # once trained it matters
    w = np.array([0.0, 7.5], np.float32)
    angles = 1000 * w[:, None] * np.exp(-np.log(1e4) * np.arange(128) / 127)
    expected = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
    np.testing.assert_allclose(guidance_embedding(jnp.asarray(w), 256), expected, atol=2e-3)


def test_skipping_a_layer_of_the_stack_is_the_network_without_it(params: dict, inputs: tuple, plain: tuple) -> None:
    pair = MMDiT(dataclasses.replace(TINY, num_layers=2, dual_attention_layers=(1,)))
    fewer = params | {"transformer_blocks_1": params["transformer_blocks_2"]}
    del fewer["transformer_blocks_2"]
    expected = jax.jit(pair.apply, compiler_options=FAST)({"params": fewer}, *inputs)
    assert np.abs(expected - plain[0]).max() > 1e-3
    net = MMDiT(TINY, scan=True)
    skipping = jax.jit(net.apply, static_argnames="skip_layers", compiler_options=FAST)
    y = skipping({"params": restack(params, net)}, *inputs, skip_layers=(1,))
    np.testing.assert_allclose(y, expected, atol=1e-5)


def test_bfloat16_computes_on_float32_parameters(params: dict, inputs: tuple, plain: tuple) -> None:
    net = MMDiT(TINY, dtype=jnp.bfloat16)
    y = jax.jit(net.apply, compiler_options=FAST)({"params": params}, *inputs)
    assert y.dtype == jnp.float32
    error = np.abs(y - plain[0]).max() / np.abs(plain[0]).max()
    assert 1e-4 < error < 0.1
    assert {leaf.dtype for leaf in jax.tree.leaves(abstract_params(net))} == {np.dtype("float32")}
    half = abstract_params(MMDiT(TINY, param_dtype=jnp.bfloat16))
    assert {leaf.dtype for leaf in jax.tree.leaves(half)} == {np.dtype(jnp.bfloat16)}
    x, t, cond = inputs
    bfloat16_attention = jax.eval_shape(net.apply, {"params": half}, x.astype(jnp.bfloat16), t, cond)
    assert bfloat16_attention.dtype == jnp.bfloat16


def test_patches_there_and_back() -> None:
    x = jnp.arange(2.0 * 4 * 6 * 3).reshape(2, 4, 6, 3)
    tokens = patchify(x, 2)
    np.testing.assert_array_equal(tokens[0, 1].reshape(2, 2, 3), x[0, :2, 2:4])
    np.testing.assert_array_equal(unpatchify(tokens, 2, 4), x)


@pytest.mark.parametrize("size", [(12, 12), (2, 12), (8, 6)])
def test_a_picture_takes_the_middle_of_the_grid(size: tuple[int, int]) -> None:
    grid = jax.random.normal(jax.random.key(0), (1, 36, 16))
    still = {"kernel": jnp.zeros((2, 2, 3, 16)), "bias": jnp.zeros(16)}
    y = PatchEmbed(TINY).apply({"params": {"proj": still, "pos_embed": grid}}, jnp.ones((2, *size, 3)))
    rows, columns = size[0] // 2, size[1] // 2
    top, left = (6 - rows) // 2, (6 - columns) // 2
    part = grid.reshape(6, 6, 16)[top : top + rows, left : left + columns].reshape(-1, 16)
    np.testing.assert_array_equal(y, np.broadcast_to(part, y.shape))


def test_the_grid_holds_its_range_when_it_grows() -> None:
    grid = np.asarray(position_grid(8, 4, 16)).reshape(8, 8, 16)
    np.testing.assert_array_equal(grid[::2, ::2].reshape(1, 16, 16), position_grid(4, 4, 16))
    np.testing.assert_array_equal(grid, grid.transpose(1, 0, 2)[..., np.r_[8:16, :8]])  # columns first, then rows
    np.testing.assert_allclose(grid[0, 2, :4], np.sin(1e4 ** (-np.arange(4) / 4)), atol=1e-7)


@pytest.mark.parametrize(
    ("shape", "changes", "words"),
    [
        ((2, 6, 8, 4), {}, "latent has 4 channels, the MMDiT's in_channels is 3"),
        ((2, 7, 8, 3), {}, "latent is 7 x 8: both must be multiples of patch_size=2"),
        ((2, 6, 14, 3), {}, "latent is 6 x 14, larger than the position grid: pos_embed_max_size=6"),
        ((2, 6, 8, 3), {"context": jnp.zeros((2, 3, 13))}, r"'context' has shape \(2, 3, 13\), expected \(2, l, 12\)"),
        ((2, 6, 8, 3), {"context": jnp.zeros((1, 3, 12))}, r"'context' has shape \(1, 3, 12\), expected \(2, l, 12\)"),
        ((2, 6, 8, 3), {"pooled": None}, r"'pooled' has shape None, expected \(2, 6\)"),
        ((2, 6, 8, 3), {"pooled": jnp.zeros((2, 5))}, r"'pooled' has shape \(2, 5\), expected \(2, 6\)"),
    ],
)
def test_inputs_that_do_not_fit_are_named(shape: tuple, changes: dict, words: str, params: dict, inputs: tuple) -> None:
    with pytest.raises(ValueError, match=words) as error:
        jax.eval_shape(MMDiT(TINY).apply, {"params": params}, jnp.zeros(shape), inputs[1], inputs[2] | changes)
    assert "\n" not in str(error.value)


def test_options_that_do_not_fit_are_named(params: dict, inputs: tuple) -> None:
    with pytest.raises(ValueError, match="has no time_cond_proj_dim"):
        MMDiT(dataclasses.replace(TINY, time_cond_proj_dim=None)).apply({"params": params}, *inputs)
    with pytest.raises(ValueError, match=r"skip_layers=\(3,\) must be of the layers 0 to 2"):
        MMDiT(TINY).apply({"params": params}, *inputs, skip_layers=(3,))


def trained(config: MMDiTConfig) -> int:
    """The number of parameters without the position grid."""
    shapes = abstract_params(MMDiT(config, scan=True))
    assert shapes["pos_embed"].pop("pos_embed").shape == (1, config.pos_embed_max_size**2, config.width)
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))


@pytest.mark.parametrize(
    ("config", "count"),
    [
        (presets.SD3_MEDIUM, 2_028_328_000),
        (presets.SD35_MEDIUM, 2_243_171_520),
        (presets.SD35_LARGE, 8_056_627_520),
    ],
    ids=["sd3-medium", "sd3.5-medium", "sd3.5-large"],
)
def test_published_parameter_counts(config: MMDiTConfig, count: int) -> None:
    assert trained(config) == count


@pytest.mark.parametrize(
    ("depth", "millions"),
    [
        (4, 10.55),
        *(
            pytest.param(depth, count, marks=pytest.mark.slow)
            for depth, count in ((6, 33.10), (8, 76.60), (12, 254.78), (15, 496.07), (18, 856.16))
        ),
        *(pytest.param(depth, count, marks=pytest.mark.slow) for depth, count in ((21, 1359), (30, 3962))),
        (38, 8057),
    ],
)
def test_the_family_of_the_study_has_its_sizes(depth: int, millions: float) -> None:
    assert round(trained(presets.family(depth)) / 1e6, 2 if depth < 20 else None) == millions


@pytest.mark.parametrize("config", [presets.SD3_MEDIUM, presets.SD35_MEDIUM, presets.SD35_LARGE, TINY])
def test_config_there_and_back(config: MMDiTConfig) -> None:
    d = config.to_dict()
    assert d["_class_name"] == "SD3Transformer2DModel"
    assert ("time_cond_proj_dim" in d) == (config is TINY)
    assert isinstance(d["dual_attention_layers"], list)
    assert MMDiTConfig.from_dict(d | {"_diffusers_version": "0"}) == config
    assert MMDiTConfig.from_dict(d | {"out_channels": None}).out_channels == config.in_channels


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("qk_norm", "layer_norm", "qk_norm='layer_norm' is not supported"),
        pytest.param(
            "pos_embed_max_size", None, "pos_embed_max_size=None is not supported", marks=pytest.mark.wrong_types
        ),
        ("patch_size", 0, "patch_size=0 is not supported"),
        ("sample_size", 1, "sample_size=1 is less than patch_size=2"),
        ("num_layers", True, "num_layers=True is not supported"),
        ("caption_projection_dim", 1024, "caption_projection_dim=1024 must be .* = 1536"),
        ("attention_head_dim", 63, "caption_projection_dim=1536 must be .* = 1512"),
        ("dual_attention_layers", [24], r"dual_attention_layers=\(24,\) must list layers 0 to 23"),
        pytest.param("dual_attention_layers", 3, "dual_attention_layers=3 must list", marks=pytest.mark.wrong_types),
        ("time_cond_proj_dim", 3, "time_cond_proj_dim=3 must be null or an even number"),
        ("shiny", 3, "unknown key 'shiny' .value 3."),
    ],
)
def test_unsupported_configs_are_named(key: str, value: object, words: str) -> None:
    with pytest.raises(ValueError, match=words) as error:
        MMDiTConfig.from_dict(presets.SD3_MEDIUM.to_dict() | {key: value}, source="transformer/config.json")
    assert str(error.value).startswith("transformer/config.json: ")
    assert "\n" not in str(error.value)


def test_widths_that_sinusoids_cannot_fill_are_named() -> None:
    with pytest.raises(ValueError, match="= 6 must be a multiple of 4"):
        dataclasses.replace(TINY, attention_head_dim=3, caption_projection_dim=6)
