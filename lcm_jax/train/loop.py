"""The training loop: batches in, checkpoints, scalars and pictures out. It knows no network and no loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
from jax.sharding import Mesh
from tensorboardX import SummaryWriter
from tqdm import tqdm

from lcm_jax.parallel.distributed import Preempted, Preemption, Watchdog, is_main
from lcm_jax.parallel.pmap import pmap_placement
from lcm_jax.parallel.sharding import (
    BatchedMap,
    MeshConfig,
    Placement,
    batch_parts,
    batch_sharding,
    gather_to_host,
    init_sharded,
    local_batch_indices,
    make_global_batch,
    make_mesh,
    put_on_mesh,
    tree_shardings,
)
from lcm_jax.runtime.atomic_files import write_json
from lcm_jax.runtime.flops import flops
from lcm_jax.train.checkpointing import (
    check_writable,
    checkpoint_manager,
    reporting_write_errors,
    restore_checkpoint,
    save_checkpoint,
)
from lcm_jax.train.meter import Meter, Profile
from lcm_jax.train.optimizer import OptimizerConfig, learning_rate, make_optimizer
from lcm_jax.train.task import Batches, Task
from lcm_jax.train.train_step import Metrics, Parallel, Step, TrainState, make_train_step
from lcm_jax.weights.safetensors_files import read_json


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """The length of a run, the size of its batches, and what it writes on the way.

    Raises ValueError for a value that cannot be used, such as

    >>> from lcm_jax.train.loop import LoopConfig
    >>> LoopConfig(batch_size=8, accumulate=3)
    Traceback (most recent call last):
    ValueError: loop.accumulate = 3 does not divide loop.batch_size = 8
    >>> LoopConfig(steps=50, ema_every=100)
    Traceback (most recent call last):
    ValueError: loop.ema_every = 100 is above loop.steps = 50: the moving average, which is the result, would never move
    """

    steps: int = 1000  # training steps in all
    batch_size: int = 64  # examples in a step, over all devices
    accumulate: int = 1  # micro-batches in a step
    ema: float = 0.999  # decay of the moving average
    ema_every: int = 1  # steps from one update of the average to the next
    seed: int = 0  # of the parameters, the order of the data and the noise
    log_every: int = 20  # steps from one logging of the scalars to the next
    save_every: int = 200  # steps from one checkpoint to the next
    preview_every: int = 500  # steps from one preview to the next
    keep: int = 2  # checkpoints on disk
    mesh: str = ""  # devices along each axis, such as data=4,fsdp=2,tensor=1; -1 for one axis: all that remain
    parallel: Parallel = "jit"  # pmap: data parallelism alone, in one process
    profile: int = 0  # number of steps to trace for xprof or TensorBoard, written to WORKDIR/profile
    hang_timeout: float = 1800.0  # seconds without a step after which a job of several processes ends; 0: never

    def __post_init__(self) -> None:
        MeshConfig.parse(self.mesh)
        if self.parallel not in get_args(Parallel):
            raise ValueError(f"loop.parallel is {self.parallel!r}; use one of {', '.join(get_args(Parallel))}")
        if self.parallel == "pmap" and self.accumulate > 1:
            raise ValueError(f"loop.accumulate = {self.accumulate} is for loop.parallel = jit: leave one of them out")
        counts = ("steps", "batch_size", "accumulate", "ema_every", "log_every", "save_every", "preview_every", "keep")
        for name in counts:
            if getattr(self, name) <= 0:
                raise ValueError(f"loop.{name} is {getattr(self, name)}; it must be positive")
        if self.profile < 0:
            raise ValueError(f"loop.profile is {self.profile}; it is a number of steps, 0 for none")
        if self.batch_size % self.accumulate:
            raise ValueError(f"loop.accumulate = {self.accumulate} does not divide loop.batch_size = {self.batch_size}")
        if self.ema_every > self.steps:
            raise ValueError(
                f"loop.ema_every = {self.ema_every} is above loop.steps = {self.steps}: the moving average, which is "
                "the result, would never move"
            )


def fit(task: Task, loop: LoopConfig, optimizer: OptimizerConfig, workdir: Path) -> TrainState:
    """Train `task` for `loop.steps` steps, continuing where an earlier run in `workdir` stopped.

    A run that was killed and started again ends with the same parameters, bit for bit, as one that was not: a
    checkpoint holds the state, the data position and the step number (which gives the random keys), and a run depends
    on nothing else. On another mesh or number of processes it sees the same examples and noise in the same order, but
    its sums are rounded differently.

    workdir: a folder that all processes share. The average of the parameters is exported to workdir/export.

    Raises ValueError if `workdir` holds a later step than `loop.steps`, FloatingPointError if a loss is not finite,
    OSError if a file cannot be written, and Preempted if SIGTERM ended the run early.
    """
    check_writable(workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    mesh = make_mesh(loop.mesh, batch_size=loop.batch_size)
    check_pmap(task, loop, mesh)
    tx, placement, step_fn = optimizer_and_step(task, loop, optimizer, mesh)
    rate = learning_rate(optimizer, loop.steps)
    rows = local_batch_indices(placement.batch, loop.batch_size)
    batches = task.batches(loop.batch_size, loop.seed, rows if jax.process_count() > 1 else None)
    # Closing the manager waits for the checkpoint that is being written, however the run ends.
    with Watchdog(loop.hang_timeout) as watchdog, checkpoint_manager(workdir, keep=loop.keep) as manager:
        if manager.latest_step() is None:
            state = init_sharded(
                lambda key: TrainState.create(task.init(key), tx), jax.random.key(loop.seed), placement.state
            )
        else:
            state = restore_checkpoint(manager, initial_shapes(task, tx), placement, batches)
        start = int(state.step)
        if start > loop.steps:
            raise ValueError(f"{workdir} holds step {start}, beyond --steps {loop.steps}; choose another --workdir")
        frozen = put_on_mesh(task.frozen, placement.frozen)

        meter = Meter(start, mesh.size)

        def advance(state: TrainState) -> tuple[TrainState, Metrics]:
            batch = make_global_batch(meter.wait(batches), placement.batch, rows, loop.batch_size)
            if not meter.flops:  # traced once: the trace is cached, and the call below runs it
                meter.flops = flops(step_fn.trace(state, frozen, batch).jaxpr)
            return step_fn(state, frozen, batch)

        # At most as many examples on a device at a time as a training step has there, whose memory is known to suffice.
        batched_map = BatchedMap(mesh=mesh, most=max(1, loop.batch_size // loop.accumulate // batch_parts(mesh)))

        def preview(state: TrainState) -> dict[str, float | np.ndarray]:
            return task.preview(state.ema, frozen, batched_map)

        with SummaryWriter(str(workdir / "tensorboard"), purge_step=start, write_to_disk=is_main()) as log:
            state = _Run(loop, rate, manager, batches, log, watchdog, meter).run(state, advance, preview)
        watchdog.reset("the last checkpoint")
        with reporting_write_errors(manager):
            manager.wait_until_finished()
        ema = gather_to_host(state.ema) if jax.process_count() > 1 else state.ema
    if is_main():
        task.export(ema, workdir / "export")
    return state


def initial_shapes(task: Task, tx: optax.GradientTransformation) -> TrainState:
    """Return the shapes of the initial state, without computing anything."""
    return jax.eval_shape(lambda key: TrainState.create(task.init(key), tx), jax.random.key(0))


def optimizer_and_step(
    task: Task, loop: LoopConfig, optimizer: OptimizerConfig, mesh: Mesh
) -> tuple[optax.GradientTransformation, Placement, Step]:
    """Return the optimizer of a run, the shardings of its trees, and its compiled step."""
    tx = task.optimizer(make_optimizer(optimizer, loop.steps))
    state = initial_shapes(task, tx)
    if loop.parallel == "pmap":
        placement = pmap_placement(state, task.frozen, mesh)
    else:
        state_shardings, frozen_shardings = (tree_shardings(tree, mesh, task.rules) for tree in (state, task.frozen))
        placement = Placement(mesh, state_shardings, frozen_shardings, batch_sharding(mesh))
    step = make_train_step(
        task.loss,
        tx,
        decay=loop.ema,
        seed=loop.seed,
        accumulate=loop.accumulate,
        ema_every=loop.ema_every,
        placement=placement,
        parallel=loop.parallel,
    )
    return tx, placement, step


def check_pmap(task: Task, loop: LoopConfig, mesh: Mesh) -> None:
    """Raise ValueError if the loop asks for pmap where pmap would not give the same result as jit."""
    if loop.parallel != "pmap":
        return
    if mesh.shape["data"] != mesh.size or jax.process_count() > 1:
        raise ValueError(
            f"loop.parallel = pmap needs one process with all devices along data, not {dict(mesh.shape)} in "
            f"{jax.process_count()} processes: use jit"
        )
    if not task.separable:
        raise ValueError("loop.parallel = pmap: this task's loss is not a mean over examples; use jit")


class _Run:
    """The steps of a run, and the files that it writes on the way."""

    def __init__(
        self,
        loop: LoopConfig,
        rate: optax.Schedule,
        manager: ocp.CheckpointManager,
        batches: Batches,
        log: SummaryWriter,
        watchdog: Watchdog,
        meter: Meter,
    ) -> None:
        self.loop, self.rate, self.manager, self.batches, self.log = loop, rate, manager, batches, log
        self.watchdog, self.meter = watchdog, meter
        self.workdir = Path(manager.directory).parent
        self.losses: dict[int, jax.Array] = {}  # step -> loss, for the steps that `check_losses` has not read yet

    def run(
        self,
        state: TrainState,
        advance: Callable[[TrainState], tuple[TrainState, Metrics]],
        preview: Callable[[TrainState], dict[str, float | np.ndarray]],
    ) -> TrainState:
        """Run the remaining steps and return the last state; raise Preempted if the run is told to end earlier."""
        loop, start = self.loop, int(state.step)
        name = self.workdir.name
        bar = tqdm(total=loop.steps, initial=start, unit="step", dynamic_ncols=True, desc=name, disable=not is_main())
        self.meter.restart(start)
        profile = Profile(self.workdir / "profile", start, loop.profile)
        # Metrics are read one step late, so that dispatching a step never waits for the step before.
        pending: tuple[int, Metrics] | None = None
        with bar, profile as trace, Preemption() as preempted:
            for step in range(start + 1, loop.steps + 1):
                self.watchdog.reset(f"step {step}")
                trace(step, state)
                state, metrics = advance(state)
                self.losses[step] = metrics["loss"]
                if pending is not None:
                    self.write(*pending, bar)
                pending = (step, metrics) if step % loop.log_every == 0 or step == loop.steps else None
                bar.update()
                if step == start + 1 < loop.steps:  # the first step includes compilation, which is not training time
                    self.meter.restart(step)
                last, ending = step == loop.steps, preempted(step)
                if pending is not None and (last or ending or step % loop.preview_every == 0):
                    self.write(*pending, bar)  # before the preview, which must not count as training time
                    pending = None
                if last or step % loop.preview_every == 0:
                    self.show(step, preview(state))
                    self.meter.restart(step)
                # After the preview: a run killed between the two repeats the preview and loses none.
                if last or ending or step % loop.save_every == 0:
                    self.check_losses(step)  # so that every checkpoint is of a run whose losses were finite until then
                    save_checkpoint(self.manager, state, self.batches)
                if ending and not last:
                    self.stop(step)
        return state

    def check_losses(self, until: int) -> None:
        """Raise FloatingPointError if a loss up to step `until` is not finite."""
        size = self.loop.batch_size
        for step in [step for step in self.losses if step <= until]:
            loss = self.losses.pop(step)
            if not np.isfinite(loss):
                saved = self.manager.latest_step()
                last = "nothing was saved" if saved is None else f"the last good checkpoint is of step {saved}"
                raise FloatingPointError(
                    f"the loss is {float(loss)} at step {step} (examples {(step - 1) * size} to {step * size - 1} of "
                    f"the data's order); {last}, in {self.manager.directory}: lower --learning-rate"
                )

    def write(self, step: int, metrics: Metrics, bar: tqdm) -> None:
        """Log the scalars of a step."""
        scalars = {key: float(value) for key, value in metrics.items()}
        scalars |= self.meter.read(step)  # after the step, whose metrics have just been waited for
        speed = self.loop.batch_size / scalars["step_time"]
        scalars |= {"learning_rate": float(self.rate(step - 1)), "samples_per_second": speed}
        for key, value in scalars.items():
            self.log.add_scalar(key, value, step)
        bar.set_postfix_str(f"loss {scalars['loss']:.4g}, {speed:.0f} samples/s", refresh=False)
        self.check_losses(step)
        with reporting_write_errors(self.manager):
            self.manager.check_for_errors()  # of the checkpoint that is written in the background

    def show(self, step: int, preview: dict[str, float | np.ndarray]) -> None:
        """Log the pictures and numbers of a preview, and add the numbers to previews.json."""
        numbers = {title: float(value) for title, value in preview.items() if not isinstance(value, np.ndarray)}
        for title, value in preview.items():
            if isinstance(value, np.ndarray):
                self.log.add_image(title, value, step, dataformats="HWC")
            else:
                self.log.add_scalar(title, value, step)
        if is_main():
            _record(Path(self.workdir) / "previews.json", step, numbers)

    def stop(self, step: int) -> None:
        """Wait for the checkpoint, then raise Preempted."""
        with reporting_write_errors(self.manager):
            self.manager.wait_until_finished()
        if is_main():
            print(f"{self.workdir}: ended by SIGTERM; step {step} is saved, and the same command continues from it")
        raise Preempted


def _record(path: Path, step: int, numbers: dict[str, float]) -> None:
    """Add a preview's numbers to a JSON file, step -> title -> number, and drop the later ones of a killed run."""
    earlier = read_json(path) if path.is_file() else {}
    write_json(path, {k: v for k, v in earlier.items() if int(k) < step} | {str(step): numbers})
