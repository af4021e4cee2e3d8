"""A study that repeats the ablations of the LCM paper (arXiv:2310.04378, section 5.3) on the bundled teacher.

python experiments/few_step/lcm_ablations.py --scale tiny --seeds 0 1 2

They are those of figures 3 and 4, and more. Each variant changes one thing of "ddim k=125", the bundled student's
recipe; all train for the same number of steps. The paper's claims: k = 1 learns very slowly and k = 5, 10, 20 fast;
with k = 50 the error of DDIM is visible, those of DPM and DPM++ are not; a larger w is nearer to the caption and
further from the pictures; one step is worse than 2, 4 and 8.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from ablate import PAIRS, drawn_by, variant

from lcm_jax.evaluation.evaluate import ClipMetric, captioned, evaluate
from lcm_jax.evaluation.study import Cells, Column, Scores, Study, main, statistics, with_bounds
from lcm_jax.train.config import TrainConfig

SKIPS = (1, 5, 10, 20, 50, 125)
SOLVERS = ("ddim", "dpm", "dpm++")
GUIDANCES = (1.0, 2.0, 4.0, 6.0)
TRAINING = {"tiny": 30, "gpu": 5000, "paper": 2000}  # steps
BASE = "ddim k=125"
SKIPPING: dict[str, dict[str, Any]] = {
    f"{solver} k={skip}": {"solver": solver, "skip": float(skip)}
    for solver in SOLVERS
    for skip in SKIPS
    if solver == "ddim" or skip <= 50  # the paper's skips, and the bundled student's
}
OTHERS: dict[str, dict[str, Any]] = {
    "w in [0, 2]": {"w_max": 2.0},
    "w in [3, 3]": {"w_min": 3.0, "w_max": 3.0},
    "no w-embedding, w = 3": {"w_min": 3.0, "w_max": 3.0, "embed_w": False},
    "target online": {"target": "online"},
    "loss l2": {"loss": "l2"},
    "loss huber, c = 0.001": {"huber_c": 1e-3},
}
AVERAGES = {"ema 0": 0.0, "ema 0.5": 0.5}  # in 30 steps the decay never rises above 0.78 (`ema_decay`)


def cell(name: str, scale: str) -> TrainConfig:
    """Return the bundled student's config with one change."""
    config = variant("lcf" if name == "LCF" else "lcm", scale)
    options = {**PAIRS, **SKIPPING.get(name, {}), **OTHERS.get(name, {})}
    loop = replace(config.loop, steps=TRAINING[scale], ema=AVERAGES.get(name, config.loop.ema))
    return replace(config, task=replace(config.task, objective=replace(config.task.objective, **options)), loop=loop)


def measure(name: str, config: TrainConfig, workdir: Path) -> Scores:
    """Return Frechet distance and CLIP score in four steps.

    The base variant is also drawn in 1, 2 and 8 steps, and in four steps with each guidance scale of `GUIDANCES`.
    """
    pipe, guidance = drawn_by(config, workdir)
    images, captions = captioned(config.task.resolved.prompts.open())
    clip, seed = ClipMetric.load("openmoji"), config.loop.seed
    settings = [(4, g) for g in GUIDANCES] if pipe.model.embeds_guidance else []
    if name == BASE:
        settings = [*dict.fromkeys([*settings, *((n, guidance) for n in (1, 2, 4, 8))])]
    else:
        settings = [(4, guidance)]
    scores = {}
    for steps, scale in settings:
        (row,) = evaluate(pipe, clip, images, captions, steps=[steps], sampler="lcm", guidance=scale, seed=seed)
        names = [f"{steps}/{scale:g}"] + (["4"] if (steps, scale) == (4, guidance) else [])
        for key, setting in product(("frechet", "clip_score"), names):
            scores |= with_bounds(row, key, f"{key}/{setting}")
    return scores


def plot(study: Study, cells: Cells) -> None:
    """Plot the skipping step for each solver, the guidance scale, and all other variants beside the base."""
    _, (left, middle, right) = plt.subplots(1, 3, figsize=(18, 5), layout="constrained")
    for solver in SOLVERS:
        done = {str(k): cells[f"{solver} k={k}"] for k in SKIPS if f"{solver} k={k}" in cells}
        if done:
            means, errors = np.array(list(statistics(done, "frechet/4").values())).T
            left.errorbar([float(k) for k in done], means, yerr=np.nan_to_num(errors), marker="o", label=solver)
    left.set(xscale="log", xlabel="skipping step k", ylabel="Frechet distance, 4 steps")
    left.set_xticks(SKIPS, [str(k) for k in SKIPS])
    left.tick_params(which="minor", bottom=False, labelbottom=False)
    left.legend()
    if BASE in cells:
        base = {BASE: cells[BASE]}
        for key, axes, colour in (("frechet", middle, "C0"), ("clip_score", middle.twinx(), "C1")):
            axes.plot(GUIDANCES, [statistics(base, f"{key}/4/{g:g}")[BASE][0] for g in GUIDANCES], f"{colour}o-")
            axes.set_ylabel(key.replace("_", " "), color=colour)
    middle.set_xlabel("guidance scale, 4 steps")
    rest = {name: cells[name] for name in (BASE, *OTHERS, *AVERAGES, "LCF") if name in cells}
    if rest:
        means, errors = np.array(list(statistics(rest, "frechet/4").values())).T
        right.barh(list(rest), means, xerr=np.nan_to_num(errors), color=[f"C{i}" for i in range(len(rest))])
        right.invert_yaxis()
    right.set_xlabel("Frechet distance, 4 steps")
    for axes in (left, right):
        axes.grid(alpha=0.3)


STUDY = Study(
    name="lcm_ablations",
    about=__doc__ or "",
    variants={name: partial(cell, name) for name in (*SKIPPING, *OTHERS, *AVERAGES, "LCF")},
    measure=measure,
    columns=[
        Column(key="frechet/4", title="Frechet distance, 4 steps"),
        Column(key="clip_score/4", title="CLIP score, 4 steps", best="highest"),
        Column(key="training_seconds", title="training, s", ranked=False),
    ],
    plot=plot,
)

if __name__ == "__main__":
    sys.exit(main(STUDY))
