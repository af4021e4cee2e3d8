"""A run: what is trained, for how long, by which optimizer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from lcm_jax.parallel.distributed import is_main
from lcm_jax.runtime.atomic_files import write_json
from lcm_jax.train.checkpointing import check_writable
from lcm_jax.train.loop import LoopConfig, fit
from lcm_jax.train.optimizer import OptimizerConfig
from lcm_jax.train.overrides import flatten
from lcm_jax.train.train_step import TrainState
from lcm_jax.weights.safetensors_files import read_json

# What may change between a run and its continuation: none of it touches the parameters, but for the rounding of sums.
WATCHING = ("log_every", "save_every", "preview_every", "keep", "mesh", "parallel", "profile", "hang_timeout")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Everything a run depends on."""

    task: Any  # a frozen dataclass with build() -> Task; all of its errors come before any long work
    loop: Annotated[LoopConfig, tyro.conf.arg(name="")] = LoopConfig()
    optimizer: Annotated[OptimizerConfig, tyro.conf.arg(name="")] = OptimizerConfig()

    def check(self, workdir: Path) -> None:
        """Raise ValueError if `workdir` holds a run of another config, naming the first key that differs."""
        record, mine = workdir / "config.json", self._record
        theirs = read_json(record) if record.is_file() else mine
        for key in sorted(mine.keys() | theirs.keys()):
            if mine.get(key) != theirs.get(key):
                raise ValueError(
                    f"{workdir} holds a run with {key} = {theirs.get(key)}, not {mine.get(key)}: "
                    "give the same value, or another --workdir"
                )

    @property
    def _record(self) -> dict[str, str]:
        return {key: repr(value) for key, value in flatten(self) if key not in WATCHING}

    def run(self, workdir: Path) -> TrainState:
        """Train, or go on training, in `workdir`; the result is in `workdir`/export, the numbers of its previews in
        previews.json. ValueError as `check` says.
        """
        self.check(workdir)
        check_writable(workdir)
        task = self.task.build()
        if is_main():
            write_json(workdir / "config.json", self._record)
        return fit(task, self.loop, self.optimizer, workdir)
