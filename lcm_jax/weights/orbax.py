"""Models as orbax checkpoints: parameter trees, restored onto any sharding; configs and tokenizers lie beside them.

The folder is a diffusers folder in which `params/` takes the place of every safetensors file.
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
    """Write the parameters of all components as one checkpoint (orbax renames it into place when it is whole)."""
    import orbax.checkpoint as ocp  # here, as it would be a tenth of every start

    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save((folder / NAME).absolute(), {name: part.params for name, part in components.items()})


def load_params(folder: Path, names: Mapping[str, str], *, shardings: Any = None) -> dict[str, Component]:
    """Components (name -> sub-folder) of a checkpoint. shardings: tree beside the parameters; None: one device."""
    import orbax.checkpoint as ocp

    modules, like = {}, {}
    for name, place in names.items():
        kind, config = config_of(folder / place / "config.json")
        modules[name] = FAMILIES[kind].build(config)
        like[name] = abstract_params(kind, config)
    if shardings is not None:
        like = jax.tree.map(lambda leaf, s: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=s), like, shardings)
    with ocp.StandardCheckpointer() as checkpointer:
        params = checkpointer.restore((folder / NAME).absolute(), like)
    return {name: Component(module, params[name]) for name, module in modules.items()}
