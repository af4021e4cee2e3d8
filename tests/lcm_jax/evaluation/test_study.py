"""A study: which cells run, what is kept of them, and the table that compares them with a paper."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import jax.numpy as jnp
import matplotlib as mpl
import numpy as np
import pytest

from lcm_jax.data import Loader
from lcm_jax.evaluation.study import Column, Study, curves, main, points, with_bounds
from lcm_jax.train.config import TrainConfig
from lcm_jax.train.loop import LoopConfig
from lcm_jax.train.optimizer import OptimizerConfig
from lcm_jax.train.step_cost import step_cost
from lcm_jax.train.task import Task
from lcm_jax.weights.safetensors_files import read_json

mpl.use("agg")
WIDTH = 32
POINTS = [{"x": np.float32(i)} for i in range(1, 9)]


@dataclass(frozen=True, kw_only=True)
class LineTask:
    """y = slope x is to be found; every run counts itself."""

    slope: float = 1.0
    log: str = ""
    fail: bool = False
    can_fail: ClassVar[bool] = True

    def build(self) -> Task:
        def loss(params: Any, ema: Any, frozen: Any, batch: Any, key: Any, progress: Any) -> Any:
            matrix = frozen @ jnp.full((WIDTH, 1), params["a"])
            error = jnp.mean((params["a"] * batch["x"] - self.slope * batch["x"]) ** 2) + 0.0 * jnp.sum(matrix)
            return error, {"loss": error}

        def export(ema: Any, folder: Path) -> None:
            if self.fail and self.can_fail:
                raise KeyboardInterrupt
            folder.mkdir(exist_ok=True)
            with Path(self.log).open("a") as file:
                file.write(f"{self.slope:g} ")

        return Task(
            init=lambda key: {"a": jnp.zeros(())},
            loss=loss,
            frozen=jnp.ones((WIDTH, WIDTH)),
            batches=lambda n, seed, rows=None: iter(Loader(POINTS, n, seed, rows=rows)),
            preview=lambda ema, frozen, batched_map: {"validation": float(ema["a"])},
            export=export,
        )


def config(slope: float, log: Path, *, fail: bool = False) -> TrainConfig:
    loop = LoopConfig(steps=6, batch_size=4, save_every=2, preview_every=3, log_every=1)
    return TrainConfig(
        task=LineTask(slope=slope, log=str(log), fail=fail), loop=loop, optimizer=OptimizerConfig(learning_rate=0.5)
    )


def study(log: Path, **options: Any) -> Study:
    slopes = {"flat": 1.0, "steep/er": 2.0, "wall": 3.0}

    def plot(small_study: Study, cells: Any) -> None:
        _, panels = mpl.pyplot.subplots(1, 2)
        curves(panels[0], cells, "validation")
        points(panels[1], cells, small_study.columns[0])

    defaults: dict[str, Any] = {
        "name": "lines",
        "about": "Lines.",
        "variants": {name: lambda scale, slope=slope: config(slope, log) for name, slope in slopes.items()},
        "measure": lambda name, config, workdir: {"error": config.task.slope + config.loop.seed, "speed": 1.0},
        "columns": [
            Column(key="error", title="error", paper={"flat": 30.0, "steep/er": 20.0, "wall": 10.0}),
            Column(key="speed", title="speed", best="highest", ranked=False),
        ],
        "plot": plot,
        "compare": lambda scores: {name: {"of": float(len(scores))} for name in scores},
    }
    return Study(**{**defaults, **options})


def test_cells_run_once_and_the_table_has_the_paper_beside_them(tmp_path: Path) -> None:
    log, out = tmp_path / "log", tmp_path / "out"
    asked: list[str] = []

    def prepare(name: str, scale: str, config: TrainConfig) -> TrainConfig:
        asked.append(name)
        return config

    small_study = study(log, prepare=prepare)
    assert main(small_study, ["--variants", "flat", "--out", str(out)]) == 0
    assert main(small_study, ["--seeds", "0", "2", "--out", str(out)]) == 0
    assert sorted(log.read_text().split()) == ["1", "1", "2", "2", "3", "3"]
    assert len(asked) == 6  # those that were done were not prepared again
    found = read_json(out / "table.json")
    assert found["spearman"]["error"] == -1.0
    assert found["rows"]["steep/er"]["error"] == {
        "mean": 3.0, "standard_error": 1.0, "rank": 2.0, "paper_rank": 2.0, "paper": 20.0,
        "interval": [pytest.approx(3.0 - 12.706, abs=1e-3), pytest.approx(3.0 + 12.706, abs=1e-3)],  # t of 1 degree
        "interval_over": "seeds",
    }  # fmt: skip
    assert found["cells"]["wall"]["2"]["scores"]["of"] == 3.0
    text = (out / "table.md").read_text()
    assert "| steep/er | 2 | 0.00 M | 3 [-10, 16] (2) | 20 (2) | 1.00 [1.00, 1.00] |" in text
    assert "In brackets: 95% intervals of the mean, over seeds by Student's t.\n" in text
    assert "Spearman" in text
    assert (out / "plot.png").is_file()
    assert not list(out.rglob("checkpoints"))
    scores = read_json(out / "flat" / "seed-0" / "scores.json")
    assert scores["scores"]["steps"] == 6
    assert scores["scores"]["training_seconds"] > 0
    assert sorted(scores["previews"]) == ["3", "6"]


def test_one_seed_has_the_interval_over_pictures_that_its_cell_has_stored(tmp_path: Path) -> None:
    def measure(name: str, config: TrainConfig, workdir: Path) -> dict[str, float]:
        row = {"frechet": 2.0, "frechet_low": 1.5, "frechet_high": 2.5}
        return {**with_bounds(row, "frechet", "error"), "speed": 1.0}

    out = tmp_path / "out"
    small_study = study(tmp_path / "log", measure=measure)
    assert main(small_study, ["--variants", "flat", "--out", str(out)]) == 0
    row = read_json(out / "table.json")["rows"]["flat"]
    assert (row["error"]["interval"], row["error"]["interval_over"]) == ([1.5, 2.5], "pictures")
    assert "interval" not in row["speed"]
    text = (out / "table.md").read_text()
    assert "| flat | 1 | 0.00 M | 2.0 [1.5, 2.5] (1) | 30 (3) | 1 |" in text
    assert "of one seed over its pictures by a bootstrap" in text


def test_a_cell_that_was_killed_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log, out = tmp_path / "log", tmp_path / "out"
    killed = study(log, variants={"flat": lambda scale: config(1.0, log, fail=True)})
    with pytest.raises(KeyboardInterrupt):
        main(killed, ["--out", str(out)])
    assert list(out.rglob("checkpoints"))
    # the config differs in `fail`: another run's folder is refused before anything starts
    assert main(study(log), ["--variants", "wall", "flat", "--out", str(out)]) == 2
    assert not log.exists()
    monkeypatch.setattr(LineTask, "can_fail", False)
    assert main(killed, ["--variants", "flat", "--out", str(out)]) == 0
    assert log.read_text().split() == ["1"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--variants", "falt"], "--variants falt: no such variant; known are flat, steep/er, wall"),
        (["--stepz", "3"], "no key --stepz; did you mean --steps?"),
        (["--steps", "0"], "steps is 0"),
    ],
)
def test_bad_input_is_one_line_and_runs_nothing(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(study(tmp_path / "log"), [*arguments, "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_the_cost_of_a_step_counts_products_and_bytes(tmp_path: Path) -> None:
    cost = step_cost(config(1.0, tmp_path / "log"))
    assert 2 * WIDTH**2 < cost.flops < 40 * WIDTH**2
    assert WIDTH**2 * 4 < cost.memory < 4 * WIDTH**2 * 4
    assert step_cost(config(1.0, tmp_path / "log"), compile=False).memory == 0
    assert not (tmp_path / "log").exists()
