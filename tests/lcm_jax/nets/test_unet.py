"""Laws of the UNet: stacking and recomputing change nothing, the w-embedding starts as nothing, published sizes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lcm_jax.nets import (
    RULES_UNET,
    SD15,
    SD21,
    SD_TURBO,
    SDXL,
    SDXL_REFINER,
    SSD1B,
    UNet,
    UNetConfig,
    abstract_params,
    example_inputs,
    guidance_embedding,
)
from lcm_jax.nets.embed import TimestepEmbedding
from lcm_jax.weights.torch_params import from_torch, to_torch
from vae16.layers import GroupNorm

TINY = UNetConfig(
    in_channels=3,
    out_channels=2,
    block_out_channels=(8,),
    down_block_types=("CrossAttnDownBlock2D",),
    mid_block_type=None,
    up_block_types=("UpBlock2D",),
    layers_per_block=1,
    transformer_layers_per_block=2,
    norm_num_groups=4,
    attention_head_dim=2,
    cross_attention_dim=6,
    time_cond_proj_dim=16,
    addition_embed_type="text_time",
    addition_time_embed_dim=4,
    projection_class_embeddings_input_dim=6 * 4 + 5,
)
FAST = {"xla_backend_optimization_level": 0}  # halves the compilation, which is nearly all of the time here


@pytest.fixture(scope="module")
def params() -> dict:
    shapes, rng = abstract_params(UNet(TINY)), np.random.default_rng(0)

    def fill(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        size = math.prod(leaf.shape[:-1]) if len(leaf.shape) > 1 else 25
        return jnp.asarray(rng.standard_normal(leaf.shape) / size**0.5, leaf.dtype)

    return jax.tree.map(fill, shapes)


@pytest.fixture(scope="module")
def inputs() -> tuple:
    x, t, cond = example_inputs(TINY, batch=2, size=(5, 6), tokens=3)
    leaves, tree = jax.tree.flatten((x, t, cond))
    rng = np.random.default_rng(1)
    return tree.unflatten([jnp.asarray(rng.standard_normal(leaf.shape), leaf.dtype) for leaf in leaves])


def loss(net: UNet, params: dict, inputs: tuple) -> tuple[jax.Array, jax.Array]:
    y = net.apply({"params": params}, *inputs)
    return jnp.mean(jnp.square(y)), y


def evaluate(net: UNet, params: dict, inputs: tuple) -> tuple[jax.Array, dict]:
    value = jax.jit(jax.value_and_grad(lambda p: loss(net, p, inputs), has_aux=True), compiler_options=FAST)
    (_, y), gradient = value(params)
    return np.asarray(y), to_torch(jax.tree.map(np.asarray, gradient), RULES_UNET)


@pytest.fixture(scope="module")
def plain(params: dict, inputs: tuple) -> tuple[jax.Array, dict]:
    return evaluate(UNet(TINY), params, inputs)


@pytest.mark.parametrize(
    "options",
    [pytest.param({"remat": True}, marks=pytest.mark.slow), {"scan": True, "remat": True}],
    ids=["remat", "both"],
)
def test_scan_and_remat_change_nothing(options: dict, params: dict, inputs: tuple, plain: tuple) -> None:
    net = UNet(TINY, **options)
    same = from_torch(to_torch(params, RULES_UNET), abstract_params(net), RULES_UNET)
    assert ("transformer_blocks" in same["down_blocks_0"]["attentions_0"]) == options.get("scan", False)
    y, gradient = evaluate(net, same, inputs)
    np.testing.assert_allclose(y, plain[0], atol=1e-5)
    assert gradient.keys() == plain[1].keys()
    for name, value in plain[1].items():
        np.testing.assert_allclose(gradient[name], value, atol=1e-5 * max(1, np.abs(value).max()), err_msg=name)


def test_guidance_starts_as_nothing_and_can_be_left_out(params: dict, inputs: tuple, plain: tuple) -> None:
    x, t, cond = inputs
    fresh = TimestepEmbedding(32, 16).init(jax.random.key(0), jnp.ones((2, 8)))["params"]
    assert not fresh["cond_proj"]["kernel"].any()
    assert fresh["cond_proj"].keys() == {"kernel"}
    zeroed = jax.tree.map(lambda leaf: leaf, params)
    zeroed["time_embedding"]["cond_proj"]["kernel"] = jnp.zeros_like(params["time_embedding"]["cond_proj"]["kernel"])
    apply = jax.jit(UNet(TINY).apply, compiler_options=FAST)
    without = apply({"params": params}, x, t, {k: v for k, v in cond.items() if k != "guidance"})
    np.testing.assert_allclose(apply({"params": zeroed}, x, t, cond), without, atol=1e-5)
    assert np.abs(plain[0] - without).max() > 1e-3  # once trained it matters


def test_bfloat16_computes_on_float32_parameters(params: dict, inputs: tuple, plain: tuple) -> None:
    net = UNet(TINY, dtype=jnp.bfloat16)
    y = jax.jit(net.apply, compiler_options=FAST)({"params": params}, *inputs)
    assert y.dtype == jnp.float32
    error = np.abs(y - plain[0]).max() / np.abs(plain[0]).max()
    assert 1e-4 < error < 0.1
    assert {leaf.dtype for leaf in jax.tree.leaves(abstract_params(net))} == {np.dtype("float32")}
    half = abstract_params(UNet(TINY, param_dtype=jnp.bfloat16))
    assert {leaf.dtype for leaf in jax.tree.leaves(half)} == {np.dtype(jnp.bfloat16)}
    x, t, cond = inputs
    halved = jax.eval_shape(net.apply, {"params": half}, x.astype(jnp.bfloat16), t, cond)
    assert halved.dtype == jnp.bfloat16


def test_conditioning_that_does_not_fit_is_named(params: dict, inputs: tuple) -> None:
    x, t, cond = inputs

    def shape(cfg: UNetConfig, cond: dict) -> None:
        jax.eval_shape(UNet(cfg).apply, {"params": params}, x, t, cond)

    with pytest.raises(ValueError, match="has no time_cond_proj_dim"):
        shape(dataclasses.replace(TINY, time_cond_proj_dim=None), cond)
    with pytest.raises(ValueError, match="cond needs 'pooled' and 'time_ids'"):
        shape(TINY, {k: v for k, v in cond.items() if k != "pooled"})
    with pytest.raises(ValueError, match="embed to width 30"):
        shape(TINY, cond | {"pooled": jnp.zeros((2, 6))})


@pytest.mark.parametrize(
    ("config", "scan", "count"),
    [
        (SD15, False, 859_520_964),
        (SSD1B, True, 1_331_334_404),
        pytest.param(SD21, False, 865_910_724, marks=pytest.mark.slow),
        pytest.param(SDXL, True, 2_567_463_684, marks=pytest.mark.slow),
        pytest.param(SDXL_REFINER, True, 2_259_526_660, marks=pytest.mark.slow),
    ],
    ids=["sd15", "ssd1b", "sd21", "sdxl", "refiner"],
)
def test_published_parameter_counts(config: UNetConfig, scan: bool, count: int) -> None:
    leaves = jax.tree.leaves(abstract_params(UNet(config, scan=scan)))
    assert sum(math.prod(leaf.shape) for leaf in leaves) == count


def test_turbo_is_the_architecture_of_21() -> None:
    assert dataclasses.replace(SD_TURBO, sample_size=SD21.sample_size) == SD21


@pytest.mark.parametrize("config", [SD15, SD21, SDXL, SDXL_REFINER, SSD1B, TINY])
def test_config_there_and_back(config: UNetConfig) -> None:
    d = config.to_dict()
    assert d["_class_name"] == "UNet2DConditionModel"
    assert UNetConfig.from_dict(d | {"_diffusers_version": "0", "dropout": 0.0, "upcast_attention": None}) == config


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("class_embed_type", "timestep", "class_embed_type='timestep' is not supported"),
        ("num_class_embeds", 1000, "num_class_embeds=1000"),
        ("encoder_hid_dim_type", "text_proj", "encoder_hid_dim_type='text_proj'"),
        ("dual_cross_attention", True, "dual_cross_attention=True"),
        ("act_fn", "gelu", "act_fn='gelu'"),
        ("time_embedding_type", "fourier", "time_embedding_type='fourier'"),
        ("shiny", 3, "unknown key 'shiny' .value 3."),
        ("addition_embed_type", "image", "addition_embed_type='image'"),
        ("mid_block_type", "UNetMidBlock2DSimpleCrossAttn", "mid_block_type='UNetMidBlock2DSimpleCrossAttn'"),
        ("down_block_types", ["AttnDownBlock2D"] * 4, "down_block_types has 'AttnDownBlock2D'"),
        ("block_out_channels", [320, 640], "has 4 entries for 2 levels"),
        ("block_out_channels", [320, 640, 1280, 1290], "1290 does not divide into norm_num_groups=32"),
        ("attention_head_dim", 7, "does not divide into 7 heads"),
        ("transformer_layers_per_block", [1, 0, 1, 1], "level 1 is .0, 0.; use >= 1"),
        ("transformer_layers_per_block", [1, [1, 1], 1, 1], "needs reverse_transformer_layers_per_block"),
        ("transformer_layers_per_block", [1, [1], 1, 1], "needs reverse_transformer_layers_per_block"),
        ("conv_in_kernel", 4, "conv_in_kernel=4"),
        pytest.param("norm_num_groups", None, "norm_num_groups=None", marks=pytest.mark.wrong_types),
    ],
)
def test_unsupported_configs_are_named(key: str, value: object, words: str) -> None:
    with pytest.raises(ValueError, match=words) as error:
        UNetConfig.from_dict(SD15.to_dict() | {key: value}, source="unet/config.json")
    assert str(error.value).startswith("unet/config.json: ")
    assert "\n" not in str(error.value)


def test_guidance_embedding_is_the_sinusoid_of_1000_w() -> None:
    w = jnp.array([0.0, 7.5])
    y = np.asarray(guidance_embedding(w))
    assert y.shape == (2, 256)
    frequencies = np.exp(-np.log(1e4) * np.arange(128) / 127)
    np.testing.assert_allclose(y[:, :128], np.sin(1000 * np.asarray(w)[:, None] * frequencies), atol=2e-3)
    np.testing.assert_allclose(y[:, 128:], np.cos(1000 * np.asarray(w)[:, None] * frequencies), atol=2e-3)
    np.testing.assert_allclose(y[0], np.repeat([0.0, 1.0], 128))


def test_group_norm_is_exact_far_from_zero_and_in_its_second_derivative() -> None:
    rng = np.random.default_rng(0)
    x, direction = rng.standard_normal((2, 2, 3, 3, 4)).astype(np.float32)
    scale = jnp.array([1.0, -2.0, 0.5, 3.0])
    params = {"params": {"scale": scale, "bias": jnp.zeros(4)}}

    def ours(x: jax.Array) -> jax.Array:
        return GroupNorm(2, 1e-5).apply(params, x)

    def plain(x: jax.Array) -> jax.Array:
        groups = x.reshape(2, 3, 3, 2, 2)
        centred = groups - groups.mean((1, 2, 4), keepdims=True)
        y = centred / jnp.sqrt(jnp.square(centred).mean((1, 2, 4), keepdims=True) + 1e-5)
        return y.reshape(x.shape) * scale

    def second(f: Callable[[jax.Array], jax.Array]) -> jax.Array:
        return jax.jit(jax.grad(jax.grad(lambda s: jnp.sum(f(x + s * direction) ** 3))))(0.0)

    np.testing.assert_allclose(jax.jit(ours)(x + 100), jax.jit(plain)(x + 100), atol=1e-4)
    np.testing.assert_allclose(second(ours), second(plain), rtol=1e-4)
