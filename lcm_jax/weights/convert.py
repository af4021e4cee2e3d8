"""The command `lcm-jax convert`: weights from one format to another, one tensor at a time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from lcm_jax.lora import CLIP_TARGETS, DEFAULT_TARGETS, MMDIT_TARGETS, extract
from lcm_jax.runtime.atomic_files import check_replaceable, replacing, write_json
from lcm_jax.runtime.messages import few
from lcm_jax.weights import orbax
from lcm_jax.weights.abstract_params import abstract_params
from lcm_jax.weights.component import (
    Lazy,
    Part,
    cast,
    check_part,
    config_values,
    names_of,
    to_component,
    write_config,
    write_part,
)
from lcm_jax.weights.hub import locate
from lcm_jax.weights.lora.files import is_lora, load_lora, load_loras, lora_components, save_loras
from lcm_jax.weights.lora.modules import Network
from lcm_jax.weights.lora.names import Format
from lcm_jax.weights.model_files import ENTRIES, Model, lora_networks, read_model
from lcm_jax.weights.registry import FAMILIES, UNUSED
from lcm_jax.weights.safetensors_files import read_safetensors
from lcm_jax.weights.scheduler_config import not_held_by_single_files
from lcm_jax.weights.single_file.header import Header, pack_tokenizer
from lcm_jax.weights.single_file.reader import family_to_write, write_single
from lcm_jax.weights.tokenizer_files import copy_tokenizer

MODELS = ("diffusers", "single", "orbax")
LORAS: Mapping[str, Format] = {"lora-peft": "peft", "lora-diffusers": "diffusers", "lora-kohya": "kohya"}
FORMATS = (*MODELS, *LORAS)
CLASSES = {"unet": "UNet2DConditionModel", "transformer": "SD3Transformer2DModel", "text_encoder_3": "T5EncoderModel"}
# Component that a LoRA may adapt -> the layers of it that are extracted.
TARGETS = {
    "unet": DEFAULT_TARGETS,
    "transformer": MMDIT_TARGETS,
    "text_encoder": CLIP_TARGETS,
    "text_encoder_2": CLIP_TARGETS,
}


@dataclass(frozen=True, kw_only=True)
class Summary:
    """The contents of a converted file or folder, and the entries of the source that are not in it."""

    components: tuple[str, ...]
    tensors: int
    parameters: int
    dtypes: Mapping[str, int]  # name -> number of tensors
    dropped: tuple[str, ...]  # entries of the source

    def __str__(self) -> str:
        types = ", ".join(f"{count} {name}" for name, count in sorted(self.dtypes.items()))
        left = f"; left out: {few('entries', self.dropped)}" if self.dropped else ""
        return f"{', '.join(self.components)}: {self.tensors} tensors, {self.parameters:,} parameters ({types}){left}"


def convert(
    source: str | Path,
    target: Path,
    to: str,
    *,
    dtype: Any = None,
    config: str | Path | None = None,
    variant: str | None = None,
    scheduler: Mapping[str, Any] | None = None,
) -> Summary:
    """Write a model in another format, completely or not at all.

    to: "diffusers" (a folder), "single" (one file in the original naming) or "orbax" (a folder with a checkpoint).
    The scheduler config of the source, with all that a single file declares, goes with the model in every direction;
    what other programs do not read of it in a single file is in `Summary.dropped`. dtype: that of the floating tensors;
    None keeps each one's. config, variant, scheduler: see `read_model`. Raises ValueError for an unknown format, a
    target whose name does not suit the format or that holds anything but a model, and a network that does not fit its
    config.
    """
    if to not in MODELS:
        raise ValueError(f"--to {to}: expected one of {', '.join(FORMATS)}")
    if (to == "single") != (target.suffix == ".safetensors"):
        raise ValueError(
            f"{target}: {'a single file is named *.safetensors' if to == 'single' else f'{to} is a folder'}"
        )
    if to != "single":
        check_replaceable(target, ENTRIES, "model")
    model = read_model(source, config=config, variant=variant, scheduler=scheduler)
    for part in model.parts.values():
        check_part(part)
    dropped = list(model.dropped)
    parts = model.parts
    if to == "single":
        dropped += [
            f"{name} (in the header, which other programs do not read)"
            for name in (
                *(f"scheduler's {key}" for key in not_held_by_single_files(model.scheduler, family_to_write(parts))),
                *model.tokenizers,
            )
        ]
    total = sum(len(names_of(part.kind, part.config)) for part in parts.values())
    with tqdm(total=total, unit="tensor", desc=f"{target.name}", disable=None) as bar:
        with_counts = {name: _counting(part, dtype, bar.update) for name, part in parts.items()}
        counted = {name: part for name, (part, _) in with_counts.items()}
        if to == "single":
            write_single(target, counted, scheduler=model.scheduler, header=_header(model))
        else:
            with replacing(target) as folder:
                _write_folder(folder, model, counted, orbax_params=to == "orbax")
    counts = [count for _, count in with_counts.values()]
    return Summary(
        components=tuple(parts),
        tensors=sum(len(count) for count in counts),
        parameters=sum(size for count in counts for size, _ in count.values()),
        dtypes=Counter(kind for count in counts for _, kind in count.values()),
        dropped=tuple(dropped),
    )


def _header(model: Model) -> Header:
    """Return the description of a model for its single file."""
    return Header(
        index=_index(model),
        scheduler=model.scheduler,
        configs={name: config_values(part.kind, part.config) for name, part in model.parts.items()},
        tokenizers={name: pack_tokenizer(folder) for name, folder in model.tokenizers.items()},
    )


def _index(model: Model) -> dict[str, Any]:
    """Return the model_index.json of a model as it is written: without the components that are not."""
    index = {name: value for name, value in model.index.items() if name not in UNUSED or not isinstance(value, list)}
    index |= {name: (None, None) for name in UNUSED if name in model.index}
    kind = model.scheduler.get("_class_name")
    return index if kind is None else index | {"scheduler": ("diffusers", kind)}


def _counting(part: Part, dtype: Any, update: Callable[[int], Any]) -> tuple[Part, dict[str, tuple[int, str]]]:
    """Return the part with its tensors cast, and a table name -> (size, dtype) that fills as they are read.

    update: called with 1 for every tensor that is read, to advance the progress bar.
    """
    counts: dict[str, tuple[int, str]] = {}
    tensors = cast({name: part.tensors[name] for name in names_of(part.kind, part.config)}, dtype)

    def read(name: str) -> np.ndarray:
        tensor = tensors[name]
        if name not in counts:
            counts[name] = (tensor.size, tensor.dtype.name)
            update(1)
        return tensor

    return part._replace(tensors=Lazy({name: partial(read, name) for name in tensors})), counts


def _write_folder(folder: Path, model: Model, parts: Mapping[str, Part], *, orbax_params: bool) -> None:
    """Write a diffusers folder, or one with an orbax checkpoint instead of its safetensors files."""
    for name, part in parts.items():
        if orbax_params:
            write_config(folder / name, part.kind, part.config)
        else:
            write_part(folder / name, part)
    if orbax_params:
        orbax.save_params(folder, {name: to_component(part, dtype=None) for name, part in parts.items()})
    for name, source in model.tokenizers.items():
        copy_tokenizer(source, folder / name)
    write_json(folder / "scheduler" / "scheduler_config.json", model.scheduler)
    write_json(folder / "model_index.json", _index(model))


def convert_lora(
    source: str | Path,
    target: Path,
    to: str,
    *,
    base: str | Path | None = None,
    dtype: Any = None,
    rank: int = 64,
    config: str | Path | None = None,
) -> Summary:
    """Write a LoRA in another format; if `source` is a model, extract the LoRA that turns `base` into it, by SVD.

    to: "lora-peft", "lora-diffusers" or "lora-kohya". base: the model that the LoRA is for; without it only files whose
    module names have dots (PEFT, diffusers) can be read. dtype: that of the tensors; None writes float32. rank: the
    rank of an extracted LoRA. config: see `read_model`. Raises ValueError if the target is not named *.safetensors, if
    a model is given without a base, if the two have different architectures, or if no layer that a LoRA can adapt
    differs.
    """
    if target.suffix != ".safetensors":
        raise ValueError(f"{target}: a LoRA is one file, named *.safetensors")
    model = None if base is None else read_model(base, config=config)
    dropped: list[str] = []
    path = locate(source).path
    if is_lora(path):
        if model is None:
            names = lora_components(path) or ("unet",)
            networks = {name: Network(None, FAMILIES[CLASSES.get(name, "CLIPTextModel")].rules) for name in names}
            adapters = {name: load_lora(path, None, net.rules, component=name) for name, net in networks.items()}
        else:
            networks = networks_of(model)
            adapters = load_loras(path, networks)
    else:
        if model is None:
            raise ValueError(f"{source}: to extract the LoRA of a model, give --base, the model it was made from")
        networks, adapters = networks_of(model), {}
        tuned = read_model(source, config=config)
        for name in networks:
            if name not in tuned.parts or tuned.parts[name].config != model.parts[name].config:
                raise ValueError(f"{source}: its {name} is not of the same architecture as that of {base}")
            before, after = (to_component(m.parts[name]).params for m in (model, tuned))
            extraction = extract(before, after, rank=rank, targets=TARGETS[name])
            adapters |= {name: extraction.adapters} if extraction.adapters else {}
            dropped += [f"{name}/{path}" for path in extraction.untouched]
        if not adapters:
            raise ValueError(f"{source}: does not differ from {base} in any layer that a LoRA has")
    if not ("transformer" in networks or "text_encoder_2" in networks):  # SD1's and SD2's tools want diffusers' names
        networks = {name: network._replace(layout=None) for name, network in networks.items()}
    save_loras(target, adapters, networks, format=LORAS[to], dtype=dtype)
    written = read_safetensors(target)
    return Summary(
        components=tuple(adapters),
        tensors=len(written),
        parameters=sum(tensor.size for tensor in written.values()),
        dtypes=Counter(tensor.dtype.name for tensor in written.values()),
        dropped=tuple(dropped),
    )


def networks_of(model: Model) -> dict[str, Network]:
    """Return component -> the tables that name its modules in LoRA files, for the components in `TARGETS`."""
    parts = {name: part for name, part in model.parts.items() if name in TARGETS}
    return lora_networks(
        {name: (part.kind, part.config, abstract_params(part.kind, part.config)) for name, part in parts.items()}
    )
