"""Where the modules of a LoRA file lie in a network: looked up by name, split where the file fuses several layers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from flax import traverse_util

from lcm_jax.weights.single_file.layouts import Layout, Slot
from lcm_jax.weights.torch_params import Rules, torch_name, unstack


class Network(NamedTuple):
    """What a component's modules are called: by its parameters (nested dicts of arrays or ShapeDtypeStruct) and rules
    in diffusers or transformers, by its layout in original files."""

    like: Any
    rules: Rules
    layout: Layout | None = None


class Place(NamedTuple):
    """The kernel of a torch module."""

    module: str
    path: str
    layer: tuple[int, ...]  # its index in the stacked axes


class Factors(NamedTuple):
    """A LoRA of one module in PyTorch's axes: down (r, i[, h, w]), up (o, r[, 1, 1]); W' = W + alpha / r * up down."""

    down: np.ndarray
    up: np.ndarray
    alpha: float


def modules(path: str, kernel: Any, rules: Rules) -> Iterator[Place]:
    """The torch modules whose weights a kernel holds: one, or as many as are stacked in it."""
    name = torch_name(path, rules).removesuffix(".weight")
    layers = np.ndindex(*kernel.shape[: name.count("*")])
    for module, layer in zip(unstack(name, kernel.shape, path), layers, strict=True):
        yield Place(module, path, layer)


def slot_of(module: str, layout: Layout | None) -> Slot:
    """Where original files keep a module, by the module's name there; as it is where it is no module of theirs."""
    slot = Slot("") if layout is None else layout(f"{module}.weight")
    return slot._replace(key=slot.key.removesuffix(".weight")) if slot.key.endswith(".weight") else Slot(module)


def places(network: Network) -> dict[str, dict[int, tuple[Slot, Place]]]:
    """Module as files spell it, dots as underscores -> share of it -> its place.

    Kohya's names cannot be split again, so all are looked up: in diffusers' naming, without `text_model.` (which a
    bare text encoder lacks in transformers 5), and in the original naming.
    """
    found: dict[str, dict[int, tuple[Slot, Place]]] = {}
    for path, kernel in traverse_util.flatten_dict(network.like, sep="/").items():
        if not path.endswith("kernel"):
            continue
        for place in modules(path, kernel, network.rules):
            short = place.module.removeprefix("text_model.")
            for slot in {Slot(place.module), Slot(short), slot_of(place.module, network.layout)}:
                shares = found.setdefault(slot.key.replace(".", "_"), {})
                if shares.setdefault(slot.part, (slot, place)) != (slot, place):
                    raise ValueError(f"{place.module} and {shares[slot.part][1].module} look alike in LoRA files")
    return found


def alike(a: Factors, b: Factors) -> bool:
    """Whether two LoRAs are the same, number by number."""
    return a.alpha == b.alpha and np.array_equal(a.down, b.down) and np.array_equal(a.up, b.up)


def share(whole: Factors, slot: Slot) -> Factors:
    """A layer's own LoRA out of the one of the module that holds it in original files.

    Fused layers share down and have rows of up each. Where those rows have no use for some of the rank (a file whose
    layers were trained apart has up block by block), it is dropped.
    """
    down, up, alpha = whole
    if slot.parts > 1:
        up = np.split(up, slot.parts)[slot.part]
        used = np.asarray(up.reshape(*up.shape[:2], -1).any(axis=(0, 2)))
        if used.any() and not used.all():
            down, up, alpha = down[used], up[:, used], alpha * int(used.sum()) / len(used)
    return Factors(down, reorder(up, slot), alpha)


def fuse(shares: Mapping[int, Factors], parts: int) -> Factors:
    """The LoRA of a module of original files that holds `parts` layers, from those of its layers; the others get zeros.

    Layers that share down and alpha keep them; else each has a block of up, and the ranks add up.
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
    """up with its outputs in the order of the other naming: scale and shift may have to change places."""
    return np.roll(up, len(up) // 2, axis=0) if slot.form == "swapped" else up


def to_kernel(array: np.ndarray, dimensions: int) -> np.ndarray:
    """(out, in[, h, w]) with the axes of ours, for a kernel of so many; dense and 1 x 1 are interchangeable."""
    array = np.asarray(array, np.float32)
    if dimensions >= 4:
        array = array[..., None, None] if array.ndim == 2 else array
        return array.transpose(2, 3, 1, 0)
    array = array[..., 0, 0] if array.shape[2:] == (1, 1) else array
    return array.T


def to_weight(array: np.ndarray) -> np.ndarray:
    """(..., in, out) in the axes of PyTorch."""
    return array.transpose(array.ndim - 1, array.ndim - 2, *range(array.ndim - 2))
