"""Diffusers folders of Stable Diffusion, read and written: model_index.json and a sub-folder for each component."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from lcm_jax.models.text_conditioning import Prompts
from lcm_jax.runtime.atomic_files import check_replaceable, replacing, write_json
from lcm_jax.runtime.messages import shortened, shown
from lcm_jax.weights.component import Component, read_part, to_component, to_part, write_part
from lcm_jax.weights.hub import Location
from lcm_jax.weights.model_files import ENTRIES, Model, hint_if_optional, read_folder
from lcm_jax.weights.registry import DENOISERS
from lcm_jax.weights.torch_params import Shardings
from mmdit.text import Tokenizer
from vae16 import AutoencoderKL, fold_shift

SD = ("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline", "StableDiffusionInpaintPipeline")
LCM = ("LatentConsistencyModelPipeline", "LatentConsistencyModelImg2ImgPipeline")
SDXL = ("StableDiffusionXLPipeline", "StableDiffusionXLImg2ImgPipeline", "StableDiffusionXLInpaintPipeline")
SD3 = ("StableDiffusion3Pipeline", "StableDiffusion3Img2ImgPipeline", "StableDiffusion3InpaintPipeline")

# Text encoder -> its tokenizer, in the order in which the encoders' outputs are concatenated.
TOKENIZERS = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2", "text_encoder_3": "tokenizer_3"}
_SETTINGS = (
    *("force_zeros_for_empty_prompt", "requires_aesthetics_score"),
    *("requires_safety_checker", "add_watermarker"),  # these two concern the finished image only
)


def load_component(
    folder: Path,
    name: str,
    *,
    dtype: Any = jnp.float32,
    variant: str | None = None,
    scan: bool = False,
    shardings: Shardings | None = None,
) -> Component:
    """Return the component in `folder`/`name`.

    dtype: that of parameters and computation; float16 becomes float32 for weights that overflow in it. variant: such as
    "fp16", in the file's name. scan: whether equal layers are stacked, for networks that can. shardings: (path, shape)
    -> sharding; each device reads only its slice. Raises FileNotFoundError, and ValueError with the file's name and
    what does not fit.
    """
    return to_component(read_part(folder / name, variant=variant), dtype=dtype, scan=scan, shardings=shardings)


def save_component(
    folder: Path, name: str, component: Component, *, dtype: Any = None, variant: str | None = None
) -> tuple[str, str]:
    """Write `folder`/`name` as diffusers or transformers would; return its (library, class) for model_index.json.

    dtype: that of the floating tensors; None keeps each one's. variant: such as "fp16", in the file's name.
    """
    return write_part(folder / name, to_part(component), dtype=dtype, variant=variant)


def without_shift(vae: Component) -> Component:
    """Return an equivalent autoencoder with shift_factor 0, which every diffusers pipeline can use.

    The shift is folded into the parameters. Pipelines with a UNet only scale latents, whatever the config says; those
    of SD3 also shift them and need a number. Raises ValueError for a tiny autoencoder that has a shift_factor.
    """
    config, params = vae.module.config, vae.params
    if config.shift_factor:
        if not isinstance(vae.module, AutoencoderKL):
            raise ValueError(f"the tiny autoencoder has shift_factor={config.shift_factor}; for a UNet it must be 0")
        config, params = fold_shift(config, params)
    return Component(vae.module.clone(config=replace(config, shift_factor=0.0)), params)


@dataclass(frozen=True, kw_only=True)
class Folder:
    """The contents of a diffusers folder: a pipeline's networks, tokenizers, scheduler config and settings."""

    components: Mapping[str, Component]  # by their diffusers names: unet, vae, text_encoder, ...
    tokenizers: Mapping[str, Tokenizer] = field(default_factory=dict)  # by the names of their text encoders
    scheduler: Mapping[str, Any]  # scheduler_config.json
    extras: Mapping[str, Any] = field(default_factory=dict)  # other entries of model_index.json: _class_name, ...

    @property
    def denoiser(self) -> str:
        """The name of the network that denoises: "unet" or "transformer"."""
        return next(name for name in DENOISERS if name in self.components)

    @property
    def family(self) -> str:
        """The kind of text conditioning: "sd", "sdxl" (with pooled text and image sizes) or "sd3" (three encoders)."""
        if self.denoiser == "transformer":
            return "sd3"
        return "sdxl" if "text_encoder_2" in self.components else "sd"

    @property
    def is_sdxl(self) -> bool:
        """True if the UNet takes pooled text and image sizes as inputs."""
        return self.family == "sdxl"

    @property
    def pipeline(self) -> str:
        """The name of the diffusers pipeline class for these components."""
        if "_class_name" in self.extras:
            return str(self.extras["_class_name"])
        if self.family == "sd3":
            return SD3[0]
        if self.is_sdxl:
            return SDXL["text_encoder" not in self.components]
        distilled = self.components["unet"].module.config.time_cond_proj_dim is not None
        return LCM[0] if distilled and self.scheduler.get("_class_name") == "LCMScheduler" else SD[0]

    @property
    def prompts(self) -> Prompts:
        """The text encoders and tokenizers that turn prompts into this model's conditioning."""
        modules = {name: self.components[name].module for name in TOKENIZERS if name in self.tokenizers}
        width = self.components[self.denoiser].module.config.joint_attention_dim if self.family == "sd3" else 0
        return Prompts(modules=modules, tokenizers=self.tokenizers, family=self.family, width=width)

    @property
    def zeros_for_empty_prompt(self) -> bool:
        """True if a missing negative prompt means embeddings of zeros rather than those of the empty text."""
        default = "_class_name" in self.extras or "text_encoder" in self.components
        return self.is_sdxl and bool(self.extras.get("force_zeros_for_empty_prompt", default))

    @property
    def is_refiner(self) -> bool:
        """True if the UNet takes an aesthetic score as an input (SDXL's refiner)."""
        default = "_class_name" not in self.extras and "text_encoder" not in self.components
        return self.is_sdxl and bool(self.extras.get("requires_aesthetics_score", default))


