"""LoRA files against diffusers and PEFT: what we save acts the same there, what they save acts the same here."""

from __future__ import annotations

import copy
import re
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from lcm_jax import lora
from lcm_jax.nets import RULES_UNET, UNet, UNetConfig, abstract_params
from lcm_jax.weights.lora.files import load_lora, load_loras, save_lora, save_loras
from lcm_jax.weights.lora.modules import Network
from lcm_jax.weights.single_file.layouts import mmdit_layout, unet_layout
from lcm_jax.weights.torch_params import from_torch, to_torch
from mmdit import RULES_MMDIT, MMDiT, MMDiTConfig
from mmdit import abstract_params as mmdit_params
from mmdit.rules import RULES_CLIP_TEXT
from mmdit.text import CLIPTextConfig, CLIPTextModel

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")
from diffusers.utils.state_dict_utils import convert_state_dict_to_diffusers, convert_state_dict_to_kohya  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

Pipeline = diffusers.StableDiffusionPipeline
PipelineXL = diffusers.StableDiffusionXLPipeline
Pipeline3 = diffusers.StableDiffusion3Pipeline

CONFIG = {
    "sample_size": 8,
    "block_out_channels": [8, 16],
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "layers_per_block": 1,
    "transformer_layers_per_block": 2,
    "cross_attention_dim": 12,
    "attention_head_dim": 2,
    "norm_num_groups": 4,
}


def new_unet():
    torch.manual_seed(0)
    torch.set_num_threads(1)
    return diffusers.UNet2DConditionModel(**CONFIG).eval()


@pytest.fixture(scope="module")
def net():
    return UNet(UNetConfig.from_dict(CONFIG), scan=True)


@pytest.fixture(scope="module")
def params(net):
    tensors = {name: tensor.numpy() for name, tensor in new_unet().state_dict().items()}
    return from_torch(tensors, abstract_params(net), RULES_UNET)


@pytest.fixture(scope="module")
def inputs():
    rng = np.random.default_rng(0)
    return [rng.normal(size=shape).astype(np.float32) for shape in ((1, 8, 8, 4), (1, 5, 12))]


@pytest.fixture(scope="module")
def run(net, inputs):
    apply = jax.jit(lambda params, x, context: net.apply({"params": params}, x, jnp.array(400.0), {"context": context}))
    return lambda params: np.asarray(apply(params, *inputs))


def run_torch(unet, inputs):
    x, context = (torch.from_numpy(array) for array in inputs)
    with torch.no_grad():
        return unet(x.permute(0, 3, 1, 2), 400, context).sample.permute(0, 2, 3, 1).numpy()


def load_in_diffusers(path):
    unet = new_unet()
    state, alphas, header = Pipeline.lora_state_dict(str(path), return_lora_metadata=True, unet_config=unet.config)
    assert all("lora" in key for key in state)  # what load_lora_weights asks of a file
    Pipeline.load_lora_into_unet(state, alphas, unet, metadata=header)
    return unet


def assert_close(found, expected, base):
    assert np.abs(expected - base).max() > 0.05 * np.abs(base).max()  # the adapters matter
    np.testing.assert_allclose(found, expected, atol=2e-5 * np.abs(expected).max())


def random_adapters(like, targets=lora.DEFAULT_TARGETS, rank=3, alpha=4.0, seed=1):
    """Both halves filled with noise."""
    rng = np.random.default_rng(seed)
    adapters = {}
    for path, kernel in sorted(traverse_util.flatten_dict(like, sep="/").items()):
        if path.endswith("kernel") and re.search(targets, path):
            shape = lora.shapes(kernel, rank)
            matrices = {half: jnp.asarray(0.3 * rng.normal(size=shape[half]), jnp.float32) for half in ("down", "up")}
            adapters[path] = matrices | {"alpha": jnp.full(shape["alpha"], alpha)}
    assert adapters
    return adapters


@pytest.fixture(scope="module")
def adapters(params):
    """LCM-LoRA's layers, two ranks and two alphas."""
    mixed = random_adapters(params) | random_adapters(params, "mid_block.*conv", rank=2)
    return mixed | random_adapters(params, "to_q/kernel", alpha=6.0)


@pytest.mark.parametrize("format", ["peft", "diffusers", "kohya"])
def test_diffusers_runs_what_we_save(tmp_path, params, adapters, run, inputs, format):
    if format == "kohya":  # where alphas differ, diffusers 0.42 loses those of attention layers
        adapters = {path: a | {"alpha": jnp.full_like(a["alpha"], 4)} for path, a in adapters.items()}
    save_lora(tmp_path / "pytorch_lora_weights.safetensors", adapters, RULES_UNET, format=format)
    found = run_torch(load_in_diffusers(tmp_path), inputs)
    assert_close(found, run(lora.merge(params, adapters)), run(params))


