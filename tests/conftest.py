"""Shared by all tests: a compilation cache, and a tiny model on disk."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import jax
import pytest

from lcm_jax.nets import UNet, UNetConfig, example_inputs
from lcm_jax.schedules import DDPM
from lcm_jax.weights.folders import Component, Folder, save_component, save_folder
from lcm_jax.weights.scheduler import scheduler_config
from mmdit.text import CLIPTextConfig, CLIPTextModel, CLIPVisionConfig, CLIPVisionModel, train_tokenizer
from vae16 import AutoencoderConfig, AutoencoderKL

# Tiny networks take longer to compile than to run.
jax.config.update("jax_disable_most_optimizations", True)
if jax.config.jax_compilation_cache_dir is None:
    cache = os.environ.get("LCM_JAX_TEST_CACHE") or str(Path(tempfile.gettempdir()) / "lcm_jax_test_cache")
    jax.config.update("jax_compilation_cache_dir", cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)

CAPTIONS = ["red heart", "yellow heart", "woman farmer, medium skin tone", "flag of france", "dog face", "cat face"]


@pytest.fixture(scope="session")
def tiny_components() -> dict[str, Component]:
    """Random networks of a few thousand parameters: f2 autoencoder of 16x16 pictures, text and image tower, UNet."""
    vae = AutoencoderKL(
        AutoencoderConfig(
            block_out_channels=(8, 8), latent_channels=4, norm_num_groups=4, layers_per_block=1, sample_size=16
        )
    )
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=600,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=12,
            projection_dim=8,
            bos_token_id=598,
            eos_token_id=599,
            pad_token_id=599,
        ),
        projection=True,
    )
    vision = CLIPVisionModel(
        CLIPVisionConfig(
            image_size=16,
            patch_size=8,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            projection_dim=8,
        )
    )
    net = UNet(
        UNetConfig(
            sample_size=8,
            in_channels=4,
            out_channels=4,
            block_out_channels=(16,),
            down_block_types=("CrossAttnDownBlock2D",),
            up_block_types=("CrossAttnUpBlock2D",),
            layers_per_block=1,
            attention_head_dim=2,
            cross_attention_dim=16,
            norm_num_groups=4,
        )
    )
    key = jax.random.key(0)
    inputs = {
        "vae": (vae, (jax.numpy.zeros((1, 16, 16, 3)),)),
        "text_encoder": (text, (jax.numpy.zeros((1, 12), jax.numpy.int32),)),
        "image_encoder": (vision, (jax.numpy.zeros((1, 16, 16, 3)),)),
        "unet": (net, example_inputs(net.config)),
    }
    return {name: Component(m, jax.jit(m.init)(key, *args)["params"]) for name, (m, args) in inputs.items()}


@pytest.fixture(scope="session")
def tiny_model(tiny_components: dict[str, Component], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny networks as a diffusers folder with an image encoder beside them."""
    folder = tmp_path_factory.mktemp("tiny")
    tokenizer = train_tokenizer(CAPTIONS, 600, folder / "tokenizer", 12)
    text = tiny_components["text_encoder"].module.config
    assert tokenizer.eos_token_id <= text.vocab_size
    parts = {name: tiny_components[name] for name in ("unet", "vae", "text_encoder")}
    config = scheduler_config(
        DDPM(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"), "epsilon", "ddim"
    )
    save_folder(folder / "model", Folder(components=parts, tokenizer=tokenizer, scheduler=config))
    save_component(folder / "model", "image_encoder", tiny_components["image_encoder"])
    return folder / "model"


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of small pictures with captions beside them."""
    import numpy as np
    from PIL import Image

    folder = tmp_path_factory.mktemp("pictures")
    random = np.random.default_rng(0)
    for i, caption in enumerate(CAPTIONS):
        Image.fromarray(random.integers(0, 255, (16, 16, 3), np.uint8)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(caption)
    return folder
