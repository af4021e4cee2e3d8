"""Latent consistency models, Stable Diffusion and SD3 in JAX.

pipe = lcm_jax.load("openmoji")
images = pipe("red heart", steps=4, guidance=4.0)   # uint8 (1, 64, 64, 3)

Importing the package loads nothing else: each name and each sub-package is imported when it is first used.
"""

from __future__ import annotations

import importlib
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lcm_jax.inference.loading import load
    from lcm_jax.inference.pipeline import Pipeline
    from lcm_jax.runtime.jit import jit
    from lcm_jax.weights.lora.files import load_lora, save_lora

__all__ = ["Pipeline", "__version__", "jit", "load", "load_lora", "save_lora"]

_MODULE_OF = {
    "Pipeline": "lcm_jax.inference.pipeline",
    "load": "lcm_jax.inference.loading",
    "jit": "lcm_jax.runtime.jit",
    "load_lora": "lcm_jax.weights.lora.files",
    "save_lora": "lcm_jax.weights.lora.files",
}
_PACKAGES = (
    *("bench", "cli", "configs", "data", "diffusion", "evaluation", "inference", "lora", "metrics", "models", "nets"),
    *("objectives", "parallel", "plan", "precision", "runtime", "serve", "stream", "train", "typing", "weights"),
)


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return version("lcm-jax")
    if name in _MODULE_OF:
        return getattr(importlib.import_module(_MODULE_OF[name]), name)
    if name in _PACKAGES:
        return importlib.import_module(f"lcm_jax.{name}")
    raise AttributeError(f"module 'lcm_jax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, *_PACKAGES])
