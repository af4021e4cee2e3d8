"""The bench measures what it says: rows in turns, ratios of medians, a file of every time."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from lcm_jax import bench
from lcm_jax.bench import Row, measure, moving_scene, table
from lcm_jax.weights.files import read_json


def test_rows_run_in_turns() -> None:
    """Once to compile, once more, then alternately."""
    order: list[str] = []
    rows = [Row(name=name, run=lambda name=name: order.append(name)) for name in "ab"]
    results = measure(rows, 3)
    assert "".join(order) == "ab" + "ab" + "ababab"
    assert all(len(result.seconds) == 3 for result in results.values())


def test_ratios_are_of_medians_per_frame() -> None:
    rows = [Row(name="slow", run=lambda: None), Row(name="fast", run=lambda: None, frames=4, against="slow")]
    results = measure(rows, 3)
    results["slow"].seconds, results["fast"].seconds = [1.0, 2.0, 30.0], [2.0, 2.0, 2.0]
    line = next(line for line in table(results).splitlines() if line.startswith("| fast"))
    assert "| 2.0 | 500.0 |" in line
    assert "4.00x slow" in line


def test_the_scene_moves() -> None:
    scene = moving_scene((16, 24), 5)
    assert len(scene) == 5
    assert scene[0].shape == (16, 24, 3)
    assert all(not np.array_equal(a, b) for a, b in pairwise(scene))


def test_a_case_is_run_and_written(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Pipe:
        size = (8, 8)

    rows = [Row(name="one", run=lambda: None)]
    monkeypatch.setattr(bench, "CASES", {"small": lambda pipe: iter([("A title", rows)])})
    bench.run(Pipe(), ["small"], repeats=4, out=tmp_path / "b" / "x.json", model="none")  # type: ignore[arg-type]
    assert "## A title" in capsys.readouterr().out
    kept = read_json(tmp_path / "b" / "x.json")
    assert len(kept["A title"]["one"]["seconds"]) == 4
    assert {"device", "jax", "date", "model"} <= set(kept)
    with pytest.raises(ValueError, match="large: no such case; known are small"):
        bench.run(Pipe(), ["large"], repeats=1, out=None, model="none")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="--repeats 0"):
        bench.run(Pipe(), ["small"], repeats=0, out=None, model="none")  # type: ignore[arg-type]
