"""A model as read from any format: its networks as named tensors, and the small files that belong to it."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lcm_jax.runtime.messages import few
from lcm_jax.weights import orbax
from lcm_jax.weights.component import Part, config_of, has_weights, read_part, to_part
from lcm_jax.weights.hub import Location, locate
from lcm_jax.weights.lora.files import is_lora
from lcm_jax.weights.lora.modules import Network
from lcm_jax.weights.lora.names import COMPONENTS
from lcm_jax.weights.registry import DENOISERS, FAMILIES, NETWORKS, TOKENIZERS, UNUSED, check_components
from lcm_jax.weights.safetensors_files import check_no_pickles, read_json
from lcm_jax.weights.scheduler_config import (
    check_scheduler_values,
    followed,
    has_zero_terminal_snr,
    overridden,
    prediction_of,
    with_zero_terminal_snr,
)
from lcm_jax.weights.single_file.header import Header, unpack_tokenizer
from lcm_jax.weights.single_file.reader import Single, layout_of, read_single

# The published folder whose configs, tokenizers and scheduler go with a single file of a family.
PUBLISHED: Mapping[str, str] = {
    "sd1": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "sd2": "stabilityai/stable-diffusion-2-1",
    "sdxl": "stabilityai/stable-diffusion-xl-base-1.0",
    "refiner": "stabilityai/stable-diffusion-xl-refiner-1.0",
    "sd3": "stabilityai/stable-diffusion-3-medium-diffusers",
}
T5 = ("text_encoder_3", "tokenizer_3")  # optional: SD3 also works without them

# What a folder may hold that a model replaces: all that is written here, and what hubs and other programs add.
ENTRIES = frozenset(
    {
        *(*DENOISERS, "vae", "text_encoder", "text_encoder_2", "text_encoder_3", "scheduler", "model_index.json"),
        *("tokenizer", "tokenizer_2", "tokenizer_3", "image_encoder", "feature_extractor", "safety_checker"),
        *("unet_ema", "params", "README.md", ".gitattributes", ".cache"),
    }
)


@dataclass(frozen=True, kw_only=True)
class Model:
    """A model as read from a folder or file, before its parameters are placed on a device."""

    source: str  # model_index.json or single file, named in errors
    parts: Mapping[str, Part]  # component -> network
    tokenizers: Mapping[str, Path]  # component -> folder of its tokenizer, which is copied
    scheduler: Mapping[str, Any]  # scheduler_config.json, with all that the source declares: the only one to be written
    scheduler_source: str  # the file that it comes from, named in errors
    index: Mapping[str, Any]  # model_index.json
    dropped: tuple[str, ...] = field(default=())  # components or keys of the source that are not used


def read_model(
    name: str | Path,
    *,
    config: str | Path | None = None,
    variant: str | None = None,
    t5: bool = True,
    scheduler: Mapping[str, Any] | None = None,
) -> Model:
    """Return the model of a bundled name, a diffusers or orbax folder, a hub id, or a single file.

    config: for a single file, a diffusers folder or hub id whose configs, tokenizers and scheduler describe it; None
    takes them from the header of a file that this library wrote, else infers the configs from the shapes and takes the
    rest from the published folder of its family. What a file declares of its scheduler goes before the folder's.
    variant: such as "fp16", in the names of the files to read; a component without such a file is read from its plain
    one, with a warning. t5: False leaves out SD3's third text encoder if there is one. scheduler: keys that replace
    those of the scheduler config. Raises FileNotFoundError if a file is missing, and ValueError if a file does not fit,
    is a LoRA, or config= is given for a folder.
    """
    location = locate(name, variant)
    if is_lora(location.path):
        raise ValueError(
            f"{name}: a LoRA, not a model; load the model that it was made for, with lora={str(name)!r} "
            f"(--model MODEL --lora {name})"
        )
    if location.path.is_file():
        model = _from_single(location.path, config, t5=t5)
    elif config is not None:
        raise ValueError(f"{name}: a folder has its own configs; config= is for single files")
    else:
        model = read_folder(location, variant=variant, t5=t5)
    if not scheduler:
        return model
    return replace(model, scheduler=overridden(model.scheduler, scheduler, source=model.scheduler_source))


def _read_index(source: Path, *, t5: bool) -> dict[str, Any]:
    """Return a model_index.json, in which every component is one that is known: its name is that of a folder."""
    index = read_json(source)
    check_components(index, str(source))
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
    if not source.is_file():
        raise _no_model(source)
    index = _read_index(source, t5=t5)
    named = {name for name, value in index.items() if isinstance(value, list) and value[0] is not None}
    if "scheduler" not in named:
        raise ValueError(f"{source}: names no scheduler, which says how the model was trained")
    networks = _networks(index)
    location = _with_averages(location, networks)
    for name in networks:
        with hint_if_optional(name):
            if not (location.at(name) / "config.json").is_file():
                raise FileNotFoundError(f"{source}: names {name}, but {location.at(name)} has no config.json")
    if (location.path / orbax.NAME).is_dir():
        subpaths = {name: location.subpath(name) for name in networks}
        components = orbax.load_params(location.path, subpaths)
        parts = {name: to_part(part, source=str(location.path / name)) for name, part in components.items()}
    else:
        variants = _variants(location, networks, variant)
        parts = {name: _read_named(location, name, variants[name]) for name in networks}
    config_file = location.at("scheduler") / "scheduler_config.json"
    return Model(
        source=str(source),
        parts=_unshifted(parts),
        tokenizers=_tokenizers(location, index),
        scheduler=_read_scheduler(config_file),
        scheduler_source=str(config_file),
        index=index,
        dropped=tuple(name for name in UNUSED if name in named),
    )


def _no_model(source: Path) -> FileNotFoundError:
    """Return the error for a folder without model_index.json; raise that of pickles if it has these alone."""
    singles = sorted(path.name for path in source.parent.glob("*.safetensors"))
    if not singles:
        check_no_pickles(source.parent)
    hint = f"; it has {few('single files', singles, 3)}: give one of them by its path" if singles else ""
    if (source.parent.parent / source.name).is_file():
        hint = "; the folder above has one: load that"
    return FileNotFoundError(f"{source}: no such file, so this is no folder of a model{hint}")


def _with_averages(location: Location, networks: list[str]) -> Location:
    """Return the location with NAME_ema for a network of which a folder has the moving average alone, and a warning."""
    renamed = {}
    for name in networks:
        average = f"{location.subpath(name)}_ema"
        if not location.at(name).exists() and (location.path / average / "config.json").is_file():
            text = f"{location.path}: holds only the moving average of its {name} ({average}): it is used"
            warnings.warn(text, stacklevel=4)
            renamed[name] = average
    return replace(location, subfolders={**location.subfolders, **renamed})


def _variants(location: Location, networks: list[str], variant: str | None) -> dict[str, str | None]:
    """Return component -> the variant of its file: a component without such a file has a plain one, and a warning.

    If no component has the variant, it is left as it is: reading a component then lists the files that there are.
    """
    found = {name: variant for name in networks}
    if variant is None:
        return found
    plain = [name for name in networks if not has_weights(location.at(name), variant)]
    plain = [name for name in plain if has_weights(location.at(name), None)]
    if 0 < len(plain) < len(networks):
        warnings.warn(
            f"{location.path}: {', '.join(plain)} {'have' if len(plain) > 1 else 'has'} no file of variant "
            f"{variant!r}: the plain file is read",
            stacklevel=3,
        )
        found |= dict.fromkeys(plain)
    return found


def _tokenizers(location: Location, index: Mapping[str, Any]) -> dict[str, Path]:
    """Return component -> folder of the tokenizers that a model_index.json names."""
    named = [name for name in TOKENIZERS if (index.get(name) or [None])[0] is not None]
    return {name: location.at(name) for name in named}


def _read_scheduler(file: Path) -> dict[str, Any]:
    config = read_json(file)
    check_scheduler_values(config, source=str(file))
    return config


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
    location = None if config is None else locate(config)
    single = read_single(path, configs=None if location is None else _configs(location, t5=t5))
    parts = {name: part for name, part in single.parts.items() if t5 or name not in T5}
    if single.header is not None and location is None:
        return _from_header(path, single.header, parts, single)
    if location is None:
        try:
            location = locate(PUBLISHED[single.family], weights=False)
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"{path}: a single file has no tokenizer; give config=, a diffusers folder of its family ({error})"
            ) from None
    index = _read_index(location.at("model_index.json"), t5=t5)
    missing = [name for name in _networks(index) if name not in parts]
    if missing and config is None:
        raise FileNotFoundError(
            f"{path}: holds no {', '.join(missing)}; give config=, a diffusers folder or hub id of its family, from "
            "which these are read"
        )
    if missing:  # a file without its text encoders (SD3.5, finetuned UNets) is completed from the folder
        warnings.warn(f"{path}: holds no {', '.join(missing)}: read from {location.path}", stacklevel=4)
        parts |= {name: _read_named(location, name) for name in missing}
    config_file = location.at("scheduler") / "scheduler_config.json"
    scheduler = _read_scheduler(config_file)
    if single.header is not None and single.header.scheduler != scheduler:
        scheduler = dict(single.header.scheduler)
        warnings.warn(
            f"{path}: the scheduler in its header is used, not that of {config_file}; scheduler= (--scheduler) "
            "overrides it",
            stacklevel=4,
        )
    guess = {} if config is not None or single.guessed is None else {"prediction_type": single.guessed}
    declared = {} if single.family == "sd3" else {**guess, **single.declared}
    return Model(
        source=str(path),
        parts=_unshifted(parts),
        tokenizers=_tokenizers(location, index),
        scheduler=_declared_scheduler(path, scheduler, declared, given=config is not None),
        scheduler_source=str(config_file),
        index=index,
        dropped=single.dropped,
    )


def _configs(location: Location, *, t5: bool) -> dict[str, tuple[str, Any]]:
    """Return component -> (class, config) of the networks that a folder describes."""
    index = _read_index(location.at("model_index.json"), t5=t5)
    files = {name: location.at(name) / "config.json" for name in _networks(index)}
    return {name: config_of(file) for name, file in files.items() if file.is_file() and index[name][1] in FAMILIES}


def _networks(index: Mapping[str, Any]) -> list[str]:
    """Return the networks that a model_index.json names."""
    return [name for name, value in index.items() if name in NETWORKS and isinstance(value, list) and value[0]]


def _from_header(path: Path, header: Header, parts: dict[str, Part], single: Single) -> Model:
    """Return the model of a single file that describes itself in its header."""
    check_components(header.index, f"{path}: the model_index.json in its header")
    check_scheduler_values(header.scheduler, source=f"{path}: the scheduler in its header")
    missing = [name for name in _networks(header.index) if name not in parts and name not in T5]
    if missing:
        raise ValueError(f"{path}: its header names {', '.join(missing)}, which it does not hold; give config=")
    without_t5 = {} if T5[0] in parts else {name: [None, None] for name in T5 if name in header.index}
    index = {**header.index, **without_t5}
    tokenizers = {
        name: unpack_tokenizer(files, source=str(path))
        for name, files in header.tokenizers.items()
        if name in TOKENIZERS and (index.get(name) or [None])[0] is not None
    }
    return Model(
        source=str(path),
        parts=_unshifted(parts),
        tokenizers=tokenizers,
        scheduler=_declared_scheduler(path, header.scheduler, single.declared, given=True),
        scheduler_source=f"{path}: the scheduler in its header",
        index=index,
        dropped=single.dropped,
    )


def _declared_scheduler(
    path: Path, config: Mapping[str, Any], declared: Mapping[str, Any], *, given: bool
) -> Mapping[str, Any]:
    """Return a scheduler config with what a single file declares; a warning if that of a `given` folder differs."""
    changed = config
    if declared.get("prediction_type", prediction_of(config)) != prediction_of(config):
        changed = {**changed, "prediction_type": declared["prediction_type"]}
    if declared.get("rescale_betas_zero_snr") and not has_zero_terminal_snr(config):
        changed = with_zero_terminal_snr(changed)
    if given and changed is not config:
        differing = [f"{key}={value!r}" for key, value in declared.items() if followed(config).get(key) != value]
        warnings.warn(
            f"{path}: the file declares {', '.join(differing)}, the scheduler config says otherwise: the file is "
            "followed; scheduler= (--scheduler) overrides both",
            stacklevel=5,
        )
    return changed


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
