"""LoRA files, read and written: the key styles of PEFT and diffusers, of older diffusers, and of kohya's scripts.

The reader recognises the style key by key (`lora.names`), with diffusers' module names and, if a layout is given, with
the module names of the original files. Alpha is read from a `.alpha` tensor, else from the adapter config in the file's
header (diffusers) or in a file beside it (PEFT); if neither exists, alpha is the rank. The writer puts alpha in the
header, for kohya in `.alpha`. Programs that do not read the header assume alpha = rank: give them kohya files.
(diffusers up to 0.42 loses the `.alpha` of attention layers in kohya files where alphas differ: use another format.)

Tools around kohya's scripts expect diffusers' module names for SD1 and SD2, but the original names for SDXL (SGM) and
SD3: write kohya files for these two with a layout.
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
from lcm_jax.runtime.messages import few, shown
from lcm_jax.weights.lora.modules import (
    Factors,
    KernelLayer,
    Network,
    equal_factors,
    fuse,
    layer_factors,
    modules,
    places,
    reorder,
    slot_of,
    to_kernel,
    to_weight,
)
from lcm_jax.weights.lora.names import (
    COMPONENTS,
    EMBEDDING,
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
from lcm_jax.weights.lora.peft_config import FOLDER_NAME, HEADER_KEY, alpha_of, check_alpha, read_config, write_config
from lcm_jax.weights.registry import DENOISERS
from lcm_jax.weights.safetensors_files import check_no_pickles, read_safetensors, save_tensors
from lcm_jax.weights.single_file.layouts import Layout, Slot
from lcm_jax.weights.torch_params import Rules

FILE_NAMES = ("pytorch_lora_weights.safetensors", FOLDER_NAME)


def is_lora(path: Path) -> bool:
    """Return whether a path is a LoRA: a folder by the names of its files, a file by its keys."""
    if path.is_dir():
        is_model = (path / "model_index.json").is_file()
        return not is_model and any((path / name).is_file() for name in FILE_NAMES)
    return any(re.search(r"\.lora[_.]|_lora\.|^(lora|lycoris)_", key) for key in read_safetensors(path))


def lora_components(path: str | Path) -> tuple[str, ...]:
    """Return the components that a LoRA file or folder has adapters for; empty if the keys do not say."""
    keys = read_safetensors(find_lora(path))
    components = {component_of(key)[0] for key in keys if not key.startswith(EMBEDDING)}
    return tuple(component for component in COMPONENTS if component in components)


def load_lora(
    path: str | Path,
    like: Any = None,
    rules: Rules = RULES_UNET,
    *,
    layout: Layout | None = None,
    component: str | None = None,
) -> Adapters:
    """Return float32 adapters from a LoRA file or its folder, for the network whose parameters are shaped as `like`.

    like: nested dicts of arrays or ShapeDtypeStruct; None takes paths (of a network without stacked layers) and shapes
    from the file itself, which kohya's names do not allow. layout: the original module names, for files that use them.
    component: the component to read where a file holds several; None is the UNet or MMDiT.
    Layers stacked in one kernel may differ in rank or lack an adapter: they are padded with zeros to the largest rank.
    Raises FileNotFoundError if there is no file, and one ValueError that names the modules which the network lacks,
    those that are incomplete and those whose shapes do not fit.

    >>> import tempfile, jax.numpy as jnp, lcm_jax
    >>> adapter = {"down": jnp.ones((4, 2)), "up": jnp.ones((2, 4)), "alpha": jnp.asarray(1.0)}
    >>> paths = ["mid_block/attentions_0/proj_in/kernel", "mid_block/attentions_0/proj_out/kernel"]
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     lcm_jax.save_lora(f"{folder}/style.safetensors", dict.fromkeys(paths, adapter))
    ...     adapters = lcm_jax.load_lora(f"{folder}/style.safetensors")
    >>> sorted(adapters) == paths, adapters[paths[0]]["down"].shape, float(adapters[paths[0]]["alpha"])
    (True, (4, 2), 1.0)
    """
    if component is not None:
        _check_component(component)
    path = find_lora(path)
    groups = split(read_safetensors(path), path)
    if component is None:
        component = "transformer" if "transformer" in groups and "unet" not in groups else "unet"
    group = groups.get(None, groups.get(component))
    if group is None:
        raise ValueError(f"{path}: has no adapters for {component!r}, only for {_and(groups)}")
    like = _skeleton(group, path) if like is None else like
    return _fit(group, read_config(path, component), Network(like, rules, layout), path)


def load_loras(path: str | Path, networks: Mapping[str, Network], *, embeddings: bool = False) -> dict[str, Adapters]:
    """Return component -> adapters for every component in a LoRA file.

    Keys without a component's name belong to the UNet or MMDiT. networks: component -> (like, rules, layout) as for
    `load_lora`; it may hold components that the file has no adapters for. Raises ValueError if the file has adapters
    for a component that is not in `networks`, or adapters that do not fit. embeddings: as for `names.split`.
    """
    path = find_lora(path)
    groups = split(read_safetensors(path), path, embeddings=embeddings)
    if None in groups:
        groups = {next((name for name in DENOISERS if name in networks), "unet"): groups[None]}
    absent = [str(name) for name in groups if name not in networks]
    if absent:
        bases = [base_of(width) for name in DENOISERS if name in absent and (width := _width(groups[name]))]
        hint = f" (it is made for {bases[0]})" if bases else ""
        raise ValueError(f"{path}: has adapters for {_and(absent)}{hint}, but the model has only {_and(networks)}")
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


def find_lora(path: str | Path) -> Path:
    """Return the path itself if it is no folder, else the LoRA file in it; FileNotFoundError if there is none."""
    path = Path(path)
    if not path.is_dir():
        return path
    for name in FILE_NAMES:
        if (path / name).is_file():
            return path / name
    check_no_pickles(path, [Path(name).stem for name in FILE_NAMES])
    raise FileNotFoundError(f"{path}: holds no LoRA file ({' or '.join(FILE_NAMES)})")


def _skeleton(groups: Mapping[str, Group], path: Path) -> Any:
    """Return the kernels that a file with dotted module names adapts, as a tree of ShapeDtypeStruct."""
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
    """Return the adapters of one network from the modules of a file; ValueError if a module fits no kernel."""
    kernels, table = traverse_util.flatten_dict(network.like, sep="/"), places(network)
    layers: dict[str, dict[tuple[int, ...], Factors]] = {}
    unknown, incomplete, misshaped, twice = [], [], [], []
    for module, group in groups.items():
        destinations = table.get(module.replace(".", "_"))
        if destinations is None:
            unknown.append(f"{module}{_shapes(group)}")
        elif "down" not in group or "up" not in group:
            incomplete.append(module)
        else:
            down, up = (np.asarray(group[half], np.float32) for half in ("down", "up"))
            if "scale" in group:
                alpha = group["scale"].item() * len(down)
            else:
                alpha = group["alpha"].item() if "alpha" in group else alpha_of(config, module, len(down))
            check_alpha(alpha, f"{path}: {shown(module)}: its alpha")
            alpha *= group["scalar"].item() if "scalar" in group else 1.0
            for slot, destination in destinations.values():
                kernel = kernels[destination.path]
                layer_shape = kernel.shape[len(destination.layer) :]
                factors = _layer_factors(Factors(down, up, float(alpha)), slot, layer_shape)
                if factors is None:
                    misshaped.append(f"{module}{_shapes(group, kernel.shape)}")
                    break
                first = layers.setdefault(destination.path, {}).setdefault(destination.layer, factors)
                if first is not factors and not equal_factors(first, factors):
                    twice.append(module)
    faults = {"modules the network lacks": unknown, "modules without both halves": incomplete}
    faults |= {"modules of another shape": misshaped, "modules given twice and differently": twice}
    if problem := listed(faults):
        inputs = {name: kernels[_first(destinations).path].shape[-2] for name, destinations in table.items()}
        file_width, network_width = _width(groups), text_width(inputs)
        if file_width is not None and file_width != network_width and (misshaped or unknown):
            misfit = min(misshaped + unknown)
            problem = f"made for {base_of(file_width)}, not for {base_of(network_width)}: {misfit}"
        elif network.layout is None and any(ORIGINAL.match(module) for module in unknown):
            problem += "; these names are of original files: pass layout="
        raise ValueError(f"{path}: does not fit the network: {problem}")
    return {name: _assemble(kernels[name], parts) for name, parts in layers.items()}


def _first(destinations: Mapping[int, tuple[Slot, KernelLayer]]) -> KernelLayer:
    return next(iter(destinations.values()))[1]


def _width(groups: Mapping[str, Group]) -> int | None:
    """Return the width of the text embeddings that a file's LoRA attends to; None if no module tells."""
    downs = {module.replace(".", "_"): group["down"] for module, group in groups.items() if "down" in group}
    return text_width({module: down.shape[1] for module, down in downs.items()})


