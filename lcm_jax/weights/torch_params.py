"""Parameters from PyTorch and back: one rule table per network, walked in both directions.

A table runs from the parameter path to the PyTorch name, so the network itself lists what a file must hold: nothing is
guessed from the file. `*` in a name is the index of a layer stacked by `nn.scan`, one leading axis for each `*`; `*+13`
counts from 13.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from lcm_jax.runtime.messages import few
from lcm_jax.typing import Array
from lcm_jax.weights.device import put_on_device
from lcm_jax.weights.safetensors_files import is_finite, release

Rules = Sequence[tuple[str, str]]
# (path, shape) -> where the parameter lies; each device is then given its slice alone.
Shardings = Callable[[str, tuple[int, ...]], jax.sharding.Sharding]
_WORKERS = 4
_LEAVES = {"kernel": "weight", "scale": "weight", "embedding": "weight"}


def torch_name(path: str, rules: Rules) -> str:
    """The PyTorch name of the parameter at a "/"-joined path; holds one `*` for each stacked axis."""
    for pattern, replacement in rules:
        path = re.sub(pattern, replacement, path)
    head, dot, leaf = path.replace("/", ".").rpartition(".")
    return head + dot + _LEAVES.get(leaf, leaf)


def unstack(name: str, shape: Sequence[int], path: str) -> list[str]:
    """The names of all layers in a stacked parameter, in row-major order of its leading axes."""
    stars = name.count("*")
    if stars > len(shape):
        raise ValueError(f"{path}: {name} asks for {stars} stacked axes, but its shape is {tuple(shape)}")
    names = []
    for index in np.ndindex(*shape[:stars]):
        numbers = iter(index)
        names.append(re.sub(r"\*(?:\+(\d+))?", lambda m: str(next(numbers) + int(m[1] or 0)), name))  # noqa: B023
    return names


@dataclass(frozen=True, kw_only=True)
class _Leaf:
    """A parameter, and the tensors it is made of."""

    names: np.ndarray  # of the tensors, one axis for each stacked axis
    shape: tuple[int, ...]
    dtype: Any
    kernel: bool

    @property
    def tensor_shape(self) -> tuple[int, ...]:
        """The shape of each of its tensors in PyTorch."""
        own = self.shape[self.names.ndim :]
        return (own[-1], own[-2], *own[:-2]) if self.kernel and len(own) >= 2 else own

    def read(self, tensors: Mapping[str, np.ndarray], index: tuple[slice, ...] | None = None) -> np.ndarray:
        """The parameter, or its slice `index`; only that is read where the tensors are memory maps.

        One tensor in its own type stays a view, whatever its strides: jax transposes far faster than numpy does.
        """
        index = index or (slice(None),) * len(self.shape)
        n = self.names.ndim
        stacked: Any = (*index[:n], ...)
        names, within = self.names[stacked], index[n:]
        parts = [_to_flax(tensors[name], self.kernel)[within] for name in names.flat]
        with np.errstate(over="ignore"):  # what a narrower type cannot hold is infinite, and `from_torch` finds it
            if not n and parts[0].dtype == self.dtype:
                return parts[0]
            whole = np.empty((*names.shape, *parts[0].shape), self.dtype) if n else np.empty_like(parts[0], self.dtype)
            layers = whole.reshape(len(parts), *parts[0].shape) if n else whole[None]
            for i, part in enumerate(parts):
                layers[i] = part
                release(part)
        return whole


def _leaves(like: Any, rules: Rules, dtype: Any) -> dict[str, _Leaf]:
    leaves = {}
    for path, leaf in traverse_util.flatten_dict(like, sep="/").items():
        name = torch_name(path, rules)
        names = np.array(unstack(name, leaf.shape, path), object).reshape(leaf.shape[: name.count("*")])
        # Floating parameters take the dtype asked for; integers keep theirs.
        own = leaf.dtype if dtype is None or not _floating(leaf.dtype) else jnp.dtype(dtype)
        leaves[path] = _Leaf(names=names, shape=tuple(leaf.shape), dtype=own, kernel=_is_kernel(path))
    return leaves


def torch_shapes(like: Any, rules: Rules) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors that a file for the network `like` holds."""
    leaves = _leaves(like, rules, None).values()
    return {name: leaf.tensor_shape for leaf in leaves for name in leaf.names.flat}


def check(
    tensors: Mapping[str, Any], like: Any, rules: Rules, *, optional: Sequence[str] = (), source: str = ""
) -> None:
    """One ValueError that lists every missing, unexpected and mis-shaped key (ten of each and their number)."""
    leaves = _leaves(like, rules, None).values()
    want = {name: leaf.tensor_shape for leaf in leaves for name in leaf.names.flat}
    wrong = [
        f"{name}: file {tuple(tensors[name].shape)}, network {shape}"
        for name, shape in want.items()
        if name in tensors and tuple(tensors[name].shape) != shape
    ]
    faults = {
        "missing": sorted(want.keys() - tensors.keys()),
        "unexpected": sorted(k for k in tensors.keys() - want.keys() if not any(re.search(p, k) for p in optional)),
        "mis-shaped": wrong,
        "of whole numbers": [
            name
            for leaf in leaves
            for name in leaf.names.flat
            if name in tensors and _floating(leaf.dtype) != _floating(tensors[name].dtype)
        ],
    }
    if any(faults.values()):
        listed = [few(what, items) for what, items in faults.items() if items]
        listed = [*other_depths(want, tensors), *listed]
        raise ValueError(f"{source or 'weights'}: does not fit the network: {'; '.join(listed)}")


