"""The networks by the class names of diffusers and transformers: for each its constructor, config and file names."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from lcm_jax.nets import RULES_DINOV2, RULES_UNET, Dinov2, Dinov2Config, UNet, UNetConfig, example_inputs
from lcm_jax.runtime.messages import shown
from lcm_jax.weights.torch_params import Rules
from mmdit import (
    RULES_MMDIT,
    CrossDiT,
    CrossDiTConfig,
    DiT,
    DiTConfig,
    MMDiT,
    MMDiTConfig,
    UViT,
    UViTConfig,
)
from mmdit import example_inputs as mmdit_inputs
from mmdit.rules import ALIASES_T5, OPTIONAL_CLIP, OPTIONAL_T5, RULES_CLIP_TEXT, RULES_CLIP_VISION, RULES_T5
from mmdit.text import CLIPTextConfig, CLIPTextModel, CLIPVisionConfig, CLIPVisionModel, T5Config, T5Encoder
from vae16 import TINY_RULES, AutoencoderConfig, AutoencoderKL, AutoencoderTiny, TinyConfig
from vae16.rules import RULES as RULES_VAE


@dataclass(frozen=True, kw_only=True)
class Family:
    """The facts needed to read and write a class that config.json names."""

    config: Any  # class with from_dict and to_dict
    build: Callable[..., nn.Module]  # (config, dtype=..., param_dtype=...) -> module
    fits: Callable[[Any], bool]  # whether a module is one of this class
    example: Callable[[Any], Sequence[Any]]  # config -> arguments of init
    depth: Callable[[Any], int]  # config -> number of layers that are built one by one
    rules: Rules
    stem: str  # file name without .safetensors
    library: str  # its name in model_index.json
    optional: Sequence[str] = ()  # regexes of keys that may be left over
    prefix: str = ""  # of the encoder's tensors; transformers 5 omits it in some files
    aliases: Mapping[str, str] = field(default_factory=dict)  # another name of a tensor in files -> its name


def _images(config: AutoencoderConfig | TinyConfig) -> Sequence[Any]:
    side = config.downsample_factor
    return (jnp.zeros((1, side, side, config.in_channels)),)


def _unet_depth(config: UNetConfig) -> int:
    depths = [(config.down_depths(i), config.up_depths(i)) for i in range(len(config.block_out_channels))]
    return sum(len(half) + sum(half) for pair in depths for half in pair)


def _ids(config: CLIPTextConfig | T5Config) -> Sequence[Any]:
    return (jnp.zeros((1, 2), jnp.int32),)


def _pixels(config: CLIPVisionConfig | Dinov2Config) -> Sequence[Any]:
    return (jnp.zeros((1, config.image_size, config.image_size, config.num_channels)),)


def _text(projection: bool) -> Family:
    def build(config: CLIPTextConfig, **types: Any) -> nn.Module:
        return CLIPTextModel(config, projection=projection, **types)

    return Family(
        config=CLIPTextConfig,
        build=build,
        fits=lambda module: isinstance(module, CLIPTextModel) and module.projection == projection,
        example=_ids,
        depth=lambda config: config.num_hidden_layers,
        rules=RULES_CLIP_TEXT,
        stem="model",
        library="transformers",
        optional=OPTIONAL_CLIP if projection else (*OPTIONAL_CLIP, r"^text_projection\.weight$"),
        prefix="text_model.",
    )


def _dinov2(*, registers: bool) -> Family:
    return Family(
        config=Dinov2Config,
        build=Dinov2,
        fits=lambda module: isinstance(module, Dinov2) and (module.config.num_register_tokens is not None) == registers,
        example=_pixels,
        depth=lambda config: config.num_hidden_layers,
        rules=RULES_DINOV2,
        stem="model",
        library="transformers",
    )


def _transformer(net: Any, config: Any, library: str) -> Family:
    return Family(
        config=config,
        build=net,
        fits=lambda module: isinstance(module, net),
        example=mmdit_inputs,
        depth=lambda config: config.num_layers,
        rules=RULES_MMDIT,
        stem="diffusion_pytorch_model",
        library=library,
    )


FAMILIES: Mapping[str, Family] = {
    "AutoencoderKL": Family(
        config=AutoencoderConfig,
        build=AutoencoderKL,
        fits=lambda module: isinstance(module, AutoencoderKL),
        example=_images,
        depth=lambda config: 2 * len(config.block_out_channels) * config.layers_per_block,
        rules=RULES_VAE,
        stem="diffusion_pytorch_model",
        library="diffusers",
    ),
    "AutoencoderTiny": Family(
        config=TinyConfig,
        build=AutoencoderTiny,
        fits=lambda module: isinstance(module, AutoencoderTiny),
        example=_images,
        depth=lambda config: sum(config.num_encoder_blocks) + sum(config.num_decoder_blocks),
        rules=TINY_RULES,
        stem="diffusion_pytorch_model",
        library="diffusers",
    ),
    "UNet2DConditionModel": Family(
        config=UNetConfig,
        build=UNet,
        fits=lambda module: isinstance(module, UNet),
        example=example_inputs,
        depth=_unet_depth,
        rules=RULES_UNET,
        stem="diffusion_pytorch_model",
        library="diffusers",
    ),
    "SD3Transformer2DModel": _transformer(MMDiT, MMDiTConfig, "diffusers"),
    "DiT": _transformer(DiT, DiTConfig, "mmdit"),  # these three have no class in PyTorch
    "CrossDiT": _transformer(CrossDiT, CrossDiTConfig, "mmdit"),
    "UViT": _transformer(UViT, UViTConfig, "mmdit"),
    "CLIPTextModel": _text(projection=False),
    "CLIPTextModelWithProjection": _text(projection=True),
    "T5EncoderModel": Family(
        config=T5Config,
        build=T5Encoder,
        fits=lambda module: isinstance(module, T5Encoder),
        example=_ids,
        depth=lambda config: config.num_layers,
        rules=RULES_T5,
        stem="model",
        library="transformers",
        optional=OPTIONAL_T5,
        aliases=ALIASES_T5,
    ),
    "CLIPVisionModelWithProjection": Family(
        config=CLIPVisionConfig,
        build=CLIPVisionModel,
        fits=lambda module: isinstance(module, CLIPVisionModel),
        example=_pixels,
        depth=lambda config: config.num_hidden_layers,
        rules=RULES_CLIP_VISION,
        stem="model",
        library="transformers",
        optional=OPTIONAL_CLIP,
        prefix="vision_model.",
    ),
    "Dinov2Model": _dinov2(registers=False),
    "Dinov2WithRegistersModel": _dinov2(registers=True),
}
TOWER = ("embeddings.", "encoder.", "final_layer_norm.", "pre_layrnorm.", "post_layernorm.")


# The networks that denoise, by the name of their component in a diffusers folder.
DENOISERS: Mapping[str, tuple[str, ...]] = {
    "unet": ("UNet2DConditionModel",),
    "transformer": ("SD3Transformer2DModel", "DiT", "CrossDiT", "UViT"),
}
# All components that a model_index.json can name. UNUSED have no effect on the image.
NETWORKS = (*DENOISERS, "vae", "text_encoder", "text_encoder_2", "text_encoder_3", "image_encoder")
TOKENIZERS = ("tokenizer", "tokenizer_2", "tokenizer_3")
UNUSED = ("safety_checker", "feature_extractor")


def check_components(index: Mapping[str, Any], source: str) -> None:
    """Raise ValueError unless every component that a model_index.json names is one that is known.

    Their names are those of the folders that are read and written, so a name of a file's own could lead anywhere.
    """
    known = (*NETWORKS, *TOKENIZERS, "scheduler", *UNUSED)
    for name, value in index.items():
        if value is None or (name not in known and not isinstance(value, list)):  # absent, or a setting
            continue
        if not isinstance(value, list) or len(value) != 2 or not all(isinstance(v, str | None) for v in value):
            raise ValueError(f"{source}: {shown(name)} is {shown(value)}; give [library, class] or [null, null]")
        if value[0] is not None and name not in known:
            raise ValueError(f"{source}: names the component {shown(name)}, which is not supported; remove it")


def denoiser_of(config: Any) -> tuple[str, Family]:
    """Return the component's name and the family of a denoiser's config; ValueError for any other config."""
    for name, kinds in DENOISERS.items():
        for kind in kinds:
            if type(config) is FAMILIES[kind].config:
                return name, FAMILIES[kind]
    raise ValueError(f"{type(config).__name__} is no config of a denoiser; give that of a UNet or an MMDiT")


def class_name(module: nn.Module) -> str:
    """Return the name of the PyTorch class that corresponds to a module of this library."""
    return next(name for name, family in FAMILIES.items() if family.fits(module))