def load_folder(location: Location, *, dtype: Any = jnp.float32, variant: str | None = None) -> Folder:
    """Return the contents of a diffusers folder: every component that its model_index.json names.

    dtype: that of parameters and computation. variant: such as "fp16", in the files' names. The errors are those of
    `read_folder` and `to_folder`.
    """
    return to_folder(read_folder(location, variant=variant), dtype=dtype)


def to_folder(model: Model, *, dtype: Any = jnp.float32) -> Folder:
    """Return a model as components and tokenizers; the parameters are placed on the device on first access.

    Raises ValueError if the model has a setting or component that is not supported, lacks one that it needs, or has
    networks that do not fit each other; unknown settings give a warning.
    """
    extras = {name: value for name, value in model.index.items() if not isinstance(value, list)}
    _check_index(extras, model)
    folder = Folder(
        components={name: to_component(part, dtype=dtype) for name, part in model.parts.items()},
        tokenizers={name: _load_tokenizer(model, name) for name in TOKENIZERS if name in model.parts},
        scheduler=model.scheduler,
        extras={name: value for name, value in extras.items() if name == "_class_name" or not name.startswith("_")},
    )
    config = folder.components[folder.denoiser].module.config
    if folder.denoiser == "unet" and (config.text_time is not None) != folder.is_sdxl:
        raise ValueError(
            f"{model.parts['unet'].source}/config.json: addition_embed_type={config.addition_embed_type!r} does not "
            f"fit a {folder.pipeline}: it goes with a text_encoder_2, which model_index.json must name"
        )
    latents = folder.components["vae"].module.config.latent_channels
    if config.in_channels != latents:
        raise ValueError(
            f"{model.parts[folder.denoiser].source}/config.json: in_channels={config.in_channels}, but latents have "
            f"{latents} channels; networks with more inputs than latents (inpainting, depth) are not supported"
        )
    return folder


def _load_tokenizer(model: Model, encoder: str) -> Tokenizer:
    name = TOKENIZERS[encoder]
    if name not in model.tokenizers:
        raise ValueError(f"{model.source}: names no {name}, which {encoder} needs")
    with hint_if_optional(encoder):
        return Tokenizer.load(model.tokenizers[name])


