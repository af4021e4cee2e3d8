"""What a training step costs, read from the program and not from a clock."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import jax

from lcm_jax.parallel.sharding import make_mesh
from lcm_jax.runtime.compiler_options import memory_of
from lcm_jax.train.config import TrainConfig
from lcm_jax.train.loop import initial_shapes, optimizer_and_step


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
    task, loop = config.task.build(), config.loop
    mesh = make_mesh(loop.mesh, batch_size=loop.batch_size)  # as in the loop, whose compilation is found in the cache
    tx, _, step = optimizer_and_step(task, replace(loop, parallel="jit"), config.optimizer, mesh)
    batch = next(task.batches(loop.batch_size, loop.seed))
    shapes = jax.eval_shape(lambda *trees: trees, initial_shapes(task, tx), task.frozen, batch)
    lowered: Any = step.trace(*shapes).lower()
    memory = memory_of(lowered.compile()) if compile else 0
    return StepCost(flops=float(lowered.cost_analysis()["flops"]), memory=memory)
