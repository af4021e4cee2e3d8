"""Parameters from PyTorch and back: one rule table per network, walked in both directions.

A table runs from the parameter path to the PyTorch name, so the network itself lists what a file must hold: nothing is
guessed from the file. `*` in a name is the index of a layer stacked by `nn.scan`, one leading axis for each `*`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

Rules = Sequence[tuple[str, str]]
_LEAVES = {"kernel": "weight", "scale": "weight", "embedding": "weight"}


def torch_name(path: str, rules: Rules) -> str:
    """The PyTorch name of the parameter at a "/"-joined path; holds one `*` for each stacked axis."""
    for pattern, replacement in rules:
        path = re.sub(pattern, replacement, path)
    head, dot, leaf = path.replace("/", ".").rpartition(".")
    return head + dot + _LEAVES.get(leaf, leaf)


def _unstack(name: str, shape: Sequence[int], path: str) -> list[str]:
    """The names of all layers in a stacked parameter, in row-major order of its leading axes."""
    stars = name.count("*")
    if stars > len(shape):
        raise ValueError(f"{path}: {name} asks for {stars} stacked axes, but its shape is {tuple(shape)}")
    names = []
    for index in np.ndindex(*shape[:stars]):
        numbers = iter(index)
        names.append(re.sub(r"\*", lambda _: str(next(numbers)), name))  # noqa: B023 (used at once)
    return names


def _is_kernel(path: str) -> bool:
    return path.rpartition("/")[2] == "kernel"


def _to_flax(array: np.ndarray, kernel: bool) -> np.ndarray:
    """(out, in, *window) -> (*window, in, out) for kernels."""
    return array.transpose(*range(2, array.ndim), 1, 0) if kernel and array.ndim >= 2 else array


def _to_torch(array: np.ndarray, kernel: bool) -> np.ndarray:
    """(*window, in, out) -> (out, in, *window) for kernels."""
    n = array.ndim
    return array.transpose(n - 1, n - 2, *range(n - 2)) if kernel and n >= 2 else array


def _cast(array: np.ndarray, dtype: Any) -> np.ndarray:
    """Floating arrays take the dtype asked for; integers keep theirs."""
    if dtype is None or not jnp.issubdtype(array.dtype, jnp.floating):
        return array
    return array.astype(dtype, copy=False)


def _few(what: str, items: Sequence[str]) -> str:
    more = f", and {len(items) - 10} more" if len(items) > 10 else ""
    return f"{len(items)} {what} ({', '.join(items[:10])}{more})"


def from_torch(
    tensors: Mapping[str, np.ndarray],
    like: Any,
    rules: Rules,
    *,
    dtype: Any = None,
    optional: Sequence[str] = (),
    source: str = "",
    place: Callable[[np.ndarray], Any] = jnp.asarray,
) -> Any:
    """A parameter tree shaped as `like` (nested dicts of ShapeDtypeStruct or arrays) from named PyTorch tensors.

    dtype: of the floating parameters; None takes each one from `like`. optional: regexes (searched) of keys that may be
    left over. source: the file named in errors. place: what is done with each finished leaf; pass `np.asarray` to keep
    it on the host, or a `jax.device_put` with a sharding for networks larger than one device.
    Raises one ValueError that lists every missing, unexpected and mis-shaped key (ten of each and their number).
    """
    flat = traverse_util.flatten_dict(like, sep="/")
    names = {path: _unstack(torch_name(path, rules), leaf.shape, path) for path, leaf in flat.items()}
    expected = {name for group in names.values() for name in group}
    missing = sorted(expected - tensors.keys())
    unexpected = sorted(k for k in tensors.keys() - expected if not any(re.search(p, k) for p in optional))
    misshaped: list[str] = []
    params: dict[str, Any] = {}
    for path, leaf in flat.items():
        kernel, stars = _is_kernel(path), torch_name(path, rules).count("*")
        want = tuple(leaf.shape[stars:])
        want = tuple(_to_torch(np.broadcast_to(np.int8(0), want), kernel).shape)
        parts = []
        for name in names[path]:
            if name not in tensors:
                continue
            part = np.asarray(tensors[name])
            if part.shape != want:
                misshaped.append(f"{name}: file {part.shape}, network {want}")
            else:
                parts.append(_cast(_to_flax(part, kernel), leaf.dtype if dtype is None else dtype))
        if missing or unexpected or misshaped:
            params.clear()  # the load fails: go on only to list the shapes
            continue
        whole = np.stack(parts).reshape(leaf.shape) if stars else parts[0]
        params[path] = place(np.ascontiguousarray(whole) if whole.ndim else whole)
    faults = [
        _few(what, items)
        for what, items in (("missing", missing), ("unexpected", unexpected), ("mis-shaped", misshaped))
        if items
    ]
    if faults:
        raise ValueError(f"{source or 'weights'}: does not fit the network: {'; '.join(faults)}")
    return traverse_util.unflatten_dict(params, sep="/")


def to_torch(params: Any, rules: Rules, *, dtype: Any = None) -> dict[str, np.ndarray]:
    """Named PyTorch arrays (contiguous, on the host) of a parameter tree. dtype: of floating ones; None: their own."""
    tensors: dict[str, np.ndarray] = {}
    for path, leaf in traverse_util.flatten_dict(params, sep="/").items():
        array = _cast(np.asarray(jax.device_get(leaf)), dtype)
        name = torch_name(path, rules)
        stars, group = name.count("*"), _unstack(name, array.shape, path)
        for key, part in zip(group, array.reshape(len(group), *array.shape[stars:]), strict=True):
            if key in tensors:
                raise ValueError(f"{path}: the rules name it {key}, which another parameter already has")
            part = _to_torch(part, _is_kernel(path))
            tensors[key] = np.ascontiguousarray(part) if part.ndim else part
    return tensors
