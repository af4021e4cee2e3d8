"""Networks in bfloat16 on a CPU: the same numbers as flax's to their rounding, by the processor's own products."""

from __future__ import annotations

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lcm_jax.precision import bfloat16_cpu
from lcm_jax.precision.context import is_low_precision, precision_context
from lcm_jax.precision.layer_overrides import LayerOverrides
from lcm_jax.precision.quantization import quantize
from lcm_jax.runtime.compiler_options import compiler_options
from mmdit.attention import lowering_for
from mmdit.text import T5Config, T5Encoder
from vae16.convolution import convolve
from vae16.layers import Downsample, NearestConv

HALF: dict[str, Any] = {"dtype": jnp.bfloat16, "param_dtype": jnp.bfloat16}
WIDE = 128  # channels from which on convolutions go by products
LAYERS = [
    pytest.param(nn.Dense(48, **HALF), 16, 6, id="dense"),
    pytest.param(nn.Dense(48, use_bias=False, **HALF), 16, 6, id="without bias"),
    pytest.param(nn.Conv(48, (1, 1), **HALF), 16, 6, id="1x1"),
    pytest.param(nn.Conv(WIDE, (3, 3), padding=1, **HALF), WIDE, 6, id="3x3"),
    pytest.param(nn.Conv(WIDE, (3, 3), padding=1, **HALF), WIDE, 5, id="3x3, odd"),
    pytest.param(nn.Conv(WIDE, (3, 3), padding=1, **HALF), WIDE, 1, id="3x3 of a pixel"),
    pytest.param(nn.Conv(WIDE, (3, 3), 2, padding=1, **HALF), WIDE, 6, id="stride 2"),
    pytest.param(nn.Conv(WIDE, (2, 3), (2, 1), padding="VALID", **HALF), WIDE, 6, id="2x3, valid"),
    pytest.param(nn.Conv(8, (3, 3), padding=1, conv_general_dilated=convolve, **HALF), 4, 6, id="few channels"),
    pytest.param(Downsample(**HALF), WIDE, 6, id="downsample"),
    pytest.param(NearestConv(WIDE, **HALF), WIDE, 6, id="upsample"),
    pytest.param(NearestConv(8, use_bias=False, **HALF), 8, 6, id="upsample of few channels"),
    pytest.param(NearestConv(8, dtype=jnp.bfloat16), 8, 6, id="upsample of float32 parameters"),
]


def _error(one: Any, other: Any) -> float:
    one, other = (np.asarray(x, np.float32) for x in (one, other))
    return float(np.linalg.norm(one - other) / np.linalg.norm(other))


def _given(layer: Any, channels: int, side: int) -> tuple[Any, jax.Array]:
    random = np.random.default_rng(0)
    x = jnp.asarray(random.standard_normal((2, side, side, channels)), jnp.bfloat16)

    def fill(like: Any) -> jax.Array:
        return jnp.asarray(math.prod(like.shape[:-1]) ** -0.5 * random.standard_normal(like.shape) + 0.02, like.dtype)

    return jax.tree.map(fill, jax.eval_shape(layer.init, jax.random.key(1), x)["params"]), x


def _read(layer: Any, params: Any, x: Any) -> Any:
    with precision_context(params) as read_params:
        return layer.apply({"params": read_params}, x)


@pytest.mark.parametrize(("layer", "channels", "side"), LAYERS)
def test_a_layer_gives_what_its_float32_gives(layer: Any, channels: int, side: int) -> None:
    params, x = _given(layer, channels, side)
    exact = jax.jit(layer.clone(dtype=jnp.float32).apply)({"params": params}, x.astype(jnp.float32))
    exact = np.asarray(exact)
    with lowering_for("cpu"):
        how = compiler_options(low_precision=True)
        out = jax.jit(lambda params, x: _read(layer, params, x), compiler_options=how)(params, x)
    assert out.dtype == jnp.bfloat16
    assert out.shape == exact.shape
    assert _error(out, exact) < 2 * _error(exact.astype(jnp.bfloat16), exact) + 2e-3


