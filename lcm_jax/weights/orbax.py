"""Models as orbax checkpoints: parameter trees that can be restored with any sharding.

The folder is a diffusers folder, with its configs and tokenizers, but `params/` replaces all safetensors files.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from lcm_jax.weights.abstract_params import abstract_params
from lcm_jax.weights.component import Component, config_of
from lcm_jax.weights.registry import FAMILIES

NAME = "params"


def save_params(folder: Path, components: Mapping[str, Component]) -> None:
    """Write the parameters of all components as one checkpoint, which orbax renames into place when it is complete."""
    import orbax.checkpoint as ocp  # imported late: it would be a tenth of the start-up time of every program

    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save((folder / NAME).absolute(), {name: part.params for name, part in components.items()})


def load_params(folder: Path, names: Mapping[str, str], *, shardings: Any = None) -> dict[str, Component]:
    """Return the components of a checkpoint with their parameters.

    names: component -> sub-folder that holds its config.json. shardings: a tree in the structure of the parameters,
    component -> its tree; None puts everything on one device.
    """
    import orbax.checkpoint as ocp

    modules, like = {}, {}
    for name, subfolder in names.items():
        kind, config = config_of(folder / subfolder / "config.json")
        modules[name] = FAMILIES[kind].build(config)
        like[name] = abstract_params(kind, config)
    if shardings is not None:
        like = jax.tree.map(lambda leaf, s: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=s), like, shardings)
    with ocp.StandardCheckpointer() as checkpointer:
        params = checkpointer.restore((folder / NAME).absolute(), like)
    return {name: Component(module, params[name]) for name, module in modules.items()}
