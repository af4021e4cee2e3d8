"""LoRA files by network: the original names of SDXL, SD1 and SD3, text encoders, several networks in one file."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from safetensors.numpy import load_file, save_file

from lcm_jax import lora
from lcm_jax.nets import RULES_UNET, UNet, UNetConfig, abstract_params
from lcm_jax.weights.lora.files import load_lora, load_loras, lora_components, save_lora, save_loras
from lcm_jax.weights.lora.modules import Network
from lcm_jax.weights.single_file.layouts import mmdit_layout, unet_layout
from mmdit import model as mmdit
from mmdit.config import MMDiTConfig
from mmdit.rules import RULES_CLIP_TEXT, RULES_MMDIT, RULES_T5
from mmdit.text import CLIPTextConfig, CLIPTextModel, T5Config, T5Encoder

RNG = np.random.default_rng(0)
FORMATS = ["peft", "diffusers", "kohya"]
TO_K = "down_blocks_0/attentions_0/transformer_blocks_0/attn2/to_k/kernel"
CROSS = traverse_util.unflatten_dict({TO_K: jax.ShapeDtypeStruct((6, 4), jnp.float32)}, sep="/")


def array(*shape):
    return np.asarray(RNG.normal(size=shape), np.float32)


def random_adapters(like, targets=r"kernel$", rank=2, alpha=3.0):
    """Both halves filled."""
    adapters = {}
    for path, kernel in traverse_util.flatten_dict(like, sep="/").items():
        if path.endswith("kernel") and re.search(targets, path):
            shape = lora.shapes(kernel, rank)
            matrices = {half: jnp.asarray(array(*shape[half])) for half in ("down", "up")}
            adapters[path] = matrices | {"alpha": jnp.full(shape["alpha"], alpha, jnp.float32)}
    assert adapters
    return adapters


def one(prefix):
    """A file for the network CROSS."""
    stem = f"{prefix}down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
    return {f"{stem}.lora_A.weight": array(2, 6), f"{stem}.lora_B.weight": array(4, 2)}


def assert_same(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def assert_same_change(found, expected):
    assert found.keys() == expected.keys()
    for path in found:
        np.testing.assert_allclose(lora.delta(found[path]), lora.delta(expected[path]), rtol=1e-5, atol=1e-5)


# The original names of SDXL, SD1 and SD3


@pytest.fixture(scope="module")
def sdxl():
    """A network with SDXL's blocks: three levels of two layers, attention in the lower two."""
    config = UNetConfig(
        block_out_channels=(4, 8, 12),
        norm_num_groups=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 3),
        attention_head_dim=2,
        cross_attention_dim=6,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=30,
    )
    return Network(abstract_params(UNet(config, scan=True)), RULES_UNET, unet_layout(config))


def test_sdxl_has_the_names_of_sgm(tmp_path, sdxl):
    adapters = random_adapters(sdxl.like)
    save_lora(tmp_path / "x.safetensors", adapters, format="kohya", layout=sdxl.layout)
    found = {key.split(".")[0] for key in load_file(tmp_path / "x.safetensors")}
    assert {f"lora_unet_{name}" for name in (  # of published files
        "input_blocks_1_0_in_layers_2", "input_blocks_1_0_emb_layers_1", "input_blocks_3_0_op",
        "input_blocks_4_0_skip_connection", "input_blocks_4_1_proj_in",
        "input_blocks_4_1_transformer_blocks_0_attn1_to_q", "input_blocks_8_1_transformer_blocks_2_ff_net_0_proj",
        "middle_block_0_out_layers_3", "middle_block_1_transformer_blocks_2_attn2_to_out_0",
        "output_blocks_2_2_conv", "output_blocks_5_1_transformer_blocks_1_attn2_to_k", "output_blocks_8_0_in_layers_2",
        "time_embed_0", "label_emb_0_2", "out_2",
    )} <= found  # fmt: skip
    assert not any("down_blocks" in name or "resnets" in name for name in found)
    assert_same(load_lora(tmp_path / "x.safetensors", sdxl.like, layout=sdxl.layout), adapters)
    with pytest.raises(ValueError, match=r"names are of original files: pass layout="):
        load_lora(tmp_path / "x.safetensors", sdxl.like)
    save_lora(tmp_path / "d.safetensors", adapters, format="kohya")  # and SD1's way, of the same network
    assert_same(load_lora(tmp_path / "d.safetensors", sdxl.like, layout=sdxl.layout), adapters)


