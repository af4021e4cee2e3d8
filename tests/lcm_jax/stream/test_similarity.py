"""The similarity filter: what it sees, how often it skips, and that it keeps its promise."""

from __future__ import annotations

import numpy as np
import pytest

from lcm_jax.stream import SimilarityFilter, similarity

WHITE = np.full((64, 64, 3), 255, np.uint8)


def test_similarity_of_equal_and_opposite_frames() -> None:
    assert similarity(WHITE, WHITE.copy()) == 1.0
    assert similarity(WHITE, np.zeros_like(WHITE)) == 0.0
    assert similarity(WHITE, WHITE[:32]) == 0.0


@pytest.mark.parametrize("shape", [(64, 64), (61, 67), (5, 5)])
def test_it_is_the_most_different_tile(shape: tuple[int, int]) -> None:
    """Against the definition, tile by tile, with the parts of tiles at the edges."""
    a, b = np.random.default_rng(0).integers(0, 256, (2, *shape, 3), np.uint8)
    tiles = [
        np.abs(a[i : i + 8, j : j + 8].astype(float) - b[i : i + 8, j : j + 8]).mean()
        for i in range(0, shape[0], 8)
        for j in range(0, shape[1], 8)
    ]
    assert similarity(a, b) == pytest.approx(1.0 - max(tiles) / 255.0, abs=1e-5)


def test_a_stroke_on_white_is_always_drawn() -> None:
    """Error 8: a line of one pixel, for which the cosine of 256 x 256 pixels of white is 0.998."""
    white = np.full((256, 256, 3), 255, np.uint8)
    stroke = white.copy()
    stroke[100, 100:150] = 0
    a, b = white.astype(float).ravel(), stroke.astype(float).ravel()
    assert a @ b / np.linalg.norm(a) / np.linalg.norm(b) > 0.998
    for seed in range(50):
        filter = SimilarityFilter(threshold=0.98, seed=seed)
        assert not filter.skip(white)
        assert not filter.skip(stroke)


def test_brightness_is_a_change() -> None:
    """The cosine does not see a gain."""
    assert similarity(WHITE, WHITE // 2) < 0.6


@pytest.mark.parametrize("most", [0, 1, 10])
def test_at_most_so_many_skips_in_a_row(most: int) -> None:
    """Error 8: not one more."""
    filter = SimilarityFilter(max_skips=most)
    skips = [filter.skip(WHITE) for _ in range(60)]
    rows = "".join("s" if skip else "d" for skip in skips).split("d")
    assert max(map(len, rows)) == most
    assert filter.skipped == sum(skips)
    assert filter.drawn == 60 - sum(skips)


def test_skips_are_as_likely_as_the_paper_has_it() -> None:
    """P = 1 - (1 - similarity) / (1 - threshold), half way here."""
    near = (WHITE - np.uint8(round(0.01 * 255))).astype(np.uint8)
    chance = 1.0 - (1.0 - similarity(WHITE, near)) / 0.02
    skipped = 0
    for seed in range(2000):
        filter = SimilarityFilter(seed=seed)
        filter.skip(WHITE)
        skipped += filter.skip(near)
    assert skipped / 2000 == pytest.approx(chance, abs=4 * (chance * (1 - chance) / 2000) ** 0.5)


def test_frames_in_flight_are_not_held_back() -> None:
    """After a change, so many calls are made as a frame needs to come out."""
    filter = SimilarityFilter()
    black = np.zeros_like(WHITE)
    for _ in range(30):
        filter.skip(WHITE, in_flight=3)
    assert [filter.skip(black, in_flight=3) for _ in range(6)] == [False] * 4 + [True] * 2


def test_a_slow_drift_is_seen() -> None:
    """Frames that each differ little from the last, and much from where they began, come out."""
    filter, held = SimilarityFilter(), []
    for i in range(200):
        frame = np.full((16, 16, 3), i, np.uint8)
        if not filter.skip(frame, in_flight=2):
            held.append(i)
    assert np.diff(held).max() <= 5
    last = np.full((16, 16, 3), 199, np.uint8)
    tail = [filter.skip(last, in_flight=2) for _ in range(8)]
    assert tail[-1]


def test_restart_is_as_new() -> None:
    filter = SimilarityFilter()
    noisy = [np.clip(WHITE - np.uint8(i % 3), 0, 255).astype(np.uint8) for i in range(30)]
    first = [filter.skip(frame) for frame in noisy]
    filter.restart()
    assert [filter.skip(frame) for frame in noisy] == first
