"""The training loop: batches in, checkpoints, scalars and pictures out. It knows no network and no loss."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, get_args

import jax
import numpy as np
import optax
from jax.sharding import Mesh
from tensorboardX import SummaryWriter
from tqdm import tqdm

from lcm_jax.parallel.distributed import SAVED, Preempted, Preemption, Watchdog, is_main, say
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
from lcm_jax.runtime import progress
from lcm_jax.runtime.atomic_files import write_json
from lcm_jax.runtime.flops import flops
from lcm_jax.train.checkpointing import Checkpoints, RunFolder
from lcm_jax.train.meter import Meter, Profile
from lcm_jax.train.optimizer import OptimizerConfig, learning_rate, make_optimizer
from lcm_jax.train.task import Batches, Task
from lcm_jax.train.train_step import Metrics, Parallel, Step, TrainState, make_train_step
from lcm_jax.typing import Key
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
    ema_warmup: bool = False  # the decay rises from 0.1 to `ema`, so that a short run's average forgets its start
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
        if not 0.0 <= self.ema <= 1.0:
            raise ValueError(f"loop.ema is {self.ema}; the decay of the moving average is from 0 to 1")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"loop.seed is {self.seed}; give a number from 0 to 2**32 - 1")
        if not self.hang_timeout >= 0:
            raise ValueError(f"loop.hang_timeout is {self.hang_timeout}; it is a number of seconds, 0 for never")
        if self.profile < 0:
            raise ValueError(f"loop.profile is {self.profile}; it is a number of steps, 0 for none")
        if self.batch_size % self.accumulate:
            raise ValueError(f"loop.accumulate = {self.accumulate} does not divide loop.batch_size = {self.batch_size}")
        if self.ema_every > self.steps:
            raise ValueError(
                f"loop.ema_every = {self.ema_every} is above loop.steps = {self.steps}: the moving average, which is "
                "the result, would never move"
            )


def fit(
    task: Task,
    loop: LoopConfig,
    optimizer: OptimizerConfig,
    workdir: Path | RunFolder,
    config: Mapping[str, Any] | None = None,
) -> TrainState:
    """Train `task` for `loop.steps` steps, continuing where an earlier run in `workdir` stopped.

    A run that was killed and started again ends with the same parameters, bit for bit, as one that was not: a
    checkpoint holds the state, the data position and the step number (which gives the random keys), and a run depends
    on nothing else. On another mesh or number of processes it sees the same examples and noise in the same order, but
    its sums are rounded differently.

    workdir: a folder that all processes share, or one that `RunFolder.opened` has opened. The average of the parameters
    is exported to workdir/export. config: what the checkpoints record of the run's config, as JSON values.

    Raises ValueError if `workdir` holds a later step than `loop.steps`, FloatingPointError if a loss is not finite,
    OSError if a file cannot be written, and Preempted if SIGTERM or Ctrl-C ended the run early.
    """
    if not isinstance(workdir, RunFolder):
        check_devices(loop)
        with RunFolder.opened(workdir) as opened:
            return fit(task, loop, optimizer, opened, config)
    folder, workdir = workdir, workdir.path
    start = folder.step or 0
    check_length(start, loop, workdir)
    mesh = check_devices(loop)
    if loop.parallel == "pmap" and not task.separable:
        raise ValueError("loop.parallel = pmap: this task's loss is not a mean over examples; use jit")
    tx, placement, step_fn = optimizer_and_step(task, loop, optimizer, mesh)
    rate = learning_rate(optimizer, loop.steps)
    rows = local_batch_indices(placement.batch, loop.batch_size)
    batches = task.batches(loop.batch_size, loop.seed, rows if jax.process_count() > 1 else None)
    with Watchdog(loop.hang_timeout) as watchdog, Checkpoints(folder, keep=loop.keep, config=config) as checkpoints:
        if folder.step is None:
            state = init_sharded(lambda key: create_state(task, tx, key), jax.random.key(loop.seed), placement.state)
        else:
            state = checkpoints.restore(initial_shapes(task, tx), placement, batches)
            if start == loop.steps:
                say(f"{workdir} is at its last step, {start}: nothing is left to train; more --steps train it further")
            else:
                say(f"{workdir}: goes on from step {start} of {loop.steps}")
        frozen = put_on_mesh(task.frozen, placement.frozen)
        say_memory(loop)

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
            if task.captions:
                log.add_text("captions", markdown_grid(task.captions), start)
            run = _Run(loop, rate, folder, checkpoints, batches, log, watchdog, meter)
            state = run.run(state, advance, preview)
        watchdog.reset("the last checkpoint")
        checkpoints.wait()
        ema = gather_to_host(state.ema) if jax.process_count() > 1 else state.ema
    if is_main():
        with progress.phase(f"{workdir.name}: exporting"):
            task.export(ema, workdir / "export")
    return state


def say_memory(loop: LoopConfig) -> None:
    """Say it if the moving average, which is the result, ends with more than a tenth of the first parameters in it."""
    share = 0.0 if loop.ema_warmup else loop.ema ** (loop.steps // loop.ema_every)
    if share > 0.1:
        say(
            f"after {loop.steps} steps at a decay of {loop.ema} the moving average, which is the result, still holds "
            f"{share:.0%} of the parameters before the first step: give a lower --ema, or --ema-warmup"
        )


def check_length(done: int, loop: LoopConfig, workdir: Path) -> None:
    """Raise ValueError if a folder holds a later step than the loop's last."""
    if done > loop.steps:
        raise ValueError(f"{workdir} holds step {done}, beyond --steps {loop.steps}; choose another --workdir")


