"""Networks in 8 bits are near those in 32, and hold 8 bits."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

import lcm_jax
from lcm_jax.cli.main import main
from lcm_jax.lora import Adapted, init
from lcm_jax.metrics import psnr
from lcm_jax.models.latent_diffusion import as_apply
from lcm_jax.nets import UNet, UNetConfig, example_inputs
from lcm_jax.precision import quantization
from lcm_jax.precision.context import precision_context
from lcm_jax.precision.quantization import quantize
from lcm_jax.runtime.compiler_options import compiler_options
from mmdit import MMDiT, MMDiTConfig
from mmdit import example_inputs as mmdit_inputs
from vae16.layers import NearestConv

qwix = pytest.importorskip("qwix")
UNET = UNetConfig(
    sample_size=8,
    in_channels=4,
    out_channels=4,
    block_out_channels=(32,),
    down_block_types=("CrossAttnDownBlock2D",),
    up_block_types=("CrossAttnUpBlock2D",),
    layers_per_block=1,
    attention_head_dim=2,
    cross_attention_dim=32,
    norm_num_groups=4,
)
MMDIT = MMDiTConfig(
    sample_size=8,
    in_channels=4,
    out_channels=4,
    num_layers=2,
    attention_head_dim=16,
    num_attention_heads=2,
    joint_attention_dim=32,
    caption_projection_dim=32,
    pooled_projection_dim=32,
    pos_embed_max_size=4,
)
Net = tuple[Any, Any, tuple[Any, ...]]


def _random(shapes: Any) -> Any:
    """Kernels that keep what flows through them as large as it is; gates that are shut would hide everything."""
    random = np.random.default_rng(0)

    def fill(path: Any, leaf: Any) -> jax.Array:
        stacked = int(leaf.ndim in (3, 5))
        deviation = math.prod(leaf.shape[stacked:-1]) ** -0.5 if path[-1].key == "kernel" else 0.05
        return jnp.asarray(deviation * random.standard_normal(leaf.shape, np.float32) + (path[-1].key == "scale"))

    return jax.tree_util.tree_map_with_path(fill, shapes)


@pytest.fixture(scope="module")
def net() -> Callable[[str], Net]:
    """(module, parameters, inputs) by name."""
    made: dict[str, Net] = {}

    def build(name: str) -> Net:
        if name not in made:
            module: Any = UNet(UNET) if name == "unet" else MMDiT(MMDIT, scan=name == "mmdit, stacked")
            inputs = jax.tree.map(
                lambda leaf: (
                    jax.random.normal(jax.random.key(leaf.ndim), leaf.shape) if leaf.ndim > 1 else leaf + 500.0
                ),
                example_inputs(UNET) if name == "unet" else mmdit_inputs(MMDIT),
            )
            made[name] = module, _random(jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"]), inputs
        return made[name]

    return build


def _error(one: Any, other: Any) -> float:
    one, other = np.asarray(one), np.asarray(other)
    return float(np.linalg.norm(one - other) / np.linalg.norm(other))


UNET_AND_MMDIT = [pytest.param("unet", marks=pytest.mark.slow), "mmdit, stacked"]


@pytest.mark.parametrize("name", UNET_AND_MMDIT)
def test_a_network_in_8_bits_is_near_itself(net: Callable[[str], Net], name: str) -> None:
    module, params, inputs = net(name)
    apply = jax.jit(as_apply(module))
    plain = apply(params, *inputs)
    errors = {kind: _error(apply(quantize(params, kind), *inputs), plain) for kind in ("int8", "int8w")}
    assert min(errors.values()) > 1e-4, errors
    assert max(errors.values()) < 0.05, errors


def test_convolutions_and_products_of_every_form(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantization, "NARROW", 1)
    layers = [nn.Conv(6, (3, 3), 2, padding=1), nn.Conv(6, (1, 1), use_bias=False), nn.Conv(6, (3, 3)), nn.Dense(6)]
    layers += [NearestConv(6), NearestConv(6, use_bias=False)]
    x = jax.random.normal(jax.random.key(0), (2, 8, 6, 16))
    for layer in layers:
        params = _random(jax.eval_shape(layer.init, jax.random.key(1), x)["params"])

        def apply(params: Any, layer: nn.Module = layer) -> Any:
            with precision_context(params) as read_params:
                return layer.apply({"params": read_params}, x)

        @jax.jit
        def run(params: Any, apply: Callable[[Any], Any] = apply) -> Any:
            return apply(params), [apply(quantize(params, kind)) for kind in ("int8", "int8w")]

        plain, rounded = run(params)
        for y in rounded:
            assert 1e-4 < _error(y, plain) < 0.02


@pytest.mark.parametrize("rows", [(5, 7), (2, 1000)])
@pytest.mark.parametrize("kind", [jnp.int8, jnp.float8_e4m3fn])
def test_inputs_are_within_half_a_step_of_themselves(kind: Any, rows: tuple[int, int]) -> None:
    """Of a step for each row, whose largest number is kept as it is; nothing is made of nothing."""
    x = jax.random.normal(jax.random.key(0), rows) * jnp.geomspace(1e-3, 1e3, rows[0])[:, None]
    x = x.at[0].set(0.0).at[0, 0].set(1e-38)
    values, step = quantization._rounded(x, kind)
    again = values.astype(jnp.float32) * step
    assert values.dtype == kind
    assert step.shape == (rows[0], 1)
    most = 0.5 * step if kind == jnp.int8 else jnp.abs(x) / 16 + step * 2.0**-9
    assert jnp.all(jnp.abs(again - x) <= 1.001 * most)
    np.testing.assert_allclose(jnp.abs(again).max(1), jnp.abs(x).max(1), rtol=1e-6, atol=1e-37)
    assert not values[0].astype(jnp.float32).any()


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="options of XLA:CPU")
@pytest.mark.parametrize("layer", [nn.Conv(32, (3, 3), padding=1), nn.Conv(32, (3, 3), 2, padding=1), nn.Dense(32)])
def test_a_cpu_takes_kernels_made_for_8_bits(layer: Any) -> None:
    """XLA's own loops take up to three hundred times as long."""
    x = jnp.ones((1, 8, 8, 32))
    params = quantize(layer.init(jax.random.key(0), x)["params"], "int8")

    def call(params: Any, x: Any) -> Any:
        with precision_context(params) as read_params:
            return layer.apply({"params": read_params}, x)

    taken = jax.jit(call, compiler_options=compiler_options(low_precision=True)).lower(params, x).compile().as_text()
    assert "__ynn_fusion" in taken


