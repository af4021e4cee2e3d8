"""Shapes of a network's parameters, kept between runs: a UNet takes longer to trace than to open."""

from __future__ import annotations

import contextlib
import hashlib
import time
from functools import cache, lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import traverse_util

import mmdit
import vae16
from lcm_jax import nets
from lcm_jax.runtime.atomic_files import write_json
from lcm_jax.runtime.cache import cache_dir
from lcm_jax.typing import Params
from lcm_jax.weights.registry import FAMILIES
from lcm_jax.weights.safetensors_files import read_json

_WORTH_KEEPING = 0.1  # seconds


@lru_cache(maxsize=64)
def abstract_params(kind: str, config: Any, scan: bool = False) -> Params:
    """The parameters of a class of `FAMILIES` as a tree of ShapeDtypeStruct, which is shared: do not change it.

    scan: with the layers that are alike stacked, of networks that can.

    What took long to trace is kept in `cache_dir()`, under a digest of the networks' code and the config.
    """
    named = f"{_code()} {kind} {config!r}{' scan' * scan}"
    place = cache_dir() / "shapes" / f"{hashlib.sha256(named.encode()).hexdigest()[:32]}.json"
    with contextlib.suppress(OSError, ValueError, TypeError):
        leaves = read_json(place).items()
        kept = {path: jax.ShapeDtypeStruct(shape, jnp.dtype(dtype)) for path, (dtype, *shape) in leaves}
        return traverse_util.unflatten_dict(kept, sep="/")
    start = time.perf_counter()
    params = _trace(kind, config, scan)
    if time.perf_counter() - start > _WORTH_KEEPING:
        leaves = traverse_util.flatten_dict(params, sep="/")
        with contextlib.suppress(OSError):  # a home that cannot be written to
            write_json(place, {path: [leaf.dtype.name, *leaf.shape] for path, leaf in leaves.items()})
    return params


def stacking(scan: bool) -> dict[str, bool]:
    """The option of networks that can stack their layers, where it is asked for."""
    return {"scan": True} if scan else {}


def _trace(kind: str, config: Any, scan: bool) -> Params:
    family = FAMILIES[kind]
    module = family.build(config, **stacking(scan))
    return jax.eval_shape(lambda: module.init(jax.random.key(0), *family.example(config))["params"])


@cache
def _code() -> str:
    """A digest of all that the shapes depend on besides the config."""
    digest = hashlib.sha256(f"{version('jax')} {version('flax')}".encode())
    for package in (mmdit, nets, vae16):
        for file in sorted(Path(package.__path__[0]).rglob("*.py")):
            digest.update(file.read_bytes())
    return digest.hexdigest()
