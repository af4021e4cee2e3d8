"""The keys of LoRA files: which network, which module and which factor each names, and which are not of a plain LoRA.

peft        unet.mid_block.attentions.0.proj_in.lora_A.weight      lora_B.weight
diffusers   unet.mid_block.attentions.0.proj_in.lora.down.weight   lora.up.weight   (text: lora_linear_layer.down)
kohya       lora_unet_mid_block_attentions_0_proj_in.lora_down.weight   .lora_up.weight   .alpha

Read as well: the prefixes of PEFT alone, ComfyUI and LyCORIS (`COMPONENTS`), LyCORIS' learned `.scalar`, A1111's
`.scale`, which goes before alpha, and the oldest spellings of diffusers. The textual inversions that A1111 reads from a
LoRA's file (`bundle_emb.*`) are not adapters: `weights.embeddings` reads them.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Literal

import jax.numpy as jnp
import numpy as np

from lcm_jax.runtime.messages import few
from lcm_jax.weights.safetensors_files import is_finite

Format = Literal["peft", "diffusers", "kohya"]
Group = dict[str, np.ndarray]  # the tensors of one module in a file: "down", "up", "alpha", "scalar", "scale"

# Component of a pipeline -> prefixes of its keys other than its own name. The first is kohya's, which is written.
COMPONENTS: dict[str, tuple[str, ...]] = {
    "unet": ("lora_unet_", "diffusion_model.", "lycoris_"),  # the last: LyCORIS and SimpleTuner, diffusers' names
    "transformer": ("lora_transformer_",),
    "text_encoder": ("lora_te_", "lora_te1_", *(f"text_encoders.clip_{size}.transformer." for size in "lh")),
    "text_encoder_2": ("lora_te2_", "text_encoders.clip_g.transformer."),
    "text_encoder_3": ("lora_te3_", "text_encoders.t5xxl.transformer."),
}
EMBEDDING = "bundle_emb."  # textual inversions that A1111 reads from the LoRA's file
# Kohya's and ComfyUI's keys say "unet" even for an MMDiT; these names of modules tell the two apart.
_MMDIT = re.compile(r"(joint_blocks|(x|t|y|context)_embedder|final_layer|transformer_blocks|time_text_embed)[._]")
ORIGINAL = re.compile(r"(input_blocks|middle_block|output_blocks|joint_blocks)[._]")

SUFFIXES: dict[str, tuple[str, str]] = {
    "peft": ("lora_A.weight", "lora_B.weight"),
    "diffusers": ("lora.down.weight", "lora.up.weight"),
    "kohya": ("lora_down.weight", "lora_up.weight"),
}
# End of a key -> what it holds. PEFT may put the adapter's name inside; the oldest diffusers wrote `to_q_lora.down`.
_ROLES: tuple[tuple[str, str], ...] = (
    (r"(\.lora_(A|down)(\.\w+)?|[._]lora\.down|\.lora_linear_layer\.down)\.weight$", "down"),
    (r"(\.lora_(B|up)(\.\w+)?|[._]lora\.up|\.lora_linear_layer\.up)\.weight$", "up"),
    (r"\.alpha$", "alpha"),
    (r"\.scalar$", "scalar"),  # LyCORIS: a learned factor of the whole difference
    (r"\.scale$", "scale"),  # A1111: in the place of alpha / rank
)
# Old spellings of modules.
_SPELLINGS: tuple[tuple[str, str], ...] = (
    (r"\.self_attn\.to_([qkv])$", r".self_attn.\1_proj"),
    (r"\.self_attn\.to_out$", r".self_attn.out_proj"),
    (r"\.processor\.to_out$", r".to_out.0"),
    (r"\.processor\.", r"."),
)
# Ends of the keys of other kinds of adapters. If these keys were ignored, the rest would be read as a wrong LoRA.
_OTHER_KINDS: tuple[tuple[str, str], ...] = (
    (r"\.(dora_scale|lora_magnitude_vector)(\.\w+)*$", "DoRA"),
    (r"\.hada_[wt]\d(_[ab])?$", "LoHa"),
    (r"\.lokr_[wt]\d(_[ab])?$", "LoKr"),
    (r"\.lora_mid\.weight$", "LoCon in Tucker form (lora_mid)"),
    (r"\.[ab][12]\.weight$", "GLoRA"),
    (r"\.b?oft_\w+(\.\w+)*$", "OFT"),
    (r"\.(on_input|ia3_\w+)$", "(IA)^3"),
    (r"\.(diff|diff_b|w_norm|b_norm|set_weight)$", "full difference of weights"),
    (r"\.lora_(B|up)(\.\w+)?\.bias$", "LoRA with biases"),
    (r"\.reshape_weight$", "LoRA that reshapes layers"),
)

# Width of the text embeddings that a network attends to -> the model.
_BASES = {
    768: "SD1",
    1024: "SD2",
    1280: "the SDXL refiner",
    1536: "SD3",
    2048: "SDXL",
    2432: "SD3.5-large",
    3072: "FLUX",
}
_TEXT = re.compile(r"(attn2?_to_k|add_k_proj|(x|context)_block_attn2?_qkv|(img|txt)_attn_qkv)$")


def component_of(key: str) -> tuple[str | None, str]:
    """Return the component that a key belongs to (None if the key does not say), and the rest of the key."""
    key = key.removeprefix("base_model.model.")
    for component, prefixes in COMPONENTS.items():
        for prefix in (f"{component}.", *prefixes):
            if key.startswith(prefix):
                rest = key.removeprefix(prefix).removeprefix("base_model.model.")
                return ("transformer" if component == "unet" and _MMDIT.match(rest) else component), rest
    return None, key


def start_of(component: str, components: Collection[str], *, original: bool) -> str:
    """Return the prefix of a component's keys in a kohya file for a model that has these components.

    original: whether the file has the original module names.
    """
    if component == "text_encoder" and "text_encoder_2" in components:
        return "lora_te1_"
    return "lora_unet_" if component == "transformer" and original else COMPONENTS[component][0]


def suffixes(format: Format, component: str, module: str) -> tuple[str, str]:
    """Return the ends of the keys of down and up for a module, without the dot."""
    down, up = SUFFIXES[format]
    if format == "diffusers" and component.startswith("text_encoder") and module != "text_projection":
        return down.replace("lora.", "lora_linear_layer."), up.replace("lora.", "lora_linear_layer.")
    return down, up


def split(
    tensors: Mapping[str, np.ndarray], source: Path, *, embeddings: bool = False
) -> dict[str | None, dict[str, Group]]:
    """Return {component (None if the keys do not say): {module name in the file: its tensors}}, all checked.

    Raises ValueError for other kinds of adapters, for keys that no LoRA has, and for tensors that are given twice, are
    not finite or floating, or have a shape that no LoRA has. source: the file that the messages name. embeddings:
    whether the caller reads the textual inversions in the file; otherwise a warning says that they are left out.
    """
    words = sorted({key.split(".")[1] for key in tensors if key.startswith(EMBEDDING)})
    if words:
        if not embeddings:
            warnings.warn(
                f"{source}: holds {few('embeddings', words)} ({EMBEDDING}*), which are left out: their words in a "
                "prompt are plain text here",
                stacklevel=3,
            )
        tensors = {key: tensor for key, tensor in tensors.items() if not key.startswith(EMBEDDING)}
    for pattern, kind in _OTHER_KINDS:
        keys = sorted(key for key in tensors if re.search(pattern, key))
        if keys:
            raise ValueError(
                f"{source}: a {kind}, and only plain LoRA can be read; it has {few('such keys', keys, 3)}: merge it "
                "into its model with the program that made it, then extract the difference of the two models"
            )
    groups: dict[str | None, dict[str, Group]] = {}
    unknown, twice = [], []
    for key, tensor in tensors.items():
        component, rest = component_of(key)
        match_role = next(((m, role) for pattern, role in _ROLES if (m := re.search(pattern, rest))), None)
        if match_role is None:
            unknown.append(key)
            continue
        match, role = match_role
        module = rest[: match.start()]
        for pattern, replacement in _SPELLINGS:
            module = re.sub(pattern, replacement, module)
        group = groups.setdefault(component, {}).setdefault(module, {})
        if role in group:
            twice.append(key)
        group[role] = tensor
    if unknown:
        raise ValueError(f"{source}: only plain LoRA can be read; it has {few('other keys', sorted(unknown))}")
    if not groups:
        raise ValueError(f"{source}: holds no LoRA tensors")
    nameless = sorted(groups[None]) if None in groups and len(groups) > 1 else []
    faults = {"halves of a module given before": twice, "modules without the network's name": nameless}
    if problem := listed({**faults, **_bad_tensors(tensors)}):
        raise ValueError(f"{source}: not a LoRA that can be read: {problem}")
    return groups


def _bad_tensors(tensors: Mapping[str, np.ndarray]) -> dict[str, list[str]]:
    """Return fault -> the keys of the tensors that have it."""
    faults: dict[str, list[str]] = {}
    for key, tensor in sorted(tensors.items()):
        is_alpha = key.endswith((".alpha", ".scalar", ".scale"))
        if not is_alpha and not jnp.issubdtype(tensor.dtype, jnp.floating):  # an alpha may be an integer
            faults.setdefault("tensors that are not floating", []).append(f"{key}: {tensor.dtype.name}")
        elif not is_finite(tensor):
            faults.setdefault("tensors with NaN or infinity", []).append(key)
        elif tensor.size != 1 if is_alpha else tensor.ndim not in (2, 4) or not tensor.size:
            faults.setdefault("tensors of a shape that no LoRA has", []).append(f"{key}: {tensor.shape}")
    return faults


def listed(faults: Mapping[str, list[str]]) -> str:
    """Return the faults in one line, `2 modules of this kind (a, b); 1 of that (c)`; empty if there are none."""
    return "; ".join(few(what, sorted(items)) for what, items in faults.items() if items)


def text_width(inputs: Mapping[str, int]) -> int | None:
    """Return the width of the text embeddings that a network or a LoRA attends to; None if no module tells.

    inputs: module name, dots as underscores -> its number of input channels.
    """
    return next((inputs[module] for module in sorted(inputs) if _TEXT.search(module)), None)


def base_of(width: int | None) -> str:
    """Return the name of the model whose text embeddings have this width, for messages."""
    return "a network of another kind" if width is None else f"{_BASES.get(width, 'a network')} (text {width} wide)"
