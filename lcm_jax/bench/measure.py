"""Rows that are timed in turns, and their table.

A case is a list of rows. A row is a function without arguments that ends when its result is ready. The rows of a case
run in turns, so that other work of the machine slows all of them alike and their ratios can be trusted.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lcm_jax.precision import bfloat16_cpu
from lcm_jax.precision.context import is_low_precision
from lcm_jax.runtime.compiler_options import compiler_options, memory_of
from lcm_jax.runtime.flops import flops
from mmdit.attention import lowering_for


class Cost(NamedTuple):
    """The cost of one run: floating-point operations, and bytes of arguments, results and temporaries on a device."""

    flops: float | None = None
    memory: int | None = None


@dataclass(frozen=True, kw_only=True)
class Row:
    """Something that is timed.

    run: the timed function. prepare: compiles it and returns the cost of a run. frames: the pictures (or samples) that
    one run makes. against: the name of the row that this one is compared with, as a ratio. note: returns a remark for
    the table; it is called after the runs.
    """

    name: str
    run: Callable[[], Any]
    prepare: Callable[[], Cost] = Cost
    frames: int = 1
    against: str | None = None
    note: Callable[[], str] = lambda: ""


def program(name: str, function: Callable[..., Any], *arguments: Any, **options: Any) -> Row:
    """Return a row that runs one compiled program, function(*arguments). options: other fields of the row."""
    programs: list[Any] = []

    def prepare() -> Cost:
        how = compiler_options(low_precision=is_low_precision(*arguments))
        programs.append(jax.jit(function, compiler_options=how).lower(*arguments).compile())
        return Cost(flops_of(function, *arguments), memory_of(programs[0]))

    return Row(name=name, run=lambda: programs[0](*arguments), prepare=prepare, **options)


def flops_of(function: Callable[..., Any], *arguments: Any) -> float:
    """Return the floating-point operations of a function's matrix products and convolutions.

    arguments: arrays or their shapes. The function is traced for a CPU, since the operations inside other devices'
    attention kernels cannot be counted.
    """
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), arguments)
    with lowering_for("cpu"):
        return flops(jax.make_jaxpr(lambda *arrays: function(*arrays))(*shapes))


class Ceilings(NamedTuple):
    """The measured limits of this device: operations a second in a matrix product, bytes a second read and written."""

    flops: float
    bytes: float


@cache
def ceilings(dtype: str) -> Ceilings:
    """Measure the limits of this device with a large square product and a large copy, the best of a few runs."""
    side, length = (2048, 2**26) if jax.default_backend() == "cpu" else (8192, 2**30)
    a = jax.random.normal(jax.random.key(0), (side, side), dtype)
    flat = jax.random.normal(jax.random.key(1), (length // a.dtype.itemsize,), dtype)

    half = jax.default_backend() == "cpu" and dtype == "bfloat16"
    multiply = bfloat16_cpu.OVERRIDES.multiply if half else jnp.matmul

    def repeated(body: Callable[[Any], Any]) -> Callable[..., Any]:
        loop = partial(jax.lax.fori_loop, 0, _REPEATS, lambda _, x: body(x))
        return jax.jit(loop, compiler_options=compiler_options(low_precision=half))

    product = _best(repeated(lambda x: multiply(x, a).astype(dtype) * jnp.asarray(side**-0.5, dtype)), a)
    copied = _best(repeated(jnp.negative), flat)
    return Ceilings(_REPEATS * 2 * side**3 / product, _REPEATS * 2 * flat.nbytes / copied)


_REPEATS = 8  # in one program, so that its start does not count


def _best(function: Callable[..., Any], *arguments: Any) -> float:
    return min(_timed(lambda: function(*arguments)) for _ in range(6))


@dataclass(kw_only=True)
class Result:
    """The result of a row: the seconds of each run, those of the first one with compilation, and the cost of a run."""

    row: Row
    first: float
    cost: Cost = Cost()
    seconds: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        """The median seconds of a run."""
        return float(np.median(self.seconds))

    @property
    def quartiles(self) -> tuple[float, float]:
        """The quartiles of the seconds of a run."""
        low, high = np.quantile(self.seconds, [0.25, 0.75])
        return float(low), float(high)

    @property
    def frame(self) -> float:
        """The median seconds of one picture."""
        return self.median / self.row.frames

    def over(self, base: Result) -> tuple[float, float, float]:
        """Return how many times faster this row is than `base`: the ratio of medians, and quartiles over the turns."""
        ratios = np.divide(base.seconds, self.seconds) * self.row.frames / base.row.frames
        low, high = np.quantile(ratios, [0.25, 0.75])
        return base.frame / self.frame, float(low), float(high)

    def record(self) -> dict[str, Any]:
        """Return everything that was measured as a dict for JSON."""
        return {"frames": self.row.frames, "first": self.first, **self.cost._asdict(), "seconds": self.seconds}


def measure(rows: Sequence[Row], repeats: int) -> dict[str, Result]:
    """Run every row once to compile it, once more, and then `repeats` times in turns; return name -> result."""
    results = {}
    for row in rows:
        start = time.perf_counter()
        cost = row.prepare()
        jax.block_until_ready(row.run())
        results[row.name] = Result(row=row, first=time.perf_counter() - start, cost=cost)
    for row in rows:
        jax.block_until_ready(row.run())
    for _ in range(repeats):
        for row in rows:
            results[row.name].seconds.append(_timed(row.run))
    return results


def _timed(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - start


def table(results: Mapping[str, Result], ceiling: Ceilings | None = None) -> str:
    """Return a Markdown table with a line for each row.

    It has frames a second, milliseconds a frame with quartiles, the ratio, the seconds of the first run, and the costs
    where they are known.
    """
    costly = any(result.cost.flops for result in results.values())
    costs = ["TFLOP/s", "of a matrix product", "GiB"] if costly else []
    heads = ["", "frames/s", "ms/frame", "quartiles", "ratio", "first, s", *costs, ""]
    lines = [_line(heads), _line(["---"] * len(heads))]
    for name, result in results.items():
        per_frame = 1e3 / result.row.frames  # milliseconds a frame from the seconds of a run
        low, high = result.quartiles
        ratio = ""
        base = results.get(result.row.against or "")
        if base is not None:
            middle, *quartiles = result.over(base)
            ratio = f"{middle:.2f}x ({quartiles[0]:.2f}-{quartiles[1]:.2f}) {result.row.against}"
        cells = [
            name,
            f"{1.0 / result.frame:.1f}",
            f"{result.median * per_frame:.2f}",
            f"{low * per_frame:.2f}-{high * per_frame:.2f}",
            ratio,
            f"{result.first:.1f}",
        ]
        if costly:
            rate = None if result.cost.flops is None else result.cost.flops / result.median
            cells.append("" if rate is None else f"{rate / 1e12:.3g}")
            cells.append("" if rate is None or ceiling is None else f"{100 * rate / ceiling.flops:.0f} %")
            cells.append("" if result.cost.memory is None else f"{result.cost.memory / 2**30:.2f}")
        lines.append(_line([*cells, result.row.note()]))
    return "\n".join(lines)


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
