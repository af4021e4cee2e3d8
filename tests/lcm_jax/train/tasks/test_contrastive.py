"""A CLIP trained for two tiny steps, and the pictures that it sees."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from lcm_jax.train.tasks.common import DataConfig
from lcm_jax.train.tasks.contrastive import ContrastiveTask, move
from lcm_jax.weights.diffusers_folder import Component, load_component
from mmdit.text import Tokenizer


def test_clip(
    tiny_components: dict[str, Component], data: DataConfig, train: Callable[[object, Path], Path], tmp_path: Path
) -> None:
    task = ContrastiveTask(
        text=replace(tiny_components["text_encoder"].module.config, num_hidden_layers=1),
        vision=tiny_components["image_encoder"].module.config,
        vocabulary=600,
        data=data,
        validation=data,
        shift=1,
    )
    export = train(task, tmp_path)
    text, tokenizer = load_component(export, "text_encoder"), Tokenizer.load(export / "tokenizer")
    assert text.module.config.eos_token_id == tokenizer.eos_token_id
    assert load_component(export, "image_encoder").module.config.image_size == 16


def test_moved_pictures_bring_white_in() -> None:
    images = jnp.zeros((8, 16, 16, 3))
    moved = np.asarray(move(jax.random.key(0), images, 2))
    assert set(np.unique(moved)) == {0.0, 1.0}
    np.testing.assert_array_equal(np.asarray(move(jax.random.key(0), images, 0)), images)
