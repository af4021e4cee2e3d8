"""Parameters from PyTorch and back: one rule table per network, walked in both directions.

A table leads from the parameter path to the PyTorch name, so the network itself lists what a file must hold: nothing is
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
# (path, shape) -> the parameter's sharding; each device then gets only its slice.
Shardings = Callable[[str, tuple[int, ...]], jax.sharding.Sharding]
_WORKERS = 4
_LEAVES = {"kernel": "weight", "scale": "weight", "embedding": "weight"}


def torch_name(path: str, rules: Rules) -> str:
    """Return the PyTorch name of the parameter at a "/"-joined path, with one `*` for each stacked axis.

    >>> from lcm_jax.weights.torch_params import torch_name
    >>> torch_name("blocks/to_q/kernel", rules=[("^blocks/", "blocks/*/")])
    'blocks.*.to_q.weight'
    """
    for pattern, replacement in rules:
        path = re.sub(pattern, replacement, path)
    head, dot, leaf = path.replace("/", ".").rpartition(".")
    return head + dot + _LEAVES.get(leaf, leaf)


def unstack(name: str, shape: Sequence[int], path: str) -> list[str]:
    """Return the names of all layers in a stacked parameter, in row-major order of its leading axes.

    path: the parameter, for the message. Raises ValueError if the name has more `*` than the shape has axes.

    >>> from lcm_jax.weights.torch_params import unstack
    >>> unstack("blocks.*+1.to_q.weight", (2, 4, 4), path="blocks/to_q/kernel")
    ['blocks.1.to_q.weight', 'blocks.2.to_q.weight']
    """
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
    """A parameter, and the PyTorch tensors it consists of."""

    names: np.ndarray  # names of the tensors, one axis for each stacked axis
    shape: tuple[int, ...]
    dtype: Any
    kernel: bool

    @property
    def tensor_shape(self) -> tuple[int, ...]:
        """The shape in PyTorch of each tensor."""
        shape = self.shape[self.names.ndim :]
        return (shape[-1], shape[-2], *shape[:-2]) if self.kernel and len(shape) >= 2 else shape

    def read(self, tensors: Mapping[str, np.ndarray], index: tuple[slice, ...] | None = None) -> np.ndarray:
        """Return the parameter, or only its slice `index`; no more than that is read from memory-mapped tensors.

        A single tensor that already has the dtype stays a view with any strides: jax transposes faster than numpy.
        """
        index = index or (slice(None),) * len(self.shape)
        n = self.names.ndim
        stacked: Any = (*index[:n], ...)
        within: Any = (*index[n:], ...)  # a number stays an array
        names = self.names[stacked]
        parts = [_to_flax(tensors[name], self.kernel)[within] for name in names.flat]
        with np.errstate(over="ignore"):  # a value too large for the dtype becomes infinite; `from_torch` reports it
            if not n and parts[0].dtype == self.dtype:
                return parts[0]
            stack = np.empty((*names.shape, *parts[0].shape), self.dtype) if n else np.empty_like(parts[0], self.dtype)
            layers = stack.reshape(len(parts), *parts[0].shape) if n else stack[None]
            for i, part in enumerate(parts):
                layers[i] = part
                release(part)
        return stack


def _leaves(like: Any, rules: Rules, dtype: Any) -> dict[str, _Leaf]:
    leaves = {}
    for path, leaf in traverse_util.flatten_dict(like, sep="/").items():
        name = torch_name(path, rules)
        names = np.array(unstack(name, leaf.shape, path), object).reshape(leaf.shape[: name.count("*")])
        # Floating parameters take the dtype asked for; integers keep theirs.
        leaf_dtype = leaf.dtype if dtype is None or not _floating(leaf.dtype) else jnp.dtype(dtype)
        leaves[path] = _Leaf(names=names, shape=tuple(leaf.shape), dtype=leaf_dtype, kernel=_is_kernel(path))
    return leaves


def torch_shapes(like: Any, rules: Rules) -> dict[str, tuple[int, ...]]:
    """Return {name: shape} of the tensors in a file for the network whose parameters are shaped as `like`.

    >>> import jax.numpy as jnp
    >>> from lcm_jax.weights.torch_params import torch_shapes
    >>> torch_shapes({"proj": {"kernel": jnp.ones((4, 6)), "bias": jnp.ones(6)}}, rules=[])
    {'proj.weight': (6, 4), 'proj.bias': (6,)}
    """
    leaves = _leaves(like, rules, None).values()
    return {name: leaf.tensor_shape for leaf in leaves for name in leaf.names.flat}


def check_tensors(
    tensors: Mapping[str, Any], like: Any, rules: Rules, *, optional: Sequence[str] = (), source: str = ""
) -> None:
    """Raise one ValueError if the tensors do not fit the network whose parameters are shaped as `like`.

    It lists the missing, unexpected and mis-shaped keys and those of the wrong kind of dtype (integer or floating), ten
    of each with their number. optional: regexes (re.search) of keys that may be left over. source: the file that the
    message names.
    """
    leaves = _leaves(like, rules, None).values()
    expected = {name: leaf.tensor_shape for leaf in leaves for name in leaf.names.flat}
    misshaped = [
        f"{name}: file {tuple(tensors[name].shape)}, network {shape}"
        for name, shape in expected.items()
        if name in tensors and tuple(tensors[name].shape) != shape
    ]
    unexpected = tensors.keys() - expected.keys()
    faults = {
        "missing": sorted(expected.keys() - tensors.keys()),
        "unexpected": sorted(key for key in unexpected if not any(re.search(p, key) for p in optional)),
        "mis-shaped": misshaped,
        "of the wrong kind of dtype": [
            name
            for leaf in leaves
            for name in leaf.names.flat
            if name in tensors and _floating(leaf.dtype) != _floating(tensors[name].dtype)
        ],
    }
    if any(faults.values()):
        listed = [few(what, items) for what, items in faults.items() if items]
        listed = [*depth_mismatches(expected, tensors), *listed]
        raise ValueError(f"{source or 'weights'}: does not fit the network: {'; '.join(listed)}")


def _floating(dtype: Any) -> bool:
    return bool(jnp.issubdtype(dtype, jnp.floating))


def _is_kernel(path: str) -> bool:
    return path.rpartition("/")[2] == "kernel"


def _to_flax(array: np.ndarray, kernel: bool) -> np.ndarray:
    """Transpose kernels, (out, in, *window) -> (*window, in, out); return other arrays unchanged."""
    return array.transpose(*range(2, array.ndim), 1, 0) if kernel and array.ndim >= 2 else array


def _to_torch(array: np.ndarray, kernel: bool) -> np.ndarray:
    """Transpose kernels, (*window, in, out) -> (out, in, *window); return other arrays unchanged."""
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
    transform: Callable[[str, Array], Any] | None = None,
) -> Any:
    """Return a parameter tree on the device, shaped as `like`, from named PyTorch tensors.

    like: nested dicts of ShapeDtypeStruct or arrays. dtype: that of the floating parameters; None takes each from
    `like`. optional: regexes (re.search) of keys that may be left over. source: the file that errors name.
    shardings: (path, shape) -> sharding. Only the slices of this host's devices are read from memory-mapped tensors, so
    a network may be larger than the host's memory. each: runs on each (path, parameter) as it is loaded and returns its
    replacement; if that is smaller (quantized), the device never holds the full network.
    Raises one ValueError that lists every misfit (`check_tensors`), or the tensors that hold infinity or NaN.

    >>> import numpy as np, jax, jax.numpy as jnp
    >>> from lcm_jax.weights.torch_params import from_torch
    >>> like = {"proj": {"kernel": jax.ShapeDtypeStruct((4, 6), jnp.float32)}}
    >>> from_torch({"proj.weight": np.ones((6, 4), np.float32)}, like, rules=[])["proj"]["kernel"].shape
    (4, 6)
    """
    check_tensors(tensors, like, rules, optional=optional, source=source)
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
            placed = put_on_device(read(None))  # a copy: later changes of the file must not change the parameter
        else:
            sharding = shardings(path, leaf.shape)
            slices = sharding.addressable_devices_indices_map(leaf.shape).items()
            shards = [put_on_device(read(index), device) for device, index in slices]
            placed = jax.make_array_from_single_device_arrays(leaf.shape, sharding, shards)
        placed.block_until_ready()
        for view in views:
            release(view)
        return placed if transform is None or path in broken else jax.block_until_ready(transform(path, placed))

    # A few at a time: checking values and copying them each run at the speed of one core.
    leaves = _leaves(like, rules, dtype)
    with ThreadPoolExecutor(_WORKERS) as pool:
        params = dict(zip(leaves, pool.map(put, leaves, leaves.values()), strict=True))
    if broken:
        names = sorted({torch_name(path, rules) for path in broken})
        kind = "" if dtype is None else f" in {jnp.dtype(dtype).name}"
        raise ValueError(f"{source or 'weights'}: {few('tensors', names)} hold values that are not finite{kind}")
    return traverse_util.unflatten_dict(params, sep="/")


def to_torch(params: Any, rules: Rules, *, dtype: Any = None) -> dict[str, np.ndarray]:
    """Return a parameter tree as named arrays in PyTorch's axes, contiguous and on the host.

    dtype: that of the floating arrays; None keeps each one's. Raises ValueError if the rules give two parameters one
    name.

    >>> import jax.numpy as jnp
    >>> from lcm_jax.weights.torch_params import to_torch
    >>> {name: array.shape for name, array in to_torch({"proj": {"kernel": jnp.ones((4, 6))}}, rules=[]).items()}
    {'proj.weight': (6, 4)}
    """
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
            part = _to_torch(np.asarray(part), _is_kernel(path))
            tensors[key] = np.ascontiguousarray(part) if part.ndim else part
    return tensors


def depth_mismatches(want: Iterable[str], have: Iterable[str]) -> list[str]:
    """Return a message for each stack of numbered layers whose depth in a file differs from the config's.

    want: the names that the network needs. have: the names in the file.

    >>> from lcm_jax.weights.torch_params import depth_mismatches
    >>> depth_mismatches(["layers.0.weight", "layers.1.weight"], ["layers.0.weight"])
    ['depth: 1 layers in the file, 2 by its config (num_layers, num_hidden_layers)']
    """

    def count(names: Iterable[str]) -> dict[str, int]:
        layers: dict[str, set[str]] = {}
        for name in names:
            if match := re.match(r"(.*?)\.(\d+)\.", name):
                layers.setdefault(match[1], set()).add(match[2])
        return {stack: len(numbers) for stack, numbers in layers.items()}

    counts = count(have)
    return [
        f"depth: {counts[stack]} {stack} in the file, {n} by its config (num_layers, num_hidden_layers)"
        for stack, n in count(want).items()
        if counts.get(stack, n) != n
    ]
