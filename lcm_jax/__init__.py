"""Latent consistency models, Stable Diffusion and SD3 in JAX.

pipe = lcm_jax.load("openmoji")
images = pipe("red heart", steps=4, guidance=4.0)   # uint8 (1, 64, 64, 3)
"""

from lcm_jax.inference.pipeline import Pipeline, load
from lcm_jax.weights.lora.files import load_lora, save_lora

__all__ = ["Pipeline", "load", "load_lora", "save_lora"]
