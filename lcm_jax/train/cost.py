"""What a training step costs, read from the program and not from a clock."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import NamedSharding

from lcm_jax.train.config import TrainConfig
from lcm_jax.train.loop import optimizer_and_step, shardings
from lcm_jax.train.step import TrainState


@dataclass(frozen=True, kw_only=True)
class StepCost:
    """flops: floating-point operations of a step over all devices, of the branches of a `cond` the dearer one.

    memory: bytes on one device of all arguments (state, frozen trees, batch), results and temporaries of the compiled
    step, donated buffers once.
    """

    flops: float
    memory: int


def step_cost(config: TrainConfig, *, compile: bool = True) -> StepCost:
    """Of one step of a run. compile=False leaves `memory` 0 and takes seconds; nothing is trained either way."""
    task = config.task.build()
    tx, step = optimizer_and_step(task, config.loop, config.optimizer)
    state = jax.eval_shape(lambda key: TrainState.create(task.init(key), tx), jax.random.key(0))
    batch = next(task.batches(config.loop.batch_size, config.loop.seed))
    whole, split = shardings(config.loop.batch_size)  # as in the loop, whose compilation is then found in the cache

    def placed(tree: Any, sharding: NamedSharding) -> Any:
        return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), tree)

    lowered: Any = step.lower(placed(state, whole), placed(task.frozen, whole), placed(batch, split))
    memory = 0
    if compile:
        found = lowered.compile().memory_analysis()
        total = found.argument_size_in_bytes + found.output_size_in_bytes + found.temp_size_in_bytes
        memory = int(total - found.alias_size_in_bytes)
    return StepCost(flops=float(lowered.cost_analysis()["flops"]), memory=memory)
