"""A run: what is trained, for how long, by which optimizer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from lcm_jax.train.loop import LoopConfig, fit
from lcm_jax.train.optimizer import OptimizerConfig
from lcm_jax.train.step import TrainState


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Everything a run depends on."""

    task: Any  # a frozen dataclass with build() -> Task; all of its errors come before any long work
    loop: Annotated[LoopConfig, tyro.conf.arg(name="")] = LoopConfig()
    optimizer: Annotated[OptimizerConfig, tyro.conf.arg(name="")] = OptimizerConfig()

    def run(self, workdir: Path) -> TrainState:
        """Train, or go on training, in `workdir`; the result is in `workdir`/export."""
        return fit(self.task.build(), self.loop, self.optimizer, workdir)
