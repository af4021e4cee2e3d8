"""Training objectives, `(nets, batch, key) -> (loss, metrics)`: one file a family."""

from lcm_jax.objectives.consistency import LatentConsistencyDistillation, LatentConsistencyFinetuning
from lcm_jax.objectives.contrastive import contrastive_loss
from lcm_jax.objectives.diffusion import Diffusion

__all__ = ["Diffusion", "LatentConsistencyDistillation", "LatentConsistencyFinetuning", "contrastive_loss"]