def _shapes(group: Group, kernel: tuple[int, ...] | None = None) -> str:
    """Return the shapes for a message: ` (down (4, 320), up (640, 4), network's kernel (320, 320))`."""
    parts = [f"{half} {group[half].shape}" for half in ("down", "up") if half in group]
    parts += [] if kernel is None else [f"network's kernel {tuple(kernel)}"]
    return f" ({', '.join(parts)})" if parts else ""


def _layer_factors(module: Factors, slot: Slot, kernel: tuple[int, ...]) -> Factors | None:
    """Return one layer's factors of a module in JAX's axes; None if they do not fit a kernel of this shape."""
    if len(module.up) % slot.parts or module.up.shape[1] != len(module.down):
        return None
    down, up, alpha = layer_factors(module, slot)
    down, up = to_kernel(down, len(kernel)), to_kernel(up, len(kernel))
    expected = shapes(np.broadcast_to(np.int8(0), kernel), down.shape[-1])
    return Factors(down, up, alpha) if (down.shape, up.shape) == (expected["down"], expected["up"]) else None


def _assemble(kernel: Any, layers: Mapping[tuple[int, ...], Factors]) -> dict[str, Any]:
    """Return a kernel's adapter from its layers' factors, padded to the largest rank R: alpha becomes alpha R / r."""
    rank = max(part.down.shape[-1] for part in layers.values())
    shape = shapes(kernel, rank)
    padded = {"down": np.zeros(shape["down"], np.float32), "up": np.zeros(shape["up"], np.float32)}
    alphas = np.full(shape["alpha"], rank, np.float32)
    for index, (down, up, alpha) in layers.items():
        r = down.shape[-1]
        padded["down"][index][..., :r] = down
        padded["up"][index][..., :r, :] = up
        alphas[index] = alpha * rank / r
    return {name: jnp.asarray(array) for name, array in (padded | {"alpha": alphas}).items()}


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
    """Write adapters to a safetensors file; in a folder diffusers looks for pytorch_lora_weights.safetensors.

    layout: the original module names, which tools for SDXL and SD3 expect in kohya files (see the module's docstring).
    dtype: the dtype of the tensors in the file; None keeps that of the adapters. Every format keeps alpha. Raises
    ValueError for an unknown format or component, for no adapters, and for a layout with a format other than kohya.

    >>> import tempfile, jax.numpy as jnp, lcm_jax
    >>> from lcm_jax.weights.safetensors_files import load_tensors
    >>> adapter = {"down": jnp.ones((4, 2)), "up": jnp.ones((2, 4)), "alpha": jnp.asarray(1.0)}
    >>> paths = ["mid_block/attentions_0/proj_in/kernel", "mid_block/attentions_0/proj_out/kernel"]
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     lcm_jax.save_lora(f"{folder}/style.safetensors", dict.fromkeys(paths, adapter), format="kohya")
    ...     tensors = load_tensors(f"{folder}/style.safetensors")
    ...     for key in sorted(tensors)[:3]:
    ...         print(key, tensors[key].shape)
    lora_unet_mid_block_attentions_0_proj_in.alpha ()
    lora_unet_mid_block_attentions_0_proj_in.lora_down.weight (2, 4)
    lora_unet_mid_block_attentions_0_proj_in.lora_up.weight (4, 2)
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
    """Write the adapters of several components, component -> adapters, to one safetensors file.

    networks: the rules and layouts of all components of the model. kohya files get the original module names where a
    network has a layout, the other formats never. dtype and the errors are those of `save_lora`.
    """
    if format not in SUFFIXES:
        raise ValueError(f"format={format!r}: expected one of {', '.join(SUFFIXES)}")
    tensors: dict[str, np.ndarray] = {}
    header: dict[str, Any] = {}
    for component, component_adapters in adapters.items():
        _check_component(component)
        if not component_adapters:
            raise ValueError(f"{path}: no adapters to write for {component}")
        layout = networks[component].layout if format == "kohya" else None
        start = start_of(component, networks, original=layout is not None)
        parts = _file_modules(component_adapters, networks[component].rules, layout)
        for module, (down, up, alpha) in parts.items():
            stem = f"{component}.{module}"
            if format == "kohya":
                stem = start + module.replace(".", "_")
                tensors[f"{stem}.alpha"] = np.asarray(alpha, np.float32)
            for suffix, array in zip(suffixes(format, component, module), (down, up), strict=True):
                file_dtype = array.dtype if dtype is None else jnp.dtype(dtype)
                tensors[f"{stem}.{suffix}"] = np.ascontiguousarray(array, file_dtype)
        header |= {f"{component}.{key}": value for key, value in write_config(parts, component).items()}
    metadata = {} if format == "kohya" else {HEADER_KEY: json.dumps(header, sort_keys=True)}
    save_tensors(path, tensors, metadata)


def _file_modules(adapters: Adapters, rules: Rules, layout: Layout | None) -> dict[str, Factors]:
    """Return module name in the file -> its factors; layers that original files fuse are fused."""
    shares: dict[str, dict[int, Factors]] = {}
    parts: dict[str, int] = {}
    for path in sorted(adapters):
        down, up, alpha = (np.asarray(adapters[path][leaf]) for leaf in ("down", "up", "alpha"))
        for module, _, layer in modules(path, down, rules):
            slot = slot_of(module, layout)
            factors = Factors(to_weight(down[layer]), reorder(to_weight(up[layer]), slot), float(alpha[layer]))
            shares.setdefault(slot.key, {})[slot.part] = factors
            parts[slot.key] = slot.parts
    return {key: by_part[0] if parts[key] == 1 else fuse(by_part, parts[key]) for key, by_part in shares.items()}
