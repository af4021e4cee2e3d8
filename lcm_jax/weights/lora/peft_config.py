"""PEFT's LoraConfig, which holds alpha, read and written: in a LoRA file's header (diffusers) or beside it (PEFT)."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from types import NoneType
from typing import Any

from lcm_jax.runtime.json_text import parse_json
from lcm_jax.runtime.messages import shown
from lcm_jax.weights.lora.modules import Factors
from lcm_jax.weights.safetensors_files import read_json, read_metadata

HEADER_KEY = "lora_adapter_metadata"
MOST_ALPHA = 1 << 20
_MOST_PATTERNS = 10_000
_NAME = re.compile(r"\^?(?:[\w/]|\\?[.-])*\$?")  # as PEFT writes a module's name for a regex
_ESCAPED = re.compile(r"\\([.-])")
FOLDER_NAME = "adapter_model.safetensors"  # PEFT's name, with adapter_config.json in the same folder


def read_config(path: Path, component: str) -> dict[str, Any]:
    """Return the PEFT config of a component's adapter, from the file's header or from adapter_config.json beside it.

    The dict is empty if there is neither. Raises ValueError for a config that cannot be read, and for an initialisation
    (init_lora_weights) that changed the base model too, such as PiSSA's.
    """
    header, beside = read_metadata(path).get(HEADER_KEY), path.parent / "adapter_config.json"
    config, source = {}, f"{path}: {HEADER_KEY} in its header"
    if header is not None:
        prefix = f"{component}."
        try:
            config = {k.removeprefix(prefix): v for k, v in parse_json(header).items() if k.startswith(prefix)}
        except (ValueError, AttributeError):
            raise ValueError(f"{source} is not a JSON object: {shown(header, 60)}") from None
    elif path.name == FOLDER_NAME and beside.is_file():
        config, source = read_json(beside), str(beside)
    alphas = {"lora_alpha": config["lora_alpha"]} if "lora_alpha" in config else {}
    patterns = config.get("alpha_pattern") or {}
    if not isinstance(patterns, dict):
        raise ValueError(f"{source}: alpha_pattern is {shown(patterns)}, not an object of names and numbers")
    if len(patterns) > _MOST_PATTERNS:
        raise ValueError(f"{source}: alpha_pattern has {len(patterns)} entries, more than a network has modules")
    for name, value in {**patterns, **alphas}.items():
        check_alpha(value, f"{source}: the alpha of {shown(name)}")
    for pattern in patterns:
        if not _NAME.fullmatch(pattern):
            raise ValueError(f"{source}: alpha_pattern has {shown(pattern)}, which is not the name of a module")
    if not isinstance(config.get("use_rslora", False), (bool, NoneType)):
        raise ValueError(f"{source}: use_rslora={shown(config['use_rslora'])} is not true or false")
    init = config.get("init_lora_weights")
    if isinstance(init, str) and re.match("pissa|olora|corda|loftq|lora_ga", init.lower()):
        raise ValueError(f"{source}: init_lora_weights={init!r} changed its base too; save a plain LoRA with PEFT")
    return config


def check_alpha(value: Any, what: str) -> None:
    """Raise ValueError unless an alpha is a finite number of at most 2^20, beyond every LoRA; what: what it is."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= MOST_ALPHA:
        raise ValueError(f"{what} is {shown(value)}, not a number of at most {MOST_ALPHA}")


def alpha_of(config: Mapping[str, Any], module: str, rank: int) -> float:
    """Return PEFT's alpha of a module: that of the first name that is its own or ends it, else the common one.

    PEFT reads the names as regexes and writes them as such, with "^" in front of a whole name and "\\." for a dot. Here
    they are names and nothing else, so that no file can hang its reader.

    With use_rslora it is alpha * sqrt(rank), so that alpha / rank becomes PEFT's alpha / sqrt(rank).
    """
    alpha = config.get("lora_alpha", rank)
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        name = _ESCAPED.sub(r"\1", pattern.removesuffix("$"))
        if module == name.removeprefix("^") or module.endswith(f".{name}"):
            alpha = value
            break
    return alpha * math.sqrt(rank) if config.get("use_rslora") else alpha


def write_config(parts: Mapping[str, Factors], component: str) -> dict[str, Any]:
    """Return PEFT's LoraConfig as diffusers stores it: the most frequent rank and alpha, the others as patterns.

    parts: module name -> its factors in PyTorch's axes.
    """
    text = component.startswith("text_encoder")
    # A bare text encoder has no `text_model.` in transformers 5, and PEFT compares the ends of names.
    names = {module: module.removeprefix("text_model.") if text else module for module in parts}

    def common(values: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
        values = {names[module]: value for module, value in values.items()}
        counted = list(values.values())
        most = max(set(counted), key=counted.count)
        anchor = "" if text else "^"
        return most, {anchor + re.escape(name): value for name, value in values.items() if value != most}

    rank, rank_pattern = common({module: len(part.down) for module, part in parts.items()})
    alpha, alpha_pattern = common({module: part.alpha for module, part in parts.items()})
    config = {"r": rank, "rank_pattern": rank_pattern, "lora_alpha": alpha, "alpha_pattern": alpha_pattern}
    return config | {"target_modules": sorted(names.values())}
