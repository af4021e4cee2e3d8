"""Where the library keeps what it has prepared."""

from __future__ import annotations

import os
from pathlib import Path


def cache_dir() -> Path:
    """LCM_JAX_CACHE, or .cache/lcm_jax in the home folder."""
    return Path(os.environ.get("LCM_JAX_CACHE") or Path.home() / ".cache" / "lcm_jax")
