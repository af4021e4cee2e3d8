"""A study of every few-step method from one teacher at equal compute: pictures in 1, 2, 4 and 8 steps.

python experiments/few_step/ablate.py --scale tiny --seeds 0 1 2

A method trains for as many steps as the budget of floating-point operations allows. The operations of a step are
counted in its lowered training step, so a method that evaluates its teacher more often gets fewer steps. The guidance
scale is 4: it is an input of students with a w-embedding, and fixed in the training of those without. Methods that
learn from pictures alone are not guided.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

import lcm_jax
from lcm_jax import configs
from lcm_jax.cli.demo import GUIDANCE
from lcm_jax.evaluation.evaluate import ClipMetric, captioned, evaluate
from lcm_jax.evaluation.study import Cells, Column, Scores, Study, main, statistics, with_bounds
from lcm_jax.objectives import METHODS
from lcm_jax.runtime.image_grid import labelled_grid
from lcm_jax.train.config import TrainConfig
from lcm_jax.train.step_cost import step_cost
from lcm_jax.train.tasks.common import DataConfig

STEPS = (1, 2, 4, 8)
PROMPTS = ("red heart", "cat face", "woman pilot, dark skin tone", "santa claus", "victory hand", "flag of france")
PUBLISHED = "stable-diffusion-v1-5/stable-diffusion-v1-5"
BUDGETS = {"tiny": 4e12, "gpu": 1.3e15, "paper": 7e17}  # 120 steps of LCM's at 16; 5,000 at 128; 2,000 of SD1.5's at 72

# The bundled teacher draws as well in eight steps as in fifty: see configs/openmoji.py.
PAIRS: dict[str, Any] = {"skip": 125.0, "loss": "huber", "huber_c": 0.05}
# method -> options that depend on the length of a run or on the teacher; all others keep their published defaults
OPTIONS: Mapping[str, Callable[[int], dict[str, Any]]] = {
    "lcm": lambda steps: PAIRS,
    "lcf": lambda steps: PAIRS,
    "ctm": lambda steps: {"solver_steps": 2, "loss": "huber", "huber_c": 0.05},
    "tcd": lambda steps: PAIRS,
    "pcm": lambda steps: PAIRS,
    "hyper-sd": lambda steps: PAIRS,
    "progressive": lambda steps: {"first_steps": 8, "last_steps": 1},
    "reflow": lambda steps: {"solver_steps": 8},
    "perflow": lambda steps: {"solver_steps": 2},
}


def variant(name: str, scale: str) -> TrainConfig:
    """Return the bundled student's config, or its LoRA's, with another method."""
    config = configs.get("openmoji_lcm_lora" if name == "lcm-lora" else "openmoji_lcm")
    if name != "lcm-lora":
        config = configs.with_method(config, name, "openmoji_lcm")
    loop = replace(config.loop, steps=1, preview_every=10**6, save_every=100)
    optimizer = replace(config.optimizer, warmup=10)
    if scale == "gpu":
        loop, optimizer = replace(loop, batch_size=128, save_every=1000), replace(optimizer, warmup=100)
    if scale == "paper":  # LCM's section 5.2 on its smaller teacher; give --task.data.name
        data = DataConfig(name="folder:laion-aesthetics", size=512)
        prompts = DataConfig(name="folder:coco", split="validation", size=512)
        models = {"vae": PUBLISHED, "text": PUBLISHED, "teacher": PUBLISHED, "data": data, "prompts": prompts}
        config = replace(config, task=replace(config.task, **models, remat=True, dtype="bfloat16"))
        loop = replace(loop, batch_size=72, ema=0.95, save_every=500)
        optimizer = replace(optimizer, learning_rate=8e-6, decay="constant", warmup=100)
    return replace(config, loop=loop, optimizer=optimizer)


def prepare(name: str, scale: str, config: TrainConfig) -> TrainConfig:
    """Return the config with the steps that the budget allows, unless --steps is given, and the options set by them."""
    steps = config.loop.steps
    if scale == "tiny":  # three seeds of every method in 8 core-hours
        config = replace(config, loop=replace(config.loop, batch_size=16))
    if steps == variant(name, scale).loop.steps:
        steps = max(round(BUDGETS[scale] / step_cost(config, compile=False).flops), 4)
    loop = replace(config.loop, steps=steps)
    options = OPTIONS[name](loop.steps) if name in OPTIONS else {}
    return replace(config, task=replace(config.task, objective=replace(config.task.objective, **options)), loop=loop)


def drawn_by(config: TrainConfig, workdir: Path) -> tuple[lcm_jax.Pipeline, float]:
    """Return the trained pipeline and the guidance scale to draw with."""
    export = workdir / "export"
    pipe = lcm_jax.load(config.task.teacher, lora=export) if config.task.lora else lcm_jax.load(export)
    return pipe, GUIDANCE if pipe.model.embeds_guidance else 1.0


def measure(name: str, config: TrainConfig, workdir: Path) -> Scores:
    """Return Frechet distance and CLIP score in each number of steps, and write pictures.npz into the cell's folder."""
    cost = step_cost(config)
    pipe, guidance = drawn_by(config, workdir)
    options: dict[str, Any] = {"sampler": config.task.objective.sampler, "guidance": guidance}
    clip, seed = ClipMetric.load("openmoji"), config.loop.seed
    rows = evaluate(pipe, clip, *captioned(config.task.resolved.prompts.open()), steps=STEPS, seed=seed, **options)
    drawn = {str(n): pipe(PROMPTS, steps=n, seed=0, **options) for n in STEPS}
    np.savez_compressed(workdir / "pictures.npz", **drawn)
    scores: dict[str, float] = {}
    for row in rows:
        for key in ("frechet", "clip_score"):
            scores |= with_bounds(row, key, f"{key}/{row['steps']}")
    seconds = next(row["seconds_per_image"] for row in rows if row["steps"] == 4)
    return {**scores, "seconds_per_image": seconds, "memory": cost.memory / 2**20, "gflops": cost.flops / 1e9}


