"""PEFT's LoraConfig, which holds alpha, read and written: in a LoRA file's header (diffusers) or beside it (PEFT)."""

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
            config = {k.removeprefix(prefix): v for k, v in json.loads(header).items() if k.startswith(prefix)}
        except (ValueError, AttributeError):
            raise ValueError(f"{source} is not a JSON object: {header[:60]!r}") from None
    elif path.name == FOLDER_NAME and beside.is_file():
        config, source = read_json(beside), str(beside)
    for values in ({"lora_alpha": config.get("lora_alpha", 0)}, config.get("alpha_pattern") or {}):
        try:
            valid = all(re.compile(name) and math.isfinite(value) for name, value in values.items())
        except (AttributeError, TypeError, OverflowError, re.error):
            valid = False
        if not valid:
            message = "lora_alpha and alpha_pattern must be numbers, the latter with regexes as keys"
            raise ValueError(f"{source}: {message}, not {values!r}")
    init = config.get("init_lora_weights")
    if isinstance(init, str) and re.match("pissa|olora|corda|loftq|lora_ga", init.lower()):
        raise ValueError(f"{source}: init_lora_weights={init!r} changed its base too; save a plain LoRA with PEFT")
    return config


def alpha_of(config: Mapping[str, Any], module: str, rank: int) -> float:
    """Return PEFT's alpha of a module: that of the first pattern that fits the end of its name, else the common one.

    With use_rslora it is alpha * sqrt(rank), so that alpha / rank becomes PEFT's alpha / sqrt(rank).
    """
    alpha = config.get("lora_alpha", rank)
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
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
