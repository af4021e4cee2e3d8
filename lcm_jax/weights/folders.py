"""Components of a diffusers folder: one sub-folder each, with a config.json and a safetensors file."""

from __future__ import annotations

import contextlib
import shutil
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp

from lcm_jax.typing import Params
from lcm_jax.weights.engine import from_torch, to_torch
from lcm_jax.weights.families import FAMILIES, TOWER, abstract_params, class_name
from lcm_jax.weights.files import load_tensors, read_json, save_tensors, write_json
from lcm_jax.weights.hub import Location
from mmdit.text import Tokenizer


class Component(NamedTuple):
    """A network and its parameters."""

    module: Any  # a flax module with a `config`
    params: Params


def load_component(folder: Path, name: str, *, dtype: Any = jnp.float32, variant: str | None = None) -> Component:
    """Read `folder`/`name`. dtype: of parameters and computation. Errors name the file and what does not fit."""
    place = folder / name
    values = read_json(place / "config.json")
    kind = values.get("_class_name") or next(iter(values.get("architectures") or [None]))
    if kind not in FAMILIES:
        raise ValueError(f"{place / 'config.json'}: class {kind!r} is not supported; known are {', '.join(FAMILIES)}")
    family = FAMILIES[kind]
    module = family.build(family.config.from_dict(values, source=str(place / "config.json")), dtype=dtype)
    tensors = load_tensors(place, stem=family.stem, variant=variant)
    if family.prefix:
        tensors = {family.prefix + key if key.startswith(TOWER) else key: tensor for key, tensor in tensors.items()}
    like = abstract_params(family, module)
    params = from_torch(tensors, like, family.rules, dtype=dtype, optional=family.optional, source=str(place))
    return Component(module, params)


def save_component(folder: Path, name: str, component: Component, *, dtype: Any = None) -> tuple[str, str]:
    """Write `folder`/`name` as diffusers or transformers would; returns its (library, class) for model_index.json."""
    kind = class_name(component.module)
    family = FAMILIES[kind]
    place = folder / name
    place.mkdir(parents=True, exist_ok=True)
    save_tensors(
        place / f"{family.stem}.safetensors",
        to_torch(component.params, family.rules, dtype=dtype),
        metadata={"format": "pt"},
    )
    values = dict(component.module.config.to_dict())
    if family.library == "transformers":
        values["architectures"] = [kind]
    write_json(place / "config.json", values)
    return family.library, kind


@dataclass(frozen=True, kw_only=True)
class Folder:
    """A whole pipeline as it lies on disk. `components` by their diffusers names: unet, vae, text_encoder ..."""

    components: Mapping[str, Component]
    tokenizer: Tokenizer
    scheduler: Mapping[str, Any]  # scheduler_config.json


def load_folder(location: Location, *, dtype: Any = jnp.float32, variant: str | None = None) -> Folder:
    """Read a diffusers folder of the Stable Diffusion family: every component that its model_index.json names."""
    index = read_json(location.path / "model_index.json")
    known = ("unet", "vae", "text_encoder", "image_encoder")
    names = [name for name in known if (index.get(name) or [None])[0] is not None]
    for needed in known[:3]:
        if needed not in names:
            raise ValueError(
                f"{location.path / 'model_index.json'}: names no {needed}; a text-to-image model needs one"
            )
    return Folder(
        components={
            name: load_component(location.path, location.place(name), dtype=dtype, variant=variant) for name in names
        },
        tokenizer=Tokenizer.load(location.path / "tokenizer"),
        scheduler=read_json(location.path / location.place("scheduler") / "scheduler_config.json"),
    )


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A new folder beside `path` that takes its place at the end, or is removed on failure."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside, old = (path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}") for _ in range(2))
    try:
        aside.mkdir()
        yield aside
        if path.exists():
            path.rename(old)
        aside.rename(path)
    finally:
        for rest in (aside, old):
            shutil.rmtree(rest, ignore_errors=True)


def save_folder(path: Path, folder: Folder, *, dtype: Any = None) -> None:
    """Write a diffusers folder: aside first, then renamed, so `path` holds all of it or is as it was."""
    with _replacing(path) as aside:
        index: dict[str, Any] = {"_class_name": "StableDiffusionPipeline"}
        for name, component in folder.components.items():
            index[name] = save_component(aside, name, component, dtype=dtype)
        folder.tokenizer.save(aside / "tokenizer")
        write_json(aside / "scheduler" / "scheduler_config.json", folder.scheduler)
        index |= {
            # The pipeline takes the first output, which with a projection would be the pooled one.
            "text_encoder": ("transformers", "CLIPTextModel"),
            "tokenizer": ("transformers", "CLIPTokenizer"),
            "scheduler": ("diffusers", folder.scheduler["_class_name"]),
            "safety_checker": (None, None),
            "feature_extractor": (None, None),
            "requires_safety_checker": False,
        }
        write_json(aside / "model_index.json", index)
