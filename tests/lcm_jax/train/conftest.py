"""Shared by the tests of tasks: a cache of their own, and pictures of 16 pixels."""

from __future__ import annotations

from pathlib import Path

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
