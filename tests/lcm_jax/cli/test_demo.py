"""The demo's prompts are what it says, and its picture has the size of its parts."""

from __future__ import annotations

import numpy as np

from lcm_jax.cli import demo
from lcm_jax.data import openmoji


def test_unseen_prompts_are_held_out_and_seen_ones_are_not() -> None:
    captions = {split: {item.caption for item in openmoji.split_items(split)} for split in openmoji.SPLITS}
    assert set(demo.UNSEEN) <= captions["compositional"]
    assert set(demo.SEEN) <= captions["train"]


def test_columns_are_the_comparison_asked_for() -> None:
    found = [(c.model, c.sampler, c.steps) for c in demo.columns(3.0)]
    teacher = [("teacher", "ddim", n) for n in (1, 2, 4, 8, 50)]
    students = [*(("student", "lcm", n) for n in (1, 2, 4, 8)), ("lora", "lcm", 4)]
    assert found == [*teacher, *students]
    flow = [(c.model, c.sampler, c.steps) for c in demo.columns(3.0, "euler")]
    assert flow == [*(("teacher", "euler", n) for n in (1, 2, 4, 8, 28)), *students]


def test_grid_holds_every_picture() -> None:
    # Red, which the black and grey of the labels is not.
    strips = [np.full((3, 8, 8, 3), (value, 0, 0), np.uint8) for value in (50, 100, 150, 200)]
    picture = np.asarray(demo.labelled_grid(["a", "b", "c", "d"], ["x", "y", "z"], strips, zoom=2))
    for value in (50, 100, 150, 200):
        assert (picture == (value, 0, 0)).all(axis=-1).sum() == 3 * 16 * 16


def test_grid_keeps_the_shape_of_pictures() -> None:
    strips = [np.full((2, 8, 16, 3), (value, 0, 0), np.uint8) for value in (50, 100)]
    picture = np.asarray(demo.labelled_grid(["a", "b"], ["x", "y"], strips, zoom=3))
    rows, columns = ((picture == (50, 0, 0)).all(axis=-1).any(axis=axis).sum() for axis in (1, 0))
    assert (rows, columns) == (2 * 24, 48)


def test_table_has_a_line_for_each_row() -> None:
    row = {
        "method": "LCM 4",
        "seconds_per_image": 0.1,
        "frechet": 2.0,
        "clip_score": 30.0,
        "precision": 1.0,
        "recall": 0.5,
    }
    assert len(demo.table([row, row]).splitlines()) == 3
