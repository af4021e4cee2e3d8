"""Shared by the tests of training: a cache of their own, and pictures of 16 pixels."""

from __future__ import annotations

from pathlib import Path

import pytest

from lcm_jax.train.tasks.common import DataConfig


@pytest.fixture(scope="module", autouse=True)
def _own_cache(own_cache: None) -> None:
    """Every module of these tests has a cache of its own."""


@pytest.fixture
def data(pictures: Path) -> DataConfig:
    return DataConfig(name=f"folder:{pictures}", size=16)
