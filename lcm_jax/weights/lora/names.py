"""How LoRA files spell their keys: which network, which module of it, which half; and what is no plain LoRA.

peft        unet.mid_block.attentions.0.proj_in.lora_A.weight      lora_B.weight
diffusers   unet.mid_block.attentions.0.proj_in.lora.down.weight   lora.up.weight   (text: lora_linear_layer.down)
kohya       lora_unet_mid_block_attentions_0_proj_in.lora_down.weight   .lora_up.weight   .alpha
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Literal

import jax.numpy as jnp
import numpy as np

from lcm_jax.runtime.messages import few
from lcm_jax.weights.safetensors_files import is_finite

Format = Literal["peft", "diffusers", "kohya"]
Group = dict[str, np.ndarray]  # what a file has for one module: "down", "up", "alpha"

# Component of a pipeline -> how its keys begin besides its own name; kohya's way first, which is written.
COMPONENTS: dict[str, tuple[str, ...]] = {
    "unet": ("lora_unet_", "diffusion_model."),
    "transformer": ("lora_transformer_",),
    "text_encoder": ("lora_te_", "lora_te1_"),
    "text_encoder_2": ("lora_te2_",),
    "text_encoder_3": ("lora_te3_",),
}
# The network that denoises is "unet" in kohya's and ComfyUI's keys even where it is an MMDiT; its modules tell.
_MMDIT = re.compile(r"(joint_blocks|(x|t|y|context)_embedder|final_layer|transformer_blocks|time_text_embed)[._]")
ORIGINAL = re.compile(r"(input_blocks|middle_block|output_blocks|joint_blocks)[._]")

SUFFIXES: dict[str, tuple[str, str]] = {
    "peft": ("lora_A.weight", "lora_B.weight"),
    "diffusers": ("lora.down.weight", "lora.up.weight"),
    "kohya": ("lora_down.weight", "lora_up.weight"),
}
# How a key ends -> what it holds. PEFT may name the adapter in between; the oldest diffusers wrote `to_q_lora.down`.
_ROLES: tuple[tuple[str, str], ...] = (
    (r"(\.lora_(A|down)(\.\w+)?|[._]lora\.down|\.lora_linear_layer\.down)\.weight$", "down"),
    (r"(\.lora_(B|up)(\.\w+)?|[._]lora\.up|\.lora_linear_layer\.up)\.weight$", "up"),
    (r"\.alpha$", "alpha"),
)
# Old spellings of modules.
_SPELLINGS: tuple[tuple[str, str], ...] = (
    (r"\.self_attn\.to_([qkv])$", r".self_attn.\1_proj"),
    (r"\.self_attn\.to_out$", r".self_attn.out_proj"),
    (r"\.processor\.to_out$", r".to_out.0"),
    (r"\.processor\.", r"."),
)
# How the keys of other kinds of adapters end. Left out, the rest of the file would pass for a LoRA and be wrong.
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

# Width of the text that a network attends to -> whose it is.
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
    """The component a key belongs to, None if it does not say, and the rest of the key."""
    key = key.removeprefix("base_model.model.")
    for component, starts in COMPONENTS.items():
        for start in (f"{component}.", *starts):
            if key.startswith(start):
                rest = key.removeprefix(start).removeprefix("base_model.model.")
                return ("transformer" if component == "unet" and _MMDIT.match(rest) else component), rest
    return None, key


def start_of(component: str, components: Collection[str], *, original: bool) -> str:
    """How kohya's keys of a component begin, in a file for a model of these components."""
    if component == "text_encoder" and "text_encoder_2" in components:
        return "lora_te1_"
    return "lora_unet_" if component == "transformer" and original else COMPONENTS[component][0]


def suffixes(format: Format, component: str, module: str) -> tuple[str, str]:
    """How the keys of down and up end."""
    down, up = SUFFIXES[format]
    if format == "diffusers" and component.startswith("text_encoder") and module != "text_projection":
        return down.replace("lora.", "lora_linear_layer."), up.replace("lora.", "lora_linear_layer.")
    return down, up


def split(tensors: Mapping[str, np.ndarray], source: Path) -> dict[str | None, dict[str, Group]]:
    """Component (None: the keys do not say) -> module as the file spells it -> its tensors, checked one by one."""
    for pattern, kind in _OTHER_KINDS:
        keys = sorted(key for key in tensors if re.search(pattern, key))
        if keys:
            raise ValueError(
                f"{source}: a {kind}, and only plain LoRA can be read; it has {few('such keys', keys, 3)}: merge it "
                "into its model with the program that made it, then extract the difference of the two models"
            )
    groups: dict[str | None, dict[str, Group]] = {}
    strange, twice = [], []
    for key, tensor in tensors.items():
        component, rest = component_of(key)
        match = next(((m, role) for pattern, role in _ROLES if (m := re.search(pattern, rest))), None)
        if match is None:
            strange.append(key)
            continue
        module = rest[: match[0].start()]
        for pattern, replacement in _SPELLINGS:
            module = re.sub(pattern, replacement, module)
        group = groups.setdefault(component, {}).setdefault(module, {})
        if match[1] in group:
            twice.append(key)
        group[match[1]] = tensor
    if strange:
        raise ValueError(f"{source}: only plain LoRA can be read; it has {few('other keys', sorted(strange))}")
    if not groups:
        raise ValueError(f"{source}: holds no LoRA tensors")
    nameless = sorted(groups[None]) if None in groups and len(groups) > 1 else []
    faults = {"halves of a module given before": twice, "modules without the network's name": nameless}
    if found := listed({**faults, **_bad_tensors(tensors)}):
        raise ValueError(f"{source}: not a LoRA that can be read: {found}")
    return groups


def _bad_tensors(tensors: Mapping[str, np.ndarray]) -> dict[str, list[str]]:
    """What is wrong -> the keys of such tensors."""
    faults: dict[str, list[str]] = {}
    for key, tensor in sorted(tensors.items()):
        alpha = key.endswith(".alpha")
        if not alpha and not jnp.issubdtype(tensor.dtype, jnp.floating):  # an alpha may be an integer
            faults.setdefault("tensors that are not floating", []).append(f"{key}: {tensor.dtype.name}")
        elif not is_finite(tensor):
            faults.setdefault("tensors with NaN or infinity", []).append(key)
        elif tensor.size != 1 if alpha else tensor.ndim not in (2, 4) or not tensor.size:
            faults.setdefault("tensors of a shape that no LoRA has", []).append(f"{key}: {tensor.shape}")
    return faults


def listed(faults: Mapping[str, list[str]]) -> str:
    """`2 modules of this kind (a, b); 1 of that (c)`; empty without faults."""
    return "; ".join(few(what, sorted(items)) for what, items in faults.items() if items)


def text_width(inputs: Mapping[str, int]) -> int | None:
    """The width of the text that a network or a LoRA attends to, from {module, dots as underscores: its inputs}."""
    return next((inputs[module] for module in sorted(inputs) if _TEXT.search(module)), None)


def base_of(width: int | None) -> str:
    """The model that attends to a text of this width."""
    return "a network of another kind" if width is None else f"{_BASES.get(width, 'a network')} (text {width} wide)"
