"""`lcm-jax convert`: one format of weights into another, a tensor at a time."""

from __future__ import annotations

import re
import shutil
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from lcm_jax.lora import CLIP_TARGETS, DEFAULT_TARGETS, MMDIT_TARGETS, extract
from lcm_jax.runtime.atomic_files import replacing, write_json
from lcm_jax.runtime.messages import few
from lcm_jax.weights import orbax
from lcm_jax.weights.abstract_params import abstract_params
from lcm_jax.weights.component import Lazy, Part, cast, check_part, names_of, to_component, write_config, write_part
from lcm_jax.weights.hub import locate
from lcm_jax.weights.lora.files import FILE_NAMES, load_lora, load_loras, lora_components, save_loras
from lcm_jax.weights.lora.modules import Network
from lcm_jax.weights.lora.names import Format
from lcm_jax.weights.model_files import SMALL, UNUSED, Model, lora_networks, read_model
from lcm_jax.weights.registry import FAMILIES
from lcm_jax.weights.safetensors_files import read_safetensors
from lcm_jax.weights.single_file.reader import write_single

MODELS = ("diffusers", "single", "orbax")
LORAS: Mapping[str, Format] = {"lora-peft": "peft", "lora-diffusers": "diffusers", "lora-kohya": "kohya"}
FORMATS = (*MODELS, *LORAS)
CLASSES = {"unet": "UNet2DConditionModel", "transformer": "SD3Transformer2DModel", "text_encoder_3": "T5EncoderModel"}
# Components that a LoRA may be of, with the layers of each that are extracted.
TARGETS = {
    "unet": DEFAULT_TARGETS,
    "transformer": MMDIT_TARGETS,
    "text_encoder": CLIP_TARGETS,
    "text_encoder_2": CLIP_TARGETS,
}


@dataclass(frozen=True, kw_only=True)
class Summary:
    """What was written, and what the source had that was not."""

    components: tuple[str, ...]
    tensors: int
    parameters: int
    dtypes: Mapping[str, int]  # name -> tensors
    dropped: tuple[str, ...]

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
) -> Summary:
    """Write a model in another format, whole or not at all.

    to: "diffusers" (a folder), "single" (one file in the original naming) or "orbax" (a folder with a checkpoint).
    dtype: of floating tensors; None keeps each one's. config, variant: see `read_model`.
    """
    if to not in MODELS:
        raise ValueError(f"--to {to}: expected one of {', '.join(FORMATS)}")
    if (to == "single") != (target.suffix == ".safetensors"):
        raise ValueError(
            f"{target}: {'a single file is named *.safetensors' if to == 'single' else f'{to} is a folder'}"
        )
    model = read_model(source, config=config, variant=variant)
    for part in model.parts.values():
        check_part(part)
    dropped = list(model.dropped)
    parts = model.parts
    if to == "single":
        dropped += [f"{name} (a single file has no place for it)" for name in model.small if name != "scheduler"]
    total = sum(len(names_of(part.kind, part.config)) for part in parts.values())
    with tqdm(total=total, unit="tensor", desc=f"{target.name}", disable=None) as bar:
        counted = {name: _counting(part, dtype, bar.update) for name, part in parts.items()}
        watched = {name: part for name, (part, _) in counted.items()}
        if to == "single":
            write_single(target, watched, prediction=model.prediction)
        else:
            with replacing(target) as folder:
                _write_folder(folder, model, watched, orbax_params=to == "orbax")
    counts = [count for _, count in counted.values()]
    return Summary(
        components=tuple(parts),
        tensors=sum(len(count) for count in counts),
        parameters=sum(size for count in counts for size, _ in count.values()),
        dtypes=Counter(kind for count in counts for _, kind in count.values()),
        dropped=tuple(dropped),
    )


def _counting(part: Part, dtype: Any, seen: Callable[[int], Any]) -> tuple[Part, dict[str, tuple[int, str]]]:
    """The part with its tensors cast, and a table of size and dtype that fills as they are read."""
    counts: dict[str, tuple[int, str]] = {}
    tensors = cast({name: part.tensors[name] for name in names_of(part.kind, part.config)}, dtype)

    def read(name: str) -> np.ndarray:
        tensor = tensors[name]
        if name not in counts:
            counts[name] = (tensor.size, tensor.dtype.name)
            seen(1)
        return tensor

    return part._replace(tensors=Lazy({name: partial(read, name) for name in tensors})), counts


def _write_folder(folder: Path, model: Model, parts: Mapping[str, Part], *, orbax_params: bool) -> None:
    """A diffusers folder, or the same with one orbax checkpoint in place of its safetensors files."""
    index = {name: value for name, value in model.index.items() if name not in UNUSED or not isinstance(value, list)}
    index |= {name: (None, None) for name in UNUSED if name in model.index}
    for name, part in parts.items():
        if orbax_params:
            write_config(folder / name, part.kind, part.config)
        else:
            write_part(folder / name, part)
    if orbax_params:
        orbax.save_params(folder, {name: to_component(part, dtype=None) for name, part in parts.items()})
    for name in SMALL:
        if name in model.small:
            shutil.copytree(model.small[name], folder / name)
    write_json(folder / "model_index.json", index)


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
    """Write a LoRA in another format; or, of a model, the LoRA that makes it out of `base` (by SVD, of rank `rank`).

    base: the model that the LoRA is for. Without it only files whose names have dots (PEFT, diffusers) can be read.
    """
    if target.suffix != ".safetensors":
        raise ValueError(f"{target}: a LoRA is one file, named *.safetensors")
    model = None if base is None else read_model(base, config=config)
    dropped: list[str] = []
    if is_lora(source):
        path = locate(source).path
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
            found = extract(before, after, rank=rank, targets=TARGETS[name])
            adapters |= {name: found.adapters} if found.adapters else {}
            dropped += [f"{name}/{path}" for path in found.untouched]
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


def is_lora(source: str | Path) -> bool:
    """Whether a path or name is a LoRA, as its keys say."""
    path = locate(source).path
    if path.is_dir():
        return any((path / name).is_file() for name in FILE_NAMES)
    return any(re.search(r"\.lora[_.]|_lora\.|^lora_", key) for key in read_safetensors(path))


def networks_of(model: Model) -> dict[str, Network]:
    """How LoRA files name the modules of a model's components."""
    parts = {name: part for name, part in model.parts.items() if name in TARGETS}
    return lora_networks(
        {name: (part.kind, part.config, abstract_params(part.kind, part.config)) for name, part in parts.items()}
    )
