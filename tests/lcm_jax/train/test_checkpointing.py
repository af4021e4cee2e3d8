"""The folder of a run: damaged checkpoints, leftovers, two runs at once, and whose config it is."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from lcm_jax.runtime.atomic_files import write_json
from lcm_jax.train.checkpointing import DAMAGED, ITEMS, RunFolder, recorded_config, saved_steps
from lcm_jax.train.config import TrainConfig
from lcm_jax.train.loop import fit
from lcm_jax.train.task import Task
from lcm_jax.train.train_step import TrainState

from .test_loop import LOOP, OPTIMIZER, line_task


@dataclass(frozen=True, kw_only=True)
class LineTask:
    """The config of `line_task`, killed after `stop_at` batches; the width changes nothing but the config."""

    width: int = 1
    stop_at: int | None = None

    def build(self) -> Task:
        return line_task(self.stop_at)

    @property
    def resolved(self) -> LineTask:
        return replace(self, stop_at=None)  # of no interest to what a run depends on


def config(**options: Any) -> TrainConfig:
    return TrainConfig(task=LineTask(**options), loop=LOOP, optimizer=OPTIMIZER)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> TrainState:
    return fit(line_task(), LOOP, OPTIMIZER, tmp_path_factory.mktemp("whole") / "run")


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that was killed in step 26, after checkpoints of steps 10 and 20."""
    workdir = tmp_path_factory.mktemp("killed") / "run"
    with pytest.raises(KeyboardInterrupt):
        config(stop_at=25).run(workdir)
    assert saved_steps(workdir) == [20, 10]
    return workdir


@pytest.fixture
def workdir(killed: Path, tmp_path: Path) -> Path:
    return shutil.copytree(killed, tmp_path / "run")


def flip(path: Path, bit: int = 0) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1 << bit
    path.write_bytes(data)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "a bit": flip,
    "cut off": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "empty": lambda path: path.write_bytes(b""),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"0"),
    "missing": Path.unlink,
}


def files_of(checkpoint: Path) -> list[Path]:
    return sorted(path for item in ITEMS for path in (checkpoint / item).rglob("*") if path.is_file())


@pytest.mark.parametrize("way", DAMAGE)
def test_damage_of_any_file_is_noticed_and_named(killed: Path, tmp_path: Path, way: str) -> None:
    names = [path.relative_to(killed) for path in files_of(killed / "checkpoints" / "20")]
    assert len(names) > 10
    for i, name in enumerate(names):
        workdir = shutil.copytree(killed, tmp_path / str(i))
        DAMAGE[way](workdir / name)
        goes_on = r"checkpoint 20 is damaged .*; the run goes on from step 10"
        with pytest.warns(UserWarning, match=goes_on) as said, RunFolder.opened(workdir) as folder:
            assert folder.step == 10
        shown = str(said[0].message)
        assert name.name in shown or name.parent.name in shown  # a file, or the item whose checksums are missing
        assert saved_steps(workdir) == [10]
        assert (workdir / DAMAGED / "20").is_dir()


def test_after_damage_a_run_ends_as_one_that_was_stopped_there(
    workdir: Path, uninterrupted: TrainState, capfd: pytest.CaptureFixture[str]
) -> None:
    largest = max(files_of(workdir / "checkpoints" / "20"), key=lambda path: path.stat().st_size)
    flip(largest, bit=3)
    with pytest.warns(UserWarning, match="the run goes on from step 10"):
        state = config().run(workdir)
    assert "goes on from step 10 of 30" in capfd.readouterr().err
    for a, b in zip(jax.tree.leaves(uninterrupted), jax.tree.leaves(state), strict=True):
        np.testing.assert_array_equal(a, b)
    assert saved_steps(workdir) == [30, 20]


def test_without_a_whole_checkpoint_nothing_is_touched(workdir: Path) -> None:
    for step in (10, 20):
        flip(workdir / "checkpoints" / str(step) / "data" / "metadata")
    with pytest.raises(ValueError, match=r"no checkpoint is whole .*20/data.*10/data.*: remove") as error:
        config().run(workdir)
    assert "\n" not in str(error.value)
    assert saved_steps(workdir) == [20, 10]


