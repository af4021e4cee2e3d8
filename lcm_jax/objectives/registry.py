"""Every few-step method by its short name, with the published defaults."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any

from lcm_jax.objectives.consistency import LatentConsistencyDistillation, LatentConsistencyFinetuning
from lcm_jax.objectives.continuous import ContinuousConsistency, MeanFlow, Shortcut
from lcm_jax.objectives.distribution import AdversarialDistillation, DistributionMatching, LatentAdversarialDistillation
from lcm_jax.objectives.few_step import FewStep
from lcm_jax.objectives.progressive import GuidedDistillation, ProgressiveDistillation
from lcm_jax.objectives.time_pairs import ECTPairs, ICTPairs, KarrasPairs
from lcm_jax.objectives.trajectory import (
    ConsistencyTrajectory,
    PhasedConsistency,
    TrajectoryConsistencyDistillation,
)

_FROM_DATA: dict[str, Any] = {"w_min": 0.0, "w_max": 0.0, "embed_w": False}
_IMPROVED: dict[str, Any] = {
    **_FROM_DATA,
    "target": "online",
    "loss": "huber_whole",
    "huber_c": 5.4e-4,
    "weight": "gap",
}

METHODS: Mapping[str, Callable[..., FewStep]] = MappingProxyType(
    {
        "lcm": LatentConsistencyDistillation,
        "lcf": LatentConsistencyFinetuning,
        "cd": partial(LatentConsistencyDistillation, pairs=KarrasPairs(), solver="heun"),
        "ct": partial(LatentConsistencyFinetuning, pairs=KarrasPairs(points=150), **_FROM_DATA),
        "ict": partial(LatentConsistencyFinetuning, pairs=ICTPairs(), **_IMPROVED),
        "ect": partial(LatentConsistencyFinetuning, pairs=ECTPairs(), **_IMPROVED),
        "ctm": ConsistencyTrajectory,
        "tcd": TrajectoryConsistencyDistillation,
        "pcm": PhasedConsistency,
        "scm": ContinuousConsistency,
        "meanflow": MeanFlow,
        "shortcut": Shortcut,
        "guided": GuidedDistillation,
        "progressive": ProgressiveDistillation,
        "dmd2": DistributionMatching,
        "add": AdversarialDistillation,
        "ladd": LatentAdversarialDistillation,
    }
)


def method(name: str, **options: Any) -> FewStep:
    """The objective of that name; ValueError names the nearest there is."""
    if name not in METHODS:
        near = difflib.get_close_matches(name, METHODS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(METHODS)}"
        raise ValueError(f"--objective {name}: no such method; {hint}")
    return METHODS[name](**options)