def test_names_of_ldm_and_of_comfyui(tmp_path):
    layout, stem = unet_layout(UNetConfig()), "input_blocks.1.1.transformer_blocks.0.attn2.to_k"
    path = tmp_path / "x.safetensors"
    for key in (f"lora_unet_{stem.replace('.', '_')}", f"diffusion_model.{stem}"):
        a, b = array(3, 6), array(4, 3)
        save_file({f"{key}.lora_down.weight": a, f"{key}.lora_up.weight": b}, path)
        [(name, adapter)] = load_lora(path, CROSS, layout=layout).items()
        assert name == TO_K
        np.testing.assert_allclose(lora.delta(adapter), (b @ a).T, rtol=1e-5, atol=1e-6)


MMDIT = MMDiTConfig(
    num_layers=3,
    attention_head_dim=4,
    num_attention_heads=2,
    caption_projection_dim=8,
    joint_attention_dim=6,
    pooled_projection_dim=5,
    pos_embed_max_size=4,
)


@pytest.fixture(scope="module", params=[False, True], ids=["apart", "stacked"])
def sd3(request):
    return Network(mmdit.abstract_params(mmdit.MMDiT(MMDIT, scan=request.param)), RULES_MMDIT, mmdit_layout(MMDIT))


def load_sd3(path, network):
    return load_lora(path, network.like, network.rules, layout=network.layout)


def save_sd3(path, adapters, network):
    save_lora(path, adapters, network.rules, format="kohya", layout=network.layout, component="transformer")


def layer_change(adapters, block, name):
    """The change of a layer of the MMDiT, in PyTorch's axes."""
    if f"transformer_blocks_{block}/{name}/kernel" in adapters:
        return np.asarray(lora.delta(adapters[f"transformer_blocks_{block}/{name}/kernel"])).T
    return np.asarray(lora.delta(adapters[f"transformer_blocks/{name}/kernel"]))[block].T


def test_fused_attention_is_split(tmp_path, sd3):
    tensors, changes = {}, {}
    for block in range(3):
        for stream, names in (("x", ("to_q", "to_k", "to_v")), ("context", ("add_q_proj", "add_k_proj", "add_v_proj"))):
            a, b, alpha = array(4, 8), array(24, 4), np.float32(2 + block)
            stem = f"lora_unet_joint_blocks_{block}_{stream}_block_attn_qkv"
            tensors |= {f"{stem}.lora_down.weight": a, f"{stem}.lora_up.weight": b, f"{stem}.alpha": np.array(alpha)}
            changes[block, names] = alpha / 4 * (b @ a)
    save_file(tensors, tmp_path / "x.safetensors")
    assert lora_components(tmp_path / "x.safetensors") == ("transformer",)
    adapters = load_sd3(tmp_path / "x.safetensors", sd3)
    lora.check_adapters(adapters, sd3.like)
    for (block, names), change in changes.items():
        found = np.concatenate([layer_change(adapters, block, f"attn/{name}") for name in names])
        np.testing.assert_allclose(found, change, rtol=1e-5, atol=1e-5)
    save_sd3(tmp_path / "y.safetensors", adapters, sd3)
    assert_same(load_file(tmp_path / "y.safetensors"), tensors)  # shared halves stay shared, bit by bit


@pytest.mark.parametrize("alphas", [(2, 2, 2), (1, 2, 4)], ids=["equal", "unequal"])
def test_layers_trained_apart_are_fused_block_by_block(tmp_path, sd3, alphas):
    targets = [f"attn/{name}/kernel$" for name in ("to_q", "to_k", "add_v_proj", "to_out_0")]
    adapters = {}
    for target, alpha in zip(targets, (*alphas, 1), strict=True):  # to_v has none
        adapters |= random_adapters(sd3.like, target, alpha=alpha)
    path = tmp_path / "x.safetensors"
    save_sd3(path, adapters, sd3)
    tensors = load_file(path)
    assert tensors["lora_unet_joint_blocks_0_x_block_attn_qkv.lora_up.weight"].shape == (24, 4)
    assert tensors["lora_unet_joint_blocks_2_x_block_attn_proj.lora_down.weight"].shape == (2, 8)
    found = load_sd3(path, sd3)
    extra = {name: found.pop(name) for name in sorted(found.keys() - adapters.keys())}
    assert extra
    for adapter in extra.values():
        np.testing.assert_array_equal(adapter["up"], 0)
    assert_same_change(found, adapters)
    assert {a["down"].shape[-1] for a in found.values()} == {2}
    if len(set(alphas)) == 1:
        assert_same(found, adapters)


