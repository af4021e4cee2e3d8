"""Studies: a grid of cells (variant x seed), each trained and measured once; a table and a plot of the scores.

The folder of a cell is OUT/VARIANT/seed-N. It is a work folder of `TrainConfig.run`, which continues from its
checkpoint, and gets scores.json when the cell has been measured. A cell with scores.json is skipped, and its
checkpoints are deleted. After each cell OUT/table.md, table.json and plot.png are written again, with all cells that
are done. Several processes may share OUT as long as they run different cells (--variants, --seeds); the process that
ends last writes the table of all.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import matplotlib.pyplot as plt
import numpy as np
from scipy.stats import t

from lcm_jax.metrics import Interval, ranks, spearman
from lcm_jax.metrics.bootstrap import LEVEL
from lcm_jax.metrics.report import BOUNDS
from lcm_jax.runtime.atomic_files import write_json
from lcm_jax.runtime.cache import use_compilation_cache
from lcm_jax.runtime.messages import HelpFormatter
from lcm_jax.train.config import TrainConfig
from lcm_jax.train.overrides import override
from lcm_jax.weights.safetensors_files import read_json

OVER = {
    "seeds": "over seeds by Student's t",
    "pictures": "of one seed over its pictures by a bootstrap (other trainings are not in it)",
}
SCALES = ("tiny", "gpu", "paper")
Scores = Mapping[str, float]
Cells = Mapping[str, Mapping[int, Mapping[str, Any]]]  # variant -> seed -> the content of scores.json


@dataclass(frozen=True, kw_only=True)
class Column:
    """A score in the table, and the paper's results for it."""

    key: str
    title: str
    best: str = "lowest"  # or "highest"
    ranked: bool = True  # whether the table shows ranks
    paper: Mapping[str, float] | Sequence[str] | None = None  # variant -> the paper's number; or its order, best first

    def ranks(self, values: Mapping[str, float]) -> dict[str, float]:
        """Return the rank of each variant by this score, 1 for the best."""
        costs = np.array(list(values.values())) * (1.0 if self.best == "lowest" else -1.0)
        return dict(zip(values, ranks(costs), strict=True))

    @property
    def paper_ranks(self) -> dict[str, float]:
        """The ranks of the variants that the paper has; empty without a paper."""
        if self.paper is None or isinstance(self.paper, Mapping):
            return self.ranks(self.paper or {})
        return {name: float(i) for i, name in enumerate(self.paper, 1)}


@dataclass(frozen=True, kw_only=True)
class Study:
    """A comparison of variants: their configs, how a cell is measured, the table's columns and the plot."""

    name: str
    about: str
    variants: Mapping[str, Callable[[str], TrainConfig]]  # name -> (scale -> config); the seed is set here
    measure: Callable[[str, TrainConfig, Path], Scores]  # (variant, config, work folder of the trained cell)
    columns: Sequence[Column]
    plot: Callable[[Study, Cells], None]  # onto matplotlib's current figure
    # (variant, scale, config with overrides) -> the config that is run; not called for cells that are done
    prepare: Callable[[str, str, TrainConfig], TrainConfig] = lambda variant, scale, config: config
    # (study, OUT): writes more files, after each cell
    draw: Callable[[Study, Path], None] = lambda study, out: None
    # Scores that compare the variants of one seed: variant -> scores, in and out
    compare: Callable[[Mapping[str, Scores]], Mapping[str, Scores]] = lambda scores: {}


def main(study: Study, argv: Sequence[str] | None = None) -> int:
    """Run the cells of the study that are not done and print the table; return the exit code.

    Bad input is one line on standard error and exit code 2.
    """
    use_compilation_cache()
    parser = argparse.ArgumentParser(description=study.about, formatter_class=HelpFormatter)
    parser.add_argument("--scale", choices=SCALES, default="tiny", help="size of the networks, steps and batches")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="one run of every variant for each")
    parser.add_argument("--variants", nargs="+", default=list(study.variants), help="all of them, or some")
    parser.add_argument("--out", type=Path, help=f"folder to write to; runs/{study.name}-SCALE by default")
    parser.epilog = "Further options override every cell's config, as those of lcm-jax train do: --steps 100 ..."
    arguments, overrides = parser.parse_known_args(argv)
    out = arguments.out or Path("runs") / f"{study.name}-{arguments.scale}"
    try:
        run(study, arguments.scale, arguments.seeds, arguments.variants, out, overrides)
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"{study.name}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print((out / "table.md").read_text())
    return 0