def check_devices(loop: LoopConfig) -> Mesh:
    """Return the mesh of a run; raise ValueError if it does not fit the devices, the batch, or pmap."""
    mesh = make_mesh(loop.mesh, batch_size=loop.batch_size)
    if loop.parallel == "pmap" and (mesh.shape["data"] != mesh.size or jax.process_count() > 1):
        raise ValueError(
            f"loop.parallel = pmap needs one process with all devices along data, not {dict(mesh.shape)} in "
            f"{jax.process_count()} processes: use jit"
        )
    return mesh


def create_state(task: Task, tx: optax.GradientTransformation, key: Key) -> TrainState:
    """Return the state before the first step."""
    return TrainState.create(task.init(key), tx, own_target=task.target_decay is not None)


def initial_shapes(task: Task, tx: optax.GradientTransformation) -> TrainState:
    """Return the shapes of the initial state, without computing anything."""
    return jax.eval_shape(lambda key: create_state(task, tx, key), jax.random.key(0))


def optimizer_and_step(
    task: Task, loop: LoopConfig, optimizer: OptimizerConfig, mesh: Mesh
) -> tuple[optax.GradientTransformation, Placement, Step]:
    """Return the optimizer of a run, the shardings of its trees, and its compiled step."""
    tx = task.optimizer(partial(make_optimizer, optimizer, loop.steps))
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
        ema_warmup=loop.ema_warmup,
        target_decay=task.target_decay,
        placement=placement,
        parallel=loop.parallel,
        steps=loop.steps,
    )
    return tx, placement, step


class _Run:
    """The steps of a run, and the files that it writes on the way."""

    def __init__(
        self,
        loop: LoopConfig,
        rate: optax.Schedule,
        folder: RunFolder,
        checkpoints: Checkpoints,
        batches: Batches,
        log: SummaryWriter,
        watchdog: Watchdog,
        meter: Meter,
    ) -> None:
        self.loop, self.rate, self.checkpoints, self.batches, self.log = loop, rate, checkpoints, batches, log
        self.watchdog, self.meter = watchdog, meter
        self.workdir = folder.path
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
        bar = progress.progress(loop.steps, name, "step", initial=start, leave=True, disable=not is_main())

        @contextlib.contextmanager
        def phase(what: str) -> Iterator[None]:
            """Name what the loop does instead of training."""
            bar.set_description_str(f"{name}, {what}")
            with contextlib.nullcontext() if sys.stderr.isatty() else progress.phase(f"{name}, step {bar.n}: {what}"):
                yield
            bar.set_description_str(name, refresh=False)

        self.meter.restart(start)
        profile = Profile(self.workdir / "profile", start, loop.profile)
        # Metrics are read one step late, so that dispatching a step never waits for the step before.
        pending: tuple[int, Metrics] | None = None
        with bar, profile as trace, Preemption() as preemption:
            for step in range(start + 1, loop.steps + 1):
                self.watchdog.reset(f"step {step}")
                trace(step, state)
                with phase("compiling") if step == start + 1 else contextlib.nullcontext():
                    state, metrics = advance(state)
                self.losses[step] = metrics["loss"]
                if pending is not None:
                    self.write(*pending, bar)
                pending = (step, metrics) if step % loop.log_every == 0 or step == loop.steps else None
                bar.update()
                if step == start + 1 < loop.steps:  # the first step includes compilation, which is not training time
                    self.meter.restart(step)
                    bar.initial, bar.start_t = bar.n, bar._time()  # nor is it in the bar's rate
                last, ending = step == loop.steps, preemption(step)
                if pending is not None and (last or ending or step % loop.preview_every == 0):
                    self.write(*pending, bar)  # before the preview, which must not count as training time
                    pending = None
                if last or step % loop.preview_every == 0:
                    with phase("validating"):
                        self.show(step, preview(state))
                    self.meter.restart(step)
                # After the preview: a run killed between the two repeats the preview and loses none.
                if last or ending or step % loop.save_every == 0:
                    self.check_losses(step)  # so that every checkpoint is of a run whose losses were finite until then
                    self.checkpoints.save(state, self.batches)
                if ending and not last:
                    self.stop(step, preemption.reason)
        return state

    def check_losses(self, until: int) -> None:
        """Raise FloatingPointError if a loss up to step `until` is not finite."""
        size = self.loop.batch_size
        for step in [step for step in self.losses if step <= until]:
            loss = self.losses.pop(step)
            if not np.isfinite(loss):
                saved = self.checkpoints.newest
                last = "nothing was saved" if saved is None else f"the last good checkpoint is of step {saved}"
                raise FloatingPointError(
                    f"the loss is {float(loss)} at step {step} (examples {(step - 1) * size} to {step * size - 1} of "
                    f"the data's order); {last}, in {self.checkpoints.directory}: lower --learning-rate"
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
        self.checkpoints.check()

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

    def stop(self, step: int, reason: str) -> None:
        """Wait for the checkpoint, then raise Preempted."""
        self.checkpoints.wait()
        if is_main():
            print(
                f"{self.workdir}: ended by {reason}; step {step} of {self.loop.steps} is saved, and the same command "
                f"continues from it (exit code {SAVED})"
            )
        raise Preempted


def _record(path: Path, step: int, numbers: dict[str, float]) -> None:
    """Add a preview's numbers to a JSON file, step -> title -> number, and drop the later ones of a killed run."""
    earlier = read_json(path) if path.is_file() else {}
    write_json(path, {k: v for k, v in earlier.items() if int(k) < step} | {str(step): numbers})


def markdown_grid(captions: Sequence[str], columns: int = 8) -> str:
    """Return captions as a table of Markdown, in the places that `grid` gives their pictures."""
    cells = [" ".join(text.split()).replace("|", "\\|") for text in captions]
    rows = [cells[i : i + columns] for i in range(0, len(cells), columns)]
    lines = [[""] * len(rows[0]), ["---"] * len(rows[0]), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
