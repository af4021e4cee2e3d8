"""Every few-step method by its short name, with the published defaults."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from functools import partial
from typing import Any

from lcm_jax.objectives.consistency import LatentConsistencyDistillation, LatentConsistencyFinetuning
from lcm_jax.objectives.continuous import ContinuousConsistency, SanaSprint, ScoreRegularizedConsistency
from lcm_jax.objectives.distribution import (
    AdversarialDistillation,
    DistributionMatching,
    DivergenceDistillation,
    LatentAdversarialDistillation,
)
from lcm_jax.objectives.few_step import FewStep
from lcm_jax.objectives.mean_velocity import AlignYourFlow, AlphaFlow, ImprovedMeanFlow, MeanFlow, Shortcut
from lcm_jax.objectives.progressive import GuidedDistillation, ProgressiveDistillation
from lcm_jax.objectives.reflow import PiecewiseReflow
from lcm_jax.objectives.time_pairs import CTPairs, ECTPairs, ICTPairs, KarrasPairs
from lcm_jax.objectives.trajectory import (
    ConsistencyTrajectory,
    PhasedConsistency,
    SegmentedConsistency,
    TrajectoryConsistencyDistillation,
)
from lcm_jax.objectives.twin_flow import TwinFlow
from lcm_jax.runtime.user_code import is_same_definition

_FROM_DATA: dict[str, Any] = {"w_min": 0.0, "w_max": 0.0, "embed_w": False}
_IMPROVED: dict[str, Any] = {
    **_FROM_DATA,
    "target": "online",
    "loss": "huber_whole",
    "huber_c": 1.08e-3,  # 0.00054 for data of a standard deviation of 0.5; that of scaled latents is 1
    "weight": "gap",
}

METHODS: dict[str, Callable[..., FewStep]] = {
    "lcm": LatentConsistencyDistillation,
    "lcf": LatentConsistencyFinetuning,
    "cd": partial(LatentConsistencyDistillation, pairs=KarrasPairs(), solver="heun", target_ema=0.95),
    "ct": partial(LatentConsistencyFinetuning, pairs=CTPairs(), **_FROM_DATA),
    "ict": partial(LatentConsistencyFinetuning, pairs=ICTPairs(), **_IMPROVED),
    "ect": partial(LatentConsistencyFinetuning, pairs=ECTPairs(), **_IMPROVED),
    "ctm": ConsistencyTrajectory,
    "tcd": TrajectoryConsistencyDistillation,
    "pcm": PhasedConsistency,
    "hyper-sd": SegmentedConsistency,
    "scm": ContinuousConsistency,
    "rcm": ScoreRegularizedConsistency,
    "sana-sprint": SanaSprint,
    "ayf": AlignYourFlow,
    "meanflow": MeanFlow,
    "imf": ImprovedMeanFlow,
    "alphaflow": AlphaFlow,
    "twinflow": TwinFlow,
    "shortcut": Shortcut,
    "guided": GuidedDistillation,
    "progressive": ProgressiveDistillation,
    "reflow": partial(PiecewiseReflow, windows=1, solver_steps=25),
    "perflow": PiecewiseReflow,
    "dmd2": DistributionMatching,
    "f-distill": DivergenceDistillation,
    "add": AdversarialDistillation,
    "ladd": LatentAdversarialDistillation,
}
"""Every few-step method by its short name; `register` adds one."""


def register(name: str) -> Callable[[type[FewStep]], type[FewStep]]:
    """Register a few-step objective under a new name, which `lcm-jax distill --objective` then knows.

    Use it as a decorator of the class; the same class, imported again, replaces itself. ValueError where the name is
    taken, or for anything but a class that extends `FewStep` and has `__call__`.

    >>> from dataclasses import dataclass
    >>> from lcm_jax.diffusion.schedules import DDPM
    >>> from lcm_jax.objectives import LatentConsistencyDistillation, METHODS, method, register
    >>> @register("short-lcm")
    ... @dataclass(frozen=True, kw_only=True)
    ... class ShortLCM(LatentConsistencyDistillation):
    ...     grid_points: int = 10
    >>> method("short-lcm", schedule=DDPM()).grid_points
    10
    >>> del METHODS["short-lcm"]
    """

    def add(objective: type[FewStep]) -> type[FewStep]:
        if not (isinstance(objective, type) and issubclass(objective, FewStep)):
            kind = type(objective).__name__ if not isinstance(objective, type) else f"class {objective.__name__}"
            raise ValueError(f"objective {name!r} is a {kind}: give a class that extends lcm_jax.objectives.FewStep")
        if missing := ", ".join(sorted(objective.__abstractmethods__)):
            raise ValueError(f"objective {name!r}: {objective.__name__} has no {missing}")
        if not is_same_definition(METHODS.get(name, objective), objective):
            raise ValueError(f"objective {name!r} is registered already: give yours another name")
        METHODS[name] = objective
        return objective

    return add


def method(name: str, **options: Any) -> FewStep:
    """Return the objective of a name, with its published defaults; ValueError names the nearest there is.

    >>> from lcm_jax.diffusion.schedules import RectifiedFlow
    >>> from lcm_jax.objectives import method
    >>> type(method("pcm", schedule=RectifiedFlow(), kind="flow")).__name__
    'PhasedConsistency'
    >>> method("pcn", schedule=RectifiedFlow())  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ValueError: --objective pcn: no such method; did you mean pcm? known are lcm, lcf, ...
    """
    if name not in METHODS:
        near = difflib.get_close_matches(name, METHODS, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise ValueError(f"--objective {name}: no such method; {hint}known are {', '.join(METHODS)}")
    return METHODS[name](**options)
