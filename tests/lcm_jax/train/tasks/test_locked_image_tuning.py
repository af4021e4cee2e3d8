"""A text tower trained for two tiny steps beside an image tower that is given."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from lcm_jax.train.tasks.common import DataConfig
from lcm_jax.train.tasks.locked_image_tuning import LockedImageTask
from lcm_jax.weights.diffusers_folder import Component, load_component
from mmdit.text import Tokenizer


def test_a_text_tower_for_a_given_image_tower(
    tiny_model: Path, tiny_components: dict[str, Component], data: DataConfig,
    train: Callable[[object, Path], Path], tmp_path: Path,
) -> None:  # fmt: skip
    config = replace(tiny_components["text_encoder"].module.config, hidden_size=12, num_hidden_layers=1)
    task = LockedImageTask(text=config, images=str(tiny_model), data=data, validation=data)
    export = train(task, tmp_path)
    tower, tokenizer = load_component(export, "text_encoder_2"), Tokenizer.load(export / "tokenizer_2")
    assert tower.module.config.hidden_size == 12
    assert tower.module.projection
    assert tower.module.config.vocab_size == tokenizer.vocab_size
    with pytest.raises(ValueError, match="projection_dim is 7, the image tower's is 8"):
        replace(task, text=replace(config, projection_dim=7)).build()
