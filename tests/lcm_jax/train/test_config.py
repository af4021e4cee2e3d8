"""Registered configs, and a folder that holds the run of another one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from lcm_jax import configs
from lcm_jax.runtime.atomic_files import write_json
from lcm_jax.train.config import WATCHING, TrainConfig
from lcm_jax.train.overrides import flatten


def test_another_config_in_the_same_folder_is_refused(tmp_path: Path) -> None:
    config = configs.get("openmoji_clip")
    other = replace(config, optimizer=replace(config.optimizer, learning_rate=0.5))
    write_json(tmp_path / "config.json", {key: repr(value) for key, value in flatten(config) if key not in WATCHING})
    with pytest.raises(ValueError, match=r"learning_rate = 0.001, not 0.5: .*--workdir"):
        other.run(tmp_path)


@pytest.mark.parametrize("name", sorted(configs.CONFIGS))
def test_registered_configs_are_made_and_named(name: str) -> None:
    assert isinstance(configs.get(name), TrainConfig)


def test_an_unknown_config_names_the_nearest() -> None:
    with pytest.raises(ValueError, match="did you mean openmoji_teacher"):
        configs.get("openmoji_teache")
