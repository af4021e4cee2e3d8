"""A `Task`: everything that the training loop has to know about what it trains."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import optax

from lcm_jax.parallel.sharding import (
    RULES,
    BatchedMap,
    Rules,
)
from lcm_jax.train.train_step import Loss
from lcm_jax.typing import Key, Params


class Batches(Protocol):
    """An endless iterator whose position can be saved (lcm_jax.data.Loader)."""

    def __next__(self) -> Any: ...
    def get_state(self) -> dict[str, Any]: ...
    def set_state(self, state: dict[str, Any]) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Task:
    """What is trained: the trees, the loss, the data, and what to make of the result."""

    init: Callable[[Key], Params]
    loss: Loss
    frozen: Params
    batches: Callable[..., Batches]  # (batch size, seed, which rows of a batch are read here; None: all) -> iterator
    # (ema, frozen, rowwise) -> what is looked at on the way: numbers, and pictures uint8 (h, w, 3)
    preview: Callable[[Params, Params, BatchedMap], dict[str, float | np.ndarray]]
    export: Callable[[Params, Path], None]  # ema -> a folder that lcm_jax.load and diffusers read
    # what becomes of the run's optimizer, for tasks that train several trees
    optimizer: Callable[[optax.GradientTransformation], optax.GradientTransformation] = lambda tx: tx
    rules: Rules = RULES  # which axis of which parameter the mesh's axis `tensor` cuts
    separable: bool = True  # the loss is a mean over examples, so that it can be taken part by part
