"""Where the library keeps what it has prepared."""

from __future__ import annotations

import os
from pathlib import Path

import jax


def cache_dir() -> Path:
    """LCM_JAX_CACHE, or .cache/lcm_jax in the home folder."""
    return Path(os.environ.get("LCM_JAX_CACHE") or Path.home() / ".cache" / "lcm_jax")


def use_compilation_cache() -> None:
    """Keep compiled programs under `cache_dir`/compiled, unless JAX has been given a place already."""
    if jax.config.values["jax_compilation_cache_dir"] is None:
        jax.config.update("jax_compilation_cache_dir", str(cache_dir() / "compiled"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)  # the small ones cost a start 0.2 s
