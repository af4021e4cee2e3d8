"""Jobs of several processes: how the processes find one another, end together, and do not wait forever."""

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
import numpy as np
from jax.experimental import multihost_utils
from tqdm import tqdm

from lcm_jax.runtime.messages import is_out_of_memory

SAVED = 75
"""The exit code of a training that a signal ended after its state was saved, EX_TEMPFAIL of sysexits.h: start again."""

# Environment variables of the clusters that jax.distributed.initialize detects, and whether a value shows a job of
# several processes. To detect other clusters JAX asks the network, which needs --coordinator auto.
_CLUSTER_VARIABLES: Mapping[str, Callable[[str], bool]] = {
    "SLURM_NTASKS": lambda n: "SLURM_STEP_NODELIST" in os.environ and int(n) > 1,
    "TPU_WORKER_HOSTNAMES": lambda names: "," in names,  # GKE
    "TPU_PROCESS_ADDRESSES": lambda names: "," in names,
    "OMPI_COMM_WORLD_SIZE": lambda n: int(n) > 1,
    "JAX_COORDINATOR_ADDRESS": bool,
}


def initialize(
    coordinator: str | None = None, processes: int | None = None, process: int | None = None, *, timeout: int = 100
) -> None:
    """Join this process to its job of several processes, before any device is used; without a job do nothing.

    coordinator: "host:port" of process 0, together with `processes` and `process`; or "auto": what JAX detects
        (metadata of TPUs, Kubernetes). None: from the environment of Slurm, Open MPI or GKE, if it has a job of several
        processes.
    processes: their number.
    process: this one's number, from 0.
    timeout: seconds without a heartbeat after which a process counts as dead, which ends the others; at the start they
        wait three times as long for one another.

    Raises ValueError if only some of the three are given, if one of them is wrong, or if the job cannot be joined.
    """
    flags = {"--coordinator": coordinator, "--processes": processes, "--process": process}
    if coordinator == "auto" or not any(value is not None for value in flags.values()):
        detected = (shows_job(os.environ[key]) for key, shows_job in _CLUSTER_VARIABLES.items() if key in os.environ)
        if coordinator is None and not any(detected):
            return
        address: dict[str, Any] = {}
    else:
        if missing := [flag for flag, value in flags.items() if value is None]:
            raise ValueError(f"{', '.join(missing)} missing: a job is named by all of {', '.join(flags)}; give all")
        assert processes is not None and process is not None and coordinator is not None  # noqa: PT018
        if not 0 <= process < processes:
            raise ValueError(f"--process {process}: it must be from 0 to --processes - 1 = {processes - 1}")
        if not coordinator.rpartition(":")[2].isdigit():
            raise ValueError(f"--coordinator {coordinator}: it must be HOST:PORT of process 0, or auto")
        address = {"coordinator_address": coordinator, "num_processes": processes, "process_id": process}
        message = f"process {process} of {processes} joins the others at {coordinator}"
        print(f"lcm-jax: {message}, and waits for them for at most {3 * timeout} s", file=sys.stderr)
    try:
        jax.distributed.initialize(
            **address,
            initialization_timeout=3 * timeout,  # after it the runtime aborts the process, with its own message
            heartbeat_timeout_seconds=timeout,
            shutdown_timeout_seconds=3600,  # finished processes wait for the others, such as process 0 while it exports
        )
    except (ValueError, RuntimeError) as error:
        raise ValueError(
            f"no job of several processes ({_first_line(error)}): give --coordinator, --processes and --process"
        ) from error
    original_hook = sys.excepthook

    def exit_at_once(*error: Any) -> None:  # JAX's own exit handler would wait for the other processes
        original_hook(*error)
        leave_job(1)

    sys.excepthook = exit_at_once


def is_main() -> bool:
    """Return whether this process is the one that writes logs, configs and exports."""
    return jax.process_index() == 0


def say(text: str) -> None:
    """Write one line on standard error, by the main process alone; it does not disturb a progress bar."""
    if is_main():
        tqdm.write(f"lcm-jax: {text}", file=sys.stderr)


