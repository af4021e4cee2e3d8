"""Checkpoints of a run (state and data position): written whole or not at all, and restored on any mesh."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from lcm_jax.parallel.distributed import peer_failure_message
from lcm_jax.parallel.sharding import Placement
from lcm_jax.train.task import Batches
from lcm_jax.train.train_step import TrainState


def checkpoint_manager(workdir: Path, *, keep: int) -> ocp.CheckpointManager:
    """Return the manager of the last `keep` checkpoints (state and data position) under `workdir`/checkpoints.

    Orbax writes each under a temporary name and renames it at the end, so that a checkpoint is complete or absent.
    """
    options = ocp.CheckpointManagerOptions(max_to_keep=keep, save_interval_steps=1, cleanup_tmp_directories=True)
    return ocp.CheckpointManager((workdir / "checkpoints").absolute(), options=options)


def save_checkpoint(manager: ocp.CheckpointManager, state: TrainState, batches: Batches) -> None:
    """Save the state and the position of `batches` as the checkpoint of step `state.step`, in the background.

    Raises OSError if this checkpoint, or the one before it, could not be written.
    """
    tree = ocp.args.PyTreeSave(state._asdict())
    args = ocp.args.Composite(state=tree, data=ocp.args.JsonSave(batches.get_state()))
    with reporting_write_errors(manager):
        manager.save(int(state.step), args=args)


@contextlib.contextmanager
def reporting_write_errors(manager: ocp.CheckpointManager) -> Iterator[None]:
    """Raise OSError, in one line, if a checkpoint could not be written: this one, or the last, still being written."""
    try:
        yield
    except Exception as error:
        if peer_failure_message(error):  # another process of the job is gone; the disk is not to blame
            raise
        saved = max(manager.all_steps(read=True), default=None)
        last = "nothing was saved" if saved is None else f"the last whole one is of step {saved}"
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)[-150:]  # the cause is at the end
        raise OSError(
            f"a checkpoint could not be written to {manager.directory} ({reason}); {last}: free disk space or make the "
            "folder writable, and start again"
        ) from error


def restore_checkpoint(manager: ocp.CheckpointManager, like: Any, placement: Placement, batches: Batches) -> TrainState:
    """Return the last checkpoint's state on this mesh and these processes, and set `batches` to its data position.

    It may have been written on another mesh or number of processes.

    like: the state's shapes. placement: its shardings.
    """
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
    """Raise OSError unless files can be created in `workdir`, or in its nearest parent that exists; leave none."""
    folder = workdir.absolute()
    try:
        with tempfile.TemporaryFile(dir=next(path for path in (folder, *folder.parents) if path.exists())):
            pass
    except OSError as error:
        raise OSError(
            f"{workdir} cannot be written to ({error.strerror}): give another --workdir, or make it writable"
        ) from None
