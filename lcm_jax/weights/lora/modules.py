"""The modules of LoRA files and the kernels they adapt: found by name, split where a file fuses several layers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from flax import traverse_util

from lcm_jax.weights.single_file.layouts import Layout, Slot
from lcm_jax.weights.torch_params import Rules, torch_name, unstack


class Network(NamedTuple):
    """A component's parameters, and the tables that name its modules in files."""

    like: Any  # nested dicts of arrays or ShapeDtypeStruct
    rules: Rules  # names in diffusers or transformers
    layout: Layout | None = None  # names in original files


class KernelLayer(NamedTuple):
    """The kernel that holds the weight of a PyTorch module."""

    module: str  # name in PyTorch
    path: str  # "/"-joined path of the kernel
    layer: tuple[int, ...]  # index of the module in the kernel's stacked axes


class Factors(NamedTuple):
    """A module's LoRA in PyTorch's axes: down (r, i[, h, w]), up (o, r[, 1, 1]); W' = W + alpha / r * up @ down."""

    down: np.ndarray
    up: np.ndarray
    alpha: float


def modules(path: str, kernel: Any, rules: Rules) -> Iterator[KernelLayer]:
    """Yield the PyTorch modules whose weights a kernel holds: one, or one for each layer stacked in it."""
    name = torch_name(path, rules).removesuffix(".weight")
    layers = np.ndindex(*kernel.shape[: name.count("*")])
    for module, layer in zip(unstack(name, kernel.shape, path), layers, strict=True):
        yield KernelLayer(module, path, layer)


def slot_of(module: str, layout: Layout | None) -> Slot:
    """Return the slot of a module in original files, by module names; the name itself if they have no such module."""
    slot = Slot("") if layout is None else layout(f"{module}.weight")
    return slot._replace(key=slot.key.removesuffix(".weight")) if slot.key.endswith(".weight") else Slot(module)


def places(network: Network) -> dict[str, dict[int, tuple[Slot, KernelLayer]]]:
    """Return {module name in files, dots as underscores: {part of a fused module: (its slot, the kernel it adapts)}}.

    Kohya's names have underscores for dots and cannot be split again, so the table has every spelling of each module:
    diffusers' name, that name without `text_model.` (which a bare text encoder lacks in transformers 5), and the
    original name. Raises ValueError if two modules have the same spelling.
    """
    table: dict[str, dict[int, tuple[Slot, KernelLayer]]] = {}
    for path, kernel in traverse_util.flatten_dict(network.like, sep="/").items():
        if not path.endswith("kernel"):
            continue
        for destination in modules(path, kernel, network.rules):
            module = destination.module
            short = module.removeprefix("text_model.")
            for slot in {Slot(module), Slot(short), slot_of(module, network.layout)}:
                by_part = table.setdefault(slot.key.replace(".", "_"), {})
                if by_part.setdefault(slot.part, (slot, destination)) != (slot, destination):
                    raise ValueError(f"{module} and {by_part[slot.part][1].module} look alike in LoRA files")
    return table


def equal_factors(a: Factors, b: Factors) -> bool:
    """Return whether two LoRAs are equal, number by number."""
    return a.alpha == b.alpha and np.array_equal(a.down, b.down) and np.array_equal(a.up, b.up)


def layer_factors(module: Factors, slot: Slot) -> Factors:
    """Return one layer's LoRA from that of the module which holds the layer in original files, possibly fused.

    Fused layers share down, and each has its own rows of up. Components of the rank that are zero in a layer's rows are
    dropped: in a file whose layers were trained separately, up is block diagonal.
    """
    down, up, alpha = module
    if slot.parts > 1:
        up = np.split(up, slot.parts)[slot.part]
        used = np.asarray(up.reshape(*up.shape[:2], -1).any(axis=(0, 2)))
        if used.any() and not used.all():
            down, up, alpha = down[used], up[:, used], alpha * int(used.sum()) / len(used)
    return Factors(down, reorder(up, slot), alpha)


def fuse(shares: Mapping[int, Factors], parts: int) -> Factors:
    """Return the LoRA of a module of original files that fuses `parts` layers, from {part: the LoRA of that layer}.

    Parts without a LoRA get zeros. If all parts have the same down and alpha, these are kept; otherwise up is block
    diagonal and the rank is the sum of the ranks.
    """
    shares = dict(sorted(shares.items()))
    factors = list(shares.values())
    first = factors[0]
    if len(factors) == parts and all(f.alpha == first.alpha and np.array_equal(f.down, first.down) for f in factors):
        return Factors(first.down, np.concatenate([f.up for f in factors]), first.alpha)
    scales = [f.alpha / len(f.down) for f in factors]
    equal = len(set(scales)) == 1
    rows, rank = len(first.up), sum(len(f.down) for f in factors)
    up, column = np.zeros((parts * rows, rank), first.up.dtype), 0
    for (i, f), scale in zip(shares.items(), scales, strict=True):
        up[i * rows : (i + 1) * rows, column : column + len(f.down)] = f.up if equal else f.up * scale
        column += len(f.down)
    alpha = sum(f.alpha for f in factors) if equal else float(rank)
    return Factors(np.concatenate([f.down for f in factors]), up, alpha)


def reorder(up: np.ndarray, slot: Slot) -> np.ndarray:
    """Return up with its outputs in the order of the other naming: scale and shift are swapped in some modules."""
    return np.roll(up, len(up) // 2, axis=0) if slot.form == "swapped" else up


def to_kernel(array: np.ndarray, dimensions: int) -> np.ndarray:
    """Return a float32 array (out, in[, h, w]) of PyTorch in JAX's axes, ([h, w,] in, out).

    dimensions: the number of axes of the kernel, below 4 for a dense layer. Dense layers and 1 x 1 convolutions are
    converted into each other.
    """
    array = np.asarray(array, np.float32)
    if dimensions >= 4:
        array = array[..., None, None] if array.ndim == 2 else array
        return array.transpose(2, 3, 1, 0)
    array = array[..., 0, 0] if array.shape[2:] == (1, 1) else array
    return array.T


def to_weight(array: np.ndarray) -> np.ndarray:
    """Return an array ([h, w,] in, out) in PyTorch's axes, (out, in[, h, w])."""
    return array.transpose(array.ndim - 1, array.ndim - 2, *range(array.ndim - 2))
