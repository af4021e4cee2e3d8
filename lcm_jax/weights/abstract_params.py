"""Shapes of a network's parameters, cached between runs: a UNet takes longer to trace than its file to open."""

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
from lcm_jax.typing import Shapes
from lcm_jax.weights.registry import FAMILIES
from lcm_jax.weights.safetensors_files import read_json

_MIN_SECONDS = 0.1  # a faster trace is not cached
_MOST_LAYERS = 1024  # tracing them takes minutes; T5-XXL has 24, the UNet of SDXL about 90


@lru_cache(maxsize=64)
def abstract_params(kind: str, config: Any, scan: bool = False) -> Shapes:
    """Return a network's parameters as a tree of ShapeDtypeStruct, which callers share: do not change it.

    kind: a class name in `FAMILIES`. scan: whether equal layers are stacked, for networks that can. Raises ValueError
    for a config of which no network can be made, or one of more than 1024 layers.

    The result of a slow trace is cached in `cache_dir()`, under a digest of the networks' code and the config.
    """
    if (depth := FAMILIES[kind].depth(config)) > _MOST_LAYERS:
        raise ValueError(f"the config of this {kind} asks for {depth} layers; at most {_MOST_LAYERS} are supported")
    name = f"{_code()} {kind} {config!r}{' scan' * scan}"
    file = cache_dir() / "shapes" / f"{hashlib.sha256(name.encode()).hexdigest()[:32]}.json"
    with contextlib.suppress(OSError, ValueError, TypeError):
        leaves = read_json(file).items()
        cached = {path: jax.ShapeDtypeStruct(shape, jnp.dtype(dtype)) for path, (dtype, *shape) in leaves}
        return traverse_util.unflatten_dict(cached, sep="/")
    start = time.perf_counter()
    params = _trace(kind, config, scan)
    if time.perf_counter() - start > _MIN_SECONDS:
        leaves = traverse_util.flatten_dict(params, sep="/")
        with contextlib.suppress(OSError):  # the cache folder may not be writable
            write_json(file, {path: [leaf.dtype.name, *leaf.shape] for path, leaf in leaves.items()})
    return params


def stacking(scan: bool) -> dict[str, bool]:
    """Return {"scan": True} if scan, else no option: only some networks take it."""
    return {"scan": True} if scan else {}


def _trace(kind: str, config: Any, scan: bool) -> Shapes:
    family = FAMILIES[kind]
    module = family.build(config, **stacking(scan))
    try:
        return jax.eval_shape(lambda: module.init(jax.random.key(0), *family.example(config))["params"])
    except Exception as error:  # of any type: flax's, einops' and jax's own checks of shapes
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"no {kind} can be made of its config ({type(error).__name__}: {reason:.200})") from error


@cache
def _code() -> str:
    """Return a digest of everything but the config that the shapes depend on."""
    digest = hashlib.sha256(f"{version('jax')} {version('flax')}".encode())
    for package in (mmdit, nets, vae16):
        for file in sorted(Path(package.__path__[0]).rglob("*.py")):
            digest.update(file.read_bytes())
    return digest.hexdigest()
