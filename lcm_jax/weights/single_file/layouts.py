"""The original names: the slot of each of diffusers' tensors in the single files of Stable Diffusion's authors.

A layout is a function from diffusers' name to a `Slot`. Reading, writing and LoRA files all use it, so one table serves
every direction. The layouts are LDM's and SGM's UNet (SD1, SD2, SDXL), their autoencoder, OpenCLIP's text encoder, and
the MMDiT of SD3 and SD3.5. (A CLIP-L or T5 has the names that transformers gives it.)
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from itertools import accumulate
from typing import Literal, NamedTuple

import numpy as np

from lcm_jax.nets import UNetConfig
from lcm_jax.runtime.messages import few
from lcm_jax.weights.component import Lazy
from lcm_jax.weights.torch_params import depth_mismatches
from mmdit import MMDiTConfig
from vae16 import AutoencoderConfig

Form = Literal["same", "transposed", "pointwise", "swapped"]


class Slot(NamedTuple):
    """The key of a tensor in an original file, its part of the fused tensor there, and its form there.

    form: "same"; "transposed", a matrix; "pointwise", a dense weight (o, i) stored as a 1 x 1 convolution (o, i, 1, 1);
    "swapped", the two halves of the first axis, scale and shift, in the other order.
    """

    key: str
    part: int = 0  # index among the tensors that are fused along the first axis
    parts: int = 1  # number of tensors that are fused
    form: Form = "same"


Layout = Callable[[str], Slot]


def _rename(name: str, table: Iterable[tuple[str, str]]) -> str:
    for pattern, replacement in table:
        name = re.sub(pattern, replacement, name)
    return name


_UNET_STEMS = (
    (r"^time_embedding\.linear_1\.", "time_embed.0."),
    (r"^time_embedding\.linear_2\.", "time_embed.2."),
    (r"^time_embedding\.", "time_embed."),
    (r"^add_embedding\.linear_1\.", "label_emb.0.0."),
    (r"^add_embedding\.linear_2\.", "label_emb.0.2."),
    (r"^conv_in\.", "input_blocks.0.0."),
    (r"^conv_norm_out\.", "out.0."),
    (r"^conv_out\.", "out.2."),
)
_UNET_RESNET = (
    (r"^norm1\.", "in_layers.0."),
    (r"^conv1\.", "in_layers.2."),
    (r"^time_emb_proj\.", "emb_layers.1."),
    (r"^norm2\.", "out_layers.0."),
    (r"^conv2\.", "out_layers.3."),
    (r"^conv_shortcut\.", "skip_connection."),
)
_BLOCK = re.compile(r"^(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.*)$")
_MID = re.compile(r"^mid_block\.(resnets|attentions)\.(\d+)\.(.*)$")


def unet_layout(config: UNetConfig) -> Layout:
    """Return the layout of LDM's and SGM's UNet.

    They number the blocks of each half in one list. A block holds a residual block, then attention, then resampling.
    """
    levels = len(config.block_out_channels)
    layers = [config.level("layers_per_block", level) for level in range(levels)]
    # A down level has its layers and then a downsampler; an up level has one layer more and the upsampler in the last.
    down = list(accumulate((n + 1 for n in layers), initial=1))
    up = list(accumulate((n + 1 for n in reversed(layers)), initial=0))

    def layout(name: str) -> Slot:
        if match := _BLOCK.match(name):
            half, level, kind, index, rest = match[1], int(match[2]), match[3], int(match[4]), match[5]
            if kind == "resnets":
                rest = _rename(rest, _UNET_RESNET)
            if half == "down":
                if kind == "downsamplers":
                    index, rest = layers[level], re.sub(r"^conv\.", "op.", rest)
                return Slot(f"input_blocks.{down[level] + index}.{int(kind == 'attentions')}.{rest}")
            tail = int(kind == "attentions")
            if kind == "upsamplers":
                index, tail = up[level + 1] - up[level] - 1, 1 + config.up_block_types[level].startswith("CrossAttn")
            return Slot(f"output_blocks.{up[level] + index}.{tail}.{rest}")
        if match := _MID.match(name):
            if match[1] == "attentions":
                return Slot(f"middle_block.1.{match[3]}")
            return Slot(f"middle_block.{2 * int(match[2])}.{_rename(match[3], _UNET_RESNET)}")
        return Slot(_rename(name, _UNET_STEMS))

    return layout


_VAE = (
    (r"\.down_blocks\.(\d+)\.resnets\.", r".down.\1.block."),
    (r"\.down_blocks\.(\d+)\.downsamplers\.0\.", r".down.\1.downsample."),
    (r"\.up\.(\d+)\.resnets\.", r".up.\1.block."),
    (r"\.up\.(\d+)\.upsamplers\.0\.", r".up.\1.upsample."),
    (r"\.conv_shortcut\.", ".nin_shortcut."),
    (r"\.mid_block\.resnets\.0\.", ".mid.block_1."),
    (r"\.mid_block\.resnets\.1\.", ".mid.block_2."),
    (r"\.mid_block\.attentions\.0\.group_norm\.", ".mid.attn_1.norm."),
    (r"\.mid_block\.attentions\.0\.to_([qkv])\.", r".mid.attn_1.\1."),
    (r"\.mid_block\.attentions\.0\.to_out\.0\.", ".mid.attn_1.proj_out."),
    (r"\.conv_norm_out\.", ".norm_out."),
)


def vae_layout(config: AutoencoderConfig) -> Layout:
    """Return the layout of LDM's autoencoder.

    It counts the decoder's levels from the finest one, and its attention consists of 1 x 1 convolutions.
    """
    last = len(config.block_out_channels) - 1

    def layout(name: str) -> Slot:
        name = re.sub(r"\.up_blocks\.(\d+)\.", lambda m: f".up.{last - int(m[1])}.", name)
        key = _rename(name, _VAE)
        dense = re.search(r"\.mid\.attn_1\.(q|k|v|proj_out)\.weight$", key)
        return Slot(key, form="pointwise" if dense else "same")

    return layout


_OPENCLIP = (
    (r"^text_model\.", ""),
    (r"^vision_model\.", "visual."),
    (r"^visual\.embeddings\.patch_embedding\.", "visual.conv1."),
    (r"^visual\.embeddings\.position_embedding\.weight$", "visual.positional_embedding"),
    (r"^visual\.embeddings\.", "visual."),
    (r"^visual\.pre_layrnorm\.", "visual.ln_pre."),
    (r"^visual\.post_layernorm\.", "visual.ln_post."),
    (r"^embeddings\.position_embedding\.weight$", "positional_embedding"),
    (r"^embeddings\.token_embedding\.", "token_embedding."),
    (r"^final_layer_norm\.", "ln_final."),
    (r"^(visual\.|)encoder\.layers\.(\d+)\.", r"\1transformer.resblocks.\2."),
    (r"\.layer_norm([12])\.", r".ln_\1."),
    (r"\.self_attn\.out_proj\.", ".attn.out_proj."),
    (r"\.mlp\.fc1\.", ".mlp.c_fc."),
    (r"\.mlp\.fc2\.", ".mlp.c_proj."),
)


def openclip_layout(name: str) -> Slot:
    """Return the slot of a tensor of either encoder in OpenCLIP's files (SD2's H, SDXL's bigG, HPSv2).

    Query, key and value are one matrix there, and the projections are transposed.

    >>> from lcm_jax.weights.single_file.layouts import openclip_layout
    >>> openclip_layout("text_model.encoder.layers.3.self_attn.k_proj.weight")
    Slot(key='transformer.resblocks.3.attn.in_proj_weight', part=1, parts=3, form='same')
    """
    if name in ("text_projection.weight", "visual_projection.weight"):
        return Slot("text_projection" if name.startswith("text") else "visual.proj", form="transposed")
    key = _rename(name, _OPENCLIP)
    if match := re.match(r"^(.*)\.self_attn\.([qkv])_proj\.(weight|bias)$", key):
        return Slot(f"{match[1]}.attn.in_proj_{match[3]}", "qkv".index(match[2]), 3)
    return Slot(key)


_MMDIT = (
    (r"^pos_embed\.pos_embed$", "pos_embed"),
    (r"^pos_embed\.proj\.", "x_embedder.proj."),
    (r"^time_text_embed\.timestep_embedder\.linear_1\.", "t_embedder.mlp.0."),
    (r"^time_text_embed\.timestep_embedder\.linear_2\.", "t_embedder.mlp.2."),
    (r"^time_text_embed\.timestep_embedder\.", "t_embedder."),
    (r"^time_text_embed\.text_embedder\.linear_1\.", "y_embedder.mlp.0."),
    (r"^time_text_embed\.text_embedder\.linear_2\.", "y_embedder.mlp.2."),
    (r"^norm_out\.linear\.", "final_layer.adaLN_modulation.1."),
    (r"^proj_out\.", "final_layer.linear."),
    (r"^transformer_blocks\.", "joint_blocks."),
    (r"\.norm1_context\.linear\.", ".context_block.adaLN_modulation.1."),
    (r"\.norm1\.linear\.", ".x_block.adaLN_modulation.1."),
    (r"\.ff_context\.net\.0\.proj\.", ".context_block.mlp.fc1."),
    (r"\.ff_context\.net\.2\.", ".context_block.mlp.fc2."),
    (r"\.ff\.net\.0\.proj\.", ".x_block.mlp.fc1."),
    (r"\.ff\.net\.2\.", ".x_block.mlp.fc2."),
    (r"\.attn\.norm_added_([qk])\.", r".context_block.attn.ln_\1."),
    (r"\.(attn2?)\.norm_([qk])\.", r".x_block.\1.ln_\2."),
    (r"\.attn\.to_add_out\.", ".context_block.attn.proj."),
    (r"\.(attn2?)\.to_out\.0\.", r".x_block.\1.proj."),
    (r"\.attn\.add_([qkv])_proj\.", r".context_block.attn.\1."),
    (r"\.(attn2?)\.to_([qkv])\.", r".x_block.\1.\2."),
)


def mmdit_layout(config: MMDiTConfig) -> Layout:
    """Return the layout of Stability's MMDiT.

    Query, key and value are one matrix there, and the final modulations have scale and shift in the other order.
    """
    swapped = ("norm_out.linear.", f"transformer_blocks.{config.num_layers - 1}.norm1_context.linear.")

    def layout(name: str) -> Slot:
        key = _rename(name, _MMDIT)
        if match := re.match(r"^(.*\.attn2?)\.([qkv])\.(weight|bias)$", key):
            return Slot(f"{match[1]}.qkv.{match[3]}", "qkv".index(match[2]), 3)
        return Slot(key, form="swapped" if name.startswith(swapped) else "same")

    return layout


def original_shapes(shapes: Mapping[str, tuple[int, ...]], layout: Layout) -> dict[str, tuple[int, ...]]:
    """Return {key: shape} of an original file from {name: shape} in diffusers' naming."""
    original: dict[str, tuple[int, ...]] = {}
    for name, shape in shapes.items():
        slot = layout(name)
        if slot.form == "transposed":
            shape = shape[::-1]
        elif slot.form == "pointwise":
            shape = (*shape, 1, 1)
        original[slot.key] = (slot.parts * shape[0], *shape[1:]) if slot.parts > 1 else shape
    return original


