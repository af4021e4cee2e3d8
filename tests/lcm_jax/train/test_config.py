"""Registered configs."""

from __future__ import annotations

import pytest

from lcm_jax import configs
from lcm_jax.train.config import TrainConfig


@pytest.mark.parametrize("name", sorted(configs.CONFIGS))
def test_registered_configs_are_made_and_named(name: str) -> None:
    assert isinstance(configs.get(name), TrainConfig)


def test_an_unknown_config_names_the_nearest() -> None:
    with pytest.raises(ValueError, match="did you mean openmoji_teacher"):
        configs.get("openmoji_teache")
