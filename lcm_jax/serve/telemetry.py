"""The statistics of a server, updated in the event loop: of one session for its client, of all for /metrics."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Mapping
from typing import Any

from lcm_jax.serve.session import Answer

QUANTILES = (0.5, 0.95, 0.99)
WINDOW = 1000  # last latencies, of which the quantiles are


def quantile(values: list[float], q: float) -> float:
    """Return the smallest value that at least a share q of all values does not exceed; nan for no values.

    >>> quantile([3.0, 1.0, 2.0, 4.0], 0.5)
    2.0
    """
    return sorted(values)[max(math.ceil(q * len(values)), 1) - 1] if values else math.nan


class Telemetry:
    """The counts and times of one session, or, as `parent`, of all.

    drawn, same: answers with a picture and without. lost: frames dropped for newer ones before they were computed.
    unsent: pictures dropped because the client was too slow. failed: frames that could not be read. latencies: seconds
    from the arrival of a frame to the sending of the first picture that shows it, including its calls in the stream
    batch.
    """

    def __init__(self, parent: Telemetry | None = None) -> None:
        self.parent = parent
        self.drawn = self.same = self.lost = self.unsent = self.failed = 0
        self.latencies: deque[float] = deque(maxlen=WINDOW)
        self.timed, self.seconds = 0, 0.0  # number and sum of all latencies
        self._sent: deque[float] = deque(maxlen=WINDOW)
        self._parts: dict[str, float] = {}

    def count(self, name: str, number: int = 1) -> None:
        """Add a number to one of the counts, here and in the parent."""
        setattr(self, name, getattr(self, name) + number)
        if self.parent is not None:
            self.parent.count(name, number)

    def sent(self, answer: Answer, encoded: float) -> None:
        """Record an answer that has just been sent; encoded: time.perf_counter when its picture was encoded."""
        self.count("same" if answer.picture is None else "drawn")
        now, frame = time.perf_counter(), answer.frame
        self._sent.append(now)
        if answer.picture is None:
            return
        if answer.owed:
            self._time(now - answer.shows.received)
        parts = {
            "decode": frame.decoded - frame.received,
            "wait": answer.taken - frame.decoded,
            "compute": answer.done - answer.taken,
            "encode": encoded - answer.done,
            "send": now - encoded,
        }
        for name, value in parts.items():  # smoothed over about ten pictures
            self._parts[name] = value + 0.9 * (self._parts.get(name, value) - value)

    def _time(self, latency: float) -> None:
        self.latencies.append(latency)
        self.timed, self.seconds = self.timed + 1, self.seconds + latency
        if self.parent is not None:
            self.parent._time(latency)

    def stats(self) -> dict[str, Any]:
        """Return the statistics for a client: answers in the last second, times in milliseconds, and counts."""
        now, latencies = time.perf_counter(), list(self.latencies)
        return {
            "fps": sum(now - at < 1.0 for at in self._sent),
            "latency_ms": {f"p{round(100 * q)}": _ms(quantile(latencies, q)) for q in QUANTILES},
            "times_ms": {name: _ms(value) for name, value in self._parts.items()},
            "frames": self.drawn + self.same,
            "skipped": self.same / max(self.drawn + self.same, 1),
            "dropped": self.lost + self.unsent,
        }

    def metrics(self, gauges: Mapping[str, float]) -> str:
        """Return Prometheus' text format; gauges: further numbers by name, without the prefix."""
        latencies = list(self.latencies)
        lines = [
            "# TYPE lcm_jax_frames_total counter",
            f'lcm_jax_frames_total{{result="drawn"}} {self.drawn}',
            f'lcm_jax_frames_total{{result="same"}} {self.same}',
            f'lcm_jax_frames_total{{result="failed"}} {self.failed}',
            "# TYPE lcm_jax_dropped_total counter",
            f'lcm_jax_dropped_total{{where="in"}} {self.lost}',
            f'lcm_jax_dropped_total{{where="out"}} {self.unsent}',
            "# TYPE lcm_jax_skipped_share gauge",
            f"lcm_jax_skipped_share {self.same / max(self.drawn + self.same, 1):.6g}",
            "# TYPE lcm_jax_latency_seconds summary",
            *(f'lcm_jax_latency_seconds{{quantile="{q}"}} {_number(quantile(latencies, q))}' for q in QUANTILES),
            f"lcm_jax_latency_seconds_sum {self.seconds:.6g}",
            f"lcm_jax_latency_seconds_count {self.timed}",
        ]
        for name, value in gauges.items():
            kind = "counter" if name.endswith("_total") else "gauge"
            lines += [f"# TYPE lcm_jax_{name} {kind}", f"lcm_jax_{name} {value:g}"]
        return "\n".join(lines) + "\n"


def _ms(seconds: float) -> float | None:
    """Return milliseconds, None for nan, which JSON does not have."""
    return None if math.isnan(seconds) else round(1000.0 * seconds, 1)


def _number(value: float) -> str:
    return "NaN" if math.isnan(value) else f"{value:.6g}"
