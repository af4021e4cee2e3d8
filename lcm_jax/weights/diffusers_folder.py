"""Diffusers folders of Stable Diffusion, in and out: model_index.json and a sub-folder for each component."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from lcm_jax.models.text_conditioning import Prompts
from lcm_jax.runtime.atomic_files import replacing, write_json
from lcm_jax.weights.component import Component, read_part, to_component, to_part, write_part
from lcm_jax.weights.hub import Location
from lcm_jax.weights.model_files import Model, dispensable, read_folder
from lcm_jax.weights.registry import DENOISERS
from lcm_jax.weights.torch_params import Shardings
from mmdit.text import Tokenizer
from vae16 import AutoencoderKL, fold_shift

SD = ("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline")
LCM = ("LatentConsistencyModelPipeline", "LatentConsistencyModelImg2ImgPipeline")
SDXL = ("StableDiffusionXLPipeline", "StableDiffusionXLImg2ImgPipeline")
SD3 = ("StableDiffusion3Pipeline", "StableDiffusion3Img2ImgPipeline", "StableDiffusion3InpaintPipeline")

_NETWORKS = (*DENOISERS, "vae", "text_encoder", "text_encoder_2", "text_encoder_3", "image_encoder")
# Text encoder -> its tokenizer, in the order in which their outputs are joined.
TOKENIZERS = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2", "text_encoder_3": "tokenizer_3"}
_SETTINGS = (
    *("force_zeros_for_empty_prompt", "requires_aesthetics_score"),
    *("requires_safety_checker", "add_watermarker"),  # about what is done with the finished picture
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
    """Read `folder`/`name`. dtype: of parameters and computation; float32 for weights that overflow in float16.

    variant: such as "fp16", of the file's name. scan: stack the layers that are alike, of networks that can. shardings:
    where each parameter goes, of which a device reads its own part alone. Errors name the file and what does not fit.
    """
    return to_component(read_part(folder / name, variant=variant), dtype=dtype, scan=scan, shardings=shardings)


def save_component(
    folder: Path, name: str, component: Component, *, dtype: Any = None, variant: str | None = None
) -> tuple[str, str]:
    """Write `folder`/`name` as diffusers or transformers would; returns its (library, class) for model_index.json."""
    return write_part(folder / name, to_part(component), dtype=dtype, variant=variant)


def without_shift(vae: Component) -> Component:
    """The autoencoder with shift_factor 0, which every pipeline of diffusers draws with.

    Those of UNets only scale latents, whatever the config says; those of SD3 shift them too, and want a number.
    """
    config, params = vae.module.config, vae.params
    if config.shift_factor:
        if not isinstance(vae.module, AutoencoderKL):
            raise ValueError(f"the tiny autoencoder has shift_factor={config.shift_factor}; a UNet's must be 0")
        config, params = fold_shift(config, params)
    return Component(vae.module.clone(config=replace(config, shift_factor=0.0)), params)


@dataclass(frozen=True, kw_only=True)
class Folder:
    """A whole pipeline as it lies on disk. `components` by their diffusers names: unet, vae, text_encoder ...

    tokenizers: under the names of their text encoders. extras: what else model_index.json says, `_class_name` among it;
    of a folder made here it may be empty.
    """

    components: Mapping[str, Component]
    tokenizers: Mapping[str, Tokenizer] = field(default_factory=dict)
    scheduler: Mapping[str, Any]  # scheduler_config.json
    extras: Mapping[str, Any] = field(default_factory=dict)

    @property
    def denoiser(self) -> str:
        """The name of the network that undoes noise: "unet", or "transformer"."""
        return next(name for name in DENOISERS if name in self.components)

    @property
    def family(self) -> str:
        """How prompts condition: "sd", "sdxl" (pooled text and picture sizes) or "sd3" (three encoders)."""
        if self.denoiser == "transformer":
            return "sd3"
        return "sdxl" if "text_encoder_2" in self.components else "sd"

    @property
    def is_sdxl(self) -> bool:
        """Whether the UNet is told the pooled text and picture sizes."""
        return self.family == "sdxl"

    @property
    def pipeline(self) -> str:
        """The class of diffusers that draws with these components."""
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
        """How texts become this model's conditioning."""
        modules = {name: self.components[name].module for name in TOKENIZERS if name in self.tokenizers}
        width = self.components[self.denoiser].module.config.joint_attention_dim if self.family == "sd3" else 0
        return Prompts(modules=modules, tokenizers=self.tokenizers, family=self.family, width=width)

    @property
    def zeros_for_empty_prompt(self) -> bool:
        """Whether no negative prompt means embeddings of zeros, rather than those of the empty text."""
        default = "_class_name" in self.extras or "text_encoder" in self.components
        return self.is_sdxl and bool(self.extras.get("force_zeros_for_empty_prompt", default))

    @property
    def is_refiner(self) -> bool:
        """Whether the UNet is told an aesthetic score (SDXL's refiner)."""
        default = "_class_name" not in self.extras and "text_encoder" not in self.components
        return self.is_sdxl and bool(self.extras.get("requires_aesthetics_score", default))


