"""LoRA files in and out: the key styles of PEFT and diffusers, of older diffusers, and of kohya's scripts.

    peft        unet.mid_block.attentions.0.proj_in.lora_A.weight      lora_B.weight
    diffusers   unet.mid_block.attentions.0.proj_in.lora.down.weight   lora.up.weight
    kohya       lora_unet_mid_block_attentions_0_proj_in.lora_down.weight   .lora_up.weight   .alpha

Reading tells the styles apart key by key. Alpha comes from a `.alpha` tensor, else from the adapter config in the
file's header (diffusers) or beside it (PEFT), else it is the rank. Writing puts alpha in the header, for kohya in
`.alpha`: programs that do not read the header take alpha for the rank, so give those kohya files. (diffusers up to
0.42 loses the `.alpha` of attention layers in kohya files where alphas differ: give it one of the other formats.)
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from lcm_jax.lora import Adapters, few, shapes
from lcm_jax.nets import RULES_UNET
from lcm_jax.weights.engine import Rules, torch_name
from lcm_jax.weights.files import read_json, read_metadata, read_safetensors, save_tensors

FILE_NAMES = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")
HEADER_KEY = "lora_adapter_metadata"

# Component of a pipeline -> how kohya's keys begin for it (the first is written).
COMPONENTS: dict[str, tuple[str, ...]] = {
    "unet": ("lora_unet",),
    "transformer": ("lora_transformer",),
    "text_encoder": ("lora_te", "lora_te1"),
    "text_encoder_2": ("lora_te2",),
    "text_encoder_3": ("lora_te3",),
}

Format = Literal["peft", "diffusers", "kohya"]
SUFFIXES: dict[str, tuple[str, str]] = {
    "peft": ("lora_A.weight", "lora_B.weight"),
    "diffusers": ("lora.down.weight", "lora.up.weight"),
    "kohya": ("lora_down.weight", "lora_up.weight"),
}

# How a key ends -> what it holds. PEFT may name the adapter in between; the oldest diffusers wrote `to_q_lora.down`.
ROLES: tuple[tuple[str, str], ...] = (
    (r"(\.lora_(A|down)(\.\w+)?|[._]lora\.down|\.lora_linear_layer\.down)\.weight$", "down"),
    (r"(\.lora_(B|up)(\.\w+)?|[._]lora\.up|\.lora_linear_layer\.up)\.weight$", "up"),
    (r"\.alpha$", "alpha"),
)
# Old spellings of modules.
SPELLINGS: tuple[tuple[str, str], ...] = ((r"\.processor\.to_out$", ".to_out.0"), (r"\.processor\.", "."))


class _Place(NamedTuple):
    """Where a torch module lies in our tree."""

    module: str
    path: str
    layer: tuple[int, ...]  # its index in the stacked axes


def _modules(path: str, kernel: Any, rules: Rules) -> Iterator[_Place]:
    """The torch modules whose weights a kernel holds: one, or as many as are stacked in it."""
    name = torch_name(path, rules).removesuffix(".weight")
    for index in np.ndindex(*kernel.shape[: name.count("*")]):
        numbers = iter(index)
        yield _Place(re.sub(r"\*", lambda _: str(next(numbers)), name), path, index)  # noqa: B023 (used at once)


def _places(like: Any, rules: Rules) -> dict[str, _Place]:
    """Module name, dots as underscores, -> its place. Kohya's names cannot be split again, so they are looked up."""
    places: dict[str, _Place] = {}
    for path, kernel in traverse_util.flatten_dict(like, sep="/").items():
        if path.endswith("kernel"):
            for place in _modules(path, kernel, rules):
                if places.setdefault(place.module.replace(".", "_"), place) != place:
                    raise ValueError(f"{place.module} and {places[place.module.replace('.', '_')].module} look alike")
    return places


def _find(path: str | Path) -> Path:
    """The file itself, or the LoRA file in a folder."""
    path = Path(path)
    if not path.is_dir():
        return path
    for name in FILE_NAMES:
        if (path / name).is_file():
            return path / name
    raise FileNotFoundError(f"{path}: holds no LoRA file ({' or '.join(FILE_NAMES)})")


def _component(key: str) -> tuple[str | None, str]:
    """The component a key belongs to, None if it does not say, and the rest of the key."""
    key = key.removeprefix("base_model.model.")
    for component, kohya in COMPONENTS.items():
        for prefix in (f"{component}.", *(f"{start}_" for start in kohya)):
            if key.startswith(prefix):
                return component, key.removeprefix(prefix)
    return None, key


