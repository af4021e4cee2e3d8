"""A model as read from any format: its networks as named tensors, and the small files that belong to it."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lcm_jax.weights import orbax
from lcm_jax.weights.component import Part, config_of, read_part, to_part
from lcm_jax.weights.hub import Location, locate
from lcm_jax.weights.lora.modules import Network
from lcm_jax.weights.lora.names import COMPONENTS
from lcm_jax.weights.registry import DENOISERS, FAMILIES
from lcm_jax.weights.safetensors_files import read_json
from lcm_jax.weights.single_file.reader import layout_of, read_single

# The published folder whose configs, tokenizers and scheduler go with a single file of a family.
PUBLISHED: Mapping[str, str] = {
    "sd1": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "sd2": "stabilityai/stable-diffusion-2-1",
    "sdxl": "stabilityai/stable-diffusion-xl-base-1.0",
    "refiner": "stabilityai/stable-diffusion-xl-refiner-1.0",
    "sd3": "stabilityai/stable-diffusion-3-medium-diffusers",
}
# Components that are not networks; their folders are copied unchanged.
SMALL = ("tokenizer", "tokenizer_2", "tokenizer_3", "scheduler")
T5 = ("text_encoder_3", "tokenizer_3")  # optional: SD3 also works without them
# Components that have no effect on the image.
UNUSED = ("safety_checker", "feature_extractor")


@dataclass(frozen=True, kw_only=True)
class Model:
    """A model as read from a folder or file, before its parameters are placed on a device."""

    source: str  # model_index.json or single file, named in errors
    parts: Mapping[str, Part]  # component -> network
    small: Mapping[str, Path]  # component -> folder of its tokenizer or scheduler, which is copied
    scheduler: Mapping[str, Any]  # scheduler_config.json
    index: Mapping[str, Any]  # model_index.json
    dropped: tuple[str, ...] = field(default=())  # components or keys of the source that are not used

    @property
    def prediction(self) -> str:
        """The network's output as the scheduler's config declares it: "epsilon", "v_prediction" or "flow"."""
        flow = "FlowMatch" in self.scheduler.get("_class_name", "")
        return str(self.scheduler.get("prediction_type", "flow" if flow else "epsilon"))


def read_model(
    name: str | Path, *, config: str | Path | None = None, variant: str | None = None, t5: bool = True
) -> Model:
    """Return the model of a bundled name, a diffusers or orbax folder, a hub id, or a single file.

    config: for a single file, a diffusers folder or hub id whose configs, tokenizers and scheduler describe it; None
    infers the configs from the shapes and takes the rest from the published folder of its family. variant: such as
    "fp16", in the names of the files to read. t5: False leaves out SD3's third text encoder if there is one. Raises
    FileNotFoundError if a file is missing, and ValueError if a file does not fit or config= is given for a folder.
    """
    location = locate(name, variant)
    if location.path.is_file():
        return _from_single(location.path, config, t5=t5)
    if config is not None:
        raise ValueError(f"{name}: a folder has its own configs; config= is for single files")
    return read_folder(location, variant=variant, t5=t5)


def _read_index(source: Path, *, t5: bool) -> dict[str, Any]:
    index = read_json(source)
    return index if t5 else index | {name: [None, None] for name in T5 if name in index}


@contextmanager
def hint_if_optional(name: str) -> Iterator[None]:
    """Return a context that adds a hint to FileNotFoundError if `name` is a component that the model works without."""
    try:
        yield
    except FileNotFoundError as error:
        if name not in T5:
            raise
        raise FileNotFoundError(f"{error}; to draw without T5, load with t5=False (--no-t5)") from None


def read_folder(location: Location, *, variant: str | None = None, t5: bool = True) -> Model:
    """Return the model in a diffusers folder or one with an orbax checkpoint: all components in its model_index.json.

    Raises FileNotFoundError if a component that it names is missing, and ValueError if it names no scheduler or a
    config is not supported.
    """
    source = location.path / location.subpath("model_index.json")
    index = _read_index(source, t5=t5)
    named = {name: value for name, value in index.items() if isinstance(value, list) and value and value[0] is not None}
    networks = [name for name in named if name not in (*SMALL, *UNUSED)]
    for name in networks:
        with hint_if_optional(name):
            if len(named[name]) != 2 or not (location.at(name) / "config.json").is_file():
                raise FileNotFoundError(f"{source}: names {name}, but {location.at(name)} has no config.json")
    if (location.path / orbax.NAME).is_dir():
        subpaths = {name: location.subpath(name) for name in networks}
        components = orbax.load_params(location.path, subpaths)
        parts = {name: to_part(part, source=str(location.path / name)) for name, part in components.items()}
    else:
        parts = {name: _read_named(location, name, variant) for name in networks}
    small = {name: location.path / location.subpath(name) for name in SMALL if name in named}
    if "scheduler" not in small:
        raise ValueError(f"{source}: names no scheduler, which says how the model was trained")
    scheduler = read_json(small["scheduler"] / "scheduler_config.json")
    dropped = tuple(name for name in UNUSED if name in named)
    return Model(
        source=str(source), parts=_unshifted(parts), small=small, scheduler=scheduler, index=index, dropped=dropped
    )


def _unshifted(parts: Mapping[str, Part]) -> Mapping[str, Part]:
    """Return the parts, beside a UNet with the VAE's shift_factor set to 0: diffusers' pipelines ignore it there."""
    vae = parts.get("vae")
    if "unet" not in parts or vae is None or not vae.config.shift_factor:
        return parts
    warnings.warn(
        f"{vae.source}: shift_factor={vae.config.shift_factor} is ignored: in diffusers only pipelines of Stable "
        "Diffusion 3 and later shift latents",
        stacklevel=2,
    )
    return {**parts, "vae": vae._replace(config=replace(vae.config, shift_factor=0.0))}


def _read_named(location: Location, name: str, variant: str | None = None) -> Part:
    with hint_if_optional(name):
        return read_part(location.at(name), variant=variant)


def _from_single(path: Path, config: str | Path | None, *, t5: bool) -> Model:
    configs: dict[str, tuple[str, Any]] = {}
    location = None if config is None else locate(config)
    if location is not None:
        index = _read_index(location.at("model_index.json"), t5=t5)
        for name, value in index.items():
            config_path = location.path / location.subpath(name) / "config.json"
            if isinstance(value, list) and config_path.is_file() and value[1] in FAMILIES:
                configs[name] = config_of(config_path)
    single = read_single(path, configs=configs)
    if location is None:
        try:
            location = locate(PUBLISHED[single.family], weights=False)
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"{path}: a single file has no tokenizer; give config=, a diffusers folder of its family ({error})"
            ) from None
        index = _read_index(location.at("model_index.json"), t5=t5)
    small = {
        name: location.path / location.subpath(name) for name in SMALL if (index.get(name) or [None])[0] is not None
    }
    scheduler = read_json(small["scheduler"] / "scheduler_config.json")
    if config is None and single.family != "sd3":
        scheduler |= {"prediction_type": single.prediction}
    missing = [
        name
        for name, value in index.items()
        if isinstance(value, list) and value[0] is not None and name not in (*SMALL, *UNUSED, *single.parts)
    ]
    parts = {name: part for name, part in single.parts.items() if t5 or name not in T5}
    for name in missing:  # a file without its text encoders (SD3.5, finetuned UNets) is completed from the folder
        parts[name] = _read_named(location, name)
    return Model(
        source=str(path),
        parts=_unshifted(parts),
        small=small,
        scheduler=scheduler,
        index=index,
        dropped=single.dropped,
    )


def lora_networks(networks: Mapping[str, tuple[str, Any, Any]]) -> dict[str, Network]:
    """Return component -> the tables that name its modules in LoRA files, for the components that a LoRA can have.

    networks: component -> (class, config, parameters or their shapes). A UNet or MMDiT also gets its original names for
    reading; of the files that are written, only kohya's for SDXL and SD3 have them.
    """
    return {
        name: Network(like, FAMILIES[kind].rules, layout_of(kind, config) if name in DENOISERS else None)
        for name, (kind, config, like) in networks.items()
        if name in COMPONENTS
    }
