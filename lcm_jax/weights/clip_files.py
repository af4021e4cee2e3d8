"""Both encoders of a CLIP in one file: transformers' CLIPModel (PickScore), or OpenCLIP's names (HPSv2)."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lcm_jax.runtime.config_values import check_config, check_values
from lcm_jax.weights.component import Component, Part, check_depth, names_of, to_component
from lcm_jax.weights.safetensors_files import find_weights, load_tensors, read_json
from lcm_jax.weights.single_file.infer_config import clip_config, clip_vision_config
from lcm_jax.weights.single_file.layouts import from_original, openclip_layout
from mmdit.rules import OPTIONAL_CLIP
from mmdit.text import CLIPTextConfig, CLIPVisionConfig

TEXT, VISION = "CLIPTextModelWithProjection", "CLIPVisionModelWithProjection"
_OF_TEXT, _OF_VISION = ("text_model.", "text_projection."), ("vision_model.", "visual_projection.")


class ClipFile(NamedTuple):
    """Both encoders of a CLIP, with projections, and the scale of its cosines, exp(logit_scale)."""

    text: Component
    vision: Component
    scale: float
    is_open_clip: bool


def clip_weights(path: Path) -> Path | None:
    """Return the file that holds both encoders of a CLIP; None for a folder that is not one of a CLIP alone.

    A file is itself. A folder has config.json with model.safetensors (or the index of its shards), or just one
    .safetensors file, in OpenCLIP's names, without a config.
    """
    if path.is_file():
        return path
    if (path / "config.json").is_file():
        return find_weights(path, "model", None)
    files = sorted(path.glob("*.safetensors"))
    return files[0] if len(files) == 1 else None


def read_clip(path: Path) -> ClipFile:
    """Read the file of `clip_weights`; ValueError, which names it, for weights that are no CLIP or do not fit.

    The config is the config.json beside the file; OpenCLIP's names need none: it is inferred from the shapes.
    """
    tensors, source = load_tensors(path), str(path)
    if is_open_clip := "visual.conv1.weight" in tensors:
        shapes = {name: tensor.shape for name, tensor in tensors.items()}
        # OpenCLIP takes the state at the largest id, which eos_token_id=2 means.
        text = replace(clip_config(shapes, source=source), hidden_act="gelu", eos_token_id=2)
        vision = clip_vision_config(shapes, source=source)
        tensors = _from_open_clip(tensors, text, vision, source)
    else:
        file = path.parent / "config.json"
        values = read_json(file)
        if values.get("model_type") != "clip":
            raise ValueError(f"{file}: model_type is {values.get('model_type')!r:.160}, and both encoders are 'clip'")
        text, vision = (
            _config(cls, values, key, str(file))
            for cls, key in ((CLIPTextConfig, "text_config"), (CLIPVisionConfig, "vision_config"))
        )
    for config in (text, vision):
        check_config(config, source)
    scale = tensors.get("logit_scale")
    if scale is None or scale.size != 1 or not math.isfinite(float(scale.reshape(()))):
        raise ValueError(f"{source}: it has no finite logit_scale of one number, so it is not both encoders of a CLIP")
    # What belongs to neither is an error of the text encoder's, which lists it.
    rest = {name: tensor for name, tensor in tensors.items() if not name.startswith(_OF_VISION)}
    del rest["logit_scale"]
    of_vision = {
        name: tensor
        for name, tensor in tensors.items()
        if name.startswith(_OF_VISION) and not re.search(OPTIONAL_CLIP[0], name)
    }
    return ClipFile(
        text=to_component(Part(TEXT, text, rest, source)),
        vision=to_component(Part(VISION, vision, of_vision, source)),
        scale=math.exp(float(scale.reshape(()))),
        is_open_clip=is_open_clip,
    )


def _config(cls: Any, values: Mapping[str, Any], key: str, source: str) -> Any:
    tower = values.get(key)
    if not isinstance(tower, Mapping):
        raise ValueError(f"{source}: has no {key}")
    check_values(cls, tower, f"{source}: {key}")
    return cls.from_dict(values, source=source)


def _from_open_clip(
    tensors: Mapping[str, np.ndarray], text: CLIPTextConfig, vision: CLIPVisionConfig, source: str
) -> dict[str, np.ndarray]:
    for kind, config in ((TEXT, text), (VISION, vision)):
        check_config(config, source)
        check_depth(kind, config, len(tensors), source)
    names = [*names_of(TEXT, text), *names_of(VISION, vision), "logit_scale"]
    return from_original(tensors, names, openclip_layout, source=source, dropped=r"^attn_mask$")