def first_said(text: str) -> str:
    """Return the text of the first process of the job that has one, or ""; all processes must call it.

    text: of this process; at most 400 bytes of it arrive.
    """
    if jax.process_count() == 1:
        return text
    line = np.zeros(400, np.uint8)
    said = np.frombuffer(text.encode()[: len(line)], np.uint8)
    line[: len(said)] = said
    lines = multihost_utils.process_allgather(line)
    texts = [bytes(line[line > 0]).decode(errors="ignore") for line in np.asarray(lines)]
    return next((text for text in texts if text), "")


def leave_job(code: int) -> None:
    """Leave the job; after an error exit at once, without waiting for processes that may never end.

    code: 0 or SAVED, with which all processes end together, or that of an error.
    """
    if not jax.distributed.is_initialized():
        return
    if code in (0, SAVED):
        jax.distributed.shutdown()
        return
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def peer_failure_message(error: BaseException) -> str | None:
    """Return a message for a runtime error that another process of the job has caused; None for other errors."""
    of_this_process = is_out_of_memory(error)
    if isinstance(error, jax.errors.JaxRuntimeError) and jax.distributed.is_initialized() and not of_this_process:
        return (
            f"process {jax.process_index()} of {jax.process_count()} ends: another process is gone or does not answer "
            f"({_first_line(error)}); start all of them again, and the run continues from its last checkpoint"
        )
    return None


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__


class Preempted(SystemExit):
    """The exit of a run that a signal ended, after its state was saved: exit code SAVED."""

    def __init__(self) -> None:
        super().__init__(SAVED)


class Preemption:
    """A context in which `preemption(step)` says whether the run must end, to be called after every step.

    It must after a SIGTERM, or a SIGINT (Ctrl-C); a second SIGINT raises KeyboardInterrupt at once. All processes of a
    job get the same answer: it is true at one step, the first that none of them had passed when the signal came.

    reason: the signal's name, for messages.
    """

    def __init__(self) -> None:
        self.reason = "SIGTERM"
        self._asked = False
        self._previous_handlers: dict[int, Any] = {}

    def __enter__(self) -> Preemption:
        if threading.current_thread() is threading.main_thread():  # only it may set a handler
            handlers: dict[int, Any] = {signal.SIGTERM: self._notice, signal.SIGINT: self._notice}
            if jax.distributed.is_initialized():  # then the runtime has a handler of SIGTERM
                del handlers[signal.SIGTERM]
            self._previous_handlers = {number: signal.signal(number, handler) for number, handler in handlers.items()}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)

    def _notice(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            if self._asked:
                raise KeyboardInterrupt
            self.reason = "Ctrl-C"
            # not print, which may be what the signal has interrupted
            os.write(2, b"\nlcm-jax: Ctrl-C: saves after this step and ends; once more ends at once\n")
            if jax.distributed.is_initialized():
                os.kill(os.getpid(), signal.SIGTERM)  # to the runtime, which tells the other processes
        self._asked = True

    def __call__(self, step: int) -> bool:
        if jax.distributed.is_initialized():
            return multihost_utils.reached_preemption_sync_point(step)
        return self._asked


class Watchdog:
    """A watchdog that ends this process of a job after `seconds` without progress, so that no peer waits forever.

    seconds: 0 never ends it. A process that dies or stops is noticed sooner, by its missing heartbeat.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds, self._what, self._last = seconds, "", 0.0
        self._finished = threading.Event()

    def __enter__(self) -> Watchdog:
        self.reset("begin")
        if self._seconds > 0 and jax.process_count() > 1:
            threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._finished.set()

    def reset(self, what: str) -> None:
        """Reset the timer; `what` names what the process does next, for the message."""
        self._what, self._last = what, time.monotonic()

    def _watch(self) -> None:
        while not self._finished.wait(min(1.0, self._seconds / 4)):
            if time.monotonic() - self._last > self._seconds:
                print(
                    f"lcm-jax: process {jax.process_index()} of {jax.process_count()} has waited for "
                    f"{self._seconds:g} s at {self._what}: another process hangs. This one ends; start all of them "
                    "again, and the run continues from its last checkpoint (--hang-timeout)",
                    file=sys.stderr,
                    flush=True,
                )
                os._exit(1)
