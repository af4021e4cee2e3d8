"""The demo: a teacher, its latent-consistency student and its LCM-LoRA, side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from safetensors.numpy import load_file

from lcm_jax.diffusion.samplers import get_sampler
from lcm_jax.evaluation.evaluate import ClipMetric, generate
from lcm_jax.inference.call_options import GUIDANCE
from lcm_jax.inference.loading import load
from lcm_jax.inference.pipeline import Pipeline
from lcm_jax.runtime.atomic_files import write_json
from lcm_jax.runtime.image_grid import labelled_grid
from lcm_jax.runtime.image_io import write_picture
from lcm_jax.weights.hub import locate
from lcm_jax.weights.safetensors_files import read_json

# Of the compositional hold-out: role and skin tone both occur in training, never together.
UNSEEN = (
    "man farmer, medium skin tone",
    "woman pilot, dark skin tone",
    "princess, medium-light skin tone",
    "man superhero, medium skin tone",
)
SEEN = (
    "red heart", "grinning face", "victory hand", "waving hand", "handshake", "santa claus", "ninja", "woman astronaut",
)  # fmt: skip
PROMPTS = UNSEEN + SEEN
TITLES = {"ddim": "DDIM", "euler": "Euler"}  # of a teacher's sampler: SD's, SD3's


@dataclass(frozen=True, kw_only=True)
class Column:
    """One way to draw: a model, a sampler and a number of steps."""

    title: str
    model: str  # "teacher", "student" or "lora"
    sampler: str
    steps: int
    guidance: float


def columns(guidance: float, sampler: str = "ddim") -> list[Column]:
    """Return the columns: the teacher at 1, 2, 4, 8 and its usual steps, LCM at 1, 2, 4, 8, LCM-LoRA at 4."""
    name, most = TITLES[sampler], get_sampler(sampler).usual_steps
    teacher = [
        Column(title=f"teacher\n{name} {n}", model="teacher", sampler=sampler, steps=n, guidance=guidance)
        for n in (1, 2, 4, 8, most)
    ]
    student = [
        Column(title=f"LCM {n}", model="student", sampler="lcm", steps=n, guidance=guidance) for n in (1, 2, 4, 8)
    ]
    return [*teacher, *student, Column(title="LCM-LoRA\n4", model="lora", sampler="lcm", steps=4, guidance=1.0)]


def draw_demo(out: Path, *, model: str = "openmoji", guidance: float = GUIDANCE, seed: int = 0) -> list[dict[str, Any]]:
    """Draw everything, write grid.png and scores.json under `out`, and return the rows of the table.

    Frechet distance and CLIP score are on the validation captions (pictures never trained on), against the real ones'
    features that come with the model.
    """
    reference = locate(model).at("reference")
    captions = read_json(reference / "validation.json")["captions"]
    real = load_file(reference / "validation.safetensors")["features"].astype(np.float32)
    for name in (f"{model}-teacher", f"{model}-lcm-lora"):
        locate(name)  # what is missing is said before minutes of drawing
    clip = ClipMetric.load(model)
    pipes = {
        "teacher": lambda: load(f"{model}-teacher"),
        "student": lambda: load(model),
        "lora": lambda: load(f"{model}-teacher", lora=f"{model}-lcm-lora"),
    }
    loaded: dict[str, Pipeline] = {"teacher": pipes["teacher"]()}  # one model in memory at a time
    shown = columns(guidance, loaded["teacher"].default_sampler)
    labels = [f"{text}\n(composition not trained on)" for text in UNSEEN] + list(SEEN)
    rows: list[dict[str, Any]] = []
    strips: list[UInt8[np.ndarray, "n h w 3"]] = []
    for column in shown:
        if column.model not in loaded:
            loaded = {column.model: pipes[column.model]()}
        options: dict[str, Any] = {"sampler": column.sampler, "steps": column.steps, "guidance": column.guidance}
        title = column.title.replace("\n", " ")
        made, seconds = generate(loaded[column.model], [*PROMPTS, *captions], seed=seed, title=title, **options)
        scores = clip.score(real, made[len(PROMPTS) :], captions)
        rows.append({"method": title, **options, "seconds_per_image": seconds, **scores})
        strips.append(made[: len(PROMPTS)])
    out.mkdir(parents=True, exist_ok=True)
    write_picture(out / "grid.png", labelled_grid([c.title for c in shown], labels, strips))
    write_json(out / "scores.json", {"model": model, "seed": seed, "pictures": len(captions), "rows": rows})
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Return the scores as text, one line for each way to draw."""
    lines = [f"{'':18}{'s/image':>10}{'Frechet':>10}{'CLIP':>8}{'precision':>11}{'recall':>8}"]
    for row in rows:
        lines.append(
            f"{row['method']:18}{row['seconds_per_image']:>10.4f}{row['frechet']:>10.2f}{row['clip_score']:>8.2f}"
            f"{row['precision']:>11.2f}{row['recall']:>8.2f}"
        )
    return "\n".join(lines)
