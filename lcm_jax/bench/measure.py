"""Rows that are timed in turns, and their table.

A case is a list of rows, each a function without arguments that ends when its result is there. Rows of one case are run
in turns, so that what else the machine does falls on all of them alike, and their ratios can be believed.
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
    """Of one run: floating-point operations, and the bytes on a device of arguments, results and temporaries."""

    flops: float | None = None
    memory: int | None = None


@dataclass(frozen=True, kw_only=True)
class Row:
    """Something that is timed. frames: pictures (or samples) that one run makes. against: the row it is a ratio to.

    prepare: compiles, and says what a run costs.
    """

    name: str
    run: Callable[[], Any]
    prepare: Callable[[], Cost] = Cost
    frames: int = 1
    against: str | None = None
    note: Callable[[], str] = lambda: ""  # asked for after the runs


def program(name: str, function: Callable[..., Any], *arguments: Any, **options: Any) -> Row:
    """A row of one compiled program. options: of the row."""
    held: list[Any] = []

    def prepare() -> Cost:
        how = compiler_options(low_precision=is_low_precision(*arguments))
        held.append(jax.jit(function, compiler_options=how).lower(*arguments).compile())
        return Cost(flops_of(function, *arguments), memory_of(held[0]))

    return Row(name=name, run=lambda: held[0](*arguments), prepare=prepare, **options)


def flops_of(function: Callable[..., Any], *arguments: Any) -> float:
    """Floating-point operations of matrix products and convolutions, of arrays or their shapes.

    Counted on what is traced for a CPU: attention kernels of other devices cannot be looked into.
    """
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), arguments)
    with lowering_for("cpu"):
        return flops(jax.make_jaxpr(lambda *given: function(*given))(*shapes))


class Ceilings(NamedTuple):
    """What this device was seen to do: operations a second in a matrix product, bytes a second read and written."""

    flops: float
    bytes: float


@cache
def ceilings(dtype: str) -> Ceilings:
    """Measured by a large square product and a large copy, the best of a few runs."""
    side, length = (2048, 2**26) if jax.default_backend() == "cpu" else (8192, 2**30)
    a = jax.random.normal(jax.random.key(0), (side, side), dtype)
    flat = jax.random.normal(jax.random.key(1), (length // a.dtype.itemsize,), dtype)

    in_halves = jax.default_backend() == "cpu" and dtype == "bfloat16"
    multiply = bfloat16_cpu.OVERRIDES.multiply if in_halves else jnp.matmul

    def again(body: Callable[[Any], Any]) -> Callable[..., Any]:
        loop = partial(jax.lax.fori_loop, 0, _AGAIN, lambda _, x: body(x))
        return jax.jit(loop, compiler_options=compiler_options(low_precision=in_halves))

    product = _best(again(lambda x: multiply(x, a).astype(dtype) * jnp.asarray(side**-0.5, dtype)), a)
    copied = _best(again(jnp.negative), flat)
    return Ceilings(_AGAIN * 2 * side**3 / product, _AGAIN * 2 * flat.nbytes / copied)


_AGAIN = 8  # in one program, so that its start does not count


def _best(function: Callable[..., Any], *arguments: Any) -> float:
    return min(_timed(lambda: function(*arguments)) for _ in range(6))


@dataclass(kw_only=True)
class Result:
    """Of a row: seconds of each run, of the first with what compiles it, and the cost of one."""

    row: Row
    first: float
    cost: Cost = Cost()
    seconds: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return float(np.median(self.seconds))

    @property
    def spread(self) -> tuple[float, float]:
        """The quartiles."""
        low, high = np.quantile(self.seconds, [0.25, 0.75])
        return float(low), float(high)

    @property
    def frame(self) -> float:
        """Median seconds of one picture."""
        return self.median / self.row.frames

    def over(self, base: Result) -> tuple[float, float, float]:
        """How much faster than another row: the ratio of medians, and the quartiles of those of each turn."""
        ratios = np.divide(base.seconds, self.seconds) * self.row.frames / base.row.frames
        low, high = np.quantile(ratios, [0.25, 0.75])
        return base.frame / self.frame, float(low), float(high)

    def record(self) -> dict[str, Any]:
        """Everything that was measured, JSON-able."""
        return {"frames": self.row.frames, "first": self.first, **self.cost._asdict(), "seconds": self.seconds}


def measure(rows: Sequence[Row], repeats: int) -> dict[str, Result]:
    """Every row once, which compiles it, once more, and then `repeats` times in turns."""
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
    """One line for each row: frames a second, milliseconds with quartiles, ratio, first run, and costs where known."""
    costly = any(result.cost.flops for result in results.values())
    more = ["TFLOP/s", "of a matrix product", "GiB"] if costly else []
    heads = ["", "frames/s", "ms/frame", "quartiles", "ratio", "first, s", *more, ""]
    lines = [_line(heads), _line(["---"] * len(heads))]
    for name, result in results.items():
        each = 1e3 / result.row.frames
        low, high = result.spread
        ratio = ""
        base = results.get(result.row.against or "")
        if base is not None:
            middle, *quartiles = result.over(base)
            ratio = f"{middle:.2f}x ({quartiles[0]:.2f}-{quartiles[1]:.2f}) {result.row.against}"
        cells = [
            name,
            f"{1.0 / result.frame:.1f}",
            f"{result.median * each:.2f}",
            f"{low * each:.2f}-{high * each:.2f}",
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
