"""The UNet of Stable Diffusion and the ViT of DINOv2: configs, blocks, and the tables of their names in PyTorch."""

from lcm_jax.nets.config import UNetConfig
from lcm_jax.nets.dinov2 import DINOV2_B, DINOV2_G, DINOV2_L, DINOV2_S, RULES_DINOV2, Dinov2, Dinov2Config
from lcm_jax.nets.embed import guidance_embedding
from lcm_jax.nets.presets import SD15, SD21, SD_TURBO, SDXL, SDXL_REFINER, SSD1B
from lcm_jax.nets.rules import RULES_UNET
from lcm_jax.nets.unet import UNet, abstract_params, example_inputs

__all__ = [
    "DINOV2_B",
    "DINOV2_G",
    "DINOV2_L",
    "DINOV2_S",
    "RULES_DINOV2",
    "RULES_UNET",
    "SD15",
    "SD21",
    "SDXL",
    "SDXL_REFINER",
    "SD_TURBO",
    "SSD1B",
    "Dinov2",
    "Dinov2Config",
    "UNet",
    "UNetConfig",
    "abstract_params",
    "example_inputs",
    "guidance_embedding",
]