def test_modulations_of_the_last_layer_have_shift_and_scale_in_the_other_order(tmp_path, sd3):
    a, b = array(2, 8), array(16, 2)
    stem = "lora_unet_final_layer_adaLN_modulation_1"
    tensors = {f"{stem}.lora_down.weight": a, f"{stem}.lora_up.weight": b, f"{stem}.alpha": np.array(2, np.float32)}
    save_file(tensors, tmp_path / "x.safetensors")
    adapters = load_sd3(tmp_path / "x.safetensors", sd3)
    change = (b @ a).T
    swapped = np.concatenate([change[:, 8:], change[:, :8]], axis=1)
    np.testing.assert_allclose(lora.delta(adapters["norm_out/linear/kernel"]), swapped, rtol=1e-5, atol=1e-6)
    save_sd3(tmp_path / "y.safetensors", adapters, sd3)
    assert_same(load_file(tmp_path / "y.safetensors"), tensors)


@pytest.mark.parametrize("format", FORMATS)
def test_the_mmdit_in_the_names_of_diffusers(tmp_path, sd3, format):
    adapters = random_adapters(sd3.like, lora.MMDIT_TARGETS)
    save_lora(tmp_path / "x.safetensors", adapters, sd3.rules, format=format, component="transformer")
    keys = {"peft": "transformer.transformer_blocks.0.attn.to_q.lora_A.weight",
        "diffusers": "transformer.transformer_blocks.0.attn.to_q.lora.down.weight",
        "kohya": "lora_transformer_transformer_blocks_0_attn_to_q.lora_down.weight"}  # fmt: skip
    assert keys[format] in load_file(tmp_path / "x.safetensors")
    assert_same(load_sd3(tmp_path / "x.safetensors", sd3), adapters)


# Text encoders, and several networks in one file


@pytest.fixture(scope="module")
def text():
    config = CLIPTextConfig(
        vocab_size=9, hidden_size=4, intermediate_size=6, num_hidden_layers=2, num_attention_heads=2, projection_dim=3
    )
    model = CLIPTextModel(config, projection=True, scan=True)
    like = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
    return Network(like, RULES_CLIP_TEXT)