def run(
    study: Study, scale: str, seeds: Sequence[int], variants: Sequence[str], out: Path, overrides: Sequence[str] = ()
) -> None:
    """Run every cell that is not done, seed by seed; all configs are made and checked before the first one runs.

    Raises ValueError for an unknown variant or a config that does not hold, before anything is trained.
    """
    configs: dict[tuple[int, str], TrainConfig] = {}
    for seed in dict.fromkeys(seeds):
        for name in variants:
            if name not in study.variants:
                raise ValueError(f"--variants {name}: no such variant; known are {', '.join(study.variants)}")
            config = override(study.variants[name](scale), overrides, study.name)
            config, workdir = replace(config, loop=replace(config.loop, seed=seed)), folder(out, name, seed)
            if not is_done(workdir):
                config = study.prepare(name, scale, config)
                config.check(workdir)
            configs[seed, name] = config
    for (seed, name), config in configs.items():
        run_cell(study, name, config, folder(out, name, seed))
        report(study, scale, out)


def is_done(workdir: Path) -> bool:
    """Return whether the cell in this folder has been measured."""
    return (workdir / "scores.json").is_file()


def folder(out: Path, variant: str, seed: int) -> Path:
    """Return the folder of a cell, OUT/VARIANT/seed-N, with `_` for spaces and slashes in the variant's name."""
    return out / variant.replace("/", "_").replace(" ", "_") / f"seed-{seed}"


def run_cell(study: Study, variant: str, config: TrainConfig, workdir: Path) -> None:
    """Train a cell, measure it and write its scores.json, unless that has been done."""
    if is_done(workdir):
        return
    saved = [int(path.name) for path in (workdir / "checkpoints").glob("*") if path.name.isdigit()]
    start = time.perf_counter()
    state = config.run(workdir)
    trained = time.perf_counter()
    scores = dict(study.measure(variant, config, workdir))
    steps = config.loop.steps
    share = 1.0 - max(saved, default=0) / steps  # of the steps; a process that was killed may have done the rest
    scores |= {"steps": steps, "training_seconds": (trained - start) / share if share else float("nan")}
    about = {
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(state.params)),
        "measuring_seconds": time.perf_counter() - trained,
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind} (jax {jax.__version__})",
    }
    previews = read_json(workdir / "previews.json")
    write_json(workdir / "scores.json", {"scores": scores, "previews": previews, **about})
    shutil.rmtree(workdir / "checkpoints")


def collect(study: Study, out: Path) -> dict[str, dict[int, dict[str, Any]]]:
    """Return the cells that are done, each with the scores of `Study.compare`, which are taken seed by seed."""
    cells: dict[str, dict[int, dict[str, Any]]] = {}
    for name in study.variants:
        for path in sorted(folder(out, name, 0).parent.glob("seed-*/scores.json")):
            cells.setdefault(name, {})[int(path.parent.name.removeprefix("seed-"))] = read_json(path)
    for seed in sorted({seed for runs in cells.values() for seed in runs}):
        of_seed = {name: runs[seed]["scores"] for name, runs in cells.items() if seed in runs}
        for name, scores in study.compare(of_seed).items():
            cells[name][seed]["scores"] = cells[name][seed]["scores"] | dict(scores)
    return cells


def statistics(cells: Cells, key: str) -> dict[str, tuple[float, float]]:
    """Return, for each variant, the mean of a score over seeds and its standard error, which is NaN for one seed."""
    result = {}
    for name, runs in cells.items():
        values = np.array([cell["scores"][key] for cell in runs.values()])
        error = values.std(ddof=1) / np.sqrt(len(values)) if len(values) > 1 else float("nan")
        result[name] = (float(values.mean()), float(error))
    return result


def interval(runs: Mapping[int, Mapping[str, Any]], key: str) -> tuple[tuple[float, float], str] | None:
    """Return the 95 % interval of a score's mean over the seeds of a variant, and what it is taken over.

    Over two seeds or more it is Student's t, mean +- t s / sqrt(n) with n - 1 degrees of freedom, and says how far
    another training would move the score. Of one seed it is the one over pictures that the cell has stored as KEY_low
    and KEY_high (`lcm_jax.evaluation.study.with_bounds`), and says nothing of other trainings. None: there is neither.

    >>> from lcm_jax.evaluation.study import interval
    >>> runs = {seed: {"scores": {"fd": float(seed)}} for seed in (1, 2, 3)}
    >>> [round(bound, 2) for bound in interval(runs, "fd")[0]]  # 2 +- 4.30 / sqrt(3)
    [-0.48, 4.48]
    """
    scores = [cell["scores"] for cell in runs.values()]
    values = np.array([score[key] for score in scores])
    n = len(values)
    if n > 1:
        half = t.ppf(0.5 + 0.5 * LEVEL, n - 1) * values.std(ddof=1) / np.sqrt(n)
        return (float(values.mean() - half), float(values.mean() + half)), "seeds"
    names = [f"{key}_{end}" for end in BOUNDS]
    return None if n == 0 or names[0] not in scores[0] else (tuple(scores[0][name] for name in names), "pictures")


def with_bounds(row: Scores, name: str, key: str) -> dict[str, float]:
    """Return the score `name` of a row of `evaluate` under `key`, and its bounds, if it has some, as `interval` reads.

    >>> from lcm_jax.evaluation.study import with_bounds
    >>> with_bounds({"kid": 2.0, "kid_low": 1.0, "kid_high": 3.0}, "kid", "kid/4")
    {'kid/4': 2.0, 'kid/4_low': 1.0, 'kid/4_high': 3.0}
    """
    ends = [f"_{end}" for end in BOUNDS if f"{name}_{end}" in row]
    return {f"{key}{end}": row[f"{name}{end}"] for end in ("", *ends)}


