"""Several processes as one job: how they find one another, end together, and do not wait for ever."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from types import FrameType, TracebackType
from typing import Any

import jax
from jax.experimental import multihost_utils

# Environments of a job of several processes that JAX reads (jax.distributed.initialize), and what shows them. Others it
# has to ask the network about: --coordinator auto.
_JOBS: Mapping[str, Callable[[str], bool]] = {
    "SLURM_NTASKS": lambda n: "SLURM_STEP_NODELIST" in os.environ and int(n) > 1,
    "TPU_WORKER_HOSTNAMES": lambda names: "," in names,  # GKE
    "TPU_PROCESS_ADDRESSES": lambda names: "," in names,
    "OMPI_COMM_WORLD_SIZE": lambda n: int(n) > 1,
    "JAX_COORDINATOR_ADDRESS": bool,
}


def initialize(
    coordinator: str | None = None, processes: int | None = None, process: int | None = None, *, timeout: int = 100
) -> None:
    """Join this process to its job, before any device is used; where nothing tells of a job it is alone.

    coordinator: "host:port" of process 0, given with `processes` and `process`; or "auto", what JAX finds (metadata of
    TPUs, Kubernetes). None: from the environment of Slurm, Open MPI or GKE, if it tells of several processes.
    timeout: seconds without a sign of life after which a process counts as dead, which ends the others; all have three
    times as long to come.
    """
    flags = {"--coordinator": coordinator, "--processes": processes, "--process": process}
    if coordinator == "auto" or not any(value is not None for value in flags.values()):
        if coordinator is None and not any(shows(os.environ[key]) for key, shows in _JOBS.items() if key in os.environ):
            return
        found: dict[str, Any] = {}
    else:
        if missing := [flag for flag, value in flags.items() if value is None]:
            raise ValueError(f"{', '.join(missing)} missing: a job is named by all of {', '.join(flags)}")
        assert processes is not None and process is not None and coordinator is not None  # noqa: PT018
        if not 0 <= process < processes:
            raise ValueError(f"--process {process}: it must be from 0 to --processes - 1 = {processes - 1}")
        if not coordinator.rpartition(":")[2].isdigit():
            raise ValueError(f"--coordinator {coordinator}: it must be HOST:PORT of process 0, or auto")
        found = {"coordinator_address": coordinator, "num_processes": processes, "process_id": process}
        where = f"process {process} of {processes} joins the others at {coordinator}"
        print(f"lcm-jax: {where}, which may take them {3 * timeout} s", file=sys.stderr)
    try:
        jax.distributed.initialize(
            **found,
            initialization_timeout=3 * timeout,  # after which the runtime aborts the process, with words of its own
            heartbeat_timeout_seconds=timeout,
            shutdown_timeout_seconds=3600,  # whoever is done waits for the others, such as process 0 while it exports
        )
    except (ValueError, RuntimeError) as error:
        raise ValueError(
            f"no job of several processes ({_first_line(error)}): give --coordinator, --processes and --process"
        ) from error
    plain = sys.excepthook

    def at_once(*error: Any) -> None:  # what JAX does when Python exits would wait for the others
        plain(*error)
        end(1)

    sys.excepthook = at_once


def is_main() -> bool:
    """Whether this process writes what is written once: logs, configs, exports."""
    return jax.process_index() == 0


def end(code: int) -> None:
    """Leave the job. After an error at once, without waiting for processes that may never come."""
    if not jax.distributed.is_initialized():
        return
    if code == 0:
        jax.distributed.shutdown()
        return
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def explain(error: BaseException) -> str | None:
    """Of an error of the runtime, in a job of several processes, what it means."""
    own = "RESOURCE_EXHAUSTED" in str(error)  # its memory
    if isinstance(error, jax.errors.JaxRuntimeError) and jax.distributed.is_initialized() and not own:
        return (
            f"process {jax.process_index()} of {jax.process_count()} ends: another one is gone or does not answer "
            f"({_first_line(error)}); start all of them again, and the run goes on from its last checkpoint"
        )
    return None


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__


class Preempted(SystemExit):
    """The run was told to end, and what it had done is saved: exit code 0."""

    def __init__(self) -> None:
        super().__init__(0)


class Preemption:
    """Whether the run was told to end (SIGTERM), asked after every step; all processes are answered alike.

    In a job the answer is true in one step of all, the first that none of them has passed when the signal comes.
    """

    def __init__(self) -> None:
        self._asked = False
        self._before: Any = None

    def __enter__(self) -> Preemption:
        # In a job the runtime has a handler of its own; elsewhere only the main thread may set one.
        if not jax.distributed.is_initialized() and threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._notice)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)

    def _notice(self, number: int, frame: FrameType | None) -> None:
        self._asked = True

    def __call__(self, step: int) -> bool:
        if jax.distributed.is_initialized():
            return multihost_utils.reached_preemption_sync_point(step)
        return self._asked


class Watchdog:
    """Ends this process of a job when nothing has moved for `seconds`: a peer that hangs would be waited for for ever.

    0: never. A process that dies, or stops altogether, is noticed sooner, by its missing heartbeat.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds, self._what, self._last = seconds, "", 0.0
        self._over = threading.Event()

    def __enter__(self) -> Watchdog:
        self.moved("begin")
        if self._seconds > 0 and jax.process_count() > 1:
            threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._over.set()

    def moved(self, what: str) -> None:
        """what: is done next."""
        self._what, self._last = what, time.monotonic()

    def _watch(self) -> None:
        while not self._over.wait(min(1.0, self._seconds / 4)):
            if time.monotonic() - self._last > self._seconds:
                print(
                    f"lcm-jax: process {jax.process_index()} of {jax.process_count()} has waited for "
                    f"{self._seconds:g} s at {self._what}: another one hangs. This one ends; start all of them again, "
                    "and the run goes on from its last checkpoint (--hang-timeout)",
                    file=sys.stderr,
                    flush=True,
                )
                os._exit(1)
