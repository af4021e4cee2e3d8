"""The folder in which the library caches prepared files and compiled programs."""

from __future__ import annotations

import os
from pathlib import Path

import jax


def cache_dir() -> Path:
    """Return the cache folder: the environment variable LCM_JAX_CACHE, or .cache/lcm_jax in the home folder.

    >>> import os
    >>> from unittest import mock
    >>> with mock.patch.dict(os.environ, {"LCM_JAX_CACHE": "/data/cache"}):
    ...     print(cache_dir().as_posix())
    /data/cache
    """
    return Path(os.environ.get("LCM_JAX_CACHE") or Path.home() / ".cache" / "lcm_jax")


def use_compilation_cache() -> None:
    """Let JAX cache compiled programs under `cache_dir`/compiled, unless it has a cache folder already."""
    if jax.config.values["jax_compilation_cache_dir"] is None:
        jax.config.update("jax_compilation_cache_dir", str(cache_dir() / "compiled"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)  # the small ones take 0.2 s at a start