@pytest.mark.parametrize(
    ("component", "module", "down", "up"),
    [
        ("text_encoder", "lora_te_text_model_encoder_layers_1_self_attn_q_proj", "lora_down", "lora_up"),
        ("text_encoder", "lora_te1_text_model_encoder_layers_1_self_attn_q_proj", "lora_down", "lora_up"),
        ("text_encoder_2", "lora_te2_text_model_encoder_layers_1_self_attn_q_proj", "lora_down", "lora_up"),
        ("text_encoder_3", "lora_te3_text_model_encoder_layers_1_self_attn_q_proj", "lora_down", "lora_up"),
        ("text_encoder", "text_encoder.text_model.encoder.layers.1.self_attn.q_proj", "lora_A", "lora_B"),
        ("text_encoder_2", "text_encoder_2.encoder.layers.1.self_attn.q_proj", "lora_A", "lora_B"),
        ("text_encoder", "base_model.model.encoder.layers.1.self_attn.q_proj", "lora_A.default", "lora_B.default"),
        (
            "text_encoder",
            "text_encoder.text_model.encoder.layers.1.self_attn.q_proj",
            "lora_linear_layer.down",
            "lora_linear_layer.up",
        ),
        ("text_encoder", "text_encoder.text_model.encoder.layers.1.self_attn.to_q_lora", "down", "up"),
    ],
)
def test_spellings_of_text_encoders(tmp_path, text, component, module, down, up):
    a, b = array(2, 4), array(4, 2)
    path = tmp_path / "x.safetensors"
    save_file({f"{module}.{down}.weight": a, f"{module}.{up}.weight": b}, path)
    [(name, adapter)] = load_lora(path, text.like, text.rules, component=component).items()
    assert name == "text_model/encoder/layers/self_attn/q_proj/kernel"
    np.testing.assert_allclose(lora.delta(adapter)[1], (b @ a).T, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(lora.delta(adapter)[0], 0)


def test_t5_is_the_third_text_encoder(tmp_path):
    config = T5Config(
        vocab_size=9, d_model=4, d_kv=3, d_ff=6, num_layers=2, num_heads=2, feed_forward_proj="gated-gelu"
    )
    model, path = T5Encoder(config, scan=True), tmp_path / "x.safetensors"
    like = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
    a, b = array(2, 4), array(6, 2)
    stem = "lora_te3_encoder_block_1_layer_0_SelfAttention_q"
    save_file({f"{stem}.lora_down.weight": a, f"{stem}.lora_up.weight": b}, path)
    [(name, adapters)] = load_loras(path, {"text_encoder_3": Network(like, RULES_T5)}).items()
    [adapter] = adapters.values()
    assert name == "text_encoder_3"
    np.testing.assert_allclose(lora.delta(adapter)[1], (b @ a).T, rtol=1e-5, atol=1e-6)


@pytest.fixture(scope="module")
def xl(sdxl, text):
    """SDXL's networks and adapters for all three; ranks and alphas differ."""
    networks = {"unet": sdxl, "text_encoder": text, "text_encoder_2": text}
    attention = random_adapters(text.like, lora.CLIP_TARGETS, rank=3)
    adapters = {
        "unet": random_adapters(sdxl.like, lora.DEFAULT_TARGETS, alpha=1.0),
        "text_encoder": attention | random_adapters(text.like, "fc1/kernel"),
        "text_encoder_2": random_adapters(text.like, "(_proj|text_projection)/kernel", alpha=4.0),
    }
    return networks, adapters


@pytest.mark.parametrize("format", FORMATS)
def test_all_networks_in_one_file(tmp_path, xl, format):
    networks, adapters = xl
    save_loras(tmp_path / "pytorch_lora_weights.safetensors", adapters, networks, format=format)
    assert_same(load_loras(tmp_path, networks | {"vae": Network({}, ())}), adapters)
    stem = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
    keys = {
        "peft": (f"{stem}.lora_A.weight", "text_encoder_2.text_projection.lora_A.weight"),
        "diffusers": (
            f"{stem}.lora_linear_layer.down.weight",
            "text_encoder_2.text_projection.lora.down.weight",
        ),
        "kohya": (
            "lora_te1_text_model_encoder_layers_0_self_attn_q_proj.lora_down.weight",
            "lora_te2_text_projection.lora_down.weight",
        ),
    }
    assert set(keys[format]) <= load_file(tmp_path / "pytorch_lora_weights.safetensors").keys()


def test_a_nameless_file_is_of_the_network_that_denoises(tmp_path, text, sd3):
    networks = {"text_encoder": text, "unet": Network(CROSS, RULES_UNET)}
    save_file(one("base_model.model."), tmp_path / "x.safetensors")
    [(name, found)] = load_loras(tmp_path / "x.safetensors", networks).items()
    assert (name, list(found)) == ("unet", [TO_K])
    stem = "transformer_blocks.0.attn.to_q"
    save_file({f"{stem}.lora_A.weight": array(2, 8), f"{stem}.lora_B.weight": array(8, 2)}, tmp_path / "x.safetensors")
    assert load_loras(tmp_path / "x.safetensors", {"transformer": sd3, "text_encoder": text}).keys() == {"transformer"}


def test_no_part_of_a_file_is_left_out_in_silence(tmp_path, text):
    path = tmp_path / "x.safetensors"
    te = {
        "lora_te2_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": array(2, 3),
        "lora_te2_text_model_encoder_layers_0_mlp_fc1.lora_up.weight": array(3, 2),
    }
    save_file(one("unet.") | te, path)
    networks = {"text_encoder": text, "unet": Network(CROSS, RULES_UNET)}
    with pytest.raises(ValueError, match=r"adapters for text_encoder_2, but the model has only text_encoder, unet"):
        load_loras(path, networks)
    save_file(one("unet.") | one(""), path)
    with pytest.raises(ValueError, match=r"1 modules without the network's name \(down_blocks\.0"):
        load_loras(path, networks)
    flux = "transformer.single_transformer_blocks.0.attn.to_k"
    save_file({f"{flux}.lora_A.weight": array(2, 3072), f"{flux}.lora_B.weight": array(3072, 2)}, path)
    with pytest.raises(ValueError, match=r"transformer \(it is made for FLUX \(text 3072 wide\)\), but the model"):
        load_loras(path, networks)
