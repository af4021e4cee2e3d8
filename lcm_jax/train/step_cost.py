"""The cost of a training step, read from its compiled program and not from a clock."""

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
    """The cost of one training step.

    flops: floating-point operations over all devices; of the branches of a `cond` the more expensive one counts.
    memory: bytes on one device of all arguments (state, frozen trees, batch), results and temporaries of the compiled
    step; donated buffers count once.
    """

    flops: float
    memory: int


def step_cost(config: TrainConfig, *, compile: bool = True) -> StepCost:
    """Return the cost of one step of a run; nothing is trained. compile=False leaves `memory` 0 and takes seconds."""
    task, loop = config.task.build(), config.loop
    mesh = make_mesh(loop.mesh, batch_size=loop.batch_size)  # as in the loop, to hit its compilation cache
    tx, _, step = optimizer_and_step(task, replace(loop, parallel="jit"), config.optimizer, mesh)
    batch = next(task.batches(loop.batch_size, loop.seed))
    shapes = jax.eval_shape(lambda *trees: trees, initial_shapes(task, tx), task.frozen, batch)
    lowered: Any = step.trace(*shapes).lower()
    memory = memory_of(lowered.compile()) if compile else 0
    return StepCost(flops=float(lowered.cost_analysis()["flops"]), memory=memory)
