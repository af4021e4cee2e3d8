"""The published sizes: networks of diffusers and transformers at full width, there and back, bit for bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lcm_jax.nets import SD15, SDXL
from lcm_jax.weights.component import read_part, to_component, to_part
from mmdit.text import CLIP_BIGG, CLIP_L
from vae16 import AutoencoderConfig

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.slow

WIDE = {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2}
VAE4 = AutoencoderConfig(**WIDE)
VAE16 = AutoencoderConfig(**WIDE, latent_channels=16, use_quant_conv=False, use_post_quant_conv=False)
CLASSES = {
    "sd15": (diffusers.UNet2DConditionModel, SD15, "float32", 859_520_964),
    "sdxl": (diffusers.UNet2DConditionModel, SDXL, "bfloat16", 2_567_463_684),
    "vae": (diffusers.AutoencoderKL, VAE4, "float32", 83_653_863),
    "vae16": (diffusers.AutoencoderKL, VAE16, "float32", 83_819_683),
    "clip_l": (transformers.CLIPTextModel, CLIP_L, "float32", 123_060_480),
    "clip_bigg": (transformers.CLIPTextModelWithProjection, CLIP_BIGG, "float32", 694_659_840),
}


def save_oracle(kind: Any, config: Any, dtype: Any, folder: Path) -> None:
    """A network with random parameters as its own library saves it. No two tensors are alike."""
    values = config.to_dict()
    if issubclass(kind, transformers.PreTrainedModel):
        with torch.device("meta"):
            module = kind(transformers.CLIPTextConfig(**values))
    else:
        with torch.device("meta"):
            module = kind.from_config(values)
    module = module.to(dtype).to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in module.state_dict().values():
            if tensor.is_floating_point():
                tensor.uniform_(-1, 1, generator=generator)
            else:
                tensor.copy_(torch.arange(tensor.numel()).reshape(tensor.shape))
    module.save_pretrained(folder, max_shard_size="20GB")


@pytest.mark.parametrize("name", CLASSES)
def test_there_and_back(name: str, tmp_path: Path) -> None:
    kind, config, dtype, parameters = CLASSES[name]
    save_oracle(kind, config, getattr(torch, dtype), tmp_path)
    described = json.loads((tmp_path / "config.json").read_text())
    part = read_part(tmp_path)
    assert part.kind in (described.get("_class_name"), *described.get("architectures", ()))
    assert part.config == config
    component = to_component(part, dtype=jnp.dtype(dtype))
    assert sum(leaf.size for leaf in jax.tree.leaves(component.params)) == parameters
    back = to_part(component).tensors
    for key, tensor in back.items():
        np.testing.assert_array_equal(tensor.view(np.uint8), np.ascontiguousarray(part.tensors[key]).view(np.uint8))