def plot(study: Study, cells: Cells) -> None:
    """Plot Frechet distance and CLIP score against the number of steps."""
    _, panels = plt.subplots(1, 2, figsize=(15, 6), layout="constrained")
    for axes, key, label in zip(panels, ("frechet", "clip_score"), ("Frechet distance", "CLIP score"), strict=True):
        for i, name in enumerate(cells):
            means, errors = np.array([statistics({name: cells[name]}, f"{key}/{n}")[name] for n in STEPS]).T
            style = {"color": f"C{i % 10}", "linestyle": "-" if i < 10 else "--"}
            axes.errorbar(STEPS, means, yerr=np.nan_to_num(errors), marker="o", markersize=3, label=name, **style)
        axes.set(xscale="log", xlabel="sampling steps", ylabel=label)
        axes.set_xticks(STEPS, [str(n) for n in STEPS])
        axes.tick_params(which="minor", bottom=False, labelbottom=False)
        axes.grid(alpha=0.3)
    panels[0].set_yscale("log")
    for formatter in (panels[0].yaxis.set_major_formatter, panels[0].yaxis.set_minor_formatter):
        formatter("{x:g}")
    plt.gcf().legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", fontsize=9, ncol=9)


def grid(study: Study, out: Path, *, steps: int = 4) -> None:
    """Write OUT/grid.png: a column of pictures for each method, from the first seed that is done."""
    columns = {}
    for name in study.variants:
        for path in sorted((out / name).glob("seed-*/pictures.npz"))[:1]:
            columns[name] = np.load(path)[str(steps)]
    if columns:
        picture = labelled_grid(list(columns), PROMPTS, list(columns.values()))
        picture.quantize(256).save(out / "grid.png", optimize=True)


STUDY = Study(
    name="few_step",
    about=__doc__ or "",
    variants={name: partial(variant, name) for name in (*METHODS, "lcm-lora")},
    prepare=prepare,
    measure=measure,
    columns=[
        *(Column(key=f"frechet/{n}", title=f"FD, {n}", ranked=n == 4) for n in STEPS),
        *(Column(key=f"clip_score/{n}", title=f"CLIP, {n}", best="highest", ranked=False) for n in STEPS),
        Column(key="seconds_per_image", title="s/image, 4", ranked=False),
        Column(key="steps", title="training steps", best="highest", ranked=False),
        Column(key="training_seconds", title="training, s", ranked=False),
        Column(key="memory", title="step's memory, MiB", ranked=False),
    ],
    plot=plot,
    draw=grid,
)

if __name__ == "__main__":
    sys.exit(main(STUDY))
