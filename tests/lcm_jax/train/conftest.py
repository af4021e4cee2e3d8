"""Shared by the tests of training: a cache of their own, pictures of 16 pixels, processes with devices."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import jax
import pytest

from lcm_jax.train.tasks.common import DataConfig


@pytest.fixture(scope="module", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    patch = pytest.MonkeyPatch()
    patch.setenv("LCM_JAX_CACHE", str(tmp_path_factory.mktemp("cache")))
    yield
    patch.undo()


@pytest.fixture
def data(pictures: Path) -> DataConfig:
    return DataConfig(name=f"folder:{pictures}", size=16)


@pytest.fixture(scope="session")
def environment() -> Callable[[int], dict[str, str]]:
    """Of a process with so many devices, that compiles as the tests do."""

    def of(devices: int) -> dict[str, str]:
        return os.environ | {
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
            "JAX_PLATFORMS": "cpu",
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
            "JAX_COMPILATION_CACHE_DIR": str(jax.config.values["jax_compilation_cache_dir"]),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.3",
        }

    return of
