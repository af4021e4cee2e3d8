"""The MMDiT of Stable Diffusion 3, its text encoders (mmdit.text) and its baselines.

Text becomes embeddings, and (latent, time, embeddings) a velocity. Imports neither vae16 nor lcm_jax.
"""

from mmdit.baselines import CrossDiT, DiT, UViT
from mmdit.config import CrossDiTConfig, DiTConfig, MMDiTConfig, UViTConfig
from mmdit.model import MMDiT, abstract_params, example_inputs
from mmdit.presets import SD3_MEDIUM, SD35_LARGE, SD35_MEDIUM, family
from mmdit.rules import RULES_MMDIT

__all__ = [
    "RULES_MMDIT",
    "SD3_MEDIUM",
    "SD35_LARGE",
    "SD35_MEDIUM",
    "CrossDiT",
    "CrossDiTConfig",
    "DiT",
    "DiTConfig",
    "MMDiT",
    "MMDiTConfig",
    "UViT",
    "UViTConfig",
    "abstract_params",
    "example_inputs",
    "family",
]
