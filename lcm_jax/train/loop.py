"""The loop: batches in, checkpoints, scalars and pictures out. It knows no network and no loss."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from tensorboardX import SummaryWriter
from tqdm import tqdm

from lcm_jax.train.optimizer import OptimizerConfig, learning_rate, make_optimizer
from lcm_jax.train.step import Loss, Metrics, Step, TrainState, make_train_step
from lcm_jax.typing import Key, Params
from lcm_jax.weights.files import read_json, write_json


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
    batches: Callable[[int, int], Batches]  # (batch size, seed) -> iterator
    # (ema, frozen) -> what is looked at on the way: numbers, and pictures uint8 (h, w, 3)
    preview: Callable[[Params, Params], dict[str, float | np.ndarray]]
    export: Callable[[Params, Path], None]  # ema -> a folder that lcm_jax.load and diffusers read
    # what becomes of the run's optimizer, for tasks that train several trees
    optimizer: Callable[[optax.GradientTransformation], optax.GradientTransformation] = lambda tx: tx


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """How long, how much at a time, and what is written on the way."""

    steps: int = 1000
    batch_size: int = 64
    accumulate: int = 1  # micro-batches to a step
    ema: float = 0.999  # decay of the moving average
    ema_every: int = 1  # steps from one update of it to the next
    seed: int = 0
    log_every: int = 20
    save_every: int = 200
    preview_every: int = 500
    keep: int = 2  # checkpoints on disk

    def __post_init__(self) -> None:
        counts = ("steps", "batch_size", "accumulate", "ema_every", "log_every", "save_every", "preview_every", "keep")
        for name in counts:
            if getattr(self, name) <= 0:
                raise ValueError(f"loop.{name} is {getattr(self, name)}; it must be positive")
        if self.batch_size % self.accumulate:
            raise ValueError(f"loop.accumulate = {self.accumulate} does not divide loop.batch_size = {self.batch_size}")
        if self.ema_every > self.steps:
            raise ValueError(
                f"loop.ema_every = {self.ema_every} is above loop.steps = {self.steps}: the moving average, which is "
                "the result, would never move"
            )


def checkpoints(workdir: Path, config: LoopConfig) -> ocp.CheckpointManager:
    """Checkpoints of state and data position under `workdir`/checkpoints, written aside and renamed by orbax."""
    options = ocp.CheckpointManagerOptions(max_to_keep=config.keep, save_interval_steps=1)
    return ocp.CheckpointManager((workdir / "checkpoints").absolute(), options=options)


def _save(manager: ocp.CheckpointManager, state: TrainState, batches: Batches) -> None:
    tree = ocp.args.PyTreeSave(state._asdict())
    manager.save(int(state.step), args=ocp.args.Composite(state=tree, data=ocp.args.JsonSave(batches.get_state())))


def _restore(manager: ocp.CheckpointManager, like: TrainState, batches: Batches) -> TrainState:
    target = jax.tree.map(ocp.utils.to_shape_dtype_struct, like._asdict())
    restore_args = ocp.checkpoint_utils.construct_restore_args(target)
    args = ocp.args.Composite(
        state=ocp.args.PyTreeRestore(target, restore_args=restore_args), data=ocp.args.JsonRestore()
    )
    saved = manager.restore(manager.latest_step(), args=args)
    batches.set_state(saved["data"])
    return TrainState(**saved["state"])


def fit(task: Task, loop: LoopConfig, optimizer: OptimizerConfig, workdir: Path) -> TrainState:
    """Train `task` for `loop.steps` steps, continuing where an earlier run in `workdir` stopped.

    A run that was killed and started again ends with the same parameters, bit for bit, as one that was not: the state,
    the data position and the step number (which is the random stream) are all a checkpoint holds and all there is.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    tx, step_fn = optimizer_and_step(task, loop, optimizer)
    rate = learning_rate(optimizer, loop.steps)
    whole, split = shardings(loop.batch_size)
    batches = task.batches(loop.batch_size, loop.seed)
    create = jax.jit(lambda key: TrainState.create(task.init(key), tx), out_shardings=whole)
    state = create(jax.random.key(loop.seed))
    manager = checkpoints(workdir, loop)
    if manager.latest_step() is not None:
        state = _restore(manager, state, batches)
    start = int(state.step)
    if start > loop.steps:
        raise ValueError(f"{workdir} holds step {start}, beyond --steps {loop.steps}; choose another --workdir")

    frozen = jax.device_put(task.frozen, whole)

    def advance(state: TrainState) -> tuple[TrainState, Metrics]:
        return step_fn(state, frozen, jax.device_put(next(batches), split))

    # What closes the manager waits for the checkpoint under way, however the run ends.
    with manager, SummaryWriter(str(workdir / "tensorboard"), purge_step=start) as log:
        state = _run(task, loop, rate, advance, state, batches, manager, log, workdir / "previews.json")
    task.export(state.ema, workdir / "export")
    return state


