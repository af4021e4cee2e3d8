"""The time of a row by operations, from a trace of one run."""

from __future__ import annotations

import re
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

_NOT_AN_OPERATION = re.compile(r"^\$|ThunkExecutor|PjRt|Execute|Wait|Await|Thread|Transfer|Buffer|Parse|::|[()]")


def operations(run: Callable[[], Any], *, most: int = 12) -> list[tuple[str, float, int]]:
    """Return (operation, milliseconds, count) of one run, the most expensive first, at most `most` of them.

    Numbers at the ends of names are removed. On an accelerator the operations are those of its streams, elsewhere those
    of XLA's threads.
    """
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready(run())
        trace = next(Path(folder).rglob("*.xplane.pb"))
        data = jax.profiler.ProfileData.from_file(str(trace))
    planes = list(data.planes)
    devices = [plane for plane in planes if plane.name.startswith("/device:")]
    nanoseconds: Counter[str] = Counter()
    times: Counter[str] = Counter()
    for plane in devices or [plane for plane in planes if plane.name == "/host:CPU"]:
        for line in plane.lines:
            if line.name in ("Steps", "XLA Modules", "Framework Ops", "Source code", "python") or (
                devices and plane.name.startswith("/device:GPU") and not line.name.startswith("Stream")
            ):
                continue
            for event in line.events:
                if devices or not _NOT_AN_OPERATION.search(event.name):
                    name = re.sub(r"[._]\d+", "", event.name)[:96]
                    nanoseconds[name] += event.duration_ns
                    times[name] += 1
    return [(name, spent / 1e6, times[name]) for name, spent in nanoseconds.most_common(most)]


def table(found: list[tuple[str, float, int]]) -> str:
    """Return the operations as a Markdown table, one line each."""
    lines = [f"| {name} | {spent:.2f} | {count} |" for name, spent, count in found]
    return "\n".join(["| operation | ms | times |", "| --- | --- | --- |", *lines])
