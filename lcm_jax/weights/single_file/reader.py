"""Single files: models as Stability, CompVis and ComfyUI write them, recognised by their keys; read and written.

One .safetensors file holds all networks, each under a prefix. Configs, tokenizers and the noise schedule have no place
there: they are in the header of the files that this library writes (`header`). For other files the configs are inferred
from the shapes (`infer_config`) or given, and the schedule is that of the model's family, with what the file declares.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lcm_jax.runtime.messages import few, shown
from lcm_jax.weights.component import Lazy, Part, cast, check_part, names_of, parse_config
from lcm_jax.weights.registry import TOWER
from lcm_jax.weights.safetensors_files import read_metadata, read_safetensors, save_tensors
from lcm_jax.weights.scheduler_config import has_zero_terminal_snr, prediction_of
from lcm_jax.weights.single_file import moving_average
from lcm_jax.weights.single_file.header import Header, read_header
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
_CLIP_L = tuple(  # prefixes of text encoders in transformers' naming
    {
        spec.prefix: None
        for specs in FAMILY_COMPONENTS.values()
        for spec in specs.values()
        if spec.kind in (_CLIP, _PROJECTED) and not spec.open_clip
    }
)
# Keys left behind by training, and buffers that this library computes: dropped, and listed in `Single.dropped`.
_LEFTOVERS = re.compile(
    r"^model_ema\.|^(betas|alphas_cumprod|alphas_cumprod_prev|sqrt_\w+|log_one_minus_\w+|posterior_\w+|logvar|scale_factor"
    r"|lvlb_weights|global_step|v_pred|ztsnr)$|^denoiser\.sigmas$|^first_stage_model\.loss\.|(^|\.)logit_scale$"
    r"|\.position_ids$|\.attn_mask$|^model_sampling\.sigmas$"
)
_SD2_LAST = r"^transformer\.resblocks\.{}\.|^text_projection$"
_PROJECTION = r"^text_projection(\.weight)?$"  # SD1 and SDXL read CLIP-L's tokens alone
# Tensors without values: the output of the network is v, and the last timestep is pure noise (A1111, ComfyUI, kohya).
V_PREDICTION, ZERO_TERMINAL_SNR = "v_pred", "ztsnr"
PREDICTION_KEY = "modelspec.prediction_type"
_PREDICTIONS = {"epsilon": "epsilon", "v": "v_prediction"}  # in modelspec -> in diffusers


@dataclass(frozen=True, kw_only=True)
class Single:
    """The networks of a single file."""

    family: str  # a key of FAMILY_COMPONENTS
    parts: Mapping[str, Part]  # component -> network
    dropped: tuple[str, ...]  # the file's keys that are not used
    declared: Mapping[str, Any]  # keys of a scheduler config that the file itself declares by its marks
    guessed: str | None  # the prediction type that SD2's weights show, where the file declares none
    header: Header | None  # its description, if this library wrote it


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


def _canonical(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return the tensors under the keys that their family's published files have.

    A moving average that stands alone takes its network's place; SD-Turbo names its text encoder as SDXL does, and
    NovelAI and transformers 5 leave out CLIP's `text_model.`.
    """
    tensors = _bare(moving_average.as_network(tensors))
    renames = {}
    turbo, label = "conditioner.embedders.0.model.", "model.diffusion_model.label_emb.0.0.weight"
    if label not in tensors:
        renames[turbo] = "cond_stage_model.model."
    for prefix in _CLIP_L:
        renames |= {prefix + start: f"{prefix}text_model.{start}" for start in TOWER}
    starts = re.compile("|".join(map(re.escape, renames)))
    return {
        key.replace(match[0], renames[match[0]], 1) if (match := starts.match(key)) else key: tensor
        for key, tensor in tensors.items()
    }