def optimizer_and_step(
    task: Task, loop: LoopConfig, optimizer: OptimizerConfig
) -> tuple[optax.GradientTransformation, Step]:
    """What a run's state is made with, and its compiled step."""
    tx = task.optimizer(make_optimizer(optimizer, loop.steps))
    return tx, make_train_step(
        task.loss, tx, decay=loop.ema, seed=loop.seed, accumulate=loop.accumulate, ema_every=loop.ema_every
    )


def shardings(batch_size: int) -> tuple[NamedSharding, NamedSharding]:
    """(replicated, split over devices along the batch) on one mesh of all devices; XLA places the collectives."""
    devices = jax.device_count()
    if batch_size % devices:
        raise ValueError(f"loop.batch_size {batch_size} is no multiple of the {devices} devices")
    mesh = jax.make_mesh((devices,), ("data",), axis_types=(AxisType.Auto,))
    return NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec("data"))


def _run(
    task: Task,
    loop: LoopConfig,
    rate: optax.Schedule,
    advance: Callable[[TrainState], tuple[TrainState, Metrics]],
    state: TrainState,
    batches: Batches,
    manager: ocp.CheckpointManager,
    log: SummaryWriter,
    previews: Path,
) -> TrainState:
    start = int(state.step)
    bar = tqdm(total=loop.steps, initial=start, unit="step", dynamic_ncols=True, desc=previews.parent.name)
    timer = Timer(start)

    losses: dict[int, jax.Array] = {}  # of the steps since they were last looked at

    def check(until: int) -> None:
        for step in [step for step in losses if step <= until]:
            loss = losses.pop(step)
            if not np.isfinite(loss):
                saved = manager.latest_step()
                last = "nothing was saved" if saved is None else f"the last good checkpoint is of step {saved}"
                raise FloatingPointError(
                    f"the loss is {float(loss)} at step {step} (examples {(step - 1) * loop.batch_size} to "
                    f"{step * loop.batch_size - 1} of the data's order); {last}, in {manager.directory}: "
                    "lower --learning-rate"
                )

    def write(step: int, metrics: Metrics) -> None:
        scalars = {key: float(value) for key, value in metrics.items()}
        scalars |= {"learning_rate": float(rate(step - 1)), "samples_per_second": timer.rate(step) * loop.batch_size}
        for key, value in scalars.items():
            log.add_scalar(key, value, step)
        bar.set_postfix_str(f"loss {scalars['loss']:.4g}, {scalars['samples_per_second']:.0f} samples/s", refresh=False)
        check(step)

    # Metrics are read one step late, so that the dispatch of a step never waits for the one before.
    pending: tuple[int, Metrics] | None = None
    for step in range(start + 1, loop.steps + 1):
        state, metrics = advance(state)
        losses[step] = metrics["loss"]
        if pending is not None:
            write(*pending)
        pending = (step, metrics) if step % loop.log_every == 0 or step == loop.steps else None
        bar.update()
        last = step == loop.steps
        if last or step % loop.preview_every == 0:
            if pending is not None:  # before the preview, which is not to count as training time
                write(*pending)
                pending = None
            seen = task.preview(state.ema, task.frozen)
            for title, value in seen.items():
                if isinstance(value, np.ndarray):
                    log.add_image(title, value, step, dataformats="HWC")
                else:
                    log.add_scalar(title, value, step)
            _record(previews, step, {k: float(v) for k, v in seen.items() if not isinstance(v, np.ndarray)})
            timer.restart(step)
        if last or step % loop.save_every == 0:  # after the preview, which a run killed in between sees again
            check(step)  # so that every checkpoint is of a run that was sound until then
            _save(manager, state, batches)
    bar.close()
    return state


def _record(path: Path, step: int, numbers: dict[str, float]) -> None:
    """Add the numbers of a preview to a JSON file: step -> title -> number. What a killed run had seen later goes."""
    earlier = read_json(path) if path.is_file() else {}
    write_json(path, {k: v for k, v in earlier.items() if int(k) < step} | {str(step): numbers})


class Timer:
    """Steps per second since the last reading."""

    def __init__(self, step: int) -> None:
        self.restart(step)

    def restart(self, step: int) -> None:
        self._step, self._time = step, time.perf_counter()

    def rate(self, step: int) -> float:
        steps, seconds = step - self._step, time.perf_counter() - self._time
        self.restart(step)
        return steps / max(seconds, 1e-9)
