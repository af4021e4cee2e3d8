"""Laws of the contrastive loss."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lcm_jax.objectives.contrastive import contrastive_loss

IMAGES = jax.random.normal(jax.random.key(0), (6, 8))
TEXTS = jax.random.normal(jax.random.key(1), (6, 8))


def test_the_loss_is_the_mean_of_both_cross_entropies():
    x, y = (np.asarray(v, np.float64) / np.linalg.norm(v, axis=1, keepdims=True) for v in (IMAGES, TEXTS))
    scores = np.exp(1.5) * x @ y.T
    rows = -np.log(np.exp(np.diag(scores)) / np.exp(scores).sum(1)).mean()
    columns = -np.log(np.exp(np.diag(scores)) / np.exp(scores).sum(0)).mean()
    loss, metrics = contrastive_loss(IMAGES, TEXTS, jnp.asarray(1.5))
    np.testing.assert_allclose(loss, (rows + columns) / 2, rtol=1e-5)
    np.testing.assert_allclose(metrics["temperature"], np.exp(1.5), rtol=1e-6)
    hits = [(scores.argmax(axis) == np.arange(6)).mean() for axis in (0, 1)]
    np.testing.assert_allclose(metrics["accuracy"], np.mean(hits), rtol=1e-6)


def test_it_ignores_lengths_the_order_of_pairs_and_which_side_is_which():
    loss, _ = contrastive_loss(IMAGES, TEXTS, jnp.asarray(1.0))
    order = jnp.asarray([3, 1, 0, 5, 4, 2])
    for other in ((7 * IMAGES, TEXTS / 3), (IMAGES[order], TEXTS[order]), (TEXTS, IMAGES)):
        np.testing.assert_allclose(contrastive_loss(*other, jnp.asarray(1.0))[0], loss, rtol=1e-5)


def test_aligned_pairs_are_all_found_and_equal_ones_cost_log_batch():
    loss, metrics = contrastive_loss(jnp.eye(6), jnp.eye(6), jnp.asarray(4.0))
    assert loss < 1e-6
    assert metrics["accuracy"] == 1
    loss, _ = contrastive_loss(jnp.ones((6, 8)), TEXTS, jnp.asarray(4.0))
    assert loss > np.log(6) - 1e-3
    np.testing.assert_allclose(contrastive_loss(jnp.ones((6, 8)), jnp.ones((6, 8)), 1.0)[0], np.log(6), rtol=1e-5)


def test_the_temperature_is_clamped_and_everything_stays_finite():
    with_slope = jax.jit(jax.value_and_grad(lambda s: contrastive_loss(IMAGES, TEXTS, s)[0]))
    for scale in (5.0, 500.0):
        value, slope = with_slope(scale)
        assert jnp.isfinite(value)
        assert slope == 0
        np.testing.assert_allclose(contrastive_loss(IMAGES, TEXTS, scale)[1]["temperature"], 100, rtol=1e-5)
    slopes = jax.jit(jax.grad(lambda x: contrastive_loss(x, TEXTS, 1.0)[0]))(jnp.zeros((6, 8)))
    assert jnp.isfinite(slopes).all()


@pytest.mark.wrong_types
def test_unpaired_features_are_refused():
    with pytest.raises(ValueError, match=r"\(6, 8\).*\(5, 8\)"):
        contrastive_loss(IMAGES, TEXTS[:5], 1.0)
