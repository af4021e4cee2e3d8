"""KID, CMMD, density, coverage and the extrapolated distance: against the definitions, and without bias."""

from __future__ import annotations

from itertools import permutations, product

import numpy as np
import pytest

from lcm_jax.metrics import Moments, cmmd, density_coverage, frechet_distance, frechet_infinity, kid
from lcm_jax.metrics.mmd import cubic_kernel, gaussian_kernel, mmd


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def test_kid_is_the_sum_over_pairs(rng: np.random.Generator) -> None:
    x, y = rng.normal(size=(6, 3)), rng.normal(size=(5, 3)) + 0.5

    def k(a: np.ndarray, b: np.ndarray) -> float:
        return float((a @ b / 3 + 1) ** 3)

    want = np.mean([k(a, b) for a, b in permutations(x, 2)]) + np.mean([k(a, b) for a, b in permutations(y, 2)])
    want -= 2 * np.mean([k(a, b) for a, b in product(x, y)])
    assert kid(x, y) == pytest.approx(want, rel=1e-12)


def test_cmmd_compares_directions(rng: np.random.Generator) -> None:
    x, y = rng.normal(size=(6, 3)), rng.normal(size=(5, 3)) + 0.5
    unit = [v / np.linalg.norm(v, axis=1, keepdims=True) for v in (x, y)]

    def k(a: np.ndarray, b: np.ndarray) -> float:
        return float(np.exp(-np.square(a - b).sum() / (2 * 10.0**2)))

    want = np.mean([k(a, b) for a, b in permutations(unit[0], 2)])
    want += np.mean([k(a, b) for a, b in permutations(unit[1], 2)])
    want -= 2 * np.mean([k(a, b) for a, b in product(*unit)])
    assert cmmd(x, y) == pytest.approx(1000 * want, rel=1e-9)
    assert cmmd(x, 7.0 * y) == pytest.approx(cmmd(x, y), rel=1e-9)


@pytest.mark.parametrize("kernel", [cubic_kernel, gaussian_kernel])
def test_equal_distributions_have_a_mean_of_zero_at_any_number_of_samples(
    kernel: object, rng: np.random.Generator
) -> None:
    for n in (5, 20):
        drawn = [mmd(*rng.normal(size=(2, n, 8)), kernel)[0] for _ in range(400)]  # type: ignore[arg-type]
        assert abs(np.mean(drawn)) < 4 * np.std(drawn) / 20


def test_copies_of_a_sample_are_not_pairs(rng: np.random.Generator) -> None:
    x, y = rng.normal(size=(6, 3)), rng.normal(size=(5, 3))
    counts = np.stack([np.full(6, 2.0), np.array([3.0, 0, 1, 1, 1, 0])])
    both = mmd(x, y, cubic_kernel, counts, np.ones((2, 5)), chunk=4)
    assert both[0] == pytest.approx(kid(x, y), rel=1e-12)
    repeated = np.repeat(x, counts[1].astype(int), axis=0)
    different = [(a, b) for a, b in permutations(range(6), 2) if (repeated[a] != repeated[b]).any()]
    want = np.mean([cubic_kernel(repeated[[a]], repeated[[b]]) for a, b in different])
    want += np.mean([cubic_kernel(y[[a]], y[[b]]) for a, b in permutations(range(5), 2)])
    assert both[1] == pytest.approx(want - 2 * cubic_kernel(repeated, y).mean(), rel=1e-9)


def test_density_and_coverage_are_the_definitions(rng: np.random.Generator) -> None:
    real, fake = rng.normal(size=(40, 4)), rng.normal(size=(30, 4)) + 0.7
    distances = np.linalg.norm(real[:, None] - real[None], axis=-1)
    radius = np.sort(distances, axis=1)[:, 5]
    inside = np.linalg.norm(fake[:, None] - real[None], axis=-1) <= radius
    got = density_coverage(real, fake, k=5, chunk=7)
    assert got.density == pytest.approx(inside.sum() / (5 * 30), rel=1e-12)
    assert got.coverage == pytest.approx(inside.any(0).mean(), rel=1e-12)


def test_one_outlier_does_not_raise_the_coverage(rng: np.random.Generator) -> None:
    real, fake = rng.normal(size=(50, 2)), 0.05 * rng.normal(size=(50, 2))
    before = density_coverage(real, fake).coverage
    fake[0] = 1e3
    assert density_coverage(real, fake).coverage <= before < 0.5


def test_the_distance_at_infinity_is_nearer_to_the_truth(rng: np.random.Generator) -> None:
    """Of two Gaussians whose distance is known: 8 dimensions, shifted by a half."""
    truth, plain, extrapolated = 8 * 0.25, [], []
    for _ in range(20):
        real, fake = rng.normal(size=(4000, 8)), rng.normal(size=(60, 8)) + 0.5
        plain.append(frechet_distance(Moments.of(real), Moments.of(fake)))
        extrapolated.append(frechet_infinity(real, fake))
    assert abs(np.mean(extrapolated) - truth) < 0.3 * abs(np.mean(plain) - truth)


@pytest.mark.wrong_types
@pytest.mark.parametrize("score", [kid, cmmd])
def test_bad_features_are_named(score: object, rng: np.random.Generator) -> None:
    x = rng.normal(size=(4, 3))
    with pytest.raises(ValueError, match="dimensions differ: real 3, fake 2"):
        score(x, x[:, :2])  # type: ignore[operator]
    with pytest.raises(ValueError, match="needs 2 samples of each, got 4 real and 1 fake"):
        score(x, x[:1])  # type: ignore[operator]
    with pytest.raises(ValueError, match="at least 20 fakes, got 4"):
        frechet_infinity(x, x)
