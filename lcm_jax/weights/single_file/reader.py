"""Single files: models as Stability, CompVis and ComfyUI write them, recognised by their keys; read and written.

One .safetensors file holds all networks, each under a prefix. Configs, tokenizers and the noise schedule are not in it:
configs are inferred from the shapes (`infer_config`) or given, and the schedule is that of the model's family.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lcm_jax.runtime.messages import few
from lcm_jax.weights.component import Lazy, Part, cast, check_part, names_of
from lcm_jax.weights.safetensors_files import read_metadata, read_safetensors, save_tensors
from lcm_jax.weights.single_file.infer_config import clip_config, mmdit_config, t5_config, unet_config, vae_config
from lcm_jax.weights.single_file.layouts import (
    Layout,
    from_original,
    mmdit_layout,
    openclip_layout,
    same_layout,
    to_original,
    unet_layout,
    vae_layout,
)


class ComponentSpec(NamedTuple):
    """The prefix and class of a component in a family of single files."""

    prefix: str  # of its keys
    kind: str  # class name
    open_clip: bool = False  # a text encoder in OpenCLIP's naming


_VAE = ComponentSpec("first_stage_model.", "AutoencoderKL")
_UNET = {"unet": ComponentSpec("model.diffusion_model.", "UNet2DConditionModel"), "vae": _VAE}
_CLIP, _PROJECTED = "CLIPTextModel", "CLIPTextModelWithProjection"
FAMILY_COMPONENTS: Mapping[str, Mapping[str, ComponentSpec]] = {
    "sd1": {**_UNET, "text_encoder": ComponentSpec("cond_stage_model.transformer.", _CLIP)},
    "sd2": {**_UNET, "text_encoder": ComponentSpec("cond_stage_model.model.", _CLIP, open_clip=True)},
    "sdxl": {
        **_UNET,
        "text_encoder": ComponentSpec("conditioner.embedders.0.transformer.", _CLIP),
        "text_encoder_2": ComponentSpec("conditioner.embedders.1.model.", _PROJECTED, open_clip=True),
    },
    "refiner": {**_UNET, "text_encoder_2": ComponentSpec("conditioner.embedders.0.model.", _PROJECTED, open_clip=True)},
    "sd3": {
        "transformer": ComponentSpec("model.diffusion_model.", "SD3Transformer2DModel"),
        "vae": _VAE,
        "text_encoder": ComponentSpec("text_encoders.clip_l.transformer.", _PROJECTED),
        "text_encoder_2": ComponentSpec("text_encoders.clip_g.transformer.", _PROJECTED),
        "text_encoder_3": ComponentSpec("text_encoders.t5xxl.transformer.", "T5EncoderModel"),
    },
}
# Keys left behind by training, and buffers that this library computes: dropped, and listed in `Single.dropped`.
_LEFTOVERS = re.compile(
    r"^model_ema\.|^(betas|alphas_cumprod|alphas_cumprod_prev|sqrt_\w+|log_one_minus_\w+|posterior_\w+|logvar|scale_factor"
    r"|lvlb_weights|global_step|v_pred|ztsnr)$|^denoiser\.sigmas$|^first_stage_model\.loss\.|(^|\.)logit_scale$"
    r"|\.position_ids$|\.attn_mask$|^model_sampling\.sigmas$"
)
_SD2_LAST = r"^transformer\.resblocks\.{}\.|^text_projection$"


@dataclass(frozen=True, kw_only=True)
class Single:
    """The networks of a single file."""

    family: str  # a key of PLACES
    parts: Mapping[str, Part]  # component -> network
    dropped: tuple[str, ...]  # the file's keys that are not used
    prediction: str  # "epsilon", "v_prediction" or "flow"


def layout_of(kind: str, config: Any, *, open_clip: bool = False) -> Layout:
    """Return the layout, that is the original names, of a network of class `kind`.

    open_clip: whether a text encoder has OpenCLIP's names; the others have transformers' own.
    """
    if kind == "UNet2DConditionModel":
        return unet_layout(config)
    if kind == "AutoencoderKL":
        return vae_layout(config)
    if kind == "SD3Transformer2DModel":
        return mmdit_layout(config)
    return openclip_layout if open_clip else same_layout


def is_single(path: str | Path) -> bool:
    """Return whether a path is a file of weights rather than a folder."""
    return Path(path).is_file()


def family_of(keys: Any, *, source: str) -> str:
    """Return the family ("sd1", "sd2", "sdxl", "refiner", "sd3") whose prefixes the keys have.

    "bare" is a UNet without a text encoder. Raises ValueError for a LoRA and for keys of no family. source: the file
    that the message names.
    """

    def has(prefix: str) -> bool:
        return any(key.startswith(prefix) for key in keys)

    if has("model.diffusion_model.joint_blocks."):
        return "sd3"
    if has("model.diffusion_model.input_blocks."):
        for family, text in (
            ("sdxl", "conditioner.embedders.1.model."),
            ("refiner", "conditioner.embedders.0.model."),
            ("sd2", "cond_stage_model.model."),
            ("sd1", "cond_stage_model.transformer."),
        ):
            if has(text):
                return family
        return "bare"
    if has("lora_") or any(".lora" in key for key in keys):
        raise ValueError(f"{source}: a LoRA, not a model; give it as lora= beside the model it was made for")
    raise ValueError(
        f"{source}: none of Stable Diffusion's single files (SD1, SD2, SDXL, SD3 in their original naming); "
        f"its first keys are {', '.join(sorted(keys)[:3])}"
    )


def _bare(tensors: Mapping[str, np.ndarray], source: str) -> dict[str, np.ndarray]:
    """Return the tensors; those of a single UNet, MMDiT or autoencoder under the prefix that it has in full models."""
    for key, prefix in (
        ("input_blocks.0.0.weight", "model.diffusion_model."),
        ("x_embedder.proj.weight", "model.diffusion_model."),
        ("decoder.conv_in.weight", "first_stage_model."),
    ):
        if key in tensors:
            return {prefix + name: tensor for name, tensor in tensors.items()}
    return dict(tensors)


def read_single(path: str | Path, *, configs: Mapping[str, tuple[str, Any]] | None = None) -> Single:
    """Return the networks of a single file.

    configs: component -> (class, config) for the components whose configs are known; the others are inferred from the
    shapes. Raises FileNotFoundError, and ValueError if the file is of no known family, has keys that belong to no
    network, or does not fit a config.
    """
    source, configs = str(path), configs or {}
    metadata, tensors = read_metadata(path), _bare(read_safetensors(path), str(path))
    if "edm_mean" in tensors:
        raise ValueError(
            f"{source}: edm_mean: models with their own latent statistics (Playground 2.5) are not supported"
        )
    family = "sd1"
    if any(key.startswith("model.diffusion_model.") for key in tensors) or not any(
        key.startswith(_VAE.prefix) for key in tensors
    ):
        family = family_of(tensors.keys(), source=source)
        if family == "bare":
            width = next(t.shape[1] for key, t in tensors.items() if key.endswith(".attn2.to_k.weight"))
            family = {1024: "sd2", 2048: "sdxl", 1280: "refiner"}.get(width, "sd1")
    parts: dict[str, Part] = {}
    used: set[str] = set()
    dropped: list[str] = []
    for component, spec in FAMILY_COMPONENTS[family].items():
        network = {k.removeprefix(spec.prefix): t for k, t in tensors.items() if k.startswith(spec.prefix)}
        if not network:
            continue
        used |= {spec.prefix + key for key in network}
        kind, config = configs.get(component) or (spec.kind, _infer_config(spec, network, family, source))
        parts[component], unused = _read_part(spec._replace(kind=kind), config, network, family, source)
        dropped += [spec.prefix + key for key in unused]
    rest = sorted(tensors.keys() - used)
    unknown = [key for key in rest if not _LEFTOVERS.search(key)]
    if unknown:
        raise ValueError(f"{source}: {few('keys that belong to no network of this family', unknown)}")
    return Single(
        family=family,
        parts=parts,
        dropped=tuple(sorted(dropped + rest)),
        prediction=_prediction(family, tensors, metadata),
    )


def _infer_config(spec: ComponentSpec, tensors: Mapping[str, np.ndarray], family: str, source: str) -> Any:
    shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    if spec.kind == "UNet2DConditionModel":
        return unet_config(shapes, source=source)
    if spec.kind == "SD3Transformer2DModel":
        return mmdit_config(shapes, source=source)
    if spec.kind == "AutoencoderKL":
        return vae_config(
            shapes, source=source, family={"sd3": "sd3", "sdxl": "sdxl", "refiner": "sdxl"}.get(family, "sd")
        )
    if spec.kind == "T5EncoderModel":
        return t5_config(shapes, source=source)
    config = clip_config(shapes, source=source)
    if family == "sd2" and config.num_hidden_layers == 24:  # SD2 reads the output of layer 23; the last is never used
        config = replace_layers(config, 23)
    return config


def replace_layers(config: Any, layers: int) -> Any:
    """Return a copy of a text encoder's config with another number of layers."""
    return type(config)(**{**vars(config), "num_hidden_layers": layers})


