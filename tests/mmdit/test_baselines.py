"""Laws of DiT, CrossDiT and UViT: what each definition implies, and how many parameters that takes."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lcm_jax.weights.torch_params import from_torch, to_torch
from mmdit import (
    RULES_MMDIT,
    CrossDiT,
    CrossDiTConfig,
    DiT,
    DiTConfig,
    MMDiT,
    MMDiTConfig,
    UViT,
    UViTConfig,
    abstract_params,
    example_inputs,
)
from mmdit.embed import position_grid

FIELDS = {
    "sample_size": 8,
    "in_channels": 3,
    "out_channels": 2,
    "num_layers": 2,
    "attention_head_dim": 8,
    "num_attention_heads": 2,
    "caption_projection_dim": 16,
    "joint_attention_dim": 12,
    "pooled_projection_dim": 6,
    "pos_embed_max_size": 6,
    "qk_norm": "rms_norm",
}
KINDS = {"dit": (DiT, DiTConfig), "crossdit": (CrossDiT, CrossDiTConfig), "uvit": (UViT, UViTConfig)}
ALL = KINDS | {"mmdit": (MMDiT, MMDiTConfig)}
FAST = {"xla_backend_optimization_level": 0}


def make(name: str, **options):
    net, config = ALL[name]
    return net(config(**FIELDS), **options)


@pytest.fixture(scope="module")
def inputs() -> tuple:
    x, t, cond = example_inputs(make("dit").config, batch=2, size=(6, 8), tokens=3)
    leaves, tree = jax.tree.flatten((x, t, cond))
    rng = np.random.default_rng(1)
    return tree.unflatten([jnp.asarray(rng.standard_normal(leaf.shape), leaf.dtype) for leaf in leaves])


@pytest.fixture(scope="module", params=KINDS)
def case(request: pytest.FixtureRequest, random_params, inputs: tuple) -> tuple:
    """name, random parameters, compiled apply."""
    net = make(request.param)
    return request.param, random_params(net.init, *inputs)["params"], jax.jit(net.apply, compiler_options=FAST)


def gradient(net, params: dict, inputs: tuple) -> tuple[jax.Array, dict]:
    def loss(params: dict) -> tuple[jax.Array, jax.Array]:
        y = net.apply({"params": params}, *inputs)
        return jnp.mean(jnp.square(y)), y

    (_, y), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True), compiler_options=FAST)(params)
    return y, to_torch(gradient, RULES_MMDIT)


@pytest.mark.parametrize(
    "case",
    [pytest.param("dit", marks=pytest.mark.slow), "crossdit", "uvit"],  # all that a DiT has a CrossDiT has
    indirect=True,
)
def test_scan_and_remat_change_nothing_and_every_parameter_learns(case: tuple, inputs: tuple) -> None:
    """But the position grid, which is a constant."""
    name, params, _ = case
    y, plain = gradient(make(name), params, inputs)
    net = make(name, scan=True, remat="dots_with_no_batch_dims_saveable")
    stacked = from_torch(to_torch(params, RULES_MMDIT), abstract_params(net), RULES_MMDIT)
    assert [key for key in stacked if "transformer" in key] == ["transformer_blocks"]
    again, other = gradient(net, stacked, inputs)
    np.testing.assert_allclose(again, y, atol=1e-5 * np.abs(y).max())
    assert other.keys() == plain.keys()
    for key, value in plain.items():
        np.testing.assert_allclose(other[key], value, atol=2e-5 * max(1, np.abs(value).max()), err_msg=key)
    assert {key for key, value in plain.items() if np.abs(value).max() < 1e-9} == {"pos_embed.pos_embed"}


def test_it_begins_as_zero_on_the_computed_grid(case: tuple, inputs: tuple) -> None:
    name, random, apply = case
    fresh = jax.jit(make(name).init, compiler_options=FAST)(jax.random.key(0), *inputs)["params"]
    y = apply({"params": fresh}, *inputs)
    assert y.shape == (2, 6, 8, 2)
    assert not y.any()
    np.testing.assert_array_equal(fresh["pos_embed"]["pos_embed"], position_grid(6, 4, 16))
    assert np.abs(apply({"params": random}, *inputs)).max() > 0.1


def test_rows_do_not_see_each_other_but_see_all_their_inputs(case: tuple, inputs: tuple) -> None:
    _, params, apply = case
    x, t, cond = inputs
    first = apply({"params": params}, x, t, cond)[0]
    changed = jax.tree.map(lambda leaf: leaf.at[1].add(1.0), inputs)
    np.testing.assert_allclose(apply({"params": params}, *changed)[0], first, atol=1e-6)
    for name in cond:
        y = apply({"params": params}, x, t, cond | {name: cond[name].at[0].add(1.0)})[0]
        assert np.abs(y - first).max() > 1e-3, name
    assert np.abs(apply({"params": params}, x, t.at[0].add(1.0), cond)[0] - first).max() > 1e-3


def test_the_text_is_a_set_which_only_cross_attention_may_repeat(case: tuple, inputs: tuple) -> None:
    """No order of tokens but the grid's: permuting the text changes nothing. Said twice it takes twice its share of
    one joined sequence, while a softmax over the text alone stays what it was."""
    name, params, apply = case
    x, t, cond = inputs
    y = apply({"params": params}, x, t, cond)
    scale = float(np.abs(y).max())
    backwards = cond | {"context": cond["context"][:, ::-1]}
    np.testing.assert_allclose(apply({"params": params}, x, t, backwards), y, atol=1e-5 * scale)
    twice = cond | {"context": jnp.concatenate([cond["context"]] * 2, axis=1)}
    difference = np.abs(apply({"params": params}, x, t, twice) - y).max() / scale
    assert (difference < 1e-5) == (name == "crossdit")
    assert name == "crossdit" or difference > 1e-3


def test_only_the_uvit_sees_beyond_a_patch_without_attention(case: tuple, inputs: tuple) -> None:
    """With the attention's output off, a patch depends on itself alone, but for the UViT's convolutions."""
    name, params, apply = case
    x, t, cond = inputs
    params = jax.tree.map(lambda leaf: leaf, params)
    for key, block in params.items():
        if key.startswith("transformer_blocks"):
            for attend in ("attn", "attn2"):
                if attend in block:
                    block[attend]["to_out_0"]["kernel"] *= 0
    y, other = (apply({"params": params}, given, t, cond) for given in (x, x.at[:, :2, :2].add(1.0)))
    far = np.abs(y - other)[:, 2:, 2:].max()
    assert (far > 1e-4) == (name == "uvit")


def closed_form(name: str, c: MMDiTConfig) -> int:
    """Parameters without the position grid, without norms on queries and keys."""
    d, n, patch = c.width, c.num_layers, c.patch_size**2
    around = (256 + c.pooled_projection_dim) * d + 2 * d + 2 * (d * d + d)  # time and pooled text
    around += c.joint_attention_dim * d + d
    block = 18 * d * d + 15 * d  # modulation 6, attention 4, MLP 8
    ends = patch * c.in_channels * d + d + 2 * d * d + 2 * d + (d + 1) * patch * c.out_channels
    if name == "dit":
        return around + ends + n * block
    if name == "crossdit":
        return around + ends + n * (block + 4 * d * d + 4 * d)
    if name == "mmdit":  # the last block's text has queries, keys, values and two vectors of modulation
        return around + ends + (2 * n - 1) * block + 5 * d * d + 5 * d
    e = d // c.patch_size
    res = [9 * i * e + e + 2 * (d * e + e) + 9 * e * e + e + (i != e) * (i * e + e) for i in (e, e, 2 * e, 2 * e)]
    convs = 9 * c.in_channels * e + e + 2 * (d * e + e) + 9 * e * c.out_channels + c.out_channels
    return around + n * block + sum(res) + convs + (patch * e * d + d) + (d + 1) * patch * e


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("depth", [2, 7])
def test_parameter_counts(name: str, depth: int) -> None:
    net, kind = ALL[name]
    fields = FIELDS | {"num_layers": depth, "attention_head_dim": 24, "caption_projection_dim": 48, "qk_norm": None}
    for scan in (False, True):
        shapes = abstract_params(net(kind(**fields), scan=scan))
        assert shapes["pos_embed"].pop("pos_embed").shape == (1, 36, 48)
        assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes)) == closed_form(name, kind(**fields))


def test_bfloat16_computes_on_float32_parameters(case: tuple, inputs: tuple) -> None:
    name, params, apply = case
    y = apply({"params": params}, *inputs)
    half = jax.jit(make(name, dtype=jnp.bfloat16).apply, compiler_options=FAST)({"params": params}, *inputs)
    assert half.dtype == jnp.float32
    assert 1e-4 < np.abs(half - y).max() / np.abs(y).max() < 0.1


@pytest.mark.parametrize("name", KINDS)
def test_configs_there_and_back_and_what_they_refuse(name: str) -> None:
    net, kind = KINDS[name]
    config = kind(**FIELDS)
    assert kind.from_dict(config.to_dict()) == config
    assert config.to_dict()["_class_name"] == net.__name__
    assert dataclasses.replace(config, num_layers=3).runs == ((0, 3),)
    assert config != MMDiTConfig(**FIELDS)
    with pytest.raises(ValueError, match=r"dual_attention_layers=\(0,\) is for the MMDiT alone"):
        dataclasses.replace(config, dual_attention_layers=(0,))
    x, t, cond = jax.eval_shape(lambda: example_inputs(config, size=(6, 7)))
    with pytest.raises(ValueError, match="latent is 6 x 7: both must be multiples of patch_size=2"):
        jax.eval_shape(net(config).init, jax.random.key(0), x, t, cond)
    x, t, cond = jax.eval_shape(lambda: example_inputs(config, size=(14, 6)))
    with pytest.raises(ValueError, match="latent is 14 x 6, larger than the position grid"):
        jax.eval_shape(net(config).init, jax.random.key(0), x, t, cond)
