"""The config of a run: what is trained, for how long, and by which optimizer."""

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

# Keys that may change when a run is continued: none changes the parameters, except for the rounding of sums.
WATCHING = ("log_every", "save_every", "preview_every", "keep", "mesh", "parallel", "profile", "hang_timeout")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Everything that a run depends on."""

    task: Any  # a frozen dataclass with build() -> Task, which raises all of its errors before any long work
    loop: Annotated[LoopConfig, tyro.conf.arg(name="")] = LoopConfig()
    optimizer: Annotated[OptimizerConfig, tyro.conf.arg(name="")] = OptimizerConfig()

    def check(self, workdir: Path) -> None:
        """Raise ValueError if `workdir` holds a run of another config, naming the first key that differs."""
        path, new = workdir / "config.json", self._record
        recorded = read_json(path) if path.is_file() else new
        for key in sorted(new.keys() | recorded.keys()):
            if new.get(key) != recorded.get(key):
                raise ValueError(
                    f"{workdir} holds a run with {key} = {recorded.get(key)}, not {new.get(key)}: "
                    "give the same value, or another --workdir"
                )

    @property
    def _record(self) -> dict[str, str]:
        return {key: repr(value) for key, value in flatten(self) if key not in WATCHING}

    def run(self, workdir: Path) -> TrainState:
        """Train in `workdir`, or continue the run that is there, and return its last state.

        The result is written to `workdir`/export, and the numbers of the previews to `workdir`/previews.json. Raises
        ValueError as `check` does, and OSError if `workdir` cannot be written to.
        """
        self.check(workdir)
        check_writable(workdir)
        task = self.task.build()
        if is_main():
            write_json(workdir / "config.json", self._record)
        return fit(task, self.loop, self.optimizer, workdir)