def _read_part(
    spec: ComponentSpec, config: Any, original: dict[str, np.ndarray], family: str, source: str
) -> tuple[Part, list[str]]:
    """Return one network in diffusers' naming, and the keys of the file that it does not use."""
    shapes = names_of(spec.kind, config)
    if spec.kind == _PROJECTED and not spec.open_clip and "text_projection.weight" not in original:
        # SD3's CLIP-L returns its pooled output without a projection; diffusers and this library have one there.
        original = original | {"text_projection.weight": np.eye(config.hidden_size, dtype=np.float32)}
    if spec.kind == "T5EncoderModel":
        original = {key: tensor for key, tensor in original.items() if key != "encoder.embed_tokens.weight"} | (
            {} if "shared.weight" in original else {"shared.weight": original["encoder.embed_tokens.weight"]}
        )
    dropped = _LEFTOVERS.pattern
    if family == "sd2" and spec.open_clip:
        dropped += "|" + _SD2_LAST.format(config.num_hidden_layers)
    layout = layout_of(spec.kind, config, open_clip=spec.open_clip)
    tensors = from_original(original, shapes, layout, source=source, dropped=dropped)
    unused = sorted(original.keys() - {layout(name).key for name in shapes})
    return Part(spec.kind, config, tensors, source), unused


