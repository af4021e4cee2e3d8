"""The folder of a run and its checkpoints (state, data position, config): written whole, restored on any mesh.

A checkpoint that is not as it was written is noticed by its checksums and put aside; the run goes on from the newest
one that is whole.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from filelock import FileLock, Timeout
from jax.experimental import multihost_utils

from lcm_jax.parallel.distributed import first_said, is_main, peer_failure_message
from lcm_jax.parallel.sharding import Placement
from lcm_jax.runtime.atomic_files import remove_leftovers
from lcm_jax.runtime.checksums import check_checksums, write_checksums
from lcm_jax.runtime.messages import is_out_of_memory
from lcm_jax.train.task import Batches
from lcm_jax.train.train_step import TrainState
from lcm_jax.weights.safetensors_files import read_json

CHECKPOINTS = "checkpoints"
LOCK = ".lock"
DAMAGED = "damaged"  # the folder of checkpoints that were put aside
ITEMS = ("state", "data", "config")  # the folders of a checkpoint; those of earlier versions have no config


@dataclass(frozen=True)
class RunFolder:
    """The folder of a run, which no other run has open. step: of its newest checkpoint that is whole; None: of none."""

    path: Path
    step: int | None

    @classmethod
    @contextlib.contextmanager
    def opened(cls, path: Path) -> Iterator[RunFolder]:
        """Create the folder if it is missing, and hold it: what a killed run has left is removed, checkpoints checked.

        A damaged checkpoint goes to the folder `damaged`, with a warning. Raises ValueError if another run has the
        folder open or if none of its checkpoints is whole, and OSError if it cannot be written to.
        """
        check_writable(path)
        missing = [folder for folder in (path, *path.parents) if not folder.exists()]
        path.mkdir(parents=True, exist_ok=True)
        with _held(path) if is_main() else contextlib.nullcontext():
            if is_main():
                for folder in (path, path / "export"):
                    remove_leftovers(folder)
            try:
                yield cls(path, _newest_whole(path))
            finally:
                if is_main() and [file.name for file in path.iterdir()] == [LOCK]:  # a run that was refused
                    (path / LOCK).unlink()
                    with contextlib.suppress(OSError):  # until one that is not empty
                        for folder in missing:
                            folder.rmdir()


@contextlib.contextmanager
def _held(path: Path) -> Iterator[None]:
    lock = FileLock(path / LOCK)  # the system releases it however the process ends
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ValueError(
            f"{path}: another run is writing to this folder: wait for it, or give another --workdir"
        ) from None
    except NotImplementedError:
        warnings.warn(f"{path}: its file system has no locks, so two runs there are not told apart", stacklevel=2)
    try:
        yield
    finally:
        lock.release()


def saved_steps(workdir: Path) -> list[int]:
    """Return the steps of the checkpoints in a run's folder, newest first; none of them is opened."""
    steps = (int(path.name) for path in (workdir / CHECKPOINTS).glob("*") if path.name.isdecimal())
    return sorted(steps, reverse=True)


def recorded_config(workdir: Path) -> dict[str, Any] | None:
    """Return the config of the run whose checkpoints or export are in a folder; None if it holds neither.

    It is that of the newest checkpoint; config.json where no checkpoint has one, as with those of earlier versions.
    """
    steps = saved_steps(workdir)
    for step in steps:
        with contextlib.suppress(OSError, ValueError):  # what is damaged is found by its checksums
            return read_json(workdir / CHECKPOINTS / str(step) / "config" / "metadata")
    path = workdir / "config.json"
    return read_json(path) if path.is_file() and (steps or (workdir / "export").exists()) else None


def _newest_whole(workdir: Path) -> int | None:
    """Return the step of the newest whole checkpoint, and put those aside that are newer and damaged."""
    damaged: dict[int, str] = {}
    for step in saved_steps(workdir):
        reason = first_said(_damage(workdir / CHECKPOINTS / str(step)))
        if reason:
            damaged[step] = reason
            continue
        for number, why in damaged.items():
            _put_aside(workdir, number, f"{why}; the run goes on from step {step}")
        return step
    if damaged:
        raise ValueError(
            f"{workdir / CHECKPOINTS}: no checkpoint is whole ({'; '.join(damaged.values())}): remove {workdir} to "
            "start again"
        )
    return None


def _damage(folder: Path) -> str:
    """Return what is wrong with a checkpoint, as far as this process's part of its files tells; "" for nothing."""
    part = {"part": jax.process_index(), "parts": jax.process_count()}
    items = [folder / name for name in ITEMS if (folder / name).is_dir()]
    try:
        checked = [check_checksums(item, **part) for item in items]
        if not any(checked) and {item.name for item in items} == {"state", "data"}:
            if is_main():
                warnings.warn(f"{folder}: an earlier version wrote it, without checksums: taken as it is", stacklevel=2)
            return ""
        for name in ITEMS:
            if folder / name not in items:
                return f"{folder / name}: missing"
        for item, is_listed in zip(items, checked, strict=True):
            if not is_listed:
                return f"{item}: damaged, its checksums are missing"
        read_json(folder / "_CHECKPOINT_METADATA")  # orbax writes its time when all else is done
    except (ValueError, FileNotFoundError) as error:
        return str(error).partition(";")[0]  # without the advice to copy the folder again
    return ""


