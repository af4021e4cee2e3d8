"""LCM-LoRA on a model it was not distilled from: `python experiments/few_step/universality.py [--runs runs]`.

The paper's claim (Luo et al. 2023, arXiv:2311.05556, section 3.2): the adapter distilled from a teacher accelerates
models that were finetuned from that teacher, without training. Here the teacher of "openmoji" is finetuned to draw
outlines (the config openmoji_outline) and used with "openmoji-lcm-lora", which was trained on coloured drawings only. A
style that is itself a LoRA is added with weight 0.8 to the adapter's 1.0, as in the paper. Results that are already in
RUNS are not trained or drawn again.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from datetime import date
from pathlib import Path
from typing import Any

import jax
import numpy as np

import lcm_jax
from lcm_jax import configs
from lcm_jax.data import load_source
from lcm_jax.evaluation.evaluate import ClipMetric, captioned, evaluate, generate
from lcm_jax.inference.pipeline import Pipeline
from lcm_jax.runtime.atomic_files import write_json
from lcm_jax.runtime.image_grid import labelled_grid
from lcm_jax.weights.safetensors_files import read_json

ROOT = Path(__file__).parents[2]
PROMPTS = ("red heart", "cat face", "woman astronaut", "rocket", "victory hand", "grinning face")
TEACHER: Mapping[str, Any] = {"steps": 50, "sampler": "ddim", "guidance": 4.0}
FAST: Mapping[str, Any] = {"steps": 4, "sampler": "lcm", "guidance": 1.0}
WAYS: Mapping[str, tuple[bool, Mapping[str, Any]]] = {  # title -> whether with LCM-LoRA, options of the call
    "finetuned, DDIM 50": (False, TEACHER),
    "finetuned + LCM-LoRA, 4": (True, FAST),
    "finetuned, DDIM 4": (False, {**TEACHER, "steps": 4}),
    "finetuned, DDIM 50, unguided": (False, {**TEACHER, "guidance": 1.0}),
}


def load(export: Path, *, fast: bool) -> Pipeline:
    """Return the finetuned model, which is a full model or a LoRA, with or without LCM-LoRA."""
    is_model = (export / "model_index.json").is_file()
    style = [] if is_model else [(export, 0.8 if fast else 1.0)]
    return lcm_jax.load(
        export if is_model else "openmoji-teacher", lora=[*style, *([("openmoji-lcm-lora", 1.0)] if fast else [])]
    )


def score(export: Path, folder: Path, seed: int) -> dict[str, dict[str, float]]:
    """Return the scores of every way to draw, on the captions and outlines of the validation split."""
    images, captions = captioned(load_source("openmoji-outline", "validation", 64))
    rows: dict[str, dict[str, float]] = {}
    for i, (title, (fast, options)) in enumerate(WAYS.items()):
        file = folder / f"{i}_seed_{seed}.json"
        if not file.is_file():
            drawn = {**options, "steps": [options["steps"]], "seed": seed}
            write_json(file, evaluate(load(export, fast=fast), ClipMetric.load(), images, captions, **drawn)[0])
        rows[title] = read_json(file)
    return rows


def main() -> None:
    """Train the finetuned model if it is missing, score every way to draw, and write the results and a picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--config", default="openmoji_outline")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    arguments = parser.parse_args()
    run = arguments.runs / arguments.config
    if not (run / "export").exists():
        configs.get(arguments.config).run(run)
    scores = {seed: score(run / "export", run / "universality", seed) for seed in arguments.seeds}
    mean = {t: float(np.mean([rows[t]["frechet"] for rows in scores.values()])) for t in WAYS}
    fifty, fast, _, unguided = mean.values()

    results = ROOT / "experiments" / "results"
    device = jax.devices()[0].device_kind
    about = {
        "date": str(date.today()),
        "device": device,
        "jax": jax.__version__,
        "config": read_json(run / "config.json"),
    }
    write_json(results / "universality.json", {**about, "seeds": scores, "frechet": mean, "ratio": fast / fifty})
    lines = [
        f"# LCM-LoRA on a finetuned teacher, {about['date']}, {device}, jax {jax.__version__}",
        "",
        f"Frechet distance (and CLIP score) to the outlines of {arguments.config}'s validation split by seed. The four",
        f"steps' mean over the fifty steps': {fast / fifty:.2f}; over those without guidance: {fast / unguided:.2f}.",
        "",
        "| | " + " | ".join(f"seed {seed}" for seed in scores) + " | mean |",
        "|---" * (len(scores) + 2) + "|",
    ]
    for title in WAYS:
        cells = [f"{rows[title]['frechet']:.2f} ({rows[title]['clip_score']:.1f})" for rows in scores.values()]
        lines.append(f"| {title} | {' | '.join(cells)} | {mean[title]:.2f} |")
    (results / "universality.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))

    shown = {
        "finetuned\nDDIM 50": (load(run / "export", fast=False), TEACHER),
        "+ LCM-LoRA\n4 steps": (load(run / "export", fast=True), FAST),
        "before\nDDIM 50": (lcm_jax.load("openmoji-teacher"), TEACHER),
    }
    strips = [generate(pipe, PROMPTS, batch_size=len(PROMPTS), **options)[0] for pipe, options in shown.values()]
    labelled_grid(list(shown), PROMPTS, strips).quantize(256).save(ROOT / "docs" / "outline.png", optimize=True)


if __name__ == "__main__":
    main()
