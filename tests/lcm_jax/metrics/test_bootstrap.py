"""Confidence intervals hold the truth as often as they say."""

from __future__ import annotations

import numpy as np
import pytest

from lcm_jax.metrics import Moments, bootstrap, frechet_distance, report


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def test_the_interval_of_a_mean_holds_it_nineteen_times_in_twenty(rng: np.random.Generator) -> None:
    held = 0
    for seed in range(300):
        x = rng.exponential(size=100)
        interval = bootstrap(lambda counts, x=x: float(counts @ x / counts.sum()), [100], seed=seed)
        held += interval.low <= 1.0 <= interval.high
    assert 0.90 < held / 300 < 0.98


def test_the_interval_of_a_frechet_distance_is_not_moved_by_resampling(rng: np.random.Generator) -> None:
    """Plain quantiles of resampled distances lie above the distance itself, as resampled sets are smaller."""
    x, y = rng.normal(size=(80, 16)), rng.normal(size=(80, 16)) + 0.5

    def score(a: np.ndarray, b: np.ndarray) -> float:
        return frechet_distance(Moments.weighted(x, a), Moments.weighted(y, b))

    interval = bootstrap(score, [80, 80])
    assert interval.value == pytest.approx(frechet_distance(Moments.of(x), Moments.of(y)), rel=1e-9)
    assert interval.low < interval.value
    assert interval.high < interval.value + 0.5 * (interval.value - interval.low)


def test_counts_are_repetitions(rng: np.random.Generator) -> None:
    x, counts = rng.normal(size=(5, 3)), np.array([3.0, 0, 1, 2, 0])
    repeated = Moments.of(np.repeat(x, counts.astype(int), axis=0))
    weighted = Moments.weighted(x, counts)
    assert weighted.count == repeated.count == 6
    np.testing.assert_allclose(weighted.mean, repeated.mean, rtol=1e-12)
    np.testing.assert_allclose(weighted.covariance, repeated.covariance, rtol=1e-12)


def test_a_report_bounds_every_score(rng: np.random.Generator) -> None:
    real, fake, embeds = rng.normal(size=(60, 4)), rng.normal(size=(50, 4)) + 0.3, rng.normal(size=(2, 50, 6))
    plain = report(real, fake, *embeds)
    bounded = report(real, fake, *embeds, resamples=30)
    assert {name: bounded[name] for name in plain} == plain
    assert set(bounded) == set(plain) | {f"{name}_{end}" for name in plain for end in ("low", "high")}
    assert all(bounded[f"{name}_low"] < bounded[f"{name}_high"] for name in plain)


def test_bad_numbers_are_one_line() -> None:
    for options in ({"level": 1.0}, {"resamples": 1}):
        with pytest.raises(ValueError, match=r"level=.* must be between 0 and 1, and resamples=.* at least 2"):
            bootstrap(lambda counts: 0.0, [3], **options)