def _put_aside(workdir: Path, step: int, reason: str) -> None:
    target = workdir / DAMAGED / str(step)
    if is_main():
        shutil.rmtree(target, ignore_errors=True)
        target.parent.mkdir(exist_ok=True)
        os.replace(workdir / CHECKPOINTS / str(step), target)
        warnings.warn(f"checkpoint {step} is damaged and now in {target.parent} ({reason})", stacklevel=2)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"checkpoint {step} is put aside")


class Checkpoints:
    """The last `keep` checkpoints of a run, each of its state, data position and config; a context that ends writing.

    Orbax writes each under a temporary name, in the background, and renames it when its checksums are written too, so
    that a checkpoint is complete or absent.
    """

    def __init__(self, folder: RunFolder, *, keep: int, config: Mapping[str, Any] | None = None) -> None:
        self.folder, self._config, self._saving = folder, dict(config or {}), -1
        self.directory = (folder.path / CHECKPOINTS).absolute()
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep,
            save_interval_steps=1,
            cleanup_tmp_directories=True,
            async_options=ocp.AsyncOptions(post_finalization_callback=self._write_checksums),
        )
        self._manager = ocp.CheckpointManager(self.directory, options=options)

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *_: object) -> None:
        self._manager.close()  # waits for the checkpoint that is being written, however the run ends

    def _write_checksums(self) -> None:
        """Write those of the checkpoint that is being written; orbax calls it before the last renaming."""
        for folder in self.directory.glob(f"{self._saving}*"):
            if folder.name.split(".")[0] == str(self._saving):
                for item in ITEMS:
                    write_checksums(folder / item)

    @property
    def newest(self) -> int | None:
        """The step of the last checkpoint that is complete, or is being written."""
        return self._manager.latest_step()

    def save(self, state: TrainState, batches: Batches) -> None:
        """Save the state and the position of `batches` as the checkpoint of step `state.step`, in the background.

        Raises OSError if this checkpoint, or the one before it, could not be written.
        """
        tree = ocp.args.PyTreeSave(_present(state))
        args = ocp.args.Composite(
            state=tree, data=ocp.args.JsonSave(batches.get_state()), config=ocp.args.JsonSave(self._config)
        )
        with self._reporting_write_errors():
            self._manager.wait_until_finished()  # the last one, so that `_saving` is of one checkpoint at a time
            self._saving = int(state.step)
            self._manager.save(self._saving, args=args)

    def check(self) -> None:
        """Raise OSError if the checkpoint that is written in the background could not be written until now."""
        with self._reporting_write_errors():
            self._manager.check_for_errors()

    def wait(self) -> None:
        """Wait until the last checkpoint is complete; raise OSError if it could not be written."""
        with self._reporting_write_errors():
            self._manager.wait_until_finished()

    @contextlib.contextmanager
    def _reporting_write_errors(self) -> Iterator[None]:
        """Raise OSError, in one line, if a checkpoint could not be written."""
        try:
            yield
        except Exception as error:
            if peer_failure_message(error):  # another process of the job is gone; the disk is not to blame
                raise
            saved = max(self._manager.all_steps(read=True), default=None)
            last = "nothing was saved" if saved is None else f"the last whole one is of step {saved}"
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)[-150:]  # the cause is at the end
            raise OSError(
                f"a checkpoint could not be written to {self.directory} ({reason}); {last}: free disk space or make "
                "the folder writable, and start again"
            ) from error

    def restore(self, like: Any, placement: Placement, batches: Batches) -> TrainState:
        """Return the newest state on this mesh and these processes, and set `batches` to its data position.

        It may have been written on another mesh or number of processes.

        like: the state's shapes. placement: its shardings. Raises ValueError if it cannot be read, or does not fit.
        """
        shapes = jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            like,
            placement.state,
        )
        target = _present(shapes)
        restore_args = ocp.checkpoint_utils.construct_restore_args(target)
        args = ocp.args.Composite(
            state=ocp.args.PyTreeRestore(target, restore_args=restore_args), data=ocp.args.JsonRestore()
        )
        try:
            saved = self._manager.restore(self.folder.step, args=args)
        except Exception as error:
            if peer_failure_message(error) or is_out_of_memory(error):
                raise
            reason = " ".join(str(error).split())[:200]
            raise ValueError(
                f"{self.directory / str(self.folder.step)}: cannot be read, or is the state of another task "
                f"({reason}): move it away, and the run goes on from the checkpoint before it"
            ) from error
        batches.set_state(saved["data"])
        return TrainState(**saved["state"])


def _present(state: Any) -> dict[str, Any]:
    """Return the trees of a state by name, without a second average where there is none."""
    return {name: tree for name, tree in state._asdict().items() if tree is not None}


def check_writable(workdir: Path) -> None:
    """Raise OSError unless files can be created in `workdir`, or in its nearest parent that exists; leave none."""
    folder = workdir.absolute()
    try:
        with tempfile.TemporaryFile(dir=next(path for path in (folder, *folder.parents) if path.exists())):
            pass
    except OSError as error:
        raise OSError(
            f"{workdir} cannot be written to ({error.strerror}): give another --workdir, or make it writable"
        ) from None
