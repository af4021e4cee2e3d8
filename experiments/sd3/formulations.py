"""A study of thirteen formulations of diffusion and flow matching: tables 1 and 2 of arXiv:2403.03206.

python experiments/sd3/formulations.py --scale tiny --seeds 0 1 2

All are trained on the same data. As in the paper, the variants are sorted by Pareto dominance in Frechet distance and
CLIP score, in each of six settings of the sampler, and the ranks are averaged. Unlike in the paper, only the moving
average's weights and one data set are used.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from training import TRAININGS, score

from lcm_jax.configs.sd3_formulations import FORMULATIONS, Formulation
from lcm_jax.evaluation.study import Cells, Column, Scores, Study, main, statistics
from lcm_jax.metrics import pareto_ranks
from lcm_jax.train.config import TrainConfig
from mmdit import MMDiTConfig

SETTINGS = ((5, 5.0), (10, 5.0), (25, 5.0), (50, 5.0), (50, 2.5), (50, 1.0))  # steps and guidance scale
# Table 1: the rank averaged over all settings, over those of 5 steps and over those of 50 steps.
RANKS = {
    "rf/lognorm(0,1)": (1.54, 1.25, 1.50),
    "rf/lognorm(1,0.6)": (2.08, 3.50, 2.00),
    "rf/lognorm(0.5,0.6)": (2.71, 8.50, 1.00),
    "rf/mode(1.29)": (2.75, 3.25, 3.00),
    "eps/linear": (2.88, 4.25, 2.75),
    "rf/cosmap": (4.13, 3.75, 4.00),
    "edm(0,0.6)": (5.63, 13.25, 3.25),
    "rf": (5.67, 6.50, 5.75),
    "v/linear": (6.83, 5.75, 7.75),
    "v/cos": (9.17, 12.25, 8.75),
    "edm/cos": (11.04, 14.25, 11.25),
    "edm/rf": (13.04, 15.25, 13.25),
    "edm(-1.2,1.2)": (15.58, 20.25, 15.00),
}
# Table 2: CLIP score and FID on CC12M, 25 steps.
SCORES = {
    "rf": (0.217, 94.90),
    "edm(-1.2,1.2)": (0.200, 116.60),
    "eps/linear": (0.222, 90.34),
    "v/cos": (0.209, 97.87),
    "v/linear": (0.217, 100.76),
    "rf/lognorm(0.5,0.6)": (0.233, 120.84),
    "rf/lognorm(1,0.6)": (0.234, 147.69),
    "rf/lognorm(0,1)": (0.224, 89.91),
}
GROUPS = {"all settings": SETTINGS, "5 steps": SETTINGS[:1], "50 steps": SETTINGS[3:]}


def variant(form: Formulation, scale: str) -> TrainConfig:
    """Return the training of the MMDiT by this formulation."""
    return TRAININGS[scale](MMDiTConfig, form.objective)


def measure(name: str, config: TrainConfig, workdir: Path) -> Scores:
    """Return Frechet distance and CLIP score in each setting."""
    return score(config, workdir, FORMULATIONS[name], SETTINGS)


def compare(scores: Mapping[str, Scores]) -> dict[str, dict[str, float]]:
    """Return `rank/GROUP`, the Pareto ranks of one seed's variants averaged over the settings of each group."""
    ranks = {}
    for steps, guidance in SETTINGS:
        setting = f"{steps}/{guidance:g}"
        costs = np.array([[row[f"frechet/{setting}"], -row[f"clip_score/{setting}"]] for row in scores.values()])
        ranks[steps, guidance] = pareto_ranks(costs)
    means = {name: np.mean([ranks[setting] for setting in group], axis=0) for name, group in GROUPS.items()}
    return {name: {f"rank/{g}": float(m[i]) for g, m in means.items()} for i, name in enumerate(scores)}


def plot(study: Study, cells: Cells) -> None:
    """Plot the Frechet distance against sampling steps, as in figure 3, and the ranks against the paper's."""
    _, (left, right) = plt.subplots(1, 2, figsize=(14, 5.5), layout="constrained")
    steps = [steps for steps, guidance in SETTINGS if guidance == 5.0]
    for i, name in enumerate(cells):
        distances = [statistics({name: cells[name]}, f"frechet/{n}/5")[name] for n in steps]
        means, errors = zip(*distances, strict=True)
        style: Any = {"color": f"C{i % 10}", "marker": "o" if i < 10 else "s"}
        line = "-" if i < 10 else "--"
        left.errorbar(steps, means, yerr=np.nan_to_num(errors), linestyle=line, markersize=4, label=name, **style)
        rank, error = statistics(cells, "rank/all settings")[name]
        right.errorbar(RANKS[name][0], rank, yerr=np.nan_to_num(error), markersize=9, **style)
    left.set(xscale="log", yscale="log", xlabel="sampling steps", ylabel="Frechet distance, guidance 5")
    left.set_xticks(steps, [str(n) for n in steps])
    left.tick_params(which="minor", bottom=False, labelbottom=False)
    left.yaxis.set_minor_formatter("{x:g}")
    left.yaxis.set_major_formatter("{x:g}")
    right.margins(0.15)
    right.set(xlabel="the paper's average rank", ylabel="average rank here")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    plt.gcf().legend(*left.get_legend_handles_labels(), loc="outside lower center", fontsize=8, ncol=7)


def paper(index: int, table: Mapping[str, tuple[float, ...]]) -> dict[str, float]:
    """Return a column of one of the paper's tables."""
    return {name: row[index] for name, row in table.items()}


STUDY = Study(
    name="formulations",
    about=__doc__ or "",
    variants={name: partial(variant, FORMULATIONS[name]) for name in RANKS},
    measure=measure,
    columns=[
        *(Column(key=f"rank/{g}", title=f"rank, {g}", paper=paper(i, RANKS)) for i, g in enumerate(GROUPS)),
        Column(key="frechet/25/5", title="Frechet distance, 25 steps", paper=paper(1, SCORES)),
        Column(key="clip_score/25/5", title="CLIP score, 25 steps", best="highest", paper=paper(0, SCORES)),
    ],
    plot=plot,
    compare=compare,
)

if __name__ == "__main__":
    sys.exit(main(STUDY))
