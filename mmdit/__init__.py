"""Text encoders and the MMDiT: text -> embeddings -> velocity. Imports neither vae16 nor lcm_jax."""

from mmdit.config import MMDiTConfig
from mmdit.model import MMDiT, abstract_params, example_inputs
from mmdit.presets import SD3_MEDIUM, SD35_LARGE, SD35_MEDIUM, family
from mmdit.rules import RULES_MMDIT

__all__ = [
    "RULES_MMDIT",
    "SD3_MEDIUM",
    "SD35_LARGE",
    "SD35_MEDIUM",
    "MMDiT",
    "MMDiTConfig",
    "abstract_params",
    "example_inputs",
    "family",
]
