"""LPIPS weights from files: the full state dict of the lpips package, or torchvision's VGG16 and the heads."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp

from lcm_jax.typing import Params
from lcm_jax.weights.safetensors_files import load_tensors
from lcm_jax.weights.torch_params import from_torch
from vae16 import LPIPS, LPIPS_OPTIONAL, LPIPS_PACKAGE_RULES, LPIPS_RULES


def load_lpips(path: str | Path, module: LPIPS = LPIPS()) -> Params:
    """Return the parameters of `module` from one .safetensors file with trunk and heads, in either naming."""
    tensors = load_tensors(path)
    rules = LPIPS_PACKAGE_RULES if any(key.startswith("net.") for key in tensors) else LPIPS_RULES
    image = jnp.zeros((1, 16, 16, 3))
    like = jax.eval_shape(lambda: module.init(jax.random.key(0), image, image)["params"])
    return from_torch(tensors, like, rules, optional=LPIPS_OPTIONAL, source=str(path))
