"""Training objectives, `(nets, batch, key) -> (loss, metrics)`: one file a family."""

from lcm_jax.objectives.consistency import LatentConsistencyDistillation, LatentConsistencyFinetuning
from lcm_jax.objectives.continuous import ContinuousConsistency, MeanFlow, Shortcut
from lcm_jax.objectives.contrastive import contrastive_loss
from lcm_jax.objectives.diffusion import Diffusion, validation_losses
from lcm_jax.objectives.distribution import (
    AdversarialDistillation,
    DistributionMatching,
    LatentAdversarialDistillation,
)
from lcm_jax.objectives.few_step import FewStep
from lcm_jax.objectives.progressive import GuidedDistillation, ProgressiveDistillation
from lcm_jax.objectives.registry import METHODS, method
from lcm_jax.objectives.terms import TextEncoders
from lcm_jax.objectives.time_densities import CosMap, LogitNormal, Mode, Uniform
from lcm_jax.objectives.time_pairs import ECTPairs, ICTPairs, KarrasPairs
from lcm_jax.objectives.trajectory import (
    ConsistencyTrajectory,
    PhasedConsistency,
    TrajectoryConsistencyDistillation,
)

__all__ = [
    "METHODS",
    "AdversarialDistillation",
    "ConsistencyTrajectory",
    "ContinuousConsistency",
    "CosMap",
    "Diffusion",
    "DistributionMatching",
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
    "Shortcut",
    "TextEncoders",
    "TrajectoryConsistencyDistillation",
    "Uniform",
    "contrastive_loss",
    "method",
    "validation_losses",
]
