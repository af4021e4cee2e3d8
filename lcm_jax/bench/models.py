"""Models of the published geometries with random weights, which run as fast, or as slowly, as the real ones."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from lcm_jax.inference.parameters import DTYPES
from lcm_jax.inference.pipeline import Pipeline
from lcm_jax.nets.presets import SD15, SD_TURBO, SDXL
from lcm_jax.typing import Array, Params, Shapes
from lcm_jax.weights.abstract_params import abstract_params
from lcm_jax.weights.device import put_on_device
from lcm_jax.weights.diffusers_folder import Component, Folder
from lcm_jax.weights.hub import locate
from lcm_jax.weights.registry import FAMILIES
from mmdit.presets import SD3_MEDIUM
from mmdit.text import Tokenizer
from mmdit.text.clip_config import CLIP_BIGG, CLIP_H, CLIP_L
from vae16 import TAESD, TAESD3, AutoencoderConfig

Parts = Mapping[str, tuple[str, Any]]  # component -> (class, config)
SCALES = ("full", "tiny")
PREFIX = "random-"
_DDPM = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
_FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0}
_KL = AutoencoderConfig(block_out_channels=(128, 256, 512, 512), layers_per_block=2, sample_size=512)


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """The networks of a model and its scheduler. tiny: the autoencoder that a stream uses in place of the KL one."""

    parts: Parts
    tiny: Any
    scheduler: Mapping[str, Any]


def _lcm(**options: Any) -> dict[str, Any]:
    return {"_class_name": "LCMScheduler", "num_train_timesteps": 1000, **_DDPM, **options}


GEOMETRIES: Mapping[str, Geometry] = {
    "sd15": Geometry(
        parts={
            "unet": ("UNet2DConditionModel", SD15),
            "vae": ("AutoencoderKL", replace(_KL, scaling_factor=0.18215)),
            "text_encoder": ("CLIPTextModel", CLIP_L),
        },
        tiny=TAESD,
        scheduler=_lcm(),
    ),
    "sd-turbo": Geometry(
        parts={
            "unet": ("UNet2DConditionModel", SD_TURBO),
            "vae": ("AutoencoderKL", replace(_KL, scaling_factor=0.18215)),
            "text_encoder": ("CLIPTextModel", replace(CLIP_H, num_hidden_layers=23)),
        },
        tiny=TAESD,
        scheduler=_lcm(timestep_spacing="trailing"),
    ),
    "sdxl": Geometry(
        parts={
            "unet": ("UNet2DConditionModel", SDXL),
            "vae": ("AutoencoderKL", replace(_KL, scaling_factor=0.13025, sample_size=1024)),
            "text_encoder": ("CLIPTextModel", CLIP_L),
            "text_encoder_2": ("CLIPTextModelWithProjection", CLIP_BIGG),
        },
        tiny=TAESD,
        scheduler=_lcm(),
    ),
    "sd3": Geometry(
        parts={
            "transformer": ("SD3Transformer2DModel", SD3_MEDIUM),
            "vae": (
                "AutoencoderKL",
                replace(
                    _KL,
                    latent_channels=16,
                    scaling_factor=1.5305,
                    shift_factor=0.0609,
                    sample_size=1024,
                    use_quant_conv=False,
                    use_post_quant_conv=False,
                ),
            ),
            "text_encoder": ("CLIPTextModelWithProjection", CLIP_L),
            "text_encoder_2": ("CLIPTextModelWithProjection", CLIP_BIGG),
        },
        tiny=TAESD3,
        scheduler=_FLOW,
    ),
}


def tiny(config: Any) -> Any:
    """Return a config of the same structure whose network is very small, for smoke tests.

    Text embeddings are 32 wide (SD3's joint ones 96). Raises ValueError for a config without a tiny version.
    """
    match type(config).__name__:
        case "UNetConfig":
            levels = len(config.block_out_channels)
            small: dict[str, Any] = {"block_out_channels": (32,) * levels, "norm_num_groups": 8, "sample_size": 16}
            small |= {"attention_head_dim": 2, "layers_per_block": 1, "cross_attention_dim": 32}
            if config.text_time is not None:
                small |= {"transformer_layers_per_block": 1, "cross_attention_dim": 64}
                small |= {"addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 32 + 6 * 8}
            return replace(config, **small)
        case "MMDiTConfig":
            small = {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 16, "caption_projection_dim": 32}
            return replace(config, **small, joint_attention_dim=96, pooled_projection_dim=64, sample_size=16)
        case "AutoencoderConfig":
            return replace(config, block_out_channels=(16,) * 4, norm_num_groups=4, layers_per_block=1, sample_size=128)
        case "CLIPTextConfig":
            small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
            return replace(config, **small, projection_dim=32)
        case "TinyConfig":
            return replace(config, encoder_block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4)
        case "T5Config":
            return replace(config, d_model=32, d_ff=64, num_layers=2, num_heads=2, d_kv=16)
        case name:
            raise ValueError(f"no tiny version of {name}")


def at_scale(config: Any, scale: str) -> Any:
    """Return the config itself, or its `tiny` version for the scale "tiny"."""
    return tiny(config) if scale == "tiny" else config


def component(kind: str, config: Any, dtype: str, **options: Any) -> Component:
    """Return a network with random weights, which are drawn on the device when they are first used.

    kind: the class name in diffusers or transformers. options: of the module.
    """
    jax_dtype = DTYPES[dtype]
    module = FAMILIES[kind].build(config, dtype=jax_dtype, param_dtype=jax_dtype, **options)
    return Component(module, partial(random_params, abstract_params(kind, config), jax_dtype))


def random_params(shapes: Shapes, dtype: Any, *, transform: Callable[[str, Array], Any] | None = None) -> Params:
    """Return random parameters: kernels that keep the variance, scales of one, biases of zero.

    A leaf depends only on its path and shape. each: replaces a parameter, (path, parameter) -> new leaf, as soon as it
    is drawn.
    """

    def make(path: str, shape: tuple[int, ...]) -> Any:
        param = draw(path, shape)
        return param if transform is None else jax.block_until_ready(transform(path, param))

    def draw(path: str, shape: tuple[int, ...]) -> Array:
        name = path.rsplit("/", 1)[-1]
        if name in ("scale", "bias"):
            return jnp.full(shape, 1.0 if name == "scale" else 0.0, dtype)
        seed = np.uint32(zlib.crc32(path.encode()))
        fan_in = np.prod(shape[-4 if len(shape) >= 4 else -2 : -1])  # without the axis of stacked layers
        return put_on_device(_normal(seed, shape, float(fan_in) ** -0.5 if name == "kernel" else 0.02, dtype))

    leaves = {path: make(path, like.shape) for path, like in traverse_util.flatten_dict(shapes, sep="/").items()}
    return traverse_util.unflatten_dict(leaves, sep="/")


@partial(jax.jit, static_argnames=("shape", "dtype"))
def _normal(seed: Array, shape: tuple[int, ...], scale: Array, dtype: Any) -> Array:
    return (scale * jax.random.normal(jax.random.key(seed), shape)).astype(dtype)


@lru_cache(maxsize=1)  # two pipelines would not fit on every device
def pipeline(name: str, dtype: str, *, scale: str = "full", taesd: bool = False) -> Pipeline:
    """Return a pipeline with random weights for a name in `GEOMETRIES`; its tokenizer is the bundled model's.

    taesd: use the tiny autoencoder. Raises ValueError for an unknown name.
    """
    if name not in GEOMETRIES:
        raise ValueError(f"{PREFIX}{name}: no such geometry; known are {', '.join(PREFIX + n for n in GEOMETRIES)}")
    geometry = GEOMETRIES[name]
    parts = dict(geometry.parts)
    if taesd:
        parts["vae"] = ("AutoencoderTiny", geometry.tiny)
    tokenizer = Tokenizer.load(locate("openmoji").at("tokenizer"))
    tokenizer.backend.model_max_length = 77
    folder = Folder(
        components={part: component(kind, at_scale(config, scale), dtype) for part, (kind, config) in parts.items()},
        tokenizers={part: tokenizer for part in parts if part.startswith("text_encoder")},
        scheduler=geometry.scheduler,
    )
    return Pipeline(folder)
