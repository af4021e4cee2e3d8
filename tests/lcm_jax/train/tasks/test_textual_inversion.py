"""Textual inversion on tiny models: the new vectors alone learn, through a kill too, and their file is read again."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

import lcm_jax
from lcm_jax.parallel.sharding import BatchedMap, make_mesh
from lcm_jax.train.loop import LoopConfig, fit
from lcm_jax.train.optimizer import OptimizerConfig
from lcm_jax.train.task import Task
from lcm_jax.train.tasks.common import DataConfig
from lcm_jax.train.tasks.textual_inversion import TextualInversionTask
from lcm_jax.train.train_step import Progress
from lcm_jax.weights.embeddings import CLIP_TABLE
from lcm_jax.weights.safetensors_files import load_tensors

LOOP = LoopConfig(steps=2, batch_size=4, log_every=1, save_every=1, preview_every=2, ema=0.5)
OPTIMIZER = OptimizerConfig(warmup=0, learning_rate=0.3)
KEY = jax.random.key(0)


def inversion(model: Path, data: DataConfig, **options: Any) -> TextualInversionTask:
    defaults: dict[str, Any] = {"vectors": 2, "preview_steps": 2, "templates": ("a {word}", "{caption} {word}")}
    return TextualInversionTask(model=str(model), data=data, **defaults | options)


@pytest.fixture(scope="module")
def task(small_model: Path, pictures: Path) -> Task:
    data = DataConfig(name=f"folder:{pictures}", size=16)
    return inversion(small_model, data, preview_prompts=("dog face <new>",)).build()


@pytest.mark.slow
def test_resume_export_and_what_the_word_draws(task: Task, small_model: Path, tmp_path: Path) -> None:
    state = fit(replace(task, preview=lambda *_: {}), LOOP, OPTIMIZER, tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "killed")
    shutil.rmtree(tmp_path / "killed" / "checkpoints" / "2")
    resumed = fit(replace(task, preview=lambda *_: {}), LOOP, OPTIMIZER, tmp_path / "killed")
    jax.tree.map(np.testing.assert_array_equal, state.params, resumed.params)
    assert set(state.ema) == {"text_encoder"}
    assert np.all(state.params["text_encoder"] != task.init(KEY)["text_encoder"])

    tensors = load_tensors(tmp_path / "whole" / "export" / "learned_embeds.safetensors")
    assert list(tensors) == ["<new>"], "diffusers' form"
    np.testing.assert_array_equal(tensors["<new>"], state.ema["text_encoder"])
    before, after = lcm_jax.load(small_model), lcm_jax.load(small_model, embeddings=tmp_path / "whole" / "export")
    draw = {"steps": 2, "guidance": 2.0, "sampler": "ddim"}
    assert np.any(after("dog face <new>", **draw) != before("dog face <new>", **draw))
    np.testing.assert_array_equal(after("dog face", **draw), before("dog face", **draw))


def test_the_loss_falls(task: Task) -> None:
    """On one batch and one draw of noise, by plain gradient descent."""
    batch = jax.tree.map(jnp.asarray, next(task.batches(4, 0)))
    params, progress = task.init(KEY), Progress(jnp.int32(0), jnp.int32(1))

    @jax.jit
    def step(params: Any) -> tuple[Any, Any]:
        def loss(p: Any) -> Any:
            return task.loss(p, p, task.frozen, batch, KEY, progress)[0]

        value, gradient = jax.value_and_grad(loss)(params)
        norm = jnp.sqrt(sum(jnp.sum(g**2) for g in jax.tree.leaves(gradient)))
        return jax.tree.map(lambda p, g: p - 0.05 * g / norm, params, gradient), value

    losses = []
    for _ in range(8):
        params, value = step(params)
        losses.append(float(value))
    assert losses[-1] < losses[0]
    assert losses[1] < losses[0]


def test_batches_have_every_template_with_the_words_ids(task: Task, small_model: Path) -> None:
    batches = task.batches(12, 0)
    tokens = next(batches)["tokens_0"]
    table = traverse_util.flatten_dict(task.frozen["texts"]["text_encoder"], sep="/")[CLIP_TABLE]
    _, ids = lcm_jax.load(small_model).folder.tokenizers["text_encoder"].with_words({"<new>": 2})
    word = ids["<new>"]
    assert not table[jnp.asarray(word)].any(), "the rows of the word are zeros: the trained vectors take their place"
    assert all(set(word) <= set(row.tolist()) for row in tokens)
    lengths = {int((row == row[-1]).argmax()) for row in tokens}
    assert len(lengths) > 1, "with and without a caption"


def test_previews_are_of_the_present_vectors(task: Task) -> None:
    devices = BatchedMap(mesh=make_mesh("data=1", devices=jax.devices()[:1]), most=4)
    one = task.init(KEY)
    other = jax.tree.map(lambda leaf: leaf[:, ::-1], one)
    first, second = (next(iter(task.preview(tree, task.frozen, devices).values())) for tree in (one, other))
    assert np.any(first != second)


def test_the_vectors_begin_as_the_initializers(small_model: Path, data: DataConfig) -> None:
    task = inversion(small_model, data, initializer="dog", vectors=2)
    before = lcm_jax.load(small_model)
    ids = before.folder.tokenizers["text_encoder"].pieces(["dog"])[0]
    table = traverse_util.flatten_dict(before.params["text_encoder"], sep="/")[CLIP_TABLE]
    start = task.build().init(KEY)["text_encoder"]
    np.testing.assert_array_equal(start, [table[ids[i % len(ids)]] for i in range(2)])


@pytest.mark.slow
def test_sd3_learns_in_all_three_encoders(small_sd3: Path, data: DataConfig, tmp_path: Path) -> None:
    task = inversion(small_sd3, data).build()
    state = fit(replace(task, preview=lambda *_: {}), LOOP, OPTIMIZER, tmp_path)
    assert set(state.ema) == {"text_encoder", "text_encoder_2", "text_encoder_3"}
    start = task.init(KEY)
    assert all(np.all(state.params[name] != start[name]) for name in start)
    assert load_tensors(tmp_path / "export" / "learned_embeds.safetensors").keys() == {"clip_l", "clip_g", "t5"}
    pipe = lcm_jax.load(small_sd3, embeddings=(tmp_path / "export", "<new>"))
    assert pipe("a <new>", steps=1, t5_tokens=6).shape == (1, 16, 16, 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vectors": 0}, "task.vectors is 0"),
        ({"templates": ()}, "task.templates is empty"),
        ({"templates": ("a photo",)}, r"'a photo' has no \{word\}"),
        ({"word": "heart"}, "task.word: the word 'heart' for an embedding is in the vocabulary"),
        ({"word": "two words"}, "task.word: .* without spaces"),
    ],
)
def test_bad_values(small_model: Path, data: DataConfig, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        inversion(small_model, data, **options).build()