def load_folder(location: Location, *, dtype: Any = jnp.float32, variant: str | None = None) -> Folder:
    """Read a diffusers folder: every component that its model_index.json names."""
    return to_folder(read_folder(location, variant=variant), dtype=dtype)


def to_folder(model: Model, *, dtype: Any = jnp.float32) -> Folder:
    """The components of a model, their parameters on the device, once all that it says is known to be supported."""
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
            f"{latents} channels; networks that are given more than latents (inpainting, depth) are not supported"
        )
    return folder


def _load_tokenizer(model: Model, encoder: str) -> Tokenizer:
    name = TOKENIZERS[encoder]
    if name not in model.small:
        raise ValueError(f"{model.source}: names no {name}, which {encoder} needs")
    with dispensable(encoder):
        return Tokenizer.load(model.small[name])


def _check_index(extras: Mapping[str, Any], model: Model) -> None:
    """ValueError for what changes the picture and is not supported or absent; a warning for unknown settings."""
    pipeline, source = extras.get("_class_name"), model.source
    known = (*SD, *LCM, *SDXL, *SD3)
    if pipeline is not None and pipeline not in known:
        raise ValueError(f"{source}: _class_name {pipeline!r} is not supported; known are {', '.join(known)}")
    for needed in _needed(pipeline, model):
        if needed not in model.parts:
            raise ValueError(f"{source}: names no {needed}; {pipeline or 'a text-to-image model'} needs one")
    for name in model.parts:
        if name not in _NETWORKS:
            raise ValueError(f"{source}: names the component {name!r}, which is not supported; remove it if unused")
    for name, value in extras.items():
        if name not in _SETTINGS and not name.startswith("_"):
            warnings.warn(f"{source}: {name}={value!r} is not known and is ignored", stacklevel=2)


def _needed(pipeline: Any, model: Model) -> tuple[str, ...]:
    """The components that a pipeline cannot do without."""
    if pipeline in SD3 or (pipeline is None and "transformer" in model.parts):
        return "transformer", "vae", "text_encoder", "text_encoder_2"
    sdxl = pipeline in SDXL if pipeline is not None else "text_encoder_2" in model.parts
    return "unet", "vae", "text_encoder_2" if sdxl else "text_encoder"


def save_folder(path: Path, folder: Folder, *, dtype: Any = None, variant: str | None = None) -> None:
    """Write a diffusers folder: aside first, then renamed, so `path` holds all of it or is as it was.

    dtype: of the files; None keeps the parameters' own. variant: such as "fp16", put into the files' names. A warning
    says so where diffusers would read the folder and draw something else.
    """
    if folder.family == "sd3" and folder.components["transformer"].module.config.time_cond_proj_dim is not None:
        warnings.warn(
            f"{path}: its transformer takes the guidance scale as an input (time_cond_proj_dim); lcm_jax draws with "
            "it, diffusers would leave that input out",
            stacklevel=2,
        )
    components = dict(folder.components)
    shift = components["vae"].module.config.shift_factor
    if shift if folder.denoiser == "unet" else shift is None:
        components["vae"] = without_shift(components["vae"])
    with replacing(path) as aside:
        index = {"_class_name": folder.pipeline, **folder.extras, **_settings(folder)}
        for name, component in components.items():
            index[name] = save_component(aside, name, component, dtype=dtype, variant=variant)
        for name, tokenizer in folder.tokenizers.items():
            tokenizer.save(aside / TOKENIZERS[name])
            index[TOKENIZERS[name]] = ("transformers", tokenizer.class_name)
        write_json(aside / "scheduler" / "scheduler_config.json", folder.scheduler)
        index["scheduler"] = ("diffusers", folder.scheduler["_class_name"])
        if folder.family != "sd3" and "text_encoder" in folder.components:
            # The pipeline takes the first output, which with a projection would be the pooled one.
            index["text_encoder"] = ("transformers", "CLIPTextModel")
        write_json(aside / "model_index.json", index)


def _settings(folder: Folder) -> dict[str, Any]:
    """The entries of model_index.json that a pipeline's class asks for beside its components."""
    absent = (None, None)
    if folder.family == "sd3":
        t5 = {"text_encoder_3": absent, "tokenizer_3": absent}
        return t5 | {"image_encoder": absent, "feature_extractor": absent}
    if not folder.is_sdxl:
        return {"safety_checker": absent, "feature_extractor": absent, "requires_safety_checker": False}
    settings: dict[str, Any] = {"text_encoder": absent, "tokenizer": absent, "feature_extractor": absent}
    settings["force_zeros_for_empty_prompt"] = folder.zeros_for_empty_prompt
    if folder.pipeline == SDXL[1]:
        settings["requires_aesthetics_score"] = folder.is_refiner
    return settings
