from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lcm_jax import lora
from lcm_jax.nets.rules import RULES_UNET
from lcm_jax.weights.lora import load_lora, lora_components, save_lora

RNG = np.random.default_rng(0)
FORMATS = ["peft", "diffusers", "kohya"]


def array(*shape):
    return np.asarray(RNG.normal(size=shape), np.float32)


@pytest.fixture(scope="module")
def params():
    stack = {"attn1": {"to_q": {"kernel": array(2, 6, 5)}, "to_out_0": {"kernel": array(2, 5, 6)}}}
    return {
        "down_blocks_0": {
            "resnets_1": {"conv1": {"kernel": array(3, 3, 4, 7), "bias": array(7)}},
            "attentions_0": {"proj_in": {"kernel": array(1, 1, 4, 6)}, "transformer_blocks": stack},
        },
        "time_embedding": {"linear_1": {"kernel": array(4, 4)}},
    }


@pytest.fixture(scope="module")
def adapters(params):
    start = lora.init(jax.random.key(0), params, rank=2, alpha=3.0)
    start["down_blocks_0/resnets_1/conv1/kernel"] = lora.init(
        jax.random.key(1), params, rank=3, alpha=1.0, targets="conv1/kernel"
    )["down_blocks_0/resnets_1/conv1/kernel"]
    to_q = start["down_blocks_0/attentions_0/transformer_blocks/attn1/to_q/kernel"]
    to_q["alpha"] = jnp.asarray([3.0, 5.0])
    return {path: {**a, "up": array(*a["up"].shape)} for path, a in start.items()}


