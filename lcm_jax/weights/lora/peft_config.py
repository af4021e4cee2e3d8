"""PEFT's LoraConfig, which holds alpha: in the header of a LoRA file (diffusers) or beside it (PEFT); in and out."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lcm_jax.weights.lora.modules import Factors
from lcm_jax.weights.safetensors_files import read_json, read_metadata

HEADER_KEY = "lora_adapter_metadata"
FOLDER_NAME = "adapter_model.safetensors"  # of PEFT, with adapter_config.json beside it


def read_config(path: Path, component: str) -> dict[str, Any]:
    """The adapter's PEFT config, from the file's header or from beside it; empty if there is none."""
    header, beside = read_metadata(path).get(HEADER_KEY), path.parent / "adapter_config.json"
    config, source = {}, f"{path}: {HEADER_KEY} in its header"
    if header is not None:
        prefix = f"{component}."
        try:
            config = {k.removeprefix(prefix): v for k, v in json.loads(header).items() if k.startswith(prefix)}
        except (ValueError, AttributeError):
            raise ValueError(f"{source} is not a JSON object: {header[:60]!r}") from None
    elif path.name == FOLDER_NAME and beside.is_file():
        config, source = read_json(beside), str(beside)
    for values in ({"lora_alpha": config.get("lora_alpha", 0)}, config.get("alpha_pattern") or {}):
        try:
            wrong = not all(re.compile(name) and math.isfinite(value) for name, value in values.items())
        except (AttributeError, TypeError, OverflowError, re.error):
            wrong = True
        if wrong:
            raise ValueError(f"{source}: lora_alpha and alpha_pattern must be numbers by regexes, not {values!r}")
    start = config.get("init_lora_weights")
    if isinstance(start, str) and re.match("pissa|olora|corda|loftq|lora_ga", start.lower()):
        raise ValueError(f"{source}: init_lora_weights={start!r} changed its base too; save a plain LoRA with PEFT")
    return config


def alpha_of(config: Mapping[str, Any], module: str, rank: int) -> float:
    """PEFT's alpha of a module: the first pattern that fits the end of its name, else the common one."""
    alpha = config.get("lora_alpha", rank)
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            alpha = value
            break
    return alpha * math.sqrt(rank) if config.get("use_rslora") else alpha


def write_config(parts: Mapping[str, Factors], component: str) -> dict[str, Any]:
    """PEFT's LoraConfig as diffusers keeps it: rank and alpha most modules have, and the others as patterns."""
    text = component.startswith("text_encoder")
    # A bare text encoder has no `text_model.` in transformers 5, and PEFT compares the ends of names.
    names = {module: module.removeprefix("text_model.") if text else module for module in parts}

    def common(values: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
        values = {names[module]: value for module, value in values.items()}
        found = list(values.values())
        most = max(set(found), key=found.count)
        start = "" if text else "^"
        return most, {start + re.escape(name): value for name, value in values.items() if value != most}

    rank, rank_pattern = common({module: len(part.down) for module, part in parts.items()})
    alpha, alpha_pattern = common({module: part.alpha for module, part in parts.items()})
    config = {"r": rank, "rank_pattern": rank_pattern, "lora_alpha": alpha, "alpha_pattern": alpha_pattern}
    return config | {"target_modules": sorted(names.values())}
