"""The loop's laws, on a line fitted by gradient descent: exact resume, accumulation, moving average, bad input."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tensorboardX import SummaryWriter

from lcm_jax.data import Loader
from lcm_jax.parallel import distributed
from lcm_jax.parallel.pmap import AXIS, device_key
from lcm_jax.parallel.sharding import make_mesh
from lcm_jax.runtime import progress
from lcm_jax.train.checkpointing import saved_steps
from lcm_jax.train.loop import LoopConfig, fit, initial_shapes, optimizer_and_step
from lcm_jax.train.optimizer import OptimizerConfig, learning_rate, make_optimizer
from lcm_jax.train.task import Task
from lcm_jax.train.train_step import Parallel, TrainState, ema_decay, make_train_step

POINTS = [{"x": np.float32(i / 10), "y": np.float32(i / 5 + 1)} for i in range(20)]


def line_task(stop_at: int | None = None, told_at: int | None = None, number: int = signal.SIGTERM) -> Task:
    """y = a x + b, with noise on x that only the step's key decides. Stops with an error after `stop_at` batches, and
    is told to end by the signal `number` at batch `told_at`.
    """

    class Interrupted:
        def __init__(self, inner: Any) -> None:
            self.inner, self.count = inner, 0

        def __next__(self) -> Any:
            self.count += 1
            if stop_at is not None and self.count > stop_at:
                raise KeyboardInterrupt
            if self.count == told_at:
                os.kill(os.getpid(), number)
            return next(self.inner)

        def get_state(self) -> dict[str, Any]:
            return self.inner.get_state()

        def set_state(self, state: dict[str, Any]) -> None:
            self.inner.set_state(state)

    def loss(params: Any, ema: Any, frozen: Any, batch: Any, key: Any, progress: Any) -> Any:
        x = batch["x"] + frozen["noise"] * jax.random.normal(key, batch["x"].shape)
        error = jnp.mean((params["a"] * x + params["b"] - batch["y"]) ** 2)
        return error, {"loss": error}

    return Task(
        init=lambda key: {"a": jax.random.normal(key), "b": jnp.zeros(())},
        loss=loss,
        frozen={"noise": jnp.float32(0.01)},
        batches=lambda batch_size, seed, rows=None: Interrupted(iter(Loader(POINTS, batch_size, seed, rows=rows))),
        preview=lambda ema, frozen, batched_map: {"a": float(ema["a"]), "grid": np.zeros((4, 4, 3), np.uint8)},
        export=lambda ema, folder: (
            folder.mkdir(exist_ok=True),
            np.save(folder / "a.npy", np.asarray(ema["a"])),
        ),
    )


LOOP = LoopConfig(steps=30, batch_size=8, log_every=5, save_every=10, preview_every=15, ema=0.9)
OPTIMIZER = OptimizerConfig(learning_rate=0.05, warmup=5, decay="cosine")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[TrainState, Path]:
    """The last state of a run that nothing interrupted, and its folder."""
    workdir = tmp_path_factory.mktemp("finished") / "run"
    return fit(line_task(), LOOP, OPTIMIZER, workdir), workdir


def test_a_killed_run_ends_as_an_uninterrupted_one(finished: tuple[TrainState, Path], tmp_path: Path) -> None:
    uninterrupted, _ = finished
    with pytest.raises(KeyboardInterrupt):
        fit(line_task(stop_at=17), LOOP, OPTIMIZER, tmp_path / "killed")
    resumed = fit(line_task(), LOOP, OPTIMIZER, tmp_path / "killed")
    for a, b in zip(jax.tree.leaves(uninterrupted), jax.tree.leaves(resumed), strict=True):
        np.testing.assert_array_equal(a, b)
    assert (tmp_path / "killed" / "export" / "a.npy").is_file()
    assert list((tmp_path / "killed" / "tensorboard").glob("events*"))


@pytest.mark.parametrize(("number", "name"), [(signal.SIGTERM, "SIGTERM"), (signal.SIGINT, "Ctrl-C")])
def test_a_run_that_is_told_to_end_saves_and_goes_on_exactly(
    number: int, name: str, finished: tuple[TrainState, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = [signal.getsignal(kind) for kind in (signal.SIGTERM, signal.SIGINT)]
    uninterrupted, _ = finished
    with pytest.raises(SystemExit) as ending:
        fit(line_task(told_at=17, number=number), LOOP, OPTIMIZER, tmp_path / "told")
    assert ending.value.code == distributed.SAVED == 75
    assert f"ended by {name}; step 17 of 30 is saved, and the same command continues" in capsys.readouterr().out
    assert saved_steps(tmp_path / "told")[0] == 17
    assert not (tmp_path / "told" / "export").exists()
    assert [signal.getsignal(kind) for kind in (signal.SIGTERM, signal.SIGINT)] == before
    resumed = fit(line_task(), LOOP, OPTIMIZER, tmp_path / "told")
    for a, b in zip(jax.tree.leaves(uninterrupted), jax.tree.leaves(resumed), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_run_tells_what_it_costs_and_is_the_same_under_a_profile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended: dict[str, list[float]] = {}
    monkeypatch.setattr(
        SummaryWriter, "add_scalar", lambda self, key, value, step: ended.setdefault(key, []).append(value)
    )
    traced: list[int] = []
    task = line_task()

    def loss(params: Any, ema: Any, frozen: Any, batch: Any, key: Any, progress: Any) -> Any:
        traced.append(1)
        x = batch["x"][:, None] @ params["a"][None, None]  # 8 x 1 by 1 x 1: 16 FLOPs, and its gradient as many
        return (value := jnp.mean((x[:, 0] + params["b"] - batch["y"]) ** 2)), {"loss": value}

    plain = fit(replace(task, loss=loss), LOOP, OPTIMIZER, tmp_path / "plain")
    assert len(traced) == 1  # the count of FLOPs traces nothing again
    assert {len(ended[key]) for key in ("step_time", "data_wait", "memory", "tflops", "samples_per_second")} == {6}
    assert all(0 <= share <= 1 for share in ended["data_wait"])
    assert min(ended["step_time"]) > 0
    per_device = [speed * seconds * 1e12 for speed, seconds in zip(ended["tflops"], ended["step_time"], strict=True)]
    np.testing.assert_allclose(per_device, 32 / jax.device_count(), rtol=1e-6)
    assert 0.01 < ended["memory"][-1] < 100
    profiled = fit(replace(task, loss=loss), replace(LOOP, profile=3), OPTIMIZER, tmp_path / "profiled")
    assert list((tmp_path / "profiled" / "profile").rglob("*.xplane.pb"))
    assert not (tmp_path / "plain" / "profile").exists()
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(profiled), strict=True):
        np.testing.assert_array_equal(a, b)


def test_phases_have_names_and_previews_have_captions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    phases: list[str] = []
    texts: list[str] = []

    @contextlib.contextmanager
    def phase(name: str) -> Iterator[None]:
        phases.append(name)
        yield

    monkeypatch.setattr(progress, "phase", phase)
    monkeypatch.setattr(SummaryWriter, "add_text", lambda self, tag, text, step: texts.append(f"{tag} {step} {text}"))
    task = replace(line_task(), captions=("a | b", "c"))
    fit(task, replace(LOOP, steps=15), OPTIMIZER, tmp_path / "run")
    assert phases == ["run, step 0: compiling", "run, step 15: validating", "run: exporting"]
    assert texts == ["captions 0 |  |  |\n| --- | --- |\n| a \\| b | c |"]


def test_a_place_that_cannot_be_written_to_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"file/run cannot be written to \(Not a directory\): give another --workdir"):
        fit(line_task(), LOOP, OPTIMIZER, tmp_path / "file" / "run")


def test_it_learns(tmp_path: Path) -> None:
    loop, fast = LoopConfig(steps=100, batch_size=8, save_every=100), replace(OPTIMIZER, learning_rate=0.2)
    state = fit(line_task(), replace(loop, ema=0.9), fast, tmp_path)
    np.testing.assert_allclose([state.ema["a"], state.ema["b"]], [2.0, 1.0], atol=0.1)


def test_accumulated_gradients_are_those_of_the_whole_batch() -> None:
    def loss(params: Any, ema: Any, frozen: Any, batch: Any, key: Any, progress: Any) -> Any:
        value = jnp.mean((params - batch) ** 2)
        return value, {"loss": value}

    batch = jnp.arange(8.0)
    results = []
    for parts in (1, 4):
        tx = optax.sgd(0.1)
        step = make_train_step(loss, tx, decay=0.9, seed=0, accumulate=parts)
        results.append(step(TrainState.create(jnp.float32(1.0), tx), {}, batch)[0].params)
    np.testing.assert_allclose(results[0], results[1], rtol=1e-6)


def test_the_average_forgets_its_start_where_it_is_told_to() -> None:
    assert float(ema_decay(jnp.int32(0), 0.999, warmup=True)) == pytest.approx(0.1)
    assert float(ema_decay(jnp.int32(10**6), 0.999, warmup=True)) == pytest.approx(0.999)
    assert float(ema_decay(jnp.int32(0), 0.999943)) == pytest.approx(0.999943, abs=1e-7)


def climbing(params: Any, average: Any, frozen: Any, batch: Any, key: Any, progress: Any) -> Any:
    """Gradient -1, so that with a rate of 1 the parameter is k after k steps; a metric shows the average."""
    return -jnp.sum(params), {"loss": jnp.sum(params), "average": jnp.sum(average)}


def test_a_fixed_decay_is_that_decay_at_every_step() -> None:
    """The average of a ramp in closed form: n - d (1 - d^n) / (1 - d)."""
    tx, decay = optax.sgd(1.0), 0.9
    step = make_train_step(climbing, tx, decay=decay, seed=0)
    state = TrainState.create(jnp.float32(0.0), tx)
    for n in range(1, 12):
        state, _ = step(state, {}, jnp.float32(0.0))
        assert float(state.ema) == pytest.approx(n - decay * (1 - decay**n) / (1 - decay), rel=1e-5)


def test_the_loss_is_given_its_own_average_and_the_product_keeps_its_own() -> None:
    tx = optax.sgd(1.0)
    step = make_train_step(climbing, tx, decay=0.9, target_decay=lambda progress: 0.5, seed=0, steps=20)
    state, given = TrainState.create(jnp.float32(0.0), tx, own_target=True), []
    for n in range(1, 12):
        state, metrics = step(state, {}, jnp.float32(0.0))
        given.append(float(metrics["average"]))
        for average, decay in ((state.ema, 0.9), (state.target, 0.5)):
            assert float(average) == pytest.approx(n - decay * (1 - decay**n) / (1 - decay), rel=1e-5)
    assert given[-1] == pytest.approx(10 - 0.5 * (1 - 0.5**10) / 0.5, rel=1e-5)


def test_a_run_with_two_averages_resumes_exactly(tmp_path: Path) -> None:
    def task(**options: Any) -> Task:
        return replace(line_task(**options), target_decay=lambda progress: 0.5 + 0.01 * progress.step)

    uninterrupted = fit(task(), LOOP, OPTIMIZER, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        fit(task(stop_at=17), LOOP, OPTIMIZER, tmp_path / "killed")
    resumed = fit(task(), LOOP, OPTIMIZER, tmp_path / "killed")
    for one, other in zip(jax.tree.leaves(uninterrupted), jax.tree.leaves(resumed), strict=True):
        np.testing.assert_array_equal(one, other)
    assert float(resumed.target["a"]) != float(resumed.ema["a"])


def test_an_average_of_the_start_is_said(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    fit(line_task(), replace(LOOP, ema=0.999), OPTIMIZER, tmp_path / "long")
    assert "still holds 97% of the parameters before the first step: give a lower --ema" in capfd.readouterr().err
    fit(line_task(), replace(LOOP, ema=0.999, ema_warmup=True), OPTIMIZER, tmp_path / "warm")
    assert "still holds" not in capfd.readouterr().err


def test_the_average_of_every_third_step() -> None:
    """It stands still in between, and counts its own updates."""

    def loss(params: Any, ema: Any, frozen: Any, batch: Any, key: Any, progress: Any) -> Any:
        return jnp.sum(params * batch), {"loss": jnp.sum(params)}

    tx = optax.sgd(1.0)
    step = make_train_step(loss, tx, decay=0.3, seed=0, ema_every=3, ema_warmup=True)
    state, ema, want = TrainState.create(jnp.float32(0.0), tx), [], 0.0
    for i in range(9):
        state, _ = step(state, {}, jnp.float32(-1.0))  # the parameter is i + 1
        if i % 3 == 2:
            decay = min(0.3, (1 + i // 3) / (10 + i // 3))
            want = decay * want + (1 - decay) * (i + 1)
        ema.append(want)
        assert float(state.ema) == pytest.approx(want, rel=1e-6)
    assert len(set(ema)) == 4


def test_a_run_killed_between_two_updates_of_the_average_resumes_exactly(tmp_path: Path) -> None:
    loop = replace(LOOP, ema_every=7)
    uninterrupted = fit(line_task(), loop, OPTIMIZER, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        fit(line_task(stop_at=17), loop, OPTIMIZER, tmp_path / "killed")
    resumed = fit(line_task(), loop, OPTIMIZER, tmp_path / "killed")
    np.testing.assert_array_equal(uninterrupted.ema["a"], resumed.ema["a"])
    assert float(uninterrupted.ema["a"]) != float(uninterrupted.params["a"])


def test_learning_rate_warms_up_and_ends_at_zero() -> None:
    rate = learning_rate(OptimizerConfig(learning_rate=1.0, warmup=10, decay="cosine"), 100)
    np.testing.assert_allclose([rate(0), rate(5), rate(10), rate(100)], [0, 0.5, 1, 0], atol=1e-6)


@pytest.mark.parametrize("steps", [30, 1000])
def test_a_number_of_steps_that_is_data_gives_the_same_bits(steps: int) -> None:
    """The same as a schedule of optax, whose number of steps is a constant of the program."""
    config = OptimizerConfig(learning_rate=3e-4, warmup=20, decay="cosine")
    schedules = [optax.linear_schedule(0.0, 3e-4, 20), optax.cosine_decay_schedule(3e-4, steps - 20)]
    counts = jnp.arange(steps + 2)
    constant = jax.jit(jax.vmap(optax.join_schedules(schedules, [20])))(counts)
    data = jax.jit(lambda counts, steps: jax.vmap(learning_rate(config, steps))(counts))(counts, steps)
    np.testing.assert_array_equal(constant, data)


@pytest.mark.parametrize("parallel", ["jit", "pmap"])
def test_runs_of_another_length_and_seed_share_one_program(parallel: Parallel) -> None:
    texts = []
    for steps, seed in ((30, 0), (60, 7)):
        loop = replace(LOOP, steps=steps, seed=seed, parallel=parallel)
        tx, _, step = optimizer_and_step(task := line_task(), loop, OPTIMIZER, make_mesh(batch_size=8))
        batch = next(task.batches(8, 0))
        texts.append(step.trace(initial_shapes(task, tx), task.frozen, batch).lower().as_text())
    assert texts[0] == texts[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "loop.steps is 0"),
        ({"seed": -1}, "loop.seed is -1"),
        ({"ema": 1.5}, "loop.ema is 1.5"),
        ({"hang_timeout": -1.0}, "loop.hang_timeout is -1.0"),
        ({"ema_every": 0}, "loop.ema_every is 0"),
        ({"batch_size": 8, "accumulate": 3}, "does not divide"),
    ],
)
def test_bad_loops_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LoopConfig(**options)


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path) -> None:
    message = r"the loss is (nan|inf) at step \d+ \(examples \d+ to \d+ of .*nothing was saved.*lower --learning-rate"
    with pytest.raises(FloatingPointError, match=message):
        fit(line_task(), LOOP, OptimizerConfig(learning_rate=1e30, warmup=0, clip=0), tmp_path)


def test_no_checkpoint_is_of_a_loss_that_is_not_finite(tmp_path: Path) -> None:
    task, loop = line_task(), LoopConfig(steps=40, batch_size=8, log_every=40, save_every=2)

    def broken(params, ema, frozen, batch, key, progress):
        loss, metrics = task.loss(params, ema, frozen, batch, key, progress)
        return loss, {
            **metrics,
            "loss": jnp.where(progress.step >= 6, jnp.nan, metrics["loss"]),
        }  # step 6 is the seventh

    with pytest.raises(FloatingPointError, match=r"the loss is nan at step 7 .*the last good checkpoint is of step 6"):
        fit(replace(task, loss=broken), loop, OPTIMIZER, tmp_path)
    assert saved_steps(tmp_path)[0] == 6


def test_fewer_steps_than_done_is_refused(finished: tuple[TrainState, Path]) -> None:
    with pytest.raises(ValueError, match="beyond --steps 20"):
        fit(line_task(), LoopConfig(steps=20, batch_size=8), OPTIMIZER, finished[1])


def test_weight_decay_is_for_weights_alone() -> None:
    stacked = {
        "bias": jnp.ones((3, 4)),
        "scale": jnp.ones((3, 4)),
        "kernel": jnp.ones((3, 4, 4)),
        "pos_embed": jnp.ones((1, 9, 4)),
    }
    tx = make_optimizer(OptimizerConfig(learning_rate=0.1, warmup=0, weight_decay=0.5), 10)
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, stacked), tx.init(stacked), stacked)
    moved = {name: bool(jnp.any(update != 0)) for name, update in updates.items()}
    assert moved == {"bias": False, "scale": False, "kernel": True, "pos_embed": False}


@pytest.mark.parametrize(
    ("options", "moments"),
    [
        ({}, 2.0),
        ({"moment_dtype": "bfloat16"}, 1.5),
        ({"algorithm": "lion"}, 1.0),
        ({"algorithm": "lion", "moment_dtype": "bfloat16"}, 0.5),
        ({"algorithm": "adafactor"}, 0.0),
    ],
    ids=str,
)
def test_an_optimizer_descends_and_remembers_as_little_as_it_says(options: Any, moments: float) -> None:
    """moments: bytes of its state over those of the parameters."""
    params = {"kernel": jnp.full((256, 256), 2.0)}
    tx = make_optimizer(OptimizerConfig(learning_rate=0.1, warmup=0, **options), 10)
    state = tx.init(params)
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(state)) / params["kernel"].nbytes
    assert held == pytest.approx(moments, abs=0.02)
    updates, _ = tx.update(params, state, params)  # the gradient of half the square
    np.testing.assert_allclose(updates["kernel"], -0.1, rtol=1e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        pytest.param(
            {"algorithm": "sgd"},
            "optimizer.algorithm is 'sgd'; use one of adamw, lion, adafactor",
            marks=pytest.mark.wrong_types,
        ),
        pytest.param(
            {"moment_dtype": "int8"},
            "optimizer.moment_dtype is 'int8'; use one of float32, bfloat16",
            marks=pytest.mark.wrong_types,
        ),
        ({"algorithm": "adafactor", "moment_dtype": "bfloat16"}, "adafactor has no first moment"),
        ({"b2": 1.0}, "optimizer.b2 is 1.0; it must be at least 0 and below 1"),
        ({"clip": -1.0}, "optimizer.clip is -1.0; it must not be negative"),
    ],
)
def test_bad_optimizers_are_refused(options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OptimizerConfig(**options)


DRAWS = {
    "normal": jax.random.normal,
    "integers": lambda key, shape: jax.random.randint(key, shape, 0, 1000),
    "coins": lambda key, shape: jax.random.bernoulli(key, 0.3, shape),
    "truncated": lambda key, shape: jax.random.truncated_normal(key, -1.0, 1.0, shape),
    "of keys made of it": lambda key, shape: jax.random.normal(jax.random.fold_in(jax.random.split(key)[1], 3), shape),
    "for several": lambda key, shape: jnp.moveaxis(
        jax.vmap(lambda key: jax.random.uniform(key, shape))(jax.random.split(key, 3)), 0, -1
    ),
}


@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS.keys())
def test_each_device_draws_its_rows_of_what_one_would(draw: Any) -> None:
    key = jax.random.key(5)

    @jax.jit
    def both() -> Any:
        drawn = jax.vmap(
            lambda: (draw(device_key(key, 4), (2, 3)), draw(device_key(key, 4), ())), axis_name=AXIS, axis_size=4
        )
        return drawn(), (draw(key, (8, 3)), draw(key, ()))

    (parts, scalars), (uninterrupted, scalar) = both()
    np.testing.assert_array_equal(parts.reshape(uninterrupted.shape), uninterrupted)
    np.testing.assert_array_equal(scalars, jnp.broadcast_to(scalar, scalars.shape))
