"""Measurements of a run: times, FLOPs and memory, read from clocks and counters without waiting for a device."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from lcm_jax.runtime.hardware import GIB, chip_of

WARM = 10  # steps before the traced ones: they compile and fill caches


class Meter:
    """A meter of a run: time of a step, time spent waiting for data, and FLOPs reached, since the last reading.

    step: the step from which it counts. devices: the number of devices. `flops`, to be set by its user, is the FLOPs of
    one step over all devices.
    """

    def __init__(self, step: int, devices: int) -> None:
        self.flops, self.devices = 0.0, devices
        self.restart(step)

    def restart(self, step: int) -> None:
        """Restart the timers at `step`, which leaves out what happened before, such as compilation and previews."""
        self._step, self._time, self._waited = step, time.perf_counter(), 0.0

    def wait(self, batches: Any) -> Any:
        """Return next(batches), and add its time to the time spent waiting for data."""
        start = time.perf_counter()
        batch = next(batches)
        self._waited += time.perf_counter() - start
        return batch

    def read(self, step: int) -> dict[str, float]:
        """Return the scalars since the last reading, and restart:

        step_time    seconds per step
        data_wait    share of this time in which the loop waited for a batch
        mfu          FLOPs of matrix products and convolutions (including what `remat` computes again), as a share of
                     the chips' bfloat16 peak; for an unknown chip `tflops` instead: TFLOP/s on each device
        memory       GiB, the highest use so far: of one device, or of the process if the device does not report it
        """
        seconds = max(time.perf_counter() - self._time, 1e-9)
        step_time = seconds / max(step - self._step, 1)
        scalars = {"step_time": step_time, "data_wait": self._waited / seconds, "memory": memory() / GIB}
        if self.flops:
            chip, speed = chip_of(jax.local_devices()[0].device_kind), self.flops / self.devices / step_time
            scalars |= {"mfu": speed / chip.flops} if chip else {"tflops": speed / 1e12}
        self.restart(step)
        return scalars


def memory() -> int:
    """Return the peak memory in bytes of this process's first device, or of the process if the device reports none."""
    stats = jax.local_devices()[0].memory_stats() or {}
    unit = 1 if sys.platform == "darwin" else 1024
    return stats.get("peak_bytes_in_use") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


class Profile:
    """A context that traces `steps` steps, from WARM steps after the start, into `folder`, for xprof or TensorBoard.

    steps: 0 traces none.
    """

    def __init__(self, folder: Path, start: int, steps: int) -> None:
        self._folder, self._first, self._end = folder, start + WARM + 1, start + WARM + steps
        self._steps, self._tracing = steps, False

    def __enter__(self) -> Callable[[int, Any], None]:
        return self._before

    def _before(self, step: int, state: Any) -> None:
        """Start or stop the trace; to be called before every step, with the state after the last."""
        if self._steps and step == self._first:
            jax.profiler.start_trace(str(self._folder))
            self._tracing = True
        elif step > self._end:
            self._stop(state)

    def _stop(self, state: Any) -> None:
        if self._tracing:
            jax.block_until_ready(state)
            jax.profiler.stop_trace()
            self._tracing = False

    def __exit__(self, *_: object) -> None:
        self._stop(None)
