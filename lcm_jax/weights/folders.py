"""Diffusers folders of the Stable Diffusion UNets, in and out: model_index.json and a sub-folder for each component."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from lcm_jax.weights.files import replacing, write_json
from lcm_jax.weights.hub import Location
from lcm_jax.weights.model import Model, read_folder
from lcm_jax.weights.parts import Component, read_part, to_component, to_part, write_part
from mmdit.text import Tokenizer

SD = ("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline")
LCM = ("LatentConsistencyModelPipeline", "LatentConsistencyModelImg2ImgPipeline")
SDXL = ("StableDiffusionXLPipeline", "StableDiffusionXLImg2ImgPipeline")

_NETWORKS = ("unet", "vae", "text_encoder", "text_encoder_2", "image_encoder")
_SETTINGS = (
    *("force_zeros_for_empty_prompt", "requires_aesthetics_score"),
    *("requires_safety_checker", "add_watermarker"),  # about what is done with the finished picture
)


def load_component(folder: Path, name: str, *, dtype: Any = jnp.float32, variant: str | None = None) -> Component:
    """Read `folder`/`name`. dtype: of parameters and computation; float32 for weights that overflow in float16.

    variant: such as "fp16", of the file's name. Errors name the file and what does not fit.
    """
    return to_component(read_part(folder / name, variant=variant), dtype=dtype)


def save_component(
    folder: Path, name: str, component: Component, *, dtype: Any = None, variant: str | None = None
) -> tuple[str, str]:
    """Write `folder`/`name` as diffusers or transformers would; returns its (library, class) for model_index.json."""
    return write_part(folder / name, to_part(component), dtype=dtype, variant=variant)


@dataclass(frozen=True, kw_only=True)
class Folder:
    """A whole pipeline as it lies on disk. `components` by their diffusers names: unet, vae, text_encoder ...

    extras: what else model_index.json says, `_class_name` among it; of a folder made here it may be empty.
    """

    components: Mapping[str, Component]
    tokenizer: Tokenizer | None = None
    tokenizer_2: Tokenizer | None = None
    scheduler: Mapping[str, Any]  # scheduler_config.json
    extras: Mapping[str, Any] = field(default_factory=dict)

    @property
    def texts(self) -> tuple[tuple[str, Tokenizer], ...]:
        """The text encoders' names, each with its tokenizer, in the order in which their outputs are joined."""
        pairs = (("text_encoder", self.tokenizer), ("text_encoder_2", self.tokenizer_2))
        return tuple((name, tokenizer) for name, tokenizer in pairs if tokenizer is not None)

    @property
    def is_sdxl(self) -> bool:
        """Whether the UNet is told the pooled text and picture sizes."""
        return "text_encoder_2" in self.components

    @property
    def pipeline(self) -> str:
        """The class of diffusers that draws with these components."""
        if "_class_name" in self.extras:
            return str(self.extras["_class_name"])
        if self.is_sdxl:
            return SDXL["text_encoder" not in self.components]
        distilled = self.components["unet"].module.config.time_cond_proj_dim is not None
        return LCM[0] if distilled and self.scheduler.get("_class_name") == "LCMScheduler" else SD[0]

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
    """Read a diffusers folder of the Stable Diffusion UNets: every component that its model_index.json names."""
    return to_folder(read_folder(location, variant=variant), dtype=dtype)


def to_folder(model: Model, *, dtype: Any = jnp.float32) -> Folder:
    """The components of a model, their parameters on the device, once all that it says is known to be supported."""
    extras = {name: value for name, value in model.index.items() if not isinstance(value, list)}
    _check_index(extras, model)
    tokenizers = {
        name: Tokenizer.load(model.small[name])
        for name, encoder in (("tokenizer", "text_encoder"), ("tokenizer_2", "text_encoder_2"))
        if encoder in model.parts
    }
    folder = Folder(
        components={name: to_component(part, dtype=dtype) for name, part in model.parts.items()},
        scheduler=model.scheduler,
        extras={name: value for name, value in extras.items() if name == "_class_name" or not name.startswith("_")},
        **tokenizers,
    )
    sizes = folder.components["unet"].module.config.text_time
    if (sizes is not None) != folder.is_sdxl:
        kind = folder.components["unet"].module.config.addition_embed_type
        raise ValueError(
            f"{model.parts['unet'].source}/config.json: addition_embed_type={kind!r} does not fit a {folder.pipeline}: "
            "it goes with a text_encoder_2, which model_index.json must name"
        )
    return folder


def _check_index(extras: Mapping[str, Any], model: Model) -> None:
    """ValueError for what changes the picture and is not supported or absent; a warning for unknown settings."""
    pipeline, source = extras.get("_class_name"), model.source
    known = (*SD, *LCM, *SDXL)
    if pipeline is not None and pipeline not in known:
        raise ValueError(f"{source}: _class_name {pipeline!r} is not supported; known are {', '.join(known)}")
    sdxl = pipeline in SDXL if pipeline is not None else "text_encoder_2" in model.parts
    for needed in ("unet", "vae", "text_encoder_2" if sdxl else "text_encoder"):
        if needed not in model.parts:
            raise ValueError(f"{source}: names no {needed}; {pipeline or 'a text-to-image model'} needs one")
    for name in model.parts:
        if name not in _NETWORKS:
            raise ValueError(f"{source}: names the component {name!r}, which is not supported; remove it if unused")
    for name, value in extras.items():
        if name not in _SETTINGS and not name.startswith("_"):
            warnings.warn(f"{source}: {name}={value!r} is not known and is ignored", stacklevel=2)


def save_folder(path: Path, folder: Folder, *, dtype: Any = None, variant: str | None = None) -> None:
    """Write a diffusers folder: aside first, then renamed, so `path` holds all of it or is as it was.

    dtype: of the files; None keeps the parameters' own. variant: such as "fp16", put into the files' names.
    """
    with replacing(path) as aside:
        index = {"_class_name": folder.pipeline, **folder.extras, **_settings(folder)}
        for name, component in folder.components.items():
            index[name] = save_component(aside, name, component, dtype=dtype, variant=variant)
        for name, tokenizer in (("tokenizer", folder.tokenizer), ("tokenizer_2", folder.tokenizer_2)):
            if tokenizer is not None:
                tokenizer.save(aside / name)
                index[name] = ("transformers", "CLIPTokenizer")
        write_json(aside / "scheduler" / "scheduler_config.json", folder.scheduler)
        index["scheduler"] = ("diffusers", folder.scheduler["_class_name"])
        if "text_encoder" in folder.components:
            # The pipeline takes the first output, which with a projection would be the pooled one.
            index["text_encoder"] = ("transformers", "CLIPTextModel")
        write_json(aside / "model_index.json", index)


def _settings(folder: Folder) -> dict[str, Any]:
    """The entries of model_index.json that a pipeline's class asks for beside its components."""
    absent = (None, None)
    if not folder.is_sdxl:
        return {"safety_checker": absent, "feature_extractor": absent, "requires_safety_checker": False}
    settings: dict[str, Any] = {"text_encoder": absent, "tokenizer": absent, "feature_extractor": absent}
    settings["force_zeros_for_empty_prompt"] = folder.zeros_for_empty_prompt
    if folder.pipeline == SDXL[1]:
        settings["requires_aesthetics_score"] = folder.is_refiner
    return settings
