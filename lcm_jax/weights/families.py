"""The networks by the class names of diffusers and transformers: how each is built, and how its files name things."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from lcm_jax.nets import RULES_UNET, UNet, UNetConfig, example_inputs
from lcm_jax.typing import Params
from lcm_jax.weights.engine import Rules
from mmdit.rules import OPTIONAL_CLIP, RULES_CLIP_TEXT, RULES_CLIP_VISION
from mmdit.text import CLIPTextConfig, CLIPTextModel, CLIPVisionConfig, CLIPVisionModel
from vae16 import AutoencoderConfig, AutoencoderKL
from vae16.rules import RULES as RULES_VAE


@dataclass(frozen=True, kw_only=True)
class Family:
    """How a class named in config.json is read and written."""

    config: Any  # class with from_dict and to_dict
    build: Callable[..., nn.Module]  # (config, dtype=..., param_dtype=...) -> module
    fits: Callable[[Any], bool]  # whether a module is one of this class
    example: Callable[[Any], Sequence[Any]]  # config -> arguments of init
    rules: Rules
    stem: str  # file name without .safetensors
    library: str  # what model_index.json names
    optional: Sequence[str] = ()
    prefix: str = ""  # of the tower's names; transformers 5 leaves it out in some files


def _images(config: AutoencoderConfig) -> Sequence[Any]:
    side = config.downsample_factor
    return (jnp.zeros((1, side, side, config.in_channels)),)


def _ids(config: CLIPTextConfig) -> Sequence[Any]:
    return (jnp.zeros((1, 2), jnp.int32),)


def _pixels(config: CLIPVisionConfig) -> Sequence[Any]:
    return (jnp.zeros((1, config.image_size, config.image_size, config.num_channels)),)


def _text(projection: bool) -> Family:
    def build(config: CLIPTextConfig, **types: Any) -> nn.Module:
        return CLIPTextModel(config, projection=projection, **types)

    return Family(
        config=CLIPTextConfig,
        build=build,
        fits=lambda module: isinstance(module, CLIPTextModel) and module.projection == projection,
        example=_ids,
        rules=RULES_CLIP_TEXT,
        stem="model",
        library="transformers",
        optional=OPTIONAL_CLIP,
        prefix="text_model.",
    )


FAMILIES: Mapping[str, Family] = {
    "AutoencoderKL": Family(
        config=AutoencoderConfig,
        build=AutoencoderKL,
        fits=lambda module: isinstance(module, AutoencoderKL),
        example=_images,
        rules=RULES_VAE,
        stem="diffusion_pytorch_model",
        library="diffusers",
    ),
    "UNet2DConditionModel": Family(
        config=UNetConfig,
        build=UNet,
        fits=lambda module: isinstance(module, UNet),
        example=example_inputs,
        rules=RULES_UNET,
        stem="diffusion_pytorch_model",
        library="diffusers",
    ),
    "CLIPTextModel": _text(projection=False),
    "CLIPTextModelWithProjection": _text(projection=True),
    "CLIPVisionModelWithProjection": Family(
        config=CLIPVisionConfig,
        build=CLIPVisionModel,
        fits=lambda module: isinstance(module, CLIPVisionModel),
        example=_pixels,
        rules=RULES_CLIP_VISION,
        stem="model",
        library="transformers",
        optional=OPTIONAL_CLIP,
        prefix="vision_model.",
    ),
}
TOWER = ("embeddings.", "encoder.", "final_layer_norm.", "pre_layrnorm.", "post_layernorm.")


def class_name(module: nn.Module) -> str:
    """The PyTorch class that a module of ours corresponds to."""
    return next(name for name, family in FAMILIES.items() if family.fits(module))


def abstract_params(family: Family, module: nn.Module) -> Params:
    """Shapes and dtypes of a module's parameters; nothing is computed."""

    def init() -> Params:
        return module.init(jax.random.key(0), *family.example(module.config))["params"]

    return jax.eval_shape(init)
