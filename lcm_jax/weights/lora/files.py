"""LoRA files in and out: the key styles of PEFT and diffusers, of older diffusers, and of kohya's scripts.

Reading tells the styles apart key by key (`lora_names`), in diffusers' names of modules and, with a layout, in those of
the original files. Alpha comes from a `.alpha` tensor, else from the adapter config in the file's header (diffusers) or
beside it (PEFT), else it is the rank. Writing puts alpha in the header, for kohya in `.alpha`: programs that do not
read the header take alpha for the rank, so give those kohya files. (diffusers up to 0.42 loses the `.alpha` of
attention layers in kohya files where alphas differ: give it one of the other formats.)

Tools around kohya's scripts expect diffusers' names of modules for SD1 and SD2, the original names for SDXL (SGM) and
SD3: write kohya files for these with a layout.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from lcm_jax.lora import Adapters, shapes
from lcm_jax.nets import RULES_UNET
from lcm_jax.runtime.messages import few
from lcm_jax.weights.lora.modules import (
    Factors,
    Network,
    Place,
    alike,
    fuse,
    modules,
    places,
    reorder,
    share,
    slot_of,
    to_kernel,
    to_weight,
)
from lcm_jax.weights.lora.names import (
    COMPONENTS,
    ORIGINAL,
    SUFFIXES,
    Format,
    Group,
    base_of,
    component_of,
    listed,
    split,
    start_of,
    suffixes,
    text_width,
)
from lcm_jax.weights.lora.peft_config import FOLDER_NAME, HEADER_KEY, alpha_of, read_config, write_config
from lcm_jax.weights.registry import DENOISERS
from lcm_jax.weights.safetensors_files import read_safetensors, save_tensors
from lcm_jax.weights.single_file.layouts import Layout, Slot
from lcm_jax.weights.torch_params import Rules

FILE_NAMES = ("pytorch_lora_weights.safetensors", FOLDER_NAME)


def lora_components(path: str | Path) -> tuple[str, ...]:
    """The components that a LoRA file has adapters for; empty if its keys do not say."""
    found = {component_of(key)[0] for key in read_safetensors(_find(path))}
    return tuple(component for component in COMPONENTS if component in found)


def load_lora(
    path: str | Path,
    like: Any = None,
    rules: Rules = RULES_UNET,
    *,
    layout: Layout | None = None,
    component: str | None = None,
) -> Adapters:
    """Adapters for the network whose parameters are shaped as `like`, in float32, from a LoRA file or its folder.

    like: nested dicts of arrays or ShapeDtypeStruct; None takes paths (of a network without stacked layers) and shapes
    from the file itself, which kohya's names do not allow. layout: the original names of modules, for files that have
    them. component: whose keys to take where a file holds several; None is the network that denoises.
    Layers stacked in one kernel may differ in rank or lack an adapter: they are padded with zeros to the largest rank.
    Raises ValueError that names what the network does not have, what is incomplete and what is mis-shaped.
    """
    if component is not None:
        _check_component(component)
    path = _find(path)
    groups = split(read_safetensors(path), path)
    if component is None:
        component = "transformer" if "transformer" in groups and "unet" not in groups else "unet"
    group = groups.get(None, groups.get(component))
    if group is None:
        raise ValueError(f"{path}: has no adapters for {component!r}, only for {_and(groups)}")
    like = _skeleton(group, path) if like is None else like
    return _fit(group, read_config(path, component), Network(like, rules, layout), path)


def load_loras(path: str | Path, networks: Mapping[str, Network]) -> dict[str, Adapters]:
    """Component -> adapters, for all that a LoRA file has; a file that does not say is of the network that denoises.

    networks: component -> (like, rules, layout) as for `load_lora`; components that no LoRA is for may be among them.
    """
    path = _find(path)
    groups = split(read_safetensors(path), path)
    if None in groups:
        groups = {next((name for name in DENOISERS if name in networks), "unet"): groups[None]}
    strange = [str(name) for name in groups if name not in networks]
    if strange:
        made = [base_of(width) for name in DENOISERS if name in strange and (width := _width(groups[name]))]
        hint = f" (it is made for {made[0]})" if made else ""
        raise ValueError(f"{path}: has adapters for {_and(strange)}{hint}, but the model has only {_and(networks)}")
    return {
        name: _fit(groups[name], read_config(path, name), Network(*networks[name]), path)
        for name in COMPONENTS
        if name in groups
    }


def _check_component(component: str) -> None:
    if component not in COMPONENTS:
        raise ValueError(f"component={component!r}: expected one of {', '.join(COMPONENTS)}")


def _and(names: Collection[str | None]) -> str:
    return ", ".join(sorted(str(name) for name in names))


def _find(path: str | Path) -> Path:
    """The file itself, or the LoRA file in a folder."""
    path = Path(path)
    if not path.is_dir():
        return path
    for name in FILE_NAMES:
        if (path / name).is_file():
            return path / name
    raise FileNotFoundError(f"{path}: holds no LoRA file ({' or '.join(FILE_NAMES)})")


def _skeleton(groups: Mapping[str, Group], path: Path) -> Any:
    """The kernels that a file with dotted module names adapts, as ShapeDtypeStruct."""
    kernels = {}
    for module, group in groups.items():
        if "." not in module:
            raise ValueError(f"{path}: the name {module} does not say where it belongs; pass like=pipe.params['unet']")
        if "down" not in group or "up" not in group:
            raise ValueError(f"{path}: does not fit the network: {few('modules without both halves', [module])}")
        shape = (*group["down"].shape[2:], group["down"].shape[1], group["up"].shape[0])
        name = re.sub(r"\.(\d+)", r"_\1", module).replace(".", "/")
        kernels[f"{name}/kernel"] = jax.ShapeDtypeStruct(shape, jnp.float32)
    return traverse_util.unflatten_dict(kernels, sep="/")


def _fit(groups: Mapping[str, Group], config: Mapping[str, Any], network: Network, path: Path) -> Adapters:
    """The adapters of one network from the modules of a file, all of which must find their place."""
    kernels, table = traverse_util.flatten_dict(network.like, sep="/"), places(network)
    layers: dict[str, dict[tuple[int, ...], Factors]] = {}
    unknown, incomplete, misshaped, twice = [], [], [], []
    for module, group in groups.items():
        found = table.get(module.replace(".", "_"))
        if found is None:
            unknown.append(f"{module}{_shapes(group)}")
        elif "down" not in group or "up" not in group:
            incomplete.append(module)
        else:
            down, up = (np.asarray(group[half], np.float32) for half in ("down", "up"))
            alpha = group["alpha"].item() if "alpha" in group else alpha_of(config, module, len(down))
            for slot, place in found.values():
                kernel = kernels[place.path]
                factors = _place(Factors(down, up, float(alpha)), slot, kernel.shape[len(place.layer) :])
                if factors is None:
                    misshaped.append(f"{module}{_shapes(group, kernel.shape)}")
                    break
                mine = layers.setdefault(place.path, {}).setdefault(place.layer, factors)
                if mine is not factors and not alike(mine, factors):
                    twice.append(module)
    faults = {"modules the network lacks": unknown, "modules without both halves": incomplete}
    faults |= {"modules of another shape": misshaped, "modules given twice and differently": twice}
    if problem := listed(faults):
        mine_wide = text_width({name: kernels[_any(found).path].shape[-2] for name, found in table.items()})
        wide = _width(groups)
        if wide is not None and wide != mine_wide and (misshaped or unknown):
            problem = f"made for {base_of(wide)}, not for {base_of(mine_wide)}: {min(misshaped + unknown)}"
        elif network.layout is None and any(ORIGINAL.match(module) for module in unknown):
            problem += "; these names are of original files: pass layout="
        raise ValueError(f"{path}: does not fit the network: {problem}")
    return {name: _assemble(kernels[name], parts) for name, parts in layers.items()}


def _any(found: Mapping[int, tuple[Slot, Place]]) -> Place:
    return next(iter(found.values()))[1]


def _width(groups: Mapping[str, Group]) -> int | None:
    """The width of the text that a file's LoRA attends to."""
    halves = {module.replace(".", "_"): group["down"] for module, group in groups.items() if "down" in group}
    return text_width({module: down.shape[1] for module, down in halves.items()})