def lora_components(path: str | Path) -> tuple[str, ...]:
    """The components that a LoRA file has adapters for; empty if its keys do not say."""
    found = {_component(key)[0] for key in read_safetensors(_find(path))}
    return tuple(component for component in COMPONENTS if component in found)


def _split(tensors: Mapping[str, np.ndarray], component: str, source: Path) -> dict[str, dict[str, np.ndarray]]:
    """Module as spelt in the file -> role -> tensor, of one component."""
    keys = {key: _component(key) for key in tensors}
    named = {owner for owner, _ in keys.values() if owner}
    if named and component not in named:
        raise ValueError(f"{source}: has no adapters for {component!r}, only for {', '.join(sorted(named))}")
    groups: dict[str, dict[str, np.ndarray]] = {}
    strange = []
    for key, (owner, rest) in keys.items():
        if owner != (component if named else None):
            if owner is None:
                strange.append(key)
            continue
        match = next(((m, role) for pattern, role in ROLES if (m := re.search(pattern, rest))), None)
        if match is None:
            strange.append(key)
            continue
        module = rest[: match[0].start()]
        for pattern, replacement in SPELLINGS:
            module = re.sub(pattern, replacement, module)
        groups.setdefault(module, {})[match[1]] = tensors[key]
    if strange:
        raise ValueError(f"{source}: only plain LoRA can be read; it has {few('other keys', sorted(strange))}")
    if not groups:
        raise ValueError(f"{source}: holds no LoRA tensors")
    return groups


def _config(path: Path, component: str) -> dict[str, Any]:
    """The adapter's PEFT config, from the file's header or from beside it; empty if there is none."""
    header = read_metadata(path).get(HEADER_KEY)
    if header is not None:
        prefix = f"{component}."
        try:
            return {k.removeprefix(prefix): v for k, v in json.loads(header).items() if k.startswith(prefix)}
        except (ValueError, AttributeError):
            raise ValueError(f"{path}: {HEADER_KEY} in its header is not a JSON object: {header[:60]!r}") from None
    beside = path.parent / "adapter_config.json"
    return read_json(beside) if path.name == FILE_NAMES[1] and beside.is_file() else {}


def _config_alpha(config: Mapping[str, Any], module: str, rank: int) -> float:
    """PEFT's alpha of a module: the first pattern that fits the end of its name, else the common one."""
    alpha = config.get("lora_alpha", rank)
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            alpha = value
            break
    return alpha * math.sqrt(rank) if config.get("use_rslora") else alpha


def _to_kernel(array: np.ndarray, kernel: Any) -> np.ndarray:
    """A torch weight (out, in[, h, w]) with the axes of ours; dense and 1 x 1 convolutions are interchangeable."""
    array = np.asarray(array, np.float32)
    if kernel.ndim >= 4:
        array = array[..., None, None] if array.ndim == 2 else array
        return array.transpose(2, 3, 1, 0) if array.ndim == 4 else array
    array = array[..., 0, 0] if array.shape[2:] == (1, 1) else array
    return array.T