def _floating(dtype: Any) -> bool:
    return bool(jnp.issubdtype(dtype, jnp.floating))


def _is_kernel(path: str) -> bool:
    return path.rpartition("/")[2] == "kernel"


def _to_flax(array: np.ndarray, kernel: bool) -> np.ndarray:
    """(out, in, *window) -> (*window, in, out) for kernels."""
    return array.transpose(*range(2, array.ndim), 1, 0) if kernel and array.ndim >= 2 else array


def _to_torch(array: np.ndarray, kernel: bool) -> np.ndarray:
    """(*window, in, out) -> (out, in, *window) for kernels."""
    n = array.ndim
    return array.transpose(n - 1, n - 2, *range(n - 2)) if kernel and n >= 2 else array


def from_torch(
    tensors: Mapping[str, np.ndarray],
    like: Any,
    rules: Rules,
    *,
    dtype: Any = None,
    optional: Sequence[str] = (),
    source: str = "",
    shardings: Shardings | None = None,
    each: Callable[[str, Array], Any] | None = None,
) -> Any:
    """A parameter tree shaped as `like` (nested dicts of ShapeDtypeStruct or arrays) from named PyTorch tensors.

    dtype: of the floating parameters; None takes each one from `like`. optional: regexes (searched) of keys that may be
    left over. source: the file named in errors. shardings: where each parameter goes; from memory-mapped tensors every
    device's slice is read alone, so a network larger than this host is never whole on it. each: (path, parameter) to
    what takes its place, so that one which becomes smaller is never whole on a device.
    Raises one ValueError that lists every misfit (`check`), or the tensors that hold infinity or NaN.
    """
    check(tensors, like, rules, optional=optional, source=source)
    broken: list[str] = []

    def put(path: str, leaf: _Leaf) -> Any:
        def read(index: tuple[slice, ...] | None) -> np.ndarray:
            array = leaf.read(tensors, index)
            views.append(array)
            if not is_finite(array):
                broken.append(path)
            return array

        views: list[np.ndarray] = []
        if shardings is None:
            placed = put_on_device(read(None))  # not the file's memory: one that changes later is not to show
        else:
            where = shardings(path, leaf.shape)
            parts = where.addressable_devices_indices_map(leaf.shape).items()
            own = [put_on_device(read(index), device) for device, index in parts]
            placed = jax.make_array_from_single_device_arrays(leaf.shape, where, own)
        placed.block_until_ready()
        for view in views:
            release(view)
        return placed if each is None or path in broken else jax.block_until_ready(each(path, placed))

    # A few at a time: looking at values and moving them both run at the speed of one core.
    leaves = _leaves(like, rules, dtype)
    with ThreadPoolExecutor(_WORKERS) as pool:
        params = dict(zip(leaves, pool.map(put, leaves, leaves.values()), strict=True))
    if broken:
        names = sorted({torch_name(path, rules) for path in broken})
        kind = "" if dtype is None else f" in {jnp.dtype(dtype).name}"
        raise ValueError(f"{source or 'weights'}: {few('tensors', names)} hold values that are not finite{kind}")
    return traverse_util.unflatten_dict(params, sep="/")


def to_torch(params: Any, rules: Rules, *, dtype: Any = None) -> dict[str, np.ndarray]:
    """Named PyTorch arrays (contiguous, on the host) of a parameter tree. dtype: of floating ones; None: their own."""
    tensors: dict[str, np.ndarray] = {}
    for path, value in traverse_util.flatten_dict(params, sep="/").items():
        array = np.asarray(jax.device_get(value))
        if dtype is not None and _floating(array.dtype):
            array = array.astype(dtype, copy=False)
        name = torch_name(path, rules)
        stars, group = name.count("*"), unstack(name, array.shape, path)
        for key, part in zip(group, array.reshape(len(group), *array.shape[stars:]), strict=True):
            if key in tensors:
                raise ValueError(f"{path}: the rules name it {key}, which another parameter already has")
            part = _to_torch(part, _is_kernel(path))
            tensors[key] = np.ascontiguousarray(part) if part.ndim else part
    return tensors


def other_depths(want: Iterable[str], have: Iterable[str]) -> list[str]:
    """Stacks of numbered layers of which a file has another number than the network that its config describes."""

    def count(names: Iterable[str]) -> dict[str, int]:
        found: dict[str, set[str]] = {}
        for name in names:
            if match := re.match(r"(.*?)\.(\d+)\.", name):
                found.setdefault(match[1], set()).add(match[2])
        return {stack: len(numbers) for stack, numbers in found.items()}

    counts = count(have)
    return [
        f"depth: {counts[stack]} {stack} in the file, {n} by its config (num_layers, num_hidden_layers)"
        for stack, n in count(want).items()
        if counts.get(stack, n) != n
    ]