def _shapes(group: Group, kernel: tuple[int, ...] | None = None) -> str:
    """` (down (4, 320), up (640, 4), network's kernel (320, 320))`"""
    parts = [f"{half} {group[half].shape}" for half in ("down", "up") if half in group]
    parts += [] if kernel is None else [f"network's kernel {tuple(kernel)}"]
    return f" ({', '.join(parts)})" if parts else ""


def _place(whole: Factors, slot: Slot, kernel: tuple[int, ...]) -> Factors | None:
    """A layer's halves in the axes of ours, None if they do not fit a kernel of this shape."""
    if len(whole.up) % slot.parts or whole.up.shape[1] != len(whole.down):
        return None
    down, up, alpha = share(whole, slot)
    down, up = to_kernel(down, len(kernel)), to_kernel(up, len(kernel))
    want = shapes(np.broadcast_to(np.int8(0), kernel), down.shape[-1])
    return Factors(down, up, alpha) if (down.shape, up.shape) == (want["down"], want["up"]) else None


def _assemble(kernel: Any, layers: Mapping[tuple[int, ...], Factors]) -> dict[str, Any]:
    """The adapter of a kernel from those of its layers; alpha grows with the rank padded to."""
    rank = max(part.down.shape[-1] for part in layers.values())
    shape = shapes(kernel, rank)
    whole = {"down": np.zeros(shape["down"], np.float32), "up": np.zeros(shape["up"], np.float32)}
    alphas = np.full(shape["alpha"], rank, np.float32)
    for index, (down, up, alpha) in layers.items():
        r = down.shape[-1]
        whole["down"][index][..., :r] = down
        whole["up"][index][..., :r, :] = up
        alphas[index] = alpha * rank / r
    return {name: jnp.asarray(array) for name, array in (whole | {"alpha": alphas}).items()}


