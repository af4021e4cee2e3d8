from __future__ import annotations

import numpy as np
import pytest

from lcm_jax.metrics.clip_score import clip_score, clip_scores
from lcm_jax.metrics.mmd import kid
from lcm_jax.metrics.precision_recall import density_coverage, precision_recall
from lcm_jax.metrics.report import report


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def test_clip_score_is_a_hundred_cosines():
    image = np.array([[2.0, 0.0], [0.0, 3.0], [1.0, 1.0]])
    text = np.array([[5.0, 0.0], [0.0, -1.0], [1.0, 0.0]])
    np.testing.assert_allclose(clip_scores(image, text), [100.0, 0.0, 100.0 / np.sqrt(2)])
    assert clip_score(image, text) == pytest.approx((100.0 + 100.0 / np.sqrt(2)) / 3)
    assert clip_score(image, text, weight=2.5) == pytest.approx(clip_score(image, text) / 40)


@pytest.mark.wrong_types
def test_clip_score_refuses_what_has_no_cosine():
    x = np.eye(3)
    with pytest.raises(ValueError, match="pair row by row"):
        clip_score(x, x[:2])
    with pytest.raises(ValueError, match="pair 1 holds a zero"):
        clip_score(x * [[1.0], [0.0], [1.0]], x)
    with pytest.raises(ValueError, match="no pairs"):
        clip_score(x[:0], x[:0])


def test_identical_sets_have_precision_and_recall_one(rng):
    x = rng.normal(size=(60, 7)) + 100.0
    assert precision_recall(x, rng.permutation(x)) == (1.0, 1.0)
    collapsed = np.repeat(x[:4], 10, axis=0)  # every radius is zero
    assert precision_recall(collapsed, collapsed) == (1.0, 1.0)


def test_disjoint_sets_have_none(rng):
    x = rng.normal(size=(40, 3))
    assert precision_recall(x, x + 50.0) == (0.0, 0.0)


def test_mode_collapse_keeps_precision_and_loses_recall(rng):
    real = np.concatenate([rng.normal(size=(50, 4)), rng.normal(size=(50, 4)) + 30.0])
    fake = real[:50] + 0.01 * rng.normal(size=(50, 4))
    precision, recall = precision_recall(real, fake)
    assert precision == 1.0
    assert 0.4 <= recall <= 0.5


@pytest.mark.parametrize("k", [1, 3])
def test_precision_recall_agrees_with_the_definition(rng, k):
    real, fake = rng.normal(size=(37, 5)), 1.3 * rng.normal(size=(23, 5)) + 0.3

    def covered(x, centres):
        pairs = np.linalg.norm(centres[:, None] - centres[None], axis=-1)
        radii = np.sort(pairs, axis=1)[:, k]
        return (np.linalg.norm(x[:, None] - centres[None], axis=-1) <= radii).any(axis=1).mean()

    expected = pytest.approx((covered(fake, real), covered(real, fake)))
    assert precision_recall(real, fake, k=k) == expected
    assert precision_recall(real, fake, k=k, chunk=5) == expected
    assert precision_recall(rng.permutation(real), fake, k=k) == expected


@pytest.mark.wrong_types
def test_precision_recall_names_bad_input(rng):
    x = rng.normal(size=(10, 3))
    with pytest.raises(ValueError, match="more than k samples; got 3 real, 10 fake"):
        precision_recall(x[:3], x)
    with pytest.raises(ValueError, match="dimensions differ"):
        precision_recall(x, x[:, :2])
    with pytest.raises(ValueError, match="fake: 10 of 10"):
        precision_recall(x, x * np.inf)


def test_report(rng):
    x, e = rng.normal(size=(20, 4)), rng.normal(size=(20, 6))
    scores = report(x, x)
    assert scores["frechet"] == pytest.approx(0.0, abs=1e-9)
    assert (scores["precision"], scores["recall"], scores["coverage"]) == (1.0, 1.0, 1.0)
    assert (scores["density"], scores["kid"]) == (density_coverage(x, x).density, kid(x, x))
    assert report(x, x, e, e)["clip_score"] == pytest.approx(100.0)
    with pytest.raises(ValueError, match="both"):
        report(x, x, e)