def assert_same(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_without_a_network_the_file_says_where(tmp_path, adapters):
    dense = {k: v for k, v in adapters.items() if "transformer_blocks" not in k}
    save_lora(tmp_path / "a.safetensors", dense)
    assert_same(load_lora(tmp_path / "a.safetensors"), dense)
    save_lora(tmp_path / "k.safetensors", dense, format="kohya")
    with pytest.raises(ValueError, match="like="):
        load_lora(tmp_path / "k.safetensors")


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("component", ["unet", "text_encoder"])
def test_there_and_back(tmp_path, params, adapters, format, component):
    path = tmp_path / "pytorch_lora_weights.safetensors"
    save_lora(path, adapters, RULES_UNET, format=format, component=component)
    assert_same(load_lora(path, params, RULES_UNET, component=component), adapters)
    assert_same(load_lora(tmp_path, jax.eval_shape(lambda: params), RULES_UNET, component=component), adapters)
    assert lora_components(path) == (component,)


@pytest.mark.parametrize(
    ("format", "keys"),
    [
        ("peft", {"unet.down_blocks.0.resnets.1.conv1.lora_A.weight": (3, 4, 3, 3)}),
        (
            "diffusers",
            {"unet.down_blocks.0.attentions.0.transformer_blocks.1.attn1.to_out.0.lora.up.weight": (6, 2)},
        ),
        (
            "kohya",
            {
                "lora_unet_down_blocks_0_attentions_0_transformer_blocks_1_attn1_to_out_0.lora_down.weight": (2, 5),
                "lora_unet_down_blocks_0_attentions_0_proj_in.lora_up.weight": (6, 2, 1, 1),
                "lora_unet_down_blocks_0_attentions_0_proj_in.alpha": (),
            },
        ),
    ],
)
def test_keys_and_shapes_are_those_of_the_format(tmp_path, adapters, format, keys):
    save_lora(tmp_path / "x.safetensors", adapters, RULES_UNET, format=format, dtype="float16")
    tensors = load_file(tmp_path / "x.safetensors")
    assert len(tensors) == 6 * (3 if format == "kohya" else 2)
    for key, shape in keys.items():
        assert tensors[key].shape == shape
        assert tensors[key].dtype == (np.float32 if key.endswith("alpha") else np.float16)


def one(name="to_q", prefix="unet.", layer=0, rank=2, down="lora_A", up="lora_B"):
    stem = f"{prefix}down_blocks.0.attentions.0.transformer_blocks.{layer}.attn1.{name}"
    return {f"{stem}.{down}.weight": array(rank, 6), f"{stem}.{up}.weight": array(5, rank)}


TO_Q = "down_blocks_0/attentions_0/transformer_blocks/attn1/to_q/kernel"


@pytest.mark.parametrize(
    ("prefix", "name", "down", "up"),
    [
        ("base_model.model.", "to_q", "lora_A", "lora_B"),
        ("base_model.model.unet.", "to_q", "lora_A.default", "lora_B.default"),
        ("", "to_q", "lora_A", "lora_B"),
        ("unet.", "to_q", "lora_linear_layer.down", "lora_linear_layer.up"),
        ("unet.", "processor.to_q_lora", "down", "up"),
    ],
)
def test_other_spellings_are_read(tmp_path, params, prefix, name, down, up):
    tensors = one(name, prefix, down=down, up=up)
    save_file(tensors, tmp_path / "x.safetensors")
    adapter = load_lora(tmp_path / "x.safetensors", params, RULES_UNET)[TO_Q]
    a, b = tensors.values()
    np.testing.assert_allclose(lora.delta(adapter)[0], (b @ a).T, rtol=1e-5)
    np.testing.assert_array_equal(lora.delta(adapter)[1], 0)


def test_layers_of_unequal_rank_are_padded_without_changing_their_product(tmp_path, params):
    first, second = one(rank=2), one(layer=1, rank=4)
    stems = [next(iter(t)).removesuffix(".lora_A.weight") for t in (first, second)]
    save_file(first | second | {f"{stems[0]}.alpha": np.array(6.0, np.float32)}, tmp_path / "x.safetensors")
    adapter = load_lora(tmp_path / "x.safetensors", params, RULES_UNET)[TO_Q]
    for i, (tensors, factor) in enumerate(((first, 3.0), (second, 1.0))):
        a, b = tensors.values()
        np.testing.assert_allclose(lora.delta(adapter)[i], factor * (b @ a).T, rtol=1e-5, atol=1e-6)


def test_a_dense_adapter_fits_a_1x1_convolution_and_the_reverse(tmp_path, params):
    stem = "lora_unet_down_blocks_0_attentions_0"
    tensors = {
        f"{stem}_proj_in.lora_down.weight": array(2, 4),
        f"{stem}_proj_in.lora_up.weight": array(6, 2),
        f"{stem}_transformer_blocks_0_attn1_to_q.lora_down.weight": array(2, 6, 1, 1),
        f"{stem}_transformer_blocks_0_attn1_to_q.lora_up.weight": array(5, 2, 1, 1),
    }
    save_file(tensors, tmp_path / "x.safetensors")
    found = load_lora(tmp_path / "x.safetensors", params, RULES_UNET)
    assert found["down_blocks_0/attentions_0/proj_in/kernel"]["down"].shape == (1, 1, 4, 2)
    assert found[TO_Q]["down"].shape == (2, 6, 2)
    lora.check(found, params)


@pytest.mark.parametrize("rslora", [False, True])
def test_the_adapter_config_of_peft_gives_alpha(tmp_path, params, rslora):
    save_file(
        one("to_q", "base_model.model.") | one("to_q", "base_model.model.", layer=1),
        tmp_path / "adapter_model.safetensors",
    )
    config = {"r": 2, "lora_alpha": 8, "alpha_pattern": {r"transformer_blocks.1.attn1.to_q": 5}, "use_rslora": rslora}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    alpha = load_lora(tmp_path, params, RULES_UNET)[TO_Q]["alpha"]
    np.testing.assert_allclose(alpha, np.array([8, 5]) * (2**0.5 if rslora else 1), rtol=1e-6)


def test_only_the_component_asked_for_is_taken(tmp_path, params):
    text = {"lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": array(2, 3)}
    save_file(one(prefix="unet.") | text, tmp_path / "x.safetensors")
    assert list(load_lora(tmp_path / "x.safetensors", params, RULES_UNET)) == [TO_Q]
    assert lora_components(tmp_path / "x.safetensors") == ("unet", "text_encoder")
    with pytest.raises(ValueError, match=r"no adapters for 'transformer', only for text_encoder, unet"):
        load_lora(tmp_path / "x.safetensors", params, RULES_UNET, component="transformer")


def test_what_does_not_fit_is_named(tmp_path, params, adapters):
    path = tmp_path / "x.safetensors"

    def refused(tensors, match):
        save_file(tensors, path)
        with pytest.raises(ValueError, match=match):
            load_lora(path, params, RULES_UNET)

    refused(one("to_v"), r"x\.safetensors: .*1 modules the network lacks: down_blocks.*attn1\.to_v")
    refused(dict(list(one().items())[:1]), r"1 modules without both halves: .*to_q")
    refused({k: v[:, :1] for k, v in one(rank=4).items()}, r"1 modules of another shape: .*down \(4, 1\)")
    refused(
        one() | {"unet.mid_block.dora_scale": array(3)}, r"only plain LoRA.*1 other keys: unet.mid_block.dora_scale"
    )
    refused({"unet.mid_block.alpha": array()}, r"the network lacks: mid_block")
    with pytest.raises(ValueError, match="format='zip': expected one of peft, diffusers, kohya"):
        save_lora(path, adapters, RULES_UNET, format="zip")
    with pytest.raises(ValueError, match="component='vae'"):
        save_lora(path, adapters, RULES_UNET, component="vae")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="holds no LoRA file"):
        load_lora(tmp_path / "empty", params, RULES_UNET)