@pytest.mark.parametrize("name", UNET_AND_MMDIT)
def test_kernels_alone_are_the_network_of_the_rounded_kernels(net: Callable[[str], Net], name: str) -> None:
    module, params, inputs = net(name)
    quantized = quantize(params, "int8w")

    def dequantized(leaf: Any) -> Any:
        return qwix.dequantize(leaf) if isinstance(leaf, qwix.QArray) else leaf

    rounded = jax.tree.map(dequantized, quantized.params, is_leaf=lambda leaf: isinstance(leaf, qwix.QArray))
    apply = jax.jit(as_apply(module))
    np.testing.assert_allclose(apply(quantized, *inputs), apply(rounded, *inputs), atol=1e-5)
    before, after = (traverse_util.flatten_dict(tree, sep="/") for tree in (params, rounded))
    for path, leaf in before.items():  # within half a step of each output's scale, and of each layer's
        axes = tuple(range(leaf.ndim))[int(leaf.ndim in (3, 5)) : -1]
        step = np.abs(leaf).max(axes, keepdims=True) / 127 if axes else 0.0
        assert np.all(np.abs(np.asarray(after[path]) - leaf) <= 0.51 * step), path


def test_what_is_wide_is_int8_and_times_and_ends_are_not(net: Callable[[str], Net]) -> None:
    _, params, _ = net("unet")
    flat = traverse_util.flatten_dict(quantize(params, "int8").params, sep="/")
    rounded = {path for path, leaf in flat.items() if isinstance(leaf, qwix.QArray)}
    assert all(flat[path].qvalue.dtype == jnp.int8 for path in rounded)
    assert "down_blocks_0/resnets_0/conv1/kernel" in rounded
    assert any(path.endswith("attn1/to_q/kernel") for path in rounded)
    stay = ("conv_in", "conv_out", "time_embedding", "time_emb_proj", "attn2/to_k", "norm")
    assert not [path for path in rounded if any(name in path for name in stay)]
    kernels = sum(leaf.size for path, leaf in traverse_util.flatten_dict(params, sep="/").items() if path in rounded)
    assert sum(flat[path].qvalue.nbytes for path in rounded) == kernels


@pytest.mark.slow
def test_an_adapter_goes_around_what_is_rounded(net: Callable[[str], Net]) -> None:
    module, params, inputs = net("unet")
    adapters = jax.tree.map(lambda leaf: leaf + 0.1, init(jax.random.key(1), params, rank=4))
    apply = jax.jit(as_apply(module))
    plain = apply(Adapted(params, adapters), *inputs)
    assert _error(apply(Adapted(quantize(params, "int8"), adapters), *inputs), plain) < 0.05
    assert _error(apply(params, *inputs), plain) > 0.1