def _prediction(family: str, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> str:
    """Return "epsilon", "v_prediction" or "flow", from the header, from marker keys, or for SD2 from its weights."""
    if family == "sd3":
        return "flow"
    declared = metadata.get("modelspec.prediction_type")
    if declared is not None:
        return {"epsilon": "epsilon", "v": "v_prediction"}.get(declared, declared)
    if "v_pred" in tensors:
        return "v_prediction"
    # SD2 was released with both outputs. Training for v made this bias spread wider; other loaders test it too.
    bias = tensors.get("model.diffusion_model.output_blocks.11.1.transformer_blocks.0.norm1.bias")
    is_v = family == "sd2" and bias is not None and float(np.std(np.asarray(bias, np.float32))) > 0.09
    return "v_prediction" if is_v else "epsilon"


def write_single(path: str | Path, parts: Mapping[str, Part], *, prediction: str, dtype: Any = None) -> dict[str, str]:
    """Write the networks as one file in their family's original naming; return component -> prefix.

    parts: component -> network. prediction: "epsilon", "v_prediction" or "flow", for the file's header. dtype: that of
    the floating tensors in the file; None keeps each tensor's. Raises ValueError for a network that does not fit its
    config and for a component that the family's files do not hold.
    """
    family = _family_to_write(parts)
    specs = FAMILY_COMPONENTS[family]
    unsupported = sorted(parts.keys() - specs.keys())
    if unsupported:
        raise ValueError(f"{path}: a single file of {family} has no place for {', '.join(unsupported)}")
    makers: dict[str, Any] = {}
    for component, part in parts.items():
        spec = specs[component]
        check_part(part)
        tensors = {name: part.tensors[name] for name in names_of(part.kind, part.config)}
        original = to_original(cast(tensors, dtype), layout_of(part.kind, part.config, open_clip=spec.open_clip))
        makers |= {spec.prefix + key: partial(original.__getitem__, key) for key in original}
    declared = {"epsilon": "epsilon", "v_prediction": "v"}.get(prediction)
    save_tensors(path, Lazy(makers), {} if declared is None else {"modelspec.prediction_type": declared})
    return {component: specs[component].prefix for component in parts}


def _family_to_write(parts: Mapping[str, Part]) -> str:
    if "transformer" in parts:
        return "sd3"
    if "text_encoder_2" in parts:
        return "sdxl" if "text_encoder" in parts else "refiner"
    text = parts.get("text_encoder")
    return "sd2" if text is not None and text.config.hidden_act == "gelu" else "sd1"