def save_lora(
    path: str | Path,
    adapters: Adapters,
    rules: Rules = RULES_UNET,
    *,
    format: Format = "peft",
    layout: Layout | None = None,
    component: str = "unet",
    dtype: Any = None,
) -> None:
    """Write adapters to a safetensors file; diffusers finds it in a folder as pytorch_lora_weights.safetensors.

    layout: the original names of modules, which SDXL's and SD3's tools expect of kohya files (see the module's text).
    dtype: of the tensors; None keeps theirs. alpha stays as it is in every format.
    """
    if layout is not None and format != "kohya":
        raise ValueError(f"layout= is for format='kohya'; files of format={format!r} have diffusers' names")
    save_loras(path, {component: adapters}, {component: Network(None, rules, layout)}, format=format, dtype=dtype)


def save_loras(
    path: str | Path,
    adapters: Mapping[str, Adapters],
    networks: Mapping[str, Network],
    *,
    format: Format = "peft",
    dtype: Any = None,
) -> None:
    """Write the adapters of several components to one file. networks: of the whole model, by their rules and layouts;
    kohya files have the original names of modules where there is a layout, the other formats never."""
    if format not in SUFFIXES:
        raise ValueError(f"format={format!r}: expected one of {', '.join(SUFFIXES)}")
    tensors: dict[str, np.ndarray] = {}
    header: dict[str, Any] = {}
    for component, own in adapters.items():
        _check_component(component)
        if not own:
            raise ValueError(f"{path}: no adapters to write for {component}")
        layout = networks[component].layout if format == "kohya" else None
        start = start_of(component, networks, original=layout is not None)
        parts = _spelt(own, networks[component].rules, layout)
        for module, (down, up, alpha) in parts.items():
            stem = f"{component}.{module}"
            if format == "kohya":
                stem = start + module.replace(".", "_")
                tensors[f"{stem}.alpha"] = np.asarray(alpha, np.float32)
            for suffix, array in zip(suffixes(format, component, module), (down, up), strict=True):
                kind = array.dtype if dtype is None else jnp.dtype(dtype)
                tensors[f"{stem}.{suffix}"] = np.ascontiguousarray(array, kind)
        header |= {f"{component}.{key}": value for key, value in write_config(parts, component).items()}
    metadata = {} if format == "kohya" else {HEADER_KEY: json.dumps(header, sort_keys=True)}
    save_tensors(path, tensors, metadata)


def _spelt(adapters: Adapters, rules: Rules, layout: Layout | None) -> dict[str, Factors]:
    """Module by its name in the file, fused where original files fuse them -> its LoRA."""
    shares: dict[str, dict[int, Factors]] = {}
    parts: dict[str, int] = {}
    for path in sorted(adapters):
        down, up, alpha = (np.asarray(adapters[path][leaf]) for leaf in ("down", "up", "alpha"))
        for module, _, layer in modules(path, down, rules):
            slot = slot_of(module, layout)
            factors = Factors(to_weight(down[layer]), reorder(to_weight(up[layer]), slot), float(alpha[layer]))
            shares.setdefault(slot.key, {})[slot.part] = factors
            parts[slot.key] = slot.parts
    return {key: found[0] if parts[key] == 1 else fuse(found, parts[key]) for key, found in shares.items()}