@pytest.mark.parametrize(("layer", "channels", "side"), LAYERS)
def test_its_gradient_is_the_layers(layer: Any, channels: int, side: int) -> None:
    params, x = _given(layer, channels, side)
    out = jax.eval_shape(layer.apply, {"params": params}, x)
    weights = np.random.default_rng(1).standard_normal(out.shape).astype(np.float32)

    def gradients(apply: Any) -> Any:
        return jax.jit(jax.grad(lambda params, x: jnp.sum(weights * apply(params, x)), argnums=(0, 1)))(params, x)

    with lowering_for("cpu"):
        read_params = gradients(lambda params, x: _read(layer, params, x))
    plain = gradients(lambda params, x: layer.apply({"params": params}, x))
    for one, other in zip(jax.tree.leaves(read_params), jax.tree.leaves(plain), strict=True):
        assert one.dtype == other.dtype
        assert _error(one, other) < 0.02


def test_other_dtypes_and_other_devices_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = nn.Dense(8, **HALF)
    params, x = _given(layer, 4, 2)
    full = layer.clone(dtype=jnp.float32)
    with lowering_for("cpu"):
        np.testing.assert_array_equal(_read(full, params, x), full.apply({"params": params}, x))
    monkeypatch.setattr(LayerOverrides, "around", lambda self: pytest.fail("products of a CPU"))
    with lowering_for("tpu"):
        np.testing.assert_array_equal(_read(layer, params, x), layer.apply({"params": params}, x))


def test_sums_that_are_asked_for_in_float32_stay_so() -> None:
    """T5's residual stream, `mmdit.text.t5`."""
    config = T5Config(vocab_size=32, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=2)
    module = T5Encoder(config, **HALF)
    ids = jnp.arange(8)[None]

    def run(params: Any) -> Any:
        with lowering_for("cpu"), precision_context(params) as read_params:
            return module.apply({"params": read_params}, ids, capture_intermediates=True, mutable="intermediates")

    _, shapes = jax.eval_shape(run, jax.eval_shape(module.init, jax.random.key(0), ids)["params"])
    feed_forward = shapes["intermediates"]["encoder"]["block_0"]["layer_1"]["DenseReluDense"]
    assert feed_forward["wo"]["__call__"][0].dtype == jnp.float32
    assert feed_forward["wi"]["__call__"][0].dtype == jnp.bfloat16


def test_what_is_narrow() -> None:
    params = {"kernel": jnp.ones((32, 32))}
    half = {"kernel": jnp.ones((32, 32), jnp.bfloat16)}
    assert not is_low_precision(params)
    assert not is_low_precision(params, quantize(params, "int8w"))
    assert is_low_precision(params, half)
    assert is_low_precision(quantize(params, "int8"), params)
    assert is_low_precision(quantize(half, "int8w"))


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="options of XLA:CPU")
@pytest.mark.parametrize("kind", ["bfloat16", "int8w", "bfloat16, int8w"])
def test_no_kernel_is_whole_in_float32_before_its_turn(kind: str) -> None:
    """XLA's own order made all of T5-XXL's so at once, 18.6 GB."""
    layers = nn.Sequential([nn.Dense(512, dtype=jnp.bfloat16 if "bf" in kind else jnp.float32) for _ in range(12)])
    x = jnp.ones((4, 512))
    params = layers.init(jax.random.key(0), x)["params"]
    if "bf" in kind:
        params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    params = quantize(params, "int8w") if "int8w" in kind else params

    def temporaries(read: Any) -> int:
        how = compiler_options(low_precision=is_low_precision(params))
        compiled = jax.jit(read, compiler_options=how).lower(params, x).compile()
        return int(compiled.memory_analysis().temp_size_in_bytes)

    assert temporaries(lambda params, x: _read(layers, params, x)) < 3 * 512 * 512 * 4


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="options of XLA:CPU")
def test_a_cpu_takes_products_made_for_halves() -> None:
    x = jnp.ones((64, 64), jnp.bfloat16)
    taken = (
        jax.jit(bfloat16_cpu.OVERRIDES.multiply, compiler_options=compiler_options(low_precision=True))
        .lower(x, x)
        .compile()
    )
    assert "__ynn_fusion" in taken.as_text()