def test_a_pipeline_takes_our_file(tmp_path, params, adapters, run, inputs):
    save_lora(tmp_path / "pytorch_lora_weights.safetensors", adapters, RULES_UNET)
    pipe = new_pipeline(new_unet())
    pipe.load_lora_weights(tmp_path, adapter_name="lcm")
    pipe.set_adapters(["lcm"], [0.5])
    assert_close(run_torch(pipe.unet, inputs), run(lora.merge(params, adapters, 0.5)), run(params))


def new_pipeline(unet):
    parts = dict.fromkeys(("vae", "text_encoder", "tokenizer", "safety_checker", "feature_extractor"))
    return Pipeline(unet=unet, scheduler=diffusers.LCMScheduler(), requires_safety_checker=False, **parts)


def test_two_loras_with_weights(tmp_path, params, adapters, run, inputs):
    """LCM-LoRA with a style: set_adapters and fuse_lora do what merge_all does."""
    style = random_adapters(params, "attn[12]/to_[kv]/kernel|conv_in", rank=2, alpha=1.0, seed=2)
    save_lora(tmp_path / "lcm" / "pytorch_lora_weights.safetensors", adapters)
    save_lora(tmp_path / "style" / "pytorch_lora_weights.safetensors", style)
    pipe = new_pipeline(new_unet())
    for name in ("lcm", "style"):
        pipe.load_lora_weights(tmp_path / name, adapter_name=name)
    pipe.set_adapters(["lcm", "style"], [1.0, 0.8])
    expected = run_torch(pipe.unet, inputs)
    assert_close(run(lora.merge_all(params, [(adapters, 1.0), (style, 0.8)])), expected, run(params))
    pipe.fuse_lora(adapter_names=["lcm", "style"])
    pipe.unload_lora_weights()
    fused = {name: tensor.numpy() for name, tensor in pipe.unet.state_dict().items()}
    merged = to_torch(lora.merge_all(params, [(adapters, 1.0), (style, 0.8)]), RULES_UNET)
    assert fused.keys() == merged.keys()
    for name, tensor in merged.items():
        np.testing.assert_allclose(tensor, fused[name], atol=1e-5, err_msg=name)
    back = lora.extract(params, from_torch(fused, params, RULES_UNET), rank=5, targets="kernel$")
    assert max(back.relative_error.values()) < 1e-4
    assert back.untouched == []
    assert_close(run(lora.merge(params, back.adapters)), expected, run(params))


@pytest.mark.parametrize("header", [False, True])
def test_we_run_what_diffusers_saves(tmp_path, params, run, inputs, header):
    unet = new_unet()
    config = peft.LoraConfig(
        r=4,
        lora_alpha=8 if header else 4,
        alpha_pattern={"attn1.to_v": 2} if header else {},
        target_modules=[
            "to_q",
            "to_v",
            "to_out.0",
            "proj_in",
            "ff.net.0.proj",
            "conv1",
            "conv_shortcut",
            "time_emb_proj",
        ],
    )
    unet.add_adapter(config)
    with torch.no_grad():
        for name, weight in unet.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.2)
    layers = peft.get_peft_model_state_dict(unet)
    more = {"unet_lora_adapter_metadata": config.to_dict() | {"target_modules": sorted(config.target_modules)}}
    Pipeline.save_lora_weights(tmp_path, unet_lora_layers=layers, **(more if header else {}))
    adapters = load_lora(tmp_path, params, RULES_UNET)
    assert_close(run(lora.merge(params, adapters)), run_torch(unet, inputs), run(params))


# SDXL, SSD-1B and SD3. Networks are compared elsewhere: here PyTorch runs its LoRA layers, and weights that we merged.

XL = {
    "sample_size": 8,
    "block_out_channels": [8, 16],
    "norm_num_groups": 4,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
    "layers_per_block": 1,
    "transformer_layers_per_block": [1, 2],
    "attention_head_dim": [2, 4],
    "cross_attention_dim": 12,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 4,
    "projection_class_embeddings_input_dim": 30,
}
SSD1B = XL | {
    "mid_block_type": "UNetMidBlock2D",
    "transformer_layers_per_block": [1, [2]],
    "reverse_transformer_layers_per_block": [[1, 2], 1],
}
TEXT = {
    "vocab_size": 20,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 8,
    "projection_dim": 10,
    "eos_token_id": 19,
}
SD3 = {
    "sample_size": 8,
    "num_layers": 3,
    "attention_head_dim": 8,
    "num_attention_heads": 2,
    "joint_attention_dim": 12,
    "caption_projection_dim": 16,
    "pooled_projection_dim": 6,
    "in_channels": 4,
    "out_channels": 4,
    "pos_embed_max_size": 6,
    "dual_attention_layers": [0],
    "qk_norm": "rms_norm",
}