def report(study: Study, scale: str, out: Path) -> None:
    """Write table.json, table.md and plot.png of the cells that are done."""
    cells = collect(study, out)
    rows: dict[str, dict[str, Any]] = {name: {"seeds": sorted(cells[name])} for name in cells}
    agreement = {}
    for column in study.columns:
        measured, theirs = statistics(cells, column.key), column.paper_ranks
        ours = column.ranks({name: mean for name, (mean, _) in measured.items()})
        for name, (mean, error) in measured.items():
            entry: dict[str, Any] = {"mean": mean, "standard_error": None if np.isnan(error) else error}
            entry["rank"] = ours[name]
            if (found := interval(cells[name], column.key)) is not None:
                entry["interval"], entry["interval_over"] = list(found[0]), found[1]
            if name in theirs:
                entry["paper_rank"] = theirs[name]
            if isinstance(column.paper, Mapping) and name in column.paper:
                entry["paper"] = column.paper[name]
            rows[name][column.key] = entry
        shared = [name for name in measured if name in theirs]
        if len(shared) > 1:
            agreement[column.key] = spearman(*(np.array([x[name] for name in shared]) for x in (ours, theirs)))
    about = {"study": study.name, "scale": scale, "spearman": agreement}
    write_json(out / "table.json", about | {"rows": rows, "cells": cells})
    (out / "table.md").write_text(markdown(study, cells, rows, agreement))
    study.plot(study, cells)
    plt.gcf().savefig(out / "plot.png", dpi=120, bbox_inches="tight")
    plt.close()
    study.draw(study, out)


def markdown(study: Study, cells: Cells, rows: Mapping[str, Any], agreement: Mapping[str, float]) -> str:
    """Return the table: mean [its 95 % interval] (rank), beside the paper's number (its rank)."""
    heads = ["variant", "seeds", "parameters"]
    for column in study.columns:
        heads += [f"{column.title} ({column.best})"] + ["paper"] * (column.paper is not None)
    lines = [heads, ["---"] * len(heads)]
    for name, row in rows.items():
        line = [name, str(len(row["seeds"])), f"{next(iter(cells[name].values()))['parameters'] / 1e6:.2f} M"]
        for column in study.columns:
            entry = row[column.key]
            mean = f"{entry['mean']:.4g}" if "interval" not in entry else Interval(entry["mean"], *entry["interval"])
            line.append(f"{mean}" + (f" ({entry['rank']:g})" if column.ranked else ""))
            if column.paper is not None:
                number = f"{entry['paper']:g} " if "paper" in entry else ""
                line.append(f"{number}({entry['paper_rank']:g})" if "paper_rank" in entry else "")
        lines.append(line)
    text = "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"
    over = {row[column.key].get("interval_over") for row in rows.values() for column in study.columns} - {None}
    said = [text for kind, text in OVER.items() if kind in over]
    if said:
        text += f"\nIn brackets: {LEVEL:.0%} intervals of the mean, {'; '.join(said)}.\n"
    titles = {column.key: column.title for column in study.columns}
    if agreement:
        values = "; ".join(f"{titles[key]} {value:.2f}" for key, value in agreement.items())
        text += f"\nRank correlation (Spearman) with the paper: {values}.\n"
    return text


def curves(axes: Any, cells: Cells, title: str) -> None:
    """Plot a number of the previews against training steps: the mean over seeds, its standard error as a band."""
    for name, runs in cells.items():
        steps = sorted(set.intersection(*({int(step) for step in cell["previews"]} for cell in runs.values())))
        values = np.array([[cell["previews"][str(step)][title] for step in steps] for cell in runs.values()])
        (line,) = axes.plot(steps, values.mean(axis=0), marker="o", markersize=3, label=name)
        if len(values) > 1:
            error = values.std(axis=0, ddof=1) / np.sqrt(len(values))
            band = {"color": line.get_color(), "alpha": 0.2}
            axes.fill_between(steps, values.mean(axis=0) - error, values.mean(axis=0) + error, **band)
    axes.set_xlabel("training steps")
    axes.set_ylabel(title.replace("_", " "))
    axes.grid(alpha=0.3)


def points(axes: Any, cells: Cells, column: Column) -> None:
    """Plot a score of each variant with its standard error."""
    for i, (name, (mean, error)) in enumerate(statistics(cells, column.key).items()):
        axes.errorbar([name], [mean], yerr=np.nan_to_num(error), fmt="o", markersize=9, color=f"C{i}", capsize=4)
    axes.margins(x=0.15, y=0.15)
    axes.set_ylabel(f"{column.title} ({column.best} is best)")
    axes.grid(axis="y", alpha=0.3)
