"""The UNet of Stable Diffusion: its configs, its blocks, and the table that names its parameters in PyTorch."""

from lcm_jax.nets.config import UNetConfig
from lcm_jax.nets.embed import guidance_embedding
from lcm_jax.nets.presets import SD15, SD21, SD_TURBO, SDXL, SDXL_REFINER, SSD1B
from lcm_jax.nets.rules import RULES_UNET
from lcm_jax.nets.unet import UNet, abstract_params, example_inputs

__all__ = [
    "RULES_UNET",
    "SD15",
    "SD21",
    "SDXL",
    "SDXL_REFINER",
    "SD_TURBO",
    "SSD1B",
    "UNet",
    "UNetConfig",
    "abstract_params",
    "example_inputs",
    "guidance_embedding",
]