@cache
def build(name):
    """A component of PyTorch's, and ours without parameters."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    if name.startswith("text_encoder"):
        kind = transformers.CLIPTextModel if name == "text_encoder" else transformers.CLIPTextModelWithProjection
        model = CLIPTextModel(CLIPTextConfig(**TEXT), projection=name != "text_encoder")
        like = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
        return kind(transformers.CLIPTextConfig(**TEXT)).eval(), Network(like, RULES_CLIP_TEXT)
    if name == "transformer":
        config = MMDiTConfig.from_dict(SD3)
        like = mmdit_params(MMDiT(config, scan=True))
        return diffusers.SD3Transformer2DModel(**SD3).eval(), Network(like, RULES_MMDIT, mmdit_layout(config))
    values = {"unet": XL, "ssd1b": SSD1B}[name]
    config = UNetConfig.from_dict(values)
    network = Network(abstract_params(UNet(config, scan=True)), RULES_UNET, unet_layout(config))
    return diffusers.UNet2DConditionModel(**values).eval(), network


def new_model(name):
    return copy.deepcopy(build(name)[0])


def run_model(model):
    """The output of a component of PyTorch's for inputs of its own."""
    rng = np.random.default_rng(0)

    def noise(*shape):
        return torch.from_numpy(rng.normal(size=shape).astype(np.float32))

    with torch.no_grad():
        if isinstance(model, diffusers.UNet2DConditionModel):
            added = {"text_embeds": noise(1, 6), "time_ids": noise(1, 6)}
            return model(noise(1, 4, 8, 8), 400, noise(1, 5, 12), added_cond_kwargs=added).sample.numpy()
        if isinstance(model, diffusers.SD3Transformer2DModel):
            return model(noise(1, 4, 8, 8), noise(1, 5, 12), noise(1, 6), torch.tensor([400])).sample.numpy()
        output = model(torch.tensor([[1, 5, 7, 3, 19, 19]]))
        return (output[0] if hasattr(output, "text_embeds") else output.last_hidden_state).numpy()


@cache
def base(name):
    """A component's output, and its parameters in our tree."""
    model, network = build(name)
    tensors = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    if isinstance(model, transformers.CLIPTextModel):  # which has no `text_model.` in transformers 5
        tensors = {f"text_model.{name.removeprefix('text_model.')}": tensor for name, tensor in tensors.items()}
    return run_model(model), from_torch(tensors, network.like, network.rules)


def run_merged(name, adapters):
    """The output of a component whose weights we merged."""
    model = new_model(name)
    state = model.state_dict()
    for key, tensor in to_torch(lora.merge(base(name)[1], adapters), build(name)[1].rules).items():
        state[key if key in state else key.removeprefix("text_model.")].copy_(torch.tensor(tensor))
    return run_model(model)


def new_xl(kind="unet"):
    models = {name: new_model(kind if name == "unet" else name) for name in ("unet", "text_encoder", "text_encoder_2")}
    parts = dict.fromkeys(("vae", "tokenizer", "tokenizer_2"))
    return PipelineXL(scheduler=diffusers.LCMScheduler(), **models, **parts)


@pytest.fixture(scope="module")
def xl():
    """Networks and adapters of SDXL: LCM-LoRA's layers, and the attentions of both text encoders."""
    networks = {name: build(name)[1] for name in ("unet", "text_encoder", "text_encoder_2")}
    adapters = {
        "unet": random_adapters(networks["unet"].like),
        "text_encoder": random_adapters(networks["text_encoder"].like, lora.CLIP_TARGETS, rank=2, alpha=3.0),
        "text_encoder_2": random_adapters(networks["text_encoder_2"].like, "(_proj|fc[12])/kernel", alpha=2.0),
    }
    return networks, adapters


def differ(adapters, component):
    """With ranks and alphas that differ within the component."""
    target = "to_q/kernel" if component == "unet" else "q_proj/kernel"
    like = {path: a for path, a in adapters.items() if path.endswith(target)}
    rng = np.random.default_rng(5)
    wider = {}
    for path, a in like.items():
        extra = {half: np.asarray(rng.normal(size=a[half].shape), np.float32) * 0.3 for half in ("down", "up")}
        wider[path] = {
            "down": jnp.concatenate([a["down"], extra["down"]], axis=-1),
            "up": jnp.concatenate([a["up"], extra["up"]], axis=-2),
            "alpha": a["alpha"] + 1,
        }
    return adapters | wider


