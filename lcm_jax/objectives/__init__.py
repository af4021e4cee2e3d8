"""Training objectives, `(nets, batch, key) -> (loss, metrics)`: one file a family.

An objective of your own is a frozen dataclass that extends `FewStep`; `register` gives it a name.
"""

from lcm_jax.objectives.consistency import LatentConsistencyDistillation, LatentConsistencyFinetuning
from lcm_jax.objectives.continuous import ContinuousConsistency, MeanFlow, Shortcut
from lcm_jax.objectives.contrastive import contrastive_loss
from lcm_jax.objectives.diffusion import Diffusion, validation_losses
from lcm_jax.objectives.distribution import (
    AdversarialDistillation,
    DistributionMatching,
    LatentAdversarialDistillation,
)
from lcm_jax.objectives.few_step import Draw, FewStep, RandomKeys
from lcm_jax.objectives.progressive import GuidedDistillation, ProgressiveDistillation
from lcm_jax.objectives.registry import METHODS, method, register
from lcm_jax.objectives.terms import TextEncoders
from lcm_jax.objectives.time_densities import CosMap, LogitNormal, Mode, Uniform
from lcm_jax.objectives.time_pairs import CTPairs, ECTPairs, ICTPairs, KarrasPairs
from lcm_jax.objectives.toy import toy_batch, toy_nets
from lcm_jax.objectives.trajectory import (
    ConsistencyTrajectory,
    PhasedConsistency,
    TrajectoryConsistencyDistillation,
)

__all__ = [
    "METHODS",
    "AdversarialDistillation",
    "CTPairs",
    "ConsistencyTrajectory",
    "ContinuousConsistency",
    "CosMap",
    "Diffusion",
    "DistributionMatching",
    "Draw",
    "ECTPairs",
    "FewStep",
    "GuidedDistillation",
    "ICTPairs",
    "KarrasPairs",
    "LatentAdversarialDistillation",
    "LatentConsistencyDistillation",
    "LatentConsistencyFinetuning",
    "LogitNormal",
    "MeanFlow",
    "Mode",
    "PhasedConsistency",
    "ProgressiveDistillation",
    "RandomKeys",
    "Shortcut",
    "TextEncoders",
    "TrajectoryConsistencyDistillation",
    "Uniform",
    "contrastive_loss",
    "method",
    "register",
    "toy_batch",
    "toy_nets",
    "validation_losses",
]
