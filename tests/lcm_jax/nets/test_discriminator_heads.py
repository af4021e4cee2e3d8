"""Laws of the discriminator: one map a block, stacked or not; heads that are told the time and the text."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from lcm_jax.nets import UNet, UNetConfig, example_inputs
from lcm_jax.nets.discriminator_heads import Heads, features, pooled_text
from mmdit import MMDiT, MMDiTConfig
from mmdit.text import CLIPVisionConfig, CLIPVisionModel

BLOCKS = 3
jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
JOINT = MMDiTConfig(
    sample_size=4,
    patch_size=2,
    in_channels=2,
    out_channels=2,
    num_layers=BLOCKS,
    attention_head_dim=4,
    num_attention_heads=1,
    joint_attention_dim=3,
    caption_projection_dim=4,
    pooled_projection_dim=3,
    pos_embed_max_size=4,
)
TOWER = CLIPVisionConfig(
    hidden_size=4, intermediate_size=4, num_hidden_layers=BLOCKS, num_attention_heads=1, image_size=8, patch_size=4
)


def filled(shapes: Any) -> Any:
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: jnp.asarray(0.3 * rng.standard_normal(leaf.shape), leaf.dtype), shapes)


def joint_inputs() -> tuple[Any, ...]:
    rng = np.random.default_rng(1)
    x, context, pooled = (jnp.asarray(rng.standard_normal(s), jnp.float32) for s in ((2, 4, 4, 2), (2, 3, 3), (2, 3)))
    return x, jnp.array([100.0, 900.0]), {"context": context, "pooled": pooled}


def stacked_twin(params: dict[str, Any], name: str) -> dict[str, Any]:
    """The same parameters with the numbered layers `name`_i on one leading axis; SD3's last block stays apart."""
    numbered = [params[f"{name}_{i}"] for i in range(BLOCKS)]
    alike = [p for p in numbered if jax.tree.structure(p) == jax.tree.structure(numbered[0])]
    rest = {key: value for key, value in params.items() if not key.startswith(f"{name}_")}
    rest |= {f"{name}_{i}": numbered[i] for i in range(len(alike), BLOCKS)}
    return rest | {name: jax.tree.map(lambda *leaves: jnp.stack(leaves), *alike)}


@pytest.mark.parametrize("remat", [False, True])
def test_an_mmdit_gives_one_map_a_block_stacked_or_not(remat: bool) -> None:
    inputs = joint_inputs()
    net = MMDiT(JOINT, remat=remat)
    params = filled(jax.eval_shape(net.init, jax.random.key(0), *inputs)["params"])
    scanned, twin = MMDiT(JOINT, scan=True, remat=remat), stacked_twin(params, "transformer_blocks")
    plain, stacked = jit(lambda: (features(net, params, *inputs), features(scanned, twin, *inputs)))()
    assert len(plain) == len(stacked) == BLOCKS
    for a, b in zip(plain, stacked, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    assert min(float(jnp.abs(a - b).max()) for a, b in pairwise(plain)) > 1e-3  # in order


def test_an_image_tower_gives_one_map_a_layer_stacked_or_not() -> None:
    images = jnp.asarray(np.random.default_rng(1).standard_normal((1, 8, 8, 3)), jnp.float32)
    tower = CLIPVisionModel(TOWER)
    params = filled(jax.eval_shape(tower.init, jax.random.key(0), images)["params"])
    vision = params["vision_model"]
    twin = {**params, "vision_model": {**vision, "encoder": stacked_twin(vision["encoder"], "layers")}}
    scanned = CLIPVisionModel(TOWER, scan=True)
    plain, stacked = jit(lambda: (features(tower, params, images), features(scanned, twin, images)))()
    output: Any = jit(tower.apply)({"params": params}, images)
    assert len(plain) == len(stacked) == BLOCKS
    for a, b in zip(plain, stacked, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(plain[-1], output.last_hidden, rtol=1e-5)


def test_a_unet_gives_its_down_and_middle_blocks() -> None:
    config = UNetConfig(
        in_channels=3, out_channels=3, block_out_channels=(4, 8), layers_per_block=1, norm_num_groups=2,
        down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"),
        mid_block_type="UNetMidBlock2DCrossAttn", attention_head_dim=4, cross_attention_dim=4,
    )  # fmt: skip
    net, inputs = UNet(config), example_inputs(replace(config, sample_size=8))
    params = jax.eval_shape(net.init, jax.random.key(0), *inputs)["params"]
    shapes = [leaf.shape[1:] for leaf in jax.eval_shape(lambda p: features(net, p, *inputs), params)]
    side = inputs[0].shape[1]
    assert shapes == [(side // 2, side // 2, 4), (side // 2, side // 2, 8), (side // 2, side // 2, 8)]


def test_block_10_comes_after_block_2() -> None:
    class Block(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> None:
            self.sow("features", "map", x)

    class Eleven(nn.Module):
        @nn.compact
        def __call__(self) -> None:
            for i in range(11):
                Block(name=f"blocks_{i}")(jnp.full((1, 1), float(i)))

    assert [int(value[0, 0]) for value in features(Eleven(), {})] == list(range(11))


def test_a_network_without_blocks_is_named() -> None:
    class Plain(nn.Module):
        @nn.compact
        def __call__(self, x: Any, t: Any, cond: Any) -> Any:
            return x

    with pytest.raises(ValueError, match="Plain has no blocks for a discriminator"):
        features(Plain(), {}, jnp.zeros((1, 2, 2, 1)), jnp.zeros(1), {})


def test_the_heads_are_told_the_time_and_the_text() -> None:
    maps = [jnp.asarray(np.random.default_rng(0).standard_normal((2, 3, 4)), jnp.float32)]
    heads, text = Heads(width=4), jnp.ones((2, 5))
    params = filled(jax.eval_shape(heads.init, jax.random.key(0), maps, jnp.zeros(2), text)["params"])
    run = jit(lambda t, text: heads.apply({"params": params}, maps, t, text))
    logits = [
        run(*condition) for condition in ((jnp.zeros(2), text), (jnp.full(2, 500.0), text), (jnp.zeros(2), 2.0 * text))
    ]
    assert float(jnp.abs(logits[0] - logits[1]).min()) > 0.0
    assert float(jnp.abs(logits[0] - logits[2]).min()) > 0.0


def test_the_text_is_the_pooled_one_where_there_is_one() -> None:
    cond = {"context": jnp.arange(6.0).reshape(1, 3, 2)}
    assert pooled_text(cond).tolist() == [[2.0, 3.0]]
    assert pooled_text(cond | {"pooled": jnp.ones((1, 5))}).shape == (1, 5)