@pytest.mark.parametrize("format", ["peft", "diffusers", "kohya"])
def test_the_pipeline_of_sdxl_takes_our_file(tmp_path, xl, format):
    networks, adapters = xl
    if format != "kohya":  # of which diffusers loses alphas that differ
        adapters = {name: differ(adapter, name) for name, adapter in adapters.items()}
    save_loras(tmp_path / "pytorch_lora_weights.safetensors", adapters, networks, format=format)
    pipe = new_xl()
    pipe.load_lora_weights(tmp_path)
    for name, adapter in adapters.items():
        assert_close(run_merged(name, adapter), run_model(getattr(pipe, name)), base(name)[0])


@pytest.mark.parametrize("kind", ["unet", "ssd1b"])
@pytest.mark.parametrize("original", [False, True], ids=["diffusers", "sgm"])
def test_lcm_lora_of_sdxl_and_ssd1b_as_a_kohya_file(tmp_path, kind, original):
    network = build(kind)[1]
    adapters = random_adapters(network.like)
    layout = network.layout if original else None
    save_lora(tmp_path / "pytorch_lora_weights.safetensors", adapters, format="kohya", layout=layout, dtype="float16")
    pipe = new_xl(kind)
    pipe.load_lora_weights(tmp_path)
    stored = load_lora(tmp_path, network.like, layout=network.layout)
    assert_close(run_merged(kind, stored), run_model(pipe.unet), base(kind)[0])


def add_lora(model, targets, rank=4, alpha=4, std=0.2):
    """PEFT's layers in a model, B filled; their state and config."""
    config = peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets)
    model.add_adapter(config)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=std)
    return peft.get_peft_model_state_dict(model, adapter_name="default"), config


@pytest.mark.parametrize("style", ["plain", "header", "kohya"])
def test_we_run_what_the_pipeline_of_sdxl_saves(tmp_path, xl, style):
    pipe, alpha = new_xl(), 8 if style == "header" else 4
    linear = ["to_q", "to_v", "to_out.0", "proj_in", "ff.net.0.proj", "conv1", "downsamplers.0.conv"]
    states = {"unet": add_lora(pipe.unet, linear, alpha=alpha)}
    for name in ("text_encoder", "text_encoder_2"):
        states[name] = add_lora(getattr(pipe, name), ["q_proj", "out_proj"], alpha=alpha)
    if style == "kohya":
        tensors = {f"{name}.{key}": tensor for name, (state, _) in states.items() for key, tensor in state.items()}
        save_file(convert_state_dict_to_kohya(tensors), tmp_path / "pytorch_lora_weights.safetensors")
    else:
        layers = {f"{name}_lora_layers": state for name, (state, _) in states.items()}
        if style == "plain":  # as diffusers' training scripts do
            layers |= {k: convert_state_dict_to_diffusers(v) for k, v in layers.items() if k.startswith("text_encoder")}
        else:
            for name, (_, config) in states.items():
                values = config.to_dict() | {"target_modules": sorted(config.target_modules)}
                layers[f"{name}_lora_adapter_metadata"] = values
        PipelineXL.save_lora_weights(tmp_path, **layers)
    found = load_loras(tmp_path, xl[0])
    assert found.keys() == states.keys()
    for name, adapter in found.items():
        assert_close(run_merged(name, adapter), run_model(getattr(pipe, name)), base(name)[0])


@pytest.mark.parametrize("format", ["peft", "diffusers"])
def test_the_pipeline_of_sd3_takes_our_file(tmp_path, format):
    transformer, network = new_model("transformer"), build("transformer")[1]
    adapters = random_adapters(network.like, lora.MMDIT_TARGETS, alpha=2.0)
    adapters |= random_adapters(network.like, "net_2/kernel")
    save_lora(tmp_path / "x.safetensors", adapters, network.rules, format=format, component="transformer")
    state, header = Pipeline3.lora_state_dict(tmp_path / "x.safetensors", return_lora_metadata=True)
    Pipeline3.load_lora_into_transformer(state, transformer, metadata=header)
    assert_close(run_merged("transformer", adapters), run_model(transformer), base("transformer")[0])


def test_we_run_what_the_pipeline_of_sd3_saves(tmp_path):
    transformer, network = new_model("transformer"), build("transformer")[1]
    targets = [
        "attn.to_q",
        "attn.to_k",
        "attn.to_v",
        "attn.to_out.0",
        "attn.add_k_proj",
        "attn.to_add_out",
        "attn2.to_v",
    ]
    Pipeline3.save_lora_weights(tmp_path, transformer_lora_layers=add_lora(transformer, targets, std=0.6)[0])
    found = load_loras(tmp_path, {"transformer": network})["transformer"]
    assert_close(run_merged("transformer", found), run_model(transformer), base("transformer")[0])
    # and from there to the fused names of the original and back
    save_loras(tmp_path / "k.safetensors", {"transformer": found}, {"transformer": network}, format="kohya")
    again = load_loras(tmp_path / "k.safetensors", {"transformer": network})["transformer"]
    assert_close(run_merged("transformer", again), run_model(transformer), base("transformer")[0])
