"""AutoencoderKL against diffusers, with every weight random."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL as Oracle

from lcm_jax.weights.torch_params import from_torch, to_torch
from vae16 import RULES, AutoencoderConfig, AutoencoderKL

GEOMETRIES = {
    "4 channels, quantised (SD1, SDXL)": {
        "block_out_channels": (8, 16), "layers_per_block": 2, "latent_channels": 4, "norm_num_groups": 4,
    },
    "16 channels, plain (SD3, FLUX)": {
        "block_out_channels": (8, 16), "layers_per_block": 1, "latent_channels": 16, "norm_num_groups": 8,
        "use_quant_conv": False, "use_post_quant_conv": False, "scaling_factor": 1.5305, "shift_factor": 0.0609,
    },
    "one stage, no attention": {
        "block_out_channels": (12,), "layers_per_block": 1, "latent_channels": 8, "norm_num_groups": 3,
        "mid_block_add_attention": False,
    },
}  # fmt: skip


def error(got: object, want: torch.Tensor) -> float:
    reference = want.permute(0, 2, 3, 1).numpy()
    return float(np.abs(np.asarray(got) - reference).max() / np.abs(reference).max())


@pytest.fixture(scope="module", params=GEOMETRIES.values(), ids=GEOMETRIES.keys())
def pair(request):
    torch.set_num_threads(1)
    torch.manual_seed(0)
    keys = request.param
    n = len(keys["block_out_channels"])
    oracle = Oracle(
        **keys, down_block_types=("DownEncoderBlock2D",) * n, up_block_types=("UpDecoderBlock2D",) * n
    ).eval()
    with torch.no_grad():
        for name, p in oracle.named_parameters():
            if p.ndim == 1:
                p.copy_(torch.randn_like(p) * 0.3 + (1.0 if "norm" in name and name.endswith("weight") else 0.0))
    config = AutoencoderConfig.from_dict(dict(oracle.config))
    vae = AutoencoderKL(config)
    like = jax.eval_shape(vae.init, jax.random.key(0), jnp.zeros((1, 16, 16, 3)))["params"]
    tensors = {k: v.numpy() for k, v in oracle.state_dict().items()}
    return oracle, vae, from_torch(tensors, like, RULES, source="oracle"), tensors


def test_encode_and_decode(pair):
    oracle, vae, params, _ = pair
    x = np.random.default_rng(0).uniform(-1, 1, (2, 24, 16, 3)).astype(np.float32)
    f, channels = vae.config.downsample_factor, vae.config.latent_channels
    z = np.random.default_rng(1).normal(size=(2, 24 // f, 16 // f, channels)).astype(np.float32)
    with torch.no_grad():
        posterior = oracle.encode(torch.from_numpy(x).permute(0, 3, 1, 2)).latent_dist
        image = oracle.decode(torch.from_numpy(z).permute(0, 3, 1, 2)).sample
    mean, logvar = jax.jit(lambda p, x: vae.apply({"params": p}, x, method="encode"))(params, x)
    decoded = jax.jit(lambda p, z: vae.apply({"params": p}, z, method="decode"))(params, z)
    errors = {
        "mean": error(mean, posterior.mean), "logvar": error(logvar, posterior.logvar), "decode": error(decoded, image),
    }  # fmt: skip
    assert max(errors.values()) <= 1e-4, errors


def test_weights_there_and_back_are_identical(pair):
    _, _, params, tensors = pair
    back = to_torch(params, RULES)
    assert back.keys() == tensors.keys()
    for name, value in tensors.items():
        np.testing.assert_array_equal(back[name], value)


def test_config_survives_diffusers(pair, tmp_path):
    oracle, vae, _, _ = pair
    oracle.save_config(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    config = AutoencoderConfig.from_dict(saved, source="config.json")
    assert config == vae.config
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    again = Oracle.from_config(Oracle.load_config(tmp_path))
    assert {k: v.shape for k, v in again.state_dict().items()} == {k: v.shape for k, v in oracle.state_dict().items()}
    for key, value in config.to_dict().items():
        if key != "_class_name":
            assert again.config[key] == json.loads(json.dumps(oracle.config[key])) == value
