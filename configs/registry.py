"""The registry of configs. A config is a function without arguments, so that naming one builds none of the others."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import replace

from lcm_jax.objectives import ProgressiveDistillation, method
from lcm_jax.train.config import TrainConfig
from lcm_jax.train.tasks.distillation import DistillationTask

CONFIGS: dict[str, Callable[[], TrainConfig]] = {}


def register(make: Callable[[], TrainConfig]) -> Callable[[], TrainConfig]:
    """Register a config under its function's name."""
    if make.__name__ in CONFIGS:
        raise ValueError(f"config {make.__name__!r} is registered twice")
    CONFIGS[make.__name__] = make
    return make


def get(name: str) -> TrainConfig:
    """The config of that name; ValueError lists what there is, the nearest name first."""
    if name not in CONFIGS:
        near = difflib.get_close_matches(name, CONFIGS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(sorted(CONFIGS))}"
        raise ValueError(f"--config {name}: no such config; {hint}")
    return CONFIGS[name]()


def with_method(config: TrainConfig, method_name: str, name: str) -> TrainConfig:
    """A distillation by another method, with its published defaults; a student that is told w keeps
    the config's range.

    Progressive distillation has a moving average that is a copy of the student, made anew at each stage's end, and as
    many stages as lead to the steps of the preview.
    """
    task = config.task
    if not isinstance(task, DistillationTask):
        raise ValueError(f"--objective: config {name} is no distillation")
    old = task.objective
    made = method(method_name, schedule=old.schedule, kind=old.kind)
    if made.needs_teacher and (made.embed_w or old.w_min == old.w_max):
        made = replace(made, w_min=old.w_min, w_max=old.w_max)
    loop = config.loop
    if isinstance(made, ProgressiveDistillation):
        stages = 1 + max(0, (made.first_steps // task.preview_steps).bit_length() - 1)
        made = replace(made, stage_steps=max(1, loop.steps // stages))
        loop = replace(loop, ema=0.0, ema_every=made.stage_steps)
    return replace(config, task=replace(task, objective=made), loop=loop)
