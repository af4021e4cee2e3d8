from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg

from lcm_jax.metrics.frechet import Moments, frechet_distance, gaussian_distance


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def psd(rng, d, rank=None):
    a = rng.normal(size=(d, rank or d))
    return a @ a.T / d


@pytest.mark.parametrize("n", [5, 200])  # fewer and more samples than dimensions
def test_identical_sets_are_at_distance_zero(rng, n):
    x = Moments.of(10.0 + 3.0 * rng.normal(size=(n, 24)))
    assert frechet_distance(x, x) == pytest.approx(0.0, abs=1e-9)


def test_closed_form_of_commuting_gaussians(rng):
    d = 12
    basis = np.linalg.qr(rng.normal(size=(d, d)))[0]
    v1, v2 = rng.uniform(0.1, 3.0, d), rng.uniform(0.1, 3.0, d)
    m1, m2 = rng.normal(size=d), rng.normal(size=d)
    expected = np.sum((m1 - m2) ** 2) + np.sum((np.sqrt(v1) - np.sqrt(v2)) ** 2)
    found = gaussian_distance(m1, basis * v1 @ basis.T, m2, basis * v2 @ basis.T)
    assert found == pytest.approx(expected, rel=1e-12)


def test_a_shift_costs_its_square(rng):
    x = rng.normal(size=(50, 8))
    shift = np.arange(8.0)
    assert frechet_distance(Moments.of(x), Moments.of(x + shift)) == pytest.approx(shift @ shift, rel=1e-10)


def test_agrees_with_sqrtm(rng):
    d = 32
    m, c1, c2 = np.zeros(d), psd(rng, d), psd(rng, d)
    expected = np.trace(c1 + c2 - 2 * scipy.linalg.sqrtm(c1 @ c2).real)
    assert gaussian_distance(m, c1, m, c2) == pytest.approx(expected, rel=1e-9)


def test_rank_deficient_agrees_with_the_spectrum_of_the_product(rng):
    d = 40
    m, c1, c2 = np.zeros(d), psd(rng, d, 7), psd(rng, d, 11)
    found = gaussian_distance(m, c1, m, c2)
    assert found == pytest.approx(gaussian_distance(m, c2, m, c1), rel=1e-12)
    overlap = np.sqrt(np.sort(np.linalg.eigvals(c1 @ c2).real)[-7:]).sum()  # the product has rank 7
    assert found == pytest.approx(np.trace(c1) + np.trace(c2) - 2 * overlap, rel=1e-10)


def test_orthogonal_supports_and_zero_covariance(rng):
    m, c1, c2 = np.zeros(4), np.diag([1.0, 2.0, 0, 0]), np.diag([0, 0, 3.0, 4.0])
    assert gaussian_distance(m, c1, m, c2) == pytest.approx(10.0)
    assert gaussian_distance(m, c1, m, np.zeros((4, 4))) == pytest.approx(3.0)
    assert gaussian_distance(m, c1, np.ones(4), c1) == pytest.approx(4.0)


def test_moments_agree_with_numpy_in_any_order_and_any_sharding(rng):
    x = 1000.0 + rng.normal(size=(101, 6))
    moments_of_all = Moments.of(x)
    np.testing.assert_allclose(moments_of_all.covariance, np.cov(x.T), rtol=1e-9)
    shuffled = Moments.of(rng.permutation(x))
    shards = Moments.of_batches([x[:1], x[1:40], x[40:100], x[100:]])
    other_way = Moments.of(x[40:]).merge(Moments.of(x[:40]))
    for moments in (shuffled, shards, other_way):
        assert moments.count == 101
        np.testing.assert_allclose(moments.mean, moments_of_all.mean, rtol=1e-13)
        np.testing.assert_allclose(moments.covariance, moments_of_all.covariance, rtol=1e-8, atol=1e-10)


def test_save_and_load(rng, tmp_path):
    x = Moments.of(rng.normal(size=(30, 5)))
    x.save(tmp_path / "real.npz")
    y = Moments.load(tmp_path / "real.npz")
    assert y.count == 30
    np.testing.assert_allclose(y.covariance, x.covariance, rtol=1e-14)
    np.savez(tmp_path / "published.npz", mu=x.mean, sigma=x.covariance)
    assert frechet_distance(Moments.load(tmp_path / "published.npz"), x) == pytest.approx(0.0, abs=1e-10)


@pytest.mark.wrong_types
def test_bad_input_is_named(rng, tmp_path):
    x = rng.normal(size=(4, 3))
    with pytest.raises(ValueError, match="at least 2 samples, got 1"):
        frechet_distance(Moments.of(x[:1]), Moments.of(x))
    with pytest.raises(ValueError, match="fake: 1 of 4 rows contain NaN"):
        Moments.of(np.where(np.arange(12).reshape(4, 3) == 5, np.nan, x), name="fake")
    with pytest.raises(ValueError, match="dimensions differ: 3 and 2"):
        frechet_distance(Moments.of(x), Moments.of(x[:, :2]))
    with pytest.raises(ValueError, match="dimensions differ"):
        Moments.of(x).merge(Moments.of(x[:, :2]))
    with pytest.raises(ValueError, match="shape"):
        Moments.of(x[0])
    with pytest.raises(ValueError, match="empty"):
        Moments.of_batches([])
    with pytest.raises(FileNotFoundError, match=r"none\.npz"):
        Moments.load(tmp_path / "none.npz")
    np.savez(tmp_path / "bad.npz", mu=x)
    with pytest.raises(ValueError, match="sigma"):
        Moments.load(tmp_path / "bad.npz")