def load_lora(path: str | Path, like: Any = None, rules: Rules = RULES_UNET, *, component: str = "unet") -> Adapters:
    """Adapters for the network whose parameters are shaped as `like`, in float32, from a LoRA file or its folder.

    like: nested dicts of arrays or ShapeDtypeStruct; None takes paths (of a network without stacked layers) and shapes
    from the file itself, which kohya's names do not allow. component: whose keys to take where a file holds several.
    Layers stacked in one kernel may differ in rank or lack an adapter: they are padded with zeros to the largest rank.
    Raises ValueError that names what the network does not have, what is incomplete and what is mis-shaped.
    """
    if component not in COMPONENTS:
        raise ValueError(f"component={component!r}: expected one of {', '.join(COMPONENTS)}")
    path = _find(path)
    groups = _split(read_safetensors(path), component, path)
    config = _config(path, component)
    like = _skeleton(groups, path) if like is None else like
    places, kernels = _places(like, rules), traverse_util.flatten_dict(like, sep="/")
    parts: dict[str, list[tuple[tuple[int, ...], np.ndarray, np.ndarray, float]]] = {}
    unknown, incomplete, misshaped = [], [], []
    for module, group in groups.items():
        place = places.get(module.replace(".", "_"))
        if place is None:
            unknown.append(module)
            continue
        if "down" not in group or "up" not in group:
            incomplete.append(module)
            continue
        kernel = np.broadcast_to(np.int8(0), kernels[place.path].shape)[place.layer]
        down, up = _to_kernel(group["down"], kernel), _to_kernel(group["up"], kernel)
        want = shapes(kernel, down.shape[-1])
        if (down.shape, up.shape) != (want["down"], want["up"]):
            misshaped.append(f"{module} (down {group['down'].shape}, up {group['up'].shape})")
            continue
        rank = down.shape[-1]
        alpha = group["alpha"].item() if "alpha" in group else _config_alpha(config, place.module, rank)
        parts.setdefault(place.path, []).append((place.layer, down, up, float(alpha)))
    faults = {"modules the network lacks": unknown, "modules without both halves": incomplete}
    faults["modules of another shape"] = misshaped
    listed = [few(what, sorted(items)) for what, items in faults.items() if items]
    if listed:
        raise ValueError(f"{path}: does not fit the network: {'; '.join(listed)}")
    return {name: _assemble(kernels[name], layers) for name, layers in parts.items()}


def _skeleton(groups: Mapping[str, Mapping[str, np.ndarray]], path: Path) -> Any:
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


def _assemble(kernel: Any, layers: list[tuple[tuple[int, ...], np.ndarray, np.ndarray, float]]) -> dict[str, Any]:
    """The adapter of a kernel from (index, down, up, alpha) of its layers; alpha grows with the rank padded to."""
    rank = max(down.shape[-1] for _, down, _, _ in layers)
    shape = shapes(kernel, rank)
    whole = {"down": np.zeros(shape["down"], np.float32), "up": np.zeros(shape["up"], np.float32)}
    alphas = np.full(shape["alpha"], rank, np.float32)
    for index, down, up, alpha in layers:
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
    component: str = "unet",
    dtype: Any = None,
) -> None:
    """Write adapters to a safetensors file; diffusers finds it in a folder as pytorch_lora_weights.safetensors.

    dtype: of the tensors; None keeps theirs. alpha stays as it is in every format (see the module's text).
    """
    if format not in SUFFIXES:
        raise ValueError(f"format={format!r}: expected one of {', '.join(SUFFIXES)}")
    if component not in COMPONENTS:
        raise ValueError(f"component={component!r}: expected one of {', '.join(COMPONENTS)}")
    tensors: dict[str, np.ndarray] = {}
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for name in sorted(adapters):
        down, up, alpha = (np.asarray(adapters[name][leaf]) for leaf in ("down", "up", "alpha"))
        for module, _, index in _modules(name, down, rules):
            stem = f"{component}.{module}"
            if format == "kohya":
                stem = f"{COMPONENTS[component][0]}_{module.replace('.', '_')}"
                tensors[f"{stem}.alpha"] = np.asarray(alpha[index], np.float32)
            for suffix, array in zip(SUFFIXES[format], (down[index], up[index]), strict=True):
                array = array.transpose(array.ndim - 1, array.ndim - 2, *range(array.ndim - 2))
                tensors[f"{stem}.{suffix}"] = np.ascontiguousarray(
                    array, array.dtype if dtype is None else jnp.dtype(dtype)
                )
            ranks[module], alphas[module] = down.shape[-1], float(alpha[index])
    header = {} if format == "kohya" else {HEADER_KEY: _header(ranks, alphas, component)}
    save_tensors(path, tensors, header)


def _header(ranks: Mapping[str, int], alphas: Mapping[str, float], component: str) -> str:
    """PEFT's LoraConfig as diffusers keeps it: rank and alpha most modules have, and the others as patterns."""

    def common(values: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
        listed = list(values.values())
        most = max(set(listed), key=listed.count)
        return most, {f"^{re.escape(module)}": value for module, value in values.items() if value != most}

    rank, rank_pattern = common(ranks)
    alpha, alpha_pattern = common(alphas)
    config = {"r": rank, "rank_pattern": rank_pattern, "lora_alpha": alpha, "alpha_pattern": alpha_pattern}
    config["target_modules"] = sorted(ranks)
    return json.dumps({f"{component}.{key}": value for key, value in config.items()}, sort_keys=True)
