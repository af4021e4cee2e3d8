"""Checkpoints of a run: its state and its position in the data, written aside and renamed, restored on any mesh."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from lcm_jax.parallel.distributed import explain
from lcm_jax.parallel.sharding import (
    Placement,
)
from lcm_jax.train.task import Batches
from lcm_jax.train.train_step import TrainState


def checkpoint_manager(workdir: Path, *, keep: int) -> ocp.CheckpointManager:
    """Return the manager of the last `keep` checkpoints (state and data position) under `workdir`/checkpoints.

    Orbax writes each aside and renames it, so that a checkpoint is whole or absent.
    """
    options = ocp.CheckpointManagerOptions(max_to_keep=keep, save_interval_steps=1, cleanup_tmp_directories=True)
    return ocp.CheckpointManager((workdir / "checkpoints").absolute(), options=options)


def save_checkpoint(manager: ocp.CheckpointManager, state: TrainState, batches: Batches) -> None:
    tree = ocp.args.PyTreeSave(state._asdict())
    args = ocp.args.Composite(state=tree, data=ocp.args.JsonSave(batches.get_state()))
    with reporting_write_errors(manager):
        manager.save(int(state.step), args=args)


@contextlib.contextmanager
def reporting_write_errors(manager: ocp.CheckpointManager) -> Iterator[None]:
    """Says in one line that a checkpoint could not be written: this one, or the last, which is written meanwhile."""
    try:
        yield
    except Exception as error:
        if explain(error):  # no fault of the disk
            raise
        saved = max(manager.all_steps(read=True), default=None)
        last = "nothing was saved" if saved is None else f"the last whole one is of step {saved}"
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)[-150:]  # the cause is at the end
        raise OSError(
            f"a checkpoint could not be written to {manager.directory} ({reason}); {last}: make room or give it back "
            "its rights, and start again"
        ) from error


def restore_checkpoint(manager: ocp.CheckpointManager, like: Any, placement: Placement, batches: Batches) -> TrainState:
    """The last checkpoint, placed for this mesh and these processes whatever it was written on. like: shapes."""
    target = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), like, placement.state
    )._asdict()
    restore_args = ocp.checkpoint_utils.construct_restore_args(target)
    args = ocp.args.Composite(
        state=ocp.args.PyTreeRestore(target, restore_args=restore_args), data=ocp.args.JsonRestore()
    )
    saved = manager.restore(manager.latest_step(), args=args)
    batches.set_state(saved["data"])
    return TrainState(**saved["state"])


def check_writable(workdir: Path) -> None:
    """OSError unless files can be made there; nothing is left behind."""
    folder = workdir.absolute()
    try:
        with tempfile.TemporaryFile(dir=next(path for path in (folder, *folder.parents) if path.exists())):
            pass
    except OSError as error:
        raise OSError(
            f"{workdir} cannot be written to ({error.strerror}): give another --workdir, or its rights"
        ) from None