def _check_index(extras: Mapping[str, Any], model: Model) -> None:
    """Raise ValueError for settings that are not supported and missing components; warn of unknown settings."""
    pipeline, source = extras.get("_class_name"), model.source
    known = (*SD, *LCM, *SDXL, *SD3)
    if pipeline is not None and pipeline not in known:
        raise ValueError(f"{source}: _class_name {shown(pipeline)} is not supported; known are {', '.join(known)}")
    for name in _needed(pipeline, model):
        if name not in model.parts:
            raise ValueError(f"{source}: names no {name}; {pipeline or 'a text-to-image model'} needs one")
    for name, value in extras.items():
        if name not in _SETTINGS and not name.startswith("_"):
            warnings.warn(f"{source}: {shortened(name, 160)}={shown(value)} is not known and is ignored", stacklevel=2)


def _needed(pipeline: Any, model: Model) -> tuple[str, ...]:
    """Return the components that a pipeline needs."""
    if pipeline in SD3 or (pipeline is None and "transformer" in model.parts):
        return "transformer", "vae", "text_encoder", "text_encoder_2"
    sdxl = pipeline in SDXL if pipeline is not None else "text_encoder_2" in model.parts
    return "unet", "vae", "text_encoder_2" if sdxl else "text_encoder"


def save_folder(path: Path, folder: Folder, *, dtype: Any = None, variant: str | None = None) -> None:
    """Write a diffusers folder under another name and then rename it: a failure leaves `path` as it was.

    dtype: that of the files; None keeps the parameters'. variant: such as "fp16", added to the files' names. Warns if
    diffusers would generate different images from the folder. ValueError if `path` holds anything but a model.
    """
    check_replaceable(path, ENTRIES, "model")
    if folder.family == "sd3" and folder.components["transformer"].module.config.time_cond_proj_dim is not None:
        warnings.warn(
            f"{path}: its transformer takes the guidance scale as an input (time_cond_proj_dim); lcm_jax uses that "
            "input, diffusers ignores it",
            stacklevel=2,
        )
    components = dict(folder.components)
    shift = components["vae"].module.config.shift_factor
    if shift if folder.denoiser == "unet" else shift is None:
        components["vae"] = without_shift(components["vae"])
    with replacing(path) as temporary:
        index = {"_class_name": folder.pipeline, **folder.extras, **_settings(folder)}
        for name, component in components.items():
            index[name] = save_component(temporary, name, component, dtype=dtype, variant=variant)
        for name, tokenizer in folder.tokenizers.items():
            tokenizer.save(temporary / TOKENIZERS[name])
            index[TOKENIZERS[name]] = ("transformers", tokenizer.class_name)
        write_json(temporary / "scheduler" / "scheduler_config.json", folder.scheduler)
        index["scheduler"] = ("diffusers", folder.scheduler["_class_name"])
        if folder.family != "sd3" and "text_encoder" in folder.components:
            # The pipeline takes the encoder's first output; of a class with a projection that is the pooled one.
            index["text_encoder"] = ("transformers", "CLIPTextModel")
        write_json(temporary / "model_index.json", index)


def _settings(folder: Folder) -> dict[str, Any]:
    """Return the entries of model_index.json that a pipeline's class requires besides its components."""
    absent = (None, None)
    if folder.family == "sd3":
        t5 = {"text_encoder_3": absent, "tokenizer_3": absent}
        return t5 | {"image_encoder": absent, "feature_extractor": absent}
    if not folder.is_sdxl:
        return {"safety_checker": absent, "feature_extractor": absent, "requires_safety_checker": False}
    settings: dict[str, Any] = {"text_encoder": absent, "tokenizer": absent, "feature_extractor": absent}
    settings["force_zeros_for_empty_prompt"] = folder.zeros_for_empty_prompt
    if folder.pipeline in SDXL[1:]:
        settings["requires_aesthetics_score"] = folder.is_refiner
    return settings
