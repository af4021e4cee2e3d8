"""Confidence intervals hold the truth as often as they say."""

from __future__ import annotations

import numpy as np
import pytest

from lcm_jax.metrics import Moments, bootstrap, cmmd, frechet_distance, frechet_infinity, gaussian_distance, report
from lcm_jax.metrics.frechet import frechet_influence, infinity_influence
from lcm_jax.metrics.mmd import Kernel, cubic_kernel, gaussian_kernel, mmd


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def test_the_interval_of_a_mean_holds_it_nineteen_times_in_twenty(rng: np.random.Generator) -> None:
    held = 0
    for seed in range(300):
        x = rng.exponential(size=100)
        interval = bootstrap(lambda counts, x=x: counts @ x / 100, [100], seed=seed)
        held += interval.low <= 1.0 <= interval.high
    assert 0.90 < held / 300 < 0.98


@pytest.mark.parametrize(("n", "d"), [(80, 16), (24, 32)], ids=["more samples", "more dimensions"])
def test_the_interval_of_a_frechet_distance_holds_its_mean(n: int, d: int, rng: np.random.Generator) -> None:
    """Resampled sets themselves lie far above it: they have fewer different samples."""
    scale = 1.0 / np.sqrt(1.0 + np.arange(d))

    def draw() -> tuple[np.ndarray, np.ndarray]:
        return rng.normal(size=(n, d)) * scale, rng.normal(size=(n, d)) * scale + 0.4 * scale

    values = [frechet_influence(*draw()).value for _ in range(120)]
    held, widths = 0, []
    for seed in range(40):
        interval = bootstrap(frechet_influence(*draw()), [n, n], seed=seed)
        assert interval.low < interval.value < interval.high
        held += interval.low <= np.mean(values) <= interval.high
        widths.append(interval.high - interval.low)
    assert 0.85 <= held / 40 <= 1.0
    assert 0.8 < np.mean(widths) / (2 * 1.96 * np.std(values)) < 1.4


def test_influence_is_the_change_with_a_weight(rng: np.random.Generator) -> None:
    """Against the distance of sets in which one sample stands a little more often."""
    x, y = rng.normal(size=(30, 4)), 1.3 * rng.normal(size=(25, 4)) + 0.3
    found = frechet_influence(x, y)
    assert found.value == pytest.approx(frechet_distance(Moments.of(x), Moments.of(y)), rel=1e-9)

    def distance(share: float, i: int) -> float:
        """With population covariances, that are functions of the weights alone."""
        weights = np.full(30, (1 - share) / 30)
        weights[i] += share
        mean = weights @ x
        return gaussian_distance(mean, (x - mean).T * weights @ (x - mean) * 30 / 29, y.mean(0), np.cov(y.T))

    for i in (0, 7):
        slope = (distance(1e-5, i) - distance(-1e-5, i)) / 2e-5
        constant = np.square(found.real).mean() ** 0.5  # (n - 1) / n in the covariance's own weight
        assert found.real[i] == pytest.approx(slope, abs=0.05 * constant)


def test_a_report_bounds_every_score(rng: np.random.Generator) -> None:
    real, fake, embeds = rng.normal(size=(60, 4)), rng.normal(size=(50, 4)) + 0.3, rng.normal(size=(2, 50, 6))
    extra = {"real_embeds": rng.normal(size=(60, 6)), "means": {"taste": rng.normal(size=50)}}
    plain = report(real, fake, *embeds, **extra)
    assert list(plain)[:4] == ["frechet", "frechet_infinity", "kid", "cmmd"]
    assert plain["cmmd"] == cmmd(extra["real_embeds"], embeds[0])
    assert plain["frechet_infinity"] == pytest.approx(frechet_infinity(real, fake), rel=1e-9)
    bounded = report(real, fake, *embeds, **extra, resamples=30)
    assert {name: bounded[name] for name in plain} == pytest.approx(plain, rel=1e-9)
    assert set(bounded) == set(plain) | {f"{name}_{end}" for name in plain for end in ("low", "high")}
    assert all(bounded[f"{name}_low"] < bounded[f"{name}_high"] for name in plain)


def test_the_extrapolated_distance_has_a_wider_interval(rng: np.random.Generator) -> None:
    scatter, widths = [], []
    for _ in range(40):
        x, y = rng.normal(size=(300, 6)), rng.normal(size=(60, 6)) + 0.5
        found = infinity_influence(x, y, frechet_influence(x, y))
        interval = bootstrap(found, [300, 60], resamples=100)
        scatter.append(found.value)
        widths.append(interval.high - interval.low)
    assert 0.7 < np.mean(widths) / (2 * 1.96 * np.std(scatter)) < 1.5


@pytest.mark.parametrize("kernel", [cubic_kernel, gaussian_kernel])
def test_pairs_are_drawn_again_together(kernel: Kernel, rng: np.random.Generator) -> None:
    """A change of both pictures of a caption in the same way moves no distance, and widens no interval."""
    x = rng.normal(size=(60, 6))
    y = x + 0.2 * rng.normal(size=x.shape) + 0.3
    counts = rng.multinomial(60, np.full(60, 1 / 60), size=2000).astype(float)
    drawn, value = mmd(x, y, kernel, counts, counts, paired=True), mmd(x, y, kernel)[0]
    ones = np.ones((1, 60))
    assert mmd(x, y, kernel, ones, ones, paired=True)[0] == pytest.approx(value, rel=1e-9)
    assert abs(drawn.mean() - value) < 0.3 * drawn.std()  # without bias
    both = frechet_influence(x, y)
    apart, together = (bootstrap(both, [60, 60], paired=paired) for paired in (False, True))
    assert together.high - together.low < 0.7 * (apart.high - apart.low)
    with pytest.raises(ValueError, match="paired sets have the same size, got 60 and 50"):
        bootstrap(both, [60, 50], paired=True)


def test_bad_numbers_are_one_line() -> None:
    for options in ({"level": 1.0}, {"resamples": 1}):
        with pytest.raises(ValueError, match=r"level=.* must be between 0 and 1, and resamples=.* at least 2"):
            bootstrap(lambda counts: np.zeros(len(counts)), [3], **options)