def same_layout(name: str) -> Slot:
    """Return the slot of a tensor whose name is the same in original files and in transformers."""
    return Slot(name)


def _swap(array: np.ndarray) -> np.ndarray:
    return np.concatenate(np.split(array, 2)[::-1])


def _reform(array: np.ndarray, form: Form, *, out: bool) -> np.ndarray:
    """Convert a tensor from the form of original files to that of diffusers, or back (`out`: into a file)."""
    if form == "transposed":
        return array.T
    if form == "swapped":
        return _swap(array)
    if form == "pointwise":
        return array[..., None, None] if out else array.reshape(array.shape[:2]) if array.ndim == 4 else array
    return array


def from_original(
    tensors: Mapping[str, np.ndarray], names: Iterable[str], layout: Layout, *, source: str, dropped: str = r"^$"
) -> dict[str, np.ndarray]:
    """Return the tensors `names` (diffusers' naming) of an original file; views of it wherever the form allows.

    tensors: those of the file, without the network's prefix. dropped: a regex of the keys that may be left over. Raises
    one ValueError that lists the keys that are missing, unexpected or mis-shaped.
    """
    slots = {name: layout(name) for name in names}
    used = {slot.key for slot in slots.values()}
    missing = sorted(used - tensors.keys())
    unknown = sorted(key for key in tensors.keys() - used if not re.search(dropped, key))
    fused = {slot.key: slot.parts for slot in slots.values() if slot.parts > 1 and slot.key in tensors}
    misshaped = sorted(key for key, parts in fused.items() if tensors[key].ndim < 1 or tensors[key].shape[0] % parts)
    faults = {"missing": missing, "unexpected": unknown, "mis-shaped": misshaped}
    if any(faults.values()):
        listed = [*depth_mismatches(used, tensors), *(few(what, keys) for what, keys in faults.items() if keys)]
        raise ValueError(f"{source}: does not fit the network: {'; '.join(listed)}")
    converted = {}
    for name, slot in slots.items():
        array = tensors[slot.key]
        size = array.shape[0] // slot.parts if slot.parts > 1 else 0
        part = array[slot.part * size : (slot.part + 1) * size] if slot.parts > 1 else array
        converted[name] = _reform(part, slot.form, out=False)
    return converted


def to_original(tensors: Mapping[str, np.ndarray], layout: Layout) -> Mapping[str, np.ndarray]:
    """Return tensors of diffusers' naming under their original keys, each fused and converted when it is asked for.

    Raises ValueError if a fused tensor lacks a part.
    """
    fused: dict[str, dict[int, str]] = {}  # key -> part -> diffusers' name
    slots = {name: layout(name) for name in tensors}
    for name, slot in slots.items():
        fused.setdefault(slot.key, {})[slot.part] = name
    incomplete = sorted({slot.key for slot in slots.values() if len(fused[slot.key]) != slot.parts})
    if incomplete:
        raise ValueError(f"cannot write {few('fused tensors of which a part is missing', incomplete)}")

    def make(names: dict[int, str]) -> np.ndarray:
        parts = [_reform(tensors[names[i]], slots[names[i]].form, out=True) for i in range(len(names))]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    return Lazy({key: partial(make, names) for key, names in fused.items()})
