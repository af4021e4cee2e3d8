"""LoRA files against diffusers and PEFT: what we save acts the same there, what they save acts the same here."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lcm_jax import lora
from lcm_jax.nets.config import UNetConfig
from lcm_jax.nets.rules import RULES_UNET
from lcm_jax.nets.unet import UNet, abstract_params
from lcm_jax.weights.engine import from_torch
from lcm_jax.weights.lora import load_lora, save_lora

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
diffusers = pytest.importorskip("diffusers")
Pipeline = diffusers.StableDiffusionPipeline

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
    apply = jax.jit(lambda params, x, context: net.apply({"params": params}, x, jnp.array(400), {"context": context}))
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


@pytest.fixture(scope="module")
def adapters(params):
    """LCM-LoRA's layers, two ranks and two alphas; up filled with noise."""
    rng = np.random.default_rng(1)
    shapes = jax.eval_shape(lambda p: lora.init(jax.random.key(0), p, rank=3), params)
    like = shapes | jax.eval_shape(lambda p: lora.init(jax.random.key(0), p, rank=2, targets="mid_block.*conv"), params)
    filled = {
        path: {k: 0.3 * rng.normal(size=x.shape).astype(np.float32) for k, x in a.items()} for path, a in like.items()
    }
    alphas = {path: np.full(a["alpha"].shape, 6 if "to_q" in path else 4, np.float32) for path, a in like.items()}
    return {path: jax.tree.map(jnp.asarray, a | {"alpha": alphas[path]}) for path, a in filled.items()}


@pytest.mark.parametrize("format", ["peft", "diffusers", "kohya"])
def test_diffusers_runs_what_we_save(tmp_path, params, adapters, run, inputs, format):
    if format == "kohya":  # where alphas differ, diffusers 0.42 loses those of attention layers
        adapters = {path: a | {"alpha": jnp.full_like(a["alpha"], 4)} for path, a in adapters.items()}
    save_lora(tmp_path / "pytorch_lora_weights.safetensors", adapters, RULES_UNET, format=format)
    found = run_torch(load_in_diffusers(tmp_path), inputs)
    assert_close(found, run(lora.merge(params, adapters)), run(params))


def test_a_pipeline_takes_our_file(tmp_path, params, adapters, run, inputs):
    save_lora(tmp_path / "pytorch_lora_weights.safetensors", adapters, RULES_UNET)
    scheduler = diffusers.LCMScheduler()
    parts = dict.fromkeys(("vae", "text_encoder", "tokenizer", "safety_checker", "feature_extractor"))
    pipe = Pipeline(unet=new_unet(), scheduler=scheduler, requires_safety_checker=False, **parts)
    pipe.load_lora_weights(tmp_path, adapter_name="lcm")
    pipe.set_adapters(["lcm"], [0.5])
    assert_close(run_torch(pipe.unet, inputs), run(lora.merge(params, adapters, 0.5)), run(params))


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
