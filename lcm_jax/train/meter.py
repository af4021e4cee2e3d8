"""What a run costs: read now and then from clocks and counters, of which none waits for a device."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from lcm_jax.runtime.hardware import GIB, chip_of

WARM = 10  # steps before those that are traced: compilation, and what fills caches


class Meter:
    """Seconds of the steps since the last reading, of the waiting for data in them, and what became of the FLOPs.

    flops: of one step over all devices; devices: that share them.
    """

    def __init__(self, step: int, devices: int) -> None:
        self.flops, self.devices = 0.0, devices
        self.restart(step)

    def restart(self, step: int) -> None:
        """The steps from here on count: what has been since is no training."""
        self._step, self._time, self._waited = step, time.perf_counter(), 0.0

    def wait(self, batches: Any) -> Any:
        """next(batches), timed."""
        start = time.perf_counter()
        batch = next(batches)
        self._waited += time.perf_counter() - start
        return batch

    def read(self, step: int) -> dict[str, float]:
        """Since the last reading:

        step_time    seconds of a step
        data_wait    share of them in which the loop waited for a batch
        mfu          FLOPs of matrix products and convolutions (what `remat` computes again counts too), of what the
                     chips can do in bfloat16; for a chip that is not known tflops instead, a second, of each device
        memory       GiB, the most that was in use so far: of one device, or of the process where a device does not say
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
    """Bytes: the most that this process's first device held at once, or the process itself."""
    stats = jax.local_devices()[0].memory_stats() or {}
    unit = 1 if sys.platform == "darwin" else 1024
    return stats.get("peak_bytes_in_use") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


class Profile:
    """A trace of `steps` steps, WARM after the run's start, in `folder`, for xprof or TensorBoard. 0: none."""

    def __init__(self, folder: Path, start: int, steps: int) -> None:
        self._folder, self._first, self._end = folder, start + WARM + 1, start + WARM + steps
        self._steps, self._tracing = steps, False

    def __enter__(self) -> Callable[[int, Any], None]:
        return self._before

    def _before(self, step: int, state: Any) -> None:
        """To be called before every step, with what the last gave."""
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
