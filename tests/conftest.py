"""Shared by all tests: a compilation cache, and a tiny model on disk."""

from __future__ import annotations

import ctypes
import dataclasses
import gc
import os
import subprocess
import sys
import tempfile
import types
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jaxtyping
import pytest
from beartype import BeartypeConf, beartype
from flax import traverse_util
from jaxtyping import install_import_hook

# Every annotated function of the library checks the types, shapes and dtypes of its arguments and its result.
# LCM_JAX_CHECK_TYPES=0 switches that off, to debug a test faster.
if os.environ.get("LCM_JAX_CHECK_TYPES", "1") != "0":
    checker = types.ModuleType("lcm_jax_type_checker")
    checker.check = beartype(conf=BeartypeConf(is_pep484_tower=True))  # an int is a float
    sys.modules["lcm_jax_type_checker"] = checker
    install_import_hook(["lcm_jax", "mmdit", "vae16"], "lcm_jax_type_checker.check")

import mmdit
from lcm_jax.diffusion.schedules import DDPM, RectifiedFlow
from lcm_jax.nets import UNet, UNetConfig, example_inputs
from lcm_jax.runtime.user_code import load_object
from lcm_jax.weights.diffusers_folder import Component, Folder, save_component, save_folder
from lcm_jax.weights.scheduler_config import scheduler_config
from mmdit import MMDiT, MMDiTConfig
from mmdit.text import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    T5Config,
    T5Encoder,
    train_tokenizer,
    train_unigram,
)
from vae16 import AutoencoderConfig, AutoencoderKL

# The method of docs/examples, a file outside the library, is tested as the library's own are.
load_object(f"{Path(__file__).parents[1]}/docs/examples/own_method.py:KnowledgeDistillation", option="tests")

# Tiny networks take longer to compile than to run, and twice as long with XLA's newer emitters, whose results differ in
# rounding alone. XLA reads the flags when a first device is used; it ends a process whose flags it does not know.
jax.config.update("jax_disable_most_optimizations", True)
if jax.__version_info__[:2] == (0, 10):
    FAST_COMPILER = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FAST_COMPILER}".strip()
if jax.config.jax_compilation_cache_dir is None:
    cache = os.environ.get("LCM_JAX_TEST_CACHE") or str(Path(tempfile.gettempdir()) / "lcm_jax_test_cache")
    jax.config.update("jax_compilation_cache_dir", cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)


@pytest.fixture(autouse=True)
def _types_are_checked(request: pytest.FixtureRequest) -> Iterator[None]:
    """A test marked `wrong_types` hands the library what its annotations forbid, to see the library's own error."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", request.node.get_closest_marker("wrong_types") is not None)
    yield
    jaxtyping.config.update("jaxtyping_disable", before)


RESIDENT = 4 * 2**30  # bytes of this process, from which on compiled programs are dropped


@pytest.fixture(autouse=True)
def _memory_is_given_back() -> Iterator[None]:
    """Two workers have 24 GB, and a test at full width takes 12 of them: drop what earlier tests have compiled."""
    yield
    pages = Path("/proc/self/statm")
    if pages.is_file() and int(pages.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") > RESIDENT:
        jax.clear_caches()
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)


CAPTIONS = ["red heart", "yellow heart", "woman farmer, medium skin tone", "flag of france", "dog face", "cat face"]


@pytest.fixture(scope="session")
def on_four_devices() -> Callable[[str], None]:
    """Runs a script in a process of its own that has four CPU devices; fails with what it says."""

    def run(script: str) -> None:
        flags = {"JAX_PLATFORMS": "cpu"}
        flags["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=4"
        flags |= {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
        root = Path(__file__).parents[1]
        done = subprocess.run(
            [sys.executable, "-c", script], cwd=root, env=os.environ | flags, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr

    return run


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
    save_folder(folder / "model", Folder(components=parts, tokenizers={"text_encoder": tokenizer}, scheduler=config))
    save_component(folder / "model", "image_encoder", tiny_components["image_encoder"])
    return folder / "model"


@pytest.fixture(scope="session")
def tiny_sd3_net() -> MMDiTConfig:
    """An MMDiT of two blocks for the latents and the text encoders of `tiny_sd3`."""
    return MMDiTConfig(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=32,
        caption_projection_dim=16,
        pooled_projection_dim=16,
        pos_embed_max_size=6,
    )


@pytest.fixture(scope="session")
def tiny_sd3(
    tiny_components: dict[str, Component], tiny_sd3_net: MMDiTConfig, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A tiny Stable Diffusion 3 with a T5 as a diffusers folder, of shift 3."""
    folder = tmp_path_factory.mktemp("tiny_sd3")
    text = tiny_components["text_encoder"]
    second = CLIPTextModel(dataclasses.replace(text.module.config, hidden_size=12), projection=True)
    third = T5Encoder(
        T5Config(vocab_size=60, d_model=32, d_kv=8, d_ff=32, num_layers=2, num_heads=2, feed_forward_proj="gated-gelu")
    )
    ids = jax.numpy.zeros((1, 2), jax.numpy.int32)
    parts = {name: tiny_components[name] for name in ("vae", "text_encoder")}
    inputs = {
        "text_encoder_2": (second, (ids,)),
        "text_encoder_3": (third, (ids,)),
        "transformer": (MMDiT(tiny_sd3_net), mmdit.example_inputs(tiny_sd3_net)),
    }
    parts |= {n: Component(m, jax.jit(m.init)(jax.random.key(1), *args)["params"]) for n, (m, args) in inputs.items()}
    # Trained networks do not end in zeros, and their gates are not shut.
    flat = traverse_util.flatten_dict(parts["transformer"].params)
    for path, leaf in flat.items():
        if path[-1] == "kernel" and not leaf.any():
            flat[path] = 0.3 * jax.random.normal(jax.random.key(2), leaf.shape)
    parts["transformer"] = Component(parts["transformer"].module, traverse_util.unflatten_dict(flat))
    clip = train_tokenizer(CAPTIONS, 600, folder / "tokenizer", 12)
    tokenizers = {"text_encoder": clip, "text_encoder_2": clip}
    tokenizers["text_encoder_3"] = train_unigram(CAPTIONS, 60, folder / "tokenizer_3", 10)
    config = scheduler_config(RectifiedFlow(shift=3.0), "flow", "euler")
    save_folder(folder / "model", Folder(components=parts, tokenizers=tokenizers, scheduler=config))
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
