"""The registry of configs. A config is a function without arguments, so that naming one builds none of the others."""

from __future__ import annotations

import difflib
from collections.abc import Callable

from lcm_jax.train.config import TrainConfig

CONFIGS: dict[str, Callable[[], TrainConfig]] = {}


def register(make: Callable[[], TrainConfig]) -> Callable[[], TrainConfig]:
    """Register a config under its function's name."""
    if make.__name__ in CONFIGS:
        raise ValueError(f"config {make.__name__!r} is registered twice")
    CONFIGS[make.__name__] = make
    return make


def get(name: str) -> TrainConfig:
    """The config of that name; ValueError lists what there is, the nearest name first."""
    if name not in CONFIGS:
        near = difflib.get_close_matches(name, CONFIGS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(sorted(CONFIGS))}"
        raise ValueError(f"--config {name}: no such config; {hint}")
    return CONFIGS[name]()