def _bare(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return the tensors; those of a single UNet, MMDiT or autoencoder under the prefix that it has in full models."""
    for key, prefix in (
        ("input_blocks.0.0.weight", "model.diffusion_model."),
        ("x_embedder.proj.weight", "model.diffusion_model."),
        ("decoder.conv_in.weight", "first_stage_model."),
    ):
        if key in tensors:
            return {name if _LEFTOVERS.search(name) else prefix + name: tensor for name, tensor in tensors.items()}
    return dict(tensors)


def read_single(path: str | Path, *, configs: Mapping[str, tuple[str, Any]] | None = None) -> Single:
    """Return the networks of a single file.

    configs: component -> (class, config) for the components whose configs are known; the others are inferred from the
    shapes. None takes them from the header, if this library wrote the file. Raises FileNotFoundError, and ValueError if
    the file is of no known family, has keys that belong to no network, or does not fit a config. A warning where the
    file has only the moving average of its network, which is then the network.
    """
    source, metadata, raw = str(path), read_metadata(path), read_safetensors(path)
    try:
        header = read_header(metadata, source=source)
    except ValueError as error:
        if configs is None:
            raise
        header = None
        warnings.warn(f"{error}: it is passed over", stacklevel=3)
    if configs is None and header is not None:
        configs = {
            name: parse_config(values, source=f"{source}: {name} in its header")
            for name, values in header.configs.items()
        }
    configs, tensors = configs or {}, _canonical(raw)
    if moving_average.is_alone(raw):
        warnings.warn(f"{source}: holds only the moving average of its network (model_ema.*): it is used", stacklevel=2)
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
        network = {
            key.removeprefix(spec.prefix): tensor
            for key, tensor in tensors.items()
            if key.startswith(spec.prefix) and not _LEFTOVERS.search(key)
        }
        if not network:
            continue
        used |= {spec.prefix + key for key in network}
        kind, config = configs.get(component) or (spec.kind, _inferred(spec, network, family, source))
        parts[component], unused = _read_part(spec._replace(kind=kind), config, network, family, source)
        dropped += [spec.prefix + key for key in unused]
    rest = sorted(tensors.keys() - used)
    unknown = [key for key in rest if not _LEFTOVERS.search(key)]
    if unknown:
        raise ValueError(f"{source}: {few('keys that belong to no network of this family', unknown)}")
    return Single(
        family=family,
        parts=parts,
        dropped=tuple(sorted({*dropped, *rest} - {V_PREDICTION, ZERO_TERMINAL_SNR})),
        declared=_declared(tensors, metadata, source=source),
        guessed=_guessed(tensors) if family == "sd2" else None,
        header=header,
    )


def _inferred(spec: ComponentSpec, tensors: Mapping[str, np.ndarray], family: str, source: str) -> Any:
    """Return the config that the shapes tell; ValueError that names the file if a layer or axis is not there."""
    try:
        return _infer_config(spec, tensors, family, source)
    except (LookupError, TypeError, ArithmeticError) as error:
        raise ValueError(f"{source}: incomplete, its config cannot be inferred ({shown(error)})") from error
    except ValueError as error:
        raise ValueError(str(error) if source in str(error) else f"{source}: {error}") from None


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
    dropped = r"^$"
    if family == "sd2" and spec.open_clip:
        dropped = _SD2_LAST.format(config.num_hidden_layers)
    elif spec.kind == _CLIP and not spec.open_clip:
        dropped = _PROJECTION
    layout = layout_of(spec.kind, config, open_clip=spec.open_clip)
    tensors = from_original(original, shapes, layout, source=source, dropped=dropped)
    unused = sorted(original.keys() - {layout(name).key for name in shapes})
    return Part(spec.kind, config, tensors, source), unused


def _declared(tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str], *, source: str) -> dict[str, Any]:
    """Return the keys of a scheduler config that a file declares by its marker tensors and in its header.

    A warning where the two contradict each other: the markers, which programs act on, win.
    """
    declared: dict[str, Any] = {}
    spec = metadata.get(PREDICTION_KEY)
    if spec is not None:
        declared["prediction_type"] = _PREDICTIONS.get(spec, spec)
    if V_PREDICTION in tensors:
        if declared.get("prediction_type", "v_prediction") != "v_prediction":
            warnings.warn(
                f"{source}: its key {V_PREDICTION} says v_prediction, {PREDICTION_KEY} in its header {spec!r:.40}: the "
                "key is followed; load with scheduler={'prediction_type': ...} for the other",
                stacklevel=3,
            )
        declared["prediction_type"] = "v_prediction"
    if ZERO_TERMINAL_SNR in tensors:
        declared["rescale_betas_zero_snr"] = True
    return declared


def _guessed(tensors: Mapping[str, np.ndarray]) -> str:
    """Return the prediction type that SD2's weights show: training for v made this bias spread wider.

    SD2 was released with both outputs and without a mark; other loaders test the same bias.
    """
    bias = tensors.get("model.diffusion_model.output_blocks.11.1.transformer_blocks.0.norm1.bias")
    is_v = bias is not None and float(np.std(np.asarray(bias, np.float32))) > 0.09
    return "v_prediction" if is_v else "epsilon"


def write_single(
    path: str | Path,
    parts: Mapping[str, Part],
    *,
    scheduler: Mapping[str, Any],
    header: Header | None = None,
    dtype: Any = None,
) -> dict[str, str]:
    """Write the networks as one file in their family's original naming; return component -> prefix.

    parts: component -> network. scheduler: the scheduler config, of which other programs read the prediction type and
    zero terminal SNR, as marker keys and in the header. header: the description by which this library loads the file
    again. dtype: that of the floating tensors in the file; None keeps each tensor's. Raises ValueError for a network
    that does not fit its config and for a component that the family's files do not hold.
    """
    family = family_to_write(parts)
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
    prediction = prediction_of(scheduler)
    marker = partial(np.zeros, 0, np.float32)
    if prediction == "v_prediction":
        makers[V_PREDICTION] = marker
    if has_zero_terminal_snr(scheduler):
        makers[ZERO_TERMINAL_SNR] = marker
    metadata = {} if header is None else header.to_metadata()
    spelt = {name: spelling for spelling, name in _PREDICTIONS.items()}
    if prediction in spelt:
        metadata[PREDICTION_KEY] = spelt[prediction]
    save_tensors(path, Lazy(makers), metadata)
    return {component: specs[component].prefix for component in parts}


def family_to_write(parts: Mapping[str, Part]) -> str:
    """Return the family of single files, a key of `FAMILY_COMPONENTS`, that these networks are written as."""
    if "transformer" in parts:
        return "sd3"
    if "text_encoder_2" in parts:
        return "sdxl" if "text_encoder" in parts else "refiner"
    text = parts.get("text_encoder")
    return "sd2" if text is not None and text.config.hidden_act == "gelu" else "sd1"
