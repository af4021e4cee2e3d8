"""Training objectives, `(nets, batch, key) -> (loss, metrics)`: one file a family."""

from lcm_jax.objectives.consistency import LatentConsistencyDistillation, LatentConsistencyFinetuning
from lcm_jax.objectives.contrastive import contrastive_loss
from lcm_jax.objectives.diffusion import Diffusion, validation_loss
from lcm_jax.objectives.terms import TextEncoders
from lcm_jax.objectives.times import CosMap, LogitNormal, Mode, Uniform

__all__ = [
    "CosMap",
    "Diffusion",
    "LatentConsistencyDistillation",
    "LatentConsistencyFinetuning",
    "LogitNormal",
    "Mode",
    "TextEncoders",
    "Uniform",
    "contrastive_loss",
    "validation_loss",
]
