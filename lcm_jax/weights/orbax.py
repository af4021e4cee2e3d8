"""Models as orbax checkpoints: parameter trees that can be restored with any sharding.

The folder is a diffusers folder, with its configs and tokenizers, but `params/` replaces all safetensors files. Beside
its files lie their checksums (`lcm_jax.runtime.checksums`): orbax's own formats do not show a changed bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from lcm_jax.runtime.checksums import check_checksums, write_checksums
from lcm_jax.runtime.messages import few, shortened
from lcm_jax.weights.abstract_params import abstract_params
from lcm_jax.weights.component import Component, check_depth, config_of
from lcm_jax.weights.registry import FAMILIES
from lcm_jax.weights.safetensors_files import is_finite

NAME = "params"


def save_params(folder: Path, components: Mapping[str, Component]) -> None:
    """Write the parameters of all components as one checkpoint with checksums of its files.

    Orbax renames the checkpoint into place when it is complete; the checksums come last.
    """
    import orbax.checkpoint as ocp  # imported late: it would be a tenth of the start-up time of every program

    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save((folder / NAME).absolute(), {name: part.params for name, part in components.items()})
    write_checksums(folder / NAME)


def load_params(folder: Path, names: Mapping[str, str], *, shardings: Any = None) -> dict[str, Component]:
    """Return the components of a checkpoint with their parameters.

    names: component -> sub-folder that holds its config.json. shardings: a tree in the structure of the parameters,
    component -> its tree; None puts everything on one device. Raises ValueError, which names the file or folder, where
    a file is damaged by its checksums, a config is not supported, or a parameter is missing, left over or of another
    shape; in a folder without checksums, also where a parameter is not finite, the only damage that shows there.
    """
    import orbax.checkpoint as ocp

    source = folder / NAME
    is_checked = check_checksums(source)
    configs = {name: config_of(folder / subfolder / "config.json") for name, subfolder in names.items()}
    with ocp.StandardCheckpointer() as checkpointer:
        saved = _reading(source, lambda: _shapes(checkpointer.metadata(source.absolute())))
        like = {}
        for name, (kind, config) in configs.items():
            check_depth(kind, config, sum(path[0] == name for path in saved), source)
            like[name] = abstract_params(kind, config)
        _compare(source, saved, {path: leaf.shape for path, leaf in traverse_util.flatten_dict(like).items()})
        target = like
        if shardings is not None:
            target = jax.tree.map(
                lambda leaf, s: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=s), like, shardings
            )
        params = _reading(source, lambda: jax.tree.map(jnp.asarray, checkpointer.restore(source.absolute(), target)))
    flat = {} if is_checked else traverse_util.flatten_dict(params)
    if broken := ["/".join(path) for path, leaf in flat.items() if not all(map(is_finite, _shards(leaf)))]:
        raise ValueError(f"{source}: {few('parameters', broken)} hold infinity or NaN; copy the folder again")
    return {name: Component(FAMILIES[kind].build(config), params[name]) for name, (kind, config) in configs.items()}


def _shards(leaf: jax.Array) -> list[np.ndarray]:
    """Return this process's part of an array, without copies where it is on the host."""
    return [np.asarray(shard.data) for shard in leaf.addressable_shards]


def _shapes(metadata: Any) -> dict[tuple[str, ...], tuple[int, ...]]:
    """Return path -> shape of the arrays that a checkpoint says it has."""
    tree = getattr(metadata, "item_metadata", metadata)
    flat = traverse_util.flatten_dict(getattr(tree, "tree", tree))
    return {tuple(map(str, path)): tuple(leaf.shape) for path, leaf in flat.items()}


def _compare(
    source: Path, saved: Mapping[tuple[str, ...], tuple[int, ...]], wanted: Mapping[tuple[str, ...], tuple[int, ...]]
) -> None:
    """Raise ValueError unless the saved arrays are the wanted ones."""
    faults = {
        "missing": ["/".join(path) for path in wanted if path not in saved],
        "unexpected": ["/".join(path) for path in saved if path not in wanted],
        "mis-shaped": [
            f"{'/'.join(path)}: file {saved[path]}, network {shape}"
            for path, shape in wanted.items()
            if saved.get(path, shape) != shape
        ],
    }
    if problems := [few(what, items) for what, items in faults.items() if items]:
        raise ValueError(f"{source}: does not fit the network: {'; '.join(problems)}")


def _reading(source: Path, read: Any) -> Any:
    try:
        return read()
    except Exception as error:  # of any type: orbax's, tensorstore's and those of the JSON in between
        reason = shortened(" ".join(str(error).split()), 300)
        raise ValueError(
            f"{source}: not a whole orbax checkpoint ({type(error).__name__}: {reason}); copy the folder again"
        ) from error
