"""Training objectives, `(nets, batch, key) -> (loss, metrics)`: one file a family.

An objective of your own is a frozen dataclass that extends `FewStep`; `register` gives it a name.
"""

from lcm_jax.objectives.consistency import LatentConsistencyDistillation, LatentConsistencyFinetuning
from lcm_jax.objectives.continuous import ContinuousConsistency, SanaSprint, ScoreRegularizedConsistency
from lcm_jax.objectives.contrastive import contrastive_loss
from lcm_jax.objectives.diffusion import Diffusion, validation_losses
from lcm_jax.objectives.distribution import (
    AdversarialDistillation,
    DistributionMatching,
    DivergenceDistillation,
    LatentAdversarialDistillation,
)
from lcm_jax.objectives.few_step import Draw, FewStep, RandomKeys
from lcm_jax.objectives.mean_velocity import AlignYourFlow, AlphaFlow, ImprovedMeanFlow, MeanFlow, Shortcut
from lcm_jax.objectives.progressive import GuidedDistillation, ProgressiveDistillation
from lcm_jax.objectives.reflow import PiecewiseReflow
from lcm_jax.objectives.registry import METHODS, method, register
from lcm_jax.objectives.terms import TextEncoders
from lcm_jax.objectives.time_densities import CosMap, LogitNormal, Mode, Uniform
from lcm_jax.objectives.time_pairs import CTPairs, ECTPairs, ICTPairs, KarrasPairs
from lcm_jax.objectives.toy import toy_batch, toy_nets
from lcm_jax.objectives.trajectory import (
    ConsistencyTrajectory,
    PhasedConsistency,
    SegmentedConsistency,
    TrajectoryConsistencyDistillation,
)
from lcm_jax.objectives.twin_flow import TwinFlow

__all__ = [
    "METHODS",
    "AdversarialDistillation",
    "AlignYourFlow",
    "AlphaFlow",
    "CTPairs",
    "ConsistencyTrajectory",
    "ContinuousConsistency",
    "CosMap",
    "Diffusion",
    "DistributionMatching",
    "DivergenceDistillation",
    "Draw",
    "ECTPairs",
    "FewStep",
    "GuidedDistillation",
    "ICTPairs",
    "ImprovedMeanFlow",
    "KarrasPairs",
    "LatentAdversarialDistillation",
    "LatentConsistencyDistillation",
    "LatentConsistencyFinetuning",
    "LogitNormal",
    "MeanFlow",
    "Mode",
    "PhasedConsistency",
    "PiecewiseReflow",
    "ProgressiveDistillation",
    "RandomKeys",
    "SanaSprint",
    "ScoreRegularizedConsistency",
    "SegmentedConsistency",
    "Shortcut",
    "TextEncoders",
    "TrajectoryConsistencyDistillation",
    "TwinFlow",
    "Uniform",
    "contrastive_loss",
    "method",
    "register",
    "toy_batch",
    "toy_nets",
    "validation_losses",
]
