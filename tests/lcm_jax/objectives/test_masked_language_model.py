"""Masked language modelling: what is hidden, and what guessing it costs."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lcm_jax.objectives.masked_language_model import hide, masked_loss

IDS = jnp.tile(jnp.asarray([[5, 6, 7, 8, 1, 0, 0, 0]]), (4000, 1))


def test_tokens_are_hidden_at_the_rate_and_padding_never() -> None:
    hidden = np.asarray(hide(jax.random.key(0), IDS, rate=0.4, pad_id=0))
    assert not hidden[:, 5:].any()
    # Each at its rate, or because none of the row was chosen and its score was the smallest.
    expected = 0.4 + 0.6**5 / 5
    np.testing.assert_allclose(hidden[:, :5].mean(axis=0), expected, atol=0.03)


def test_every_row_has_a_hidden_token() -> None:
    assert (np.asarray(hide(jax.random.key(0), IDS, rate=0.0, pad_id=0)).sum(axis=1) == 1).all()


def test_the_loss_is_that_of_the_hidden_tokens_alone() -> None:
    ids = jnp.asarray([[0, 1, 2, 3]])
    hidden = jnp.asarray([[False, True, True, False]])
    uniform = jnp.zeros((1, 4, 5))
    assert float(masked_loss(uniform, ids, hidden)[0]) == pytest.approx(np.log(5))
    knowing = uniform.at[0, 1, 1].set(50.0).at[0, 2, 2].set(50.0)
    loss, metrics = masked_loss(knowing, ids, hidden)
    assert float(loss) == pytest.approx(0.0, abs=1e-6)
    assert float(metrics["accuracy"]) == 1.0
    wrong_elsewhere = knowing.at[0, 0, 4].set(50.0)
    assert float(masked_loss(wrong_elsewhere, ids, hidden)[0]) == pytest.approx(0.0, abs=1e-6)
