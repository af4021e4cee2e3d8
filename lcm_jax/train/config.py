"""The config of a run: what is trained, for how long, and by which optimizer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import jax
import tyro

from lcm_jax.parallel.distributed import is_main, say
from lcm_jax.runtime.atomic_files import write_json
from lcm_jax.runtime.messages import is_out_of_memory
from lcm_jax.runtime.progress import phase
from lcm_jax.train.checkpointing import RunFolder, recorded_config, saved_steps
from lcm_jax.train.loop import LoopConfig, check_devices, check_length, fit
from lcm_jax.train.optimizer import OptimizerConfig
from lcm_jax.train.overrides import flatten
from lcm_jax.train.train_step import TrainState

# Keys that may change when a run is continued: none changes the parameters, except for the rounding of sums.
WATCHING = ("log_every", "save_every", "preview_every", "keep", "mesh", "parallel", "profile", "hang_timeout")
LENGTH = "steps"  # may change too: what is trained stays as it is, and from there the learning rate has another end


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Everything that a run depends on."""

    # a frozen dataclass with build() -> Task, which raises all of its errors before any long work
    task: Any
    loop: Annotated[LoopConfig, tyro.conf.arg(name="")] = LoopConfig()
    optimizer: Annotated[OptimizerConfig, tyro.conf.arg(name="")] = OptimizerConfig()

    def check(self, workdir: Path) -> None:
        """Raise ValueError if `workdir` holds a run of another config, naming the first key that differs.

        A folder without a checkpoint and a result holds none. The number of steps may differ.
        """
        new = self.record
        recorded = recorded_config(workdir) or new
        for key in sorted(new.keys() | recorded.keys()):
            if key != LENGTH and new.get(key) != recorded.get(key):
                raise ValueError(
                    f"{workdir} holds a run with {key} = {recorded.get(key)}, not {new.get(key)}: "
                    "give the same value, or another --workdir"
                )
        check_length(next(iter(saved_steps(workdir)), 0), self.loop, workdir)

    @property
    def record(self) -> dict[str, str]:
        """The keys that the result depends on and their values as Python writes them, as checkpoints hold them."""
        resolved = replace(self, task=getattr(self.task, "resolved", self.task))
        return {key: repr(value) for key, value in flatten(resolved) if key not in WATCHING}

    def run(self, workdir: Path) -> TrainState:
        """Train in `workdir`, or continue the run that is there, and return its last state.

        The result is written to `workdir`/export, and the numbers of the previews to `workdir`/previews.json. Raises
        ValueError as `check` does, or if the mesh does not fit, OSError if `workdir` cannot be written to, and
        MemoryError if a device's memory does not suffice.
        """
        check_devices(self.loop)
        with RunFolder.opened(workdir) as folder:
            self.check(workdir)
            self._say_length(recorded_config(workdir) or {})
            try:
                with phase(f"{workdir.name}: reading the models and the data"):
                    task = self.task.build()
                if is_main():
                    write_json(workdir / "config.json", self.record)
                return fit(task, self.loop, self.optimizer, folder, self.record)
            except (MemoryError, jax.errors.JaxRuntimeError) as error:
                if isinstance(error, MemoryError) or is_out_of_memory(error):
                    raise MemoryError(self._memory_advice(error)) from error
                raise

    def _say_length(self, recorded: Mapping[str, Any]) -> None:
        """Say what another number of steps than the one first asked for means."""
        old, new = recorded.get(LENGTH), self.loop.steps
        if old not in (None, repr(new)):
            rest = "the rest differs from that of a run which was asked for as many from the start"
            ending = f"the learning rate now ends at step {new}, so {rest}" if self.optimizer.decay == "cosine" else ""
            say(f"asked for {old} steps before, and for {new} now{': ' if ending else ''}{ending}")

    def _memory_advice(self, error: BaseException) -> str:
        """Return one line: what did not fit, and the keys that change it."""
        keys, loop = dict(flatten(self)), self.loop
        size, dtype = keys.get("task.data.size"), keys.get("task.dtype")
        what = f"batches of {loop.batch_size}" + (f" pictures of {size}x{size}" if size else "")
        what += f" in {loop.accumulate} parts" if loop.accumulate > 1 else ""
        what += f" in {dtype}" if dtype else ""
        options = ["a smaller --batch-size"]
        if loop.parallel == "jit":
            options.append("a larger --accumulate")
        if dtype == "float32":
            options.append("--task.dtype bfloat16")
        if keys.get("task.remat") is False:
            options.append("--task.remat True")
        if size:
            options.append("a smaller --task.data.size")
        reason = next((line for line in str(error).strip().splitlines()), "")[:200]
        where = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
        return f"out of memory: {what} on {where} ({reason}): give {', '.join(options)}, or more devices"
