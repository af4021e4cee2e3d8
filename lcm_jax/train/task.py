"""`Task`: everything that the training loop needs to know about what it trains."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import optax

from lcm_jax.parallel.sharding import RULES, BatchedMap, Rules
from lcm_jax.train.optimizer import MakeOptimizer
from lcm_jax.train.train_step import Loss, Progress
from lcm_jax.typing import Array, Key, Params, Shapes


@runtime_checkable
class Batches(Protocol):
    """An endless iterator whose position can be saved (lcm_jax.data.Loader)."""

    def __next__(self) -> Any: ...
    def get_state(self) -> dict[str, Any]: ...
    def set_state(self, state: dict[str, Any]) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Task:
    """A training, as the loop sees it: parameters, loss, data, previews, and the export of the result.

    `loss(params, average, frozen, batch, key, progress)` returns (loss, metrics); see `lcm_jax.train.train_step`.
    """

    init: Callable[[Key], Params]
    loss: Loss
    frozen: Params | Shapes  # shapes in a task that is only compiled
    batches: Callable[..., Batches]  # (batch size, seed, rows of each batch to read; None: all) -> iterator
    # (ema, frozen, batched_map) -> title -> number, or picture uint8 (h, w, 3)
    preview: Callable[[Params, Params, BatchedMap], dict[str, float | np.ndarray]]
    export: Callable[[Params, Path], None]  # (ema, folder): writes files that lcm_jax.load and diffusers read
    # makes the optimizer; a task that trains several trees gives each its own, see `partitioned`
    optimizer: Callable[[MakeOptimizer], optax.GradientTransformation] = lambda make: make()
    # the decay of the average that the loss is given; None: it is the product
    target_decay: Callable[[Progress], Array] | None = None
    rules: Rules = RULES  # the axis of each parameter that the mesh axis `tensor` shards
    separable: bool = True  # the loss is a mean over examples, so a batch may be split
    captions: Sequence[str] = ()  # of the pictures in the previews, in their order