def test_any_part_of_a_model_goes_into_8_bits(tiny_sd3: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it comes from the files, near itself, and what is sensitive stays."""
    monkeypatch.setattr(quantization, "NARROW", 4)
    plain = lcm_jax.load(tiny_sd3)
    texts, vae = plain.quantized("int8w", "text"), plain.quantized("int8", "vae")
    context = texts.encode_prompt(["red heart"])["context"]
    assert 1e-4 < _error(context, plain.encode_prompt(["red heart"])["context"]) < 0.05
    image = np.random.default_rng(0).integers(0, 256, (1, *plain.size, 3), np.uint8)
    assert 1e-4 < _error(vae.encode_image(image), plain.encode_image(image)) < 0.1
    assert not plain.rounded
    kinds = [pipe.params["text_encoder_3"].params for pipe in (texts, plain.quantized("int8", "text"))]
    feed_forwards = [tree["encoder"]["block_0"]["layer_1"]["DenseReluDense"] for tree in kinds]
    assert [isinstance(read_params["wo"]["kernel"], qwix.QArray) for read_params in feed_forwards] == [True, False]
    assert all(isinstance(read_params["wi_0"]["kernel"], qwix.QArray) for read_params in feed_forwards)
    both = texts.quantized("int8", "vae").quantized("int8")
    assert both.rounded == {"text": "int8w", "vae": "int8", "denoiser": "int8"}


@pytest.mark.slow
def test_an_autoencoder_in_8_bits_draws_about_the_same(tiny_sd3: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantization, "NARROW", 4)
    plain = lcm_jax.load(tiny_sd3)
    pictures = [pipe("red heart", steps=1).astype(np.float32) for pipe in (plain, plain.quantized("int8", "vae"))]
    assert 0.0 < np.abs(pictures[1] - pictures[0]).mean() < 8.0


def test_what_becomes_smaller_is_never_whole(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantization, "NARROW", 4)
    plain = lcm_jax.load(tiny_model)
    read_params = plain.quantized("int8").net_params
    assert callable(plain.component("unet")._params)
    for one, other in zip(
        jax.tree.leaves(read_params), jax.tree.leaves(quantize(plain.net_params, "int8")), strict=True
    ):
        np.testing.assert_array_equal(one, other)


def test_parts_and_kinds_are_parsed() -> None:
    assert quantization.parse([]) == {}
    assert quantization.parse(["int8", "text=int8w"]) == {"denoiser": "int8", "text": "int8w"}
    for texts, said in (
        (["int8", "denoiser=int8w"], "'denoiser=int8w' sets the denoiser a second time"),
        (["clip=int8"], "part 'clip' is unknown; known are denoiser, text, vae"),
        (["text="], "quantize '' is unknown; known are int8, int8w, fp8"),
    ):
        with pytest.raises(ValueError, match=said):
            quantization.parse(texts)


def test_what_cannot_be_is_refused(
    tiny_model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = lcm_jax.load(tiny_model)
    with pytest.raises(ValueError, match="quantize 'int4' is unknown; known are int8, int8w, fp8"):
        pipe.quantized("int4")
    if jax.default_backend() == "cpu":
        assert main(["sample", "--model", str(tiny_model), "--prompt", "x", "--quantize", "fp8"]) == 2
        assert "cpu has no 8-bit floats" in capsys.readouterr().err
    read_params = pipe.quantized("int8")
    with pytest.raises(ValueError, match="the denoiser is in int8 already"):
        read_params.quantized("int8w")
    with pytest.raises(ValueError, match="part 'clip' is unknown; known are denoiser, text, vae"):
        read_params.quantized("int8w", "clip")
    with pytest.raises(ValueError, match="in int8, which save does not take"):
        read_params.save(tiny_model.with_name("other"))
    monkeypatch.setattr("lcm_jax.runtime.optional_deps.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"qwix not installed; pip install 'lcm-jax\[quant\]'"):
        quantization.check_kind("int8")


@pytest.mark.slow
def test_pictures_in_8_bits() -> None:
    pipe = lcm_jax.load("openmoji")
    prompts = ["red heart", "cat face", "pizza", "rocket"]
    plain = pipe(prompts, guidance=4.0)
    near = {
        kind: np.asarray(psnr(pipe.quantized(kind)(prompts, guidance=4.0), plain, data_range=255))
        for kind in ("int8", "int8w")
    }
    assert near["int8w"].min() > 38
    assert near["int8"].min() > 25