def test_a_checkpoint_of_an_earlier_version_is_taken(workdir: Path, uninterrupted: TrainState) -> None:
    for step in (10, 20):
        shutil.rmtree(workdir / "checkpoints" / str(step) / "config")
        for path in (workdir / "checkpoints" / str(step)).rglob("checksums.json"):
            path.unlink()
    with pytest.warns(UserWarning, match="checkpoints/20: an earlier version wrote it, without checksums"):
        state = config().run(workdir)
    np.testing.assert_array_equal(uninterrupted.params["a"], state.params["a"])


def test_the_files_of_a_killed_process_are_removed(workdir: Path) -> None:
    left = [workdir / ".export.0123abcd", workdir / "export" / ".unet.0123abcd", workdir / ".config.json.0123abcd"]
    for path in left[:2]:
        path.mkdir(parents=True)
        (path / "half").write_text("")
    left[2].write_text("")
    (workdir / ".notes").write_text("")
    (workdir / "checkpoints" / "30.orbax-checkpoint-tmp").mkdir()
    with RunFolder.opened(workdir) as folder:
        assert folder.step == 20
    assert not any(path.exists() for path in left)
    assert (workdir / ".notes").exists()


def test_two_runs_in_one_folder_are_told_apart(tmp_path: Path) -> None:
    with RunFolder.opened(tmp_path / "run"), pytest.raises(ValueError, match="run: another run is writing to this"):
        config().run(tmp_path / "run")
    with RunFolder.opened(tmp_path / "run"):
        pass


def test_a_folder_belongs_to_the_config_of_its_checkpoints(workdir: Path) -> None:
    record = config().record
    assert recorded_config(workdir) == record
    write_json(workdir / "config.json", {})  # for people to read; nothing depends on it
    with pytest.raises(ValueError, match=r"holds a run with task.width = 1, not 2: give the same value, or another"):
        config(width=2).run(workdir)
    shutil.rmtree(workdir / "checkpoints")
    config(width=2).check(workdir)
    (workdir / "export").mkdir()
    write_json(workdir / "config.json", record)
    with pytest.raises(ValueError, match=r"holds a run with task.width = 1, not 2"):
        config(width=2).check(workdir)


def test_a_run_that_took_no_step_locks_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        config(stop_at=0).run(tmp_path)
    assert (tmp_path / "config.json").is_file()
    with pytest.raises(KeyboardInterrupt):
        config(width=2, stop_at=0).run(tmp_path)


def test_a_run_can_be_made_longer_and_says_what_that_means(
    workdir: Path, capfd: pytest.CaptureFixture[str], uninterrupted: TrainState
) -> None:
    longer = replace(config(), loop=replace(LOOP, steps=40))
    state = longer.run(workdir)
    assert int(state.step) == 40
    said = capfd.readouterr().err
    assert "asked for 30 steps before, and for 40 now: the learning rate now ends at step 40, so the rest" in said
    longer.run(workdir)
    assert "is at its last step, 40: nothing is left to train; more --steps train it further" in capfd.readouterr().err
    with pytest.raises(ValueError, match="holds step 40, beyond --steps 30"):
        config().run(workdir)


def test_a_mesh_that_does_not_fit_is_said_before_data_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LineTask, "build", None)
    with pytest.raises(ValueError, match="data=3"):
        replace(config(), loop=replace(LOOP, mesh=f"data=3,fsdp={jax.device_count()}")).run(tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_what_a_memory_does_not_hold_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def loss(params: Any, ema: Any, frozen: Any, batch: Any, key: Any, progress: Any) -> Any:
        drawn = jax.random.normal(key, (2**21,))
        value = (
            params["a"] * jax.numpy.sort(jax.numpy.outer(drawn, drawn), axis=0)[progress.step, progress.step]
        )  # 16 TiB
        return value, {"loss": value}

    task = line_task()
    monkeypatch.setattr(LineTask, "build", lambda self: replace(task, loss=loss))
    with pytest.raises(MemoryError, match=r"out of memory: batches of 8 on .*: give a smaller --batch-size") as error:
        config().run(tmp_path / "run")
    assert "\n" not in str(error.value)
