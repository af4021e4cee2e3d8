from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lcm_jax.objectives.terms import (
    TextEncoders,
    by_quarter,
    distance,
    drop_captions,
    drop_encoders,
    without_caption,
)


def test_distances_are_means_over_elements() -> None:
    d = np.random.default_rng(0).normal(size=(3, 2, 2, 4)).astype(np.float32)
    np.testing.assert_allclose(distance("l2", jnp.asarray(d)), (d**2).mean((1, 2, 3)), rtol=1e-6)
    huber = (np.sqrt(d.astype(np.float64) ** 2 + 1e-6) - 1e-3).mean((1, 2, 3))
    np.testing.assert_allclose(distance("huber", jnp.asarray(d), 1e-3), huber, rtol=1e-5)
    assert distance("l2", jnp.asarray(d, jnp.bfloat16)).dtype == jnp.float32


def test_huber_is_quadratic_then_linear() -> None:
    np.testing.assert_allclose(distance("huber", jnp.full((1, 1), 1e-2), 1.0), 0.5e-4, rtol=1e-4)
    np.testing.assert_allclose(distance("huber", jnp.full((1, 1), 10.0), 1e-3), 10.0, rtol=1e-3)


def test_captions_drop_whole_examples_at_the_rate() -> None:
    n, rate = 20_000, 0.1
    cond = {"context": jnp.ones((n, 2, 3)), "pooled": jnp.ones((n, 5)), "time_ids": jnp.full((n, 6), 7.0)}
    null = {"context": jnp.zeros((1, 2, 3)), "pooled": jnp.zeros((1, 5))}
    dropped = drop_captions(jax.random.key(0), cond, null, rate)
    shares = np.asarray(dropped["pooled"][:, 0])
    np.testing.assert_array_equal(dropped["context"], np.broadcast_to(shares[:, None, None], (n, 2, 3)))
    np.testing.assert_array_equal(dropped["pooled"], np.broadcast_to(shares[:, None], (n, 5)))
    np.testing.assert_array_equal(dropped["time_ids"], cond["time_ids"])  # not of the caption: null lacks it
    assert abs(1 - shares.mean() - rate) < 4 * np.sqrt(rate * (1 - rate) / n)


# two CLIPs of 3 and 4 channels on 2 tokens, a T5 on 5 more, 9 channels wide
ENCODERS = TextEncoders(clip_tokens=2, clip_widths=(3, 4), pooled_widths=(2, 5))


def sd3_condition(n: int) -> dict[str, jax.Array]:
    return {"context": jnp.ones((n, 7, 9)), "pooled": jnp.ones((n, 7)), "other": jnp.ones((n, 1))}


def test_encoders_drop_on_their_own_at_the_rate() -> None:
    n, rate = 40_000, 0.464
    cond = drop_encoders(jax.random.key(0), sd3_condition(n), ENCODERS, rate)
    context, pooled = np.asarray(cond["context"]), np.asarray(cond["pooled"])
    parts = [
        np.concatenate([context[:, :2, :3].reshape(n, -1), pooled[:, :2]], axis=1),
        np.concatenate([context[:, :2, 3:7].reshape(n, -1), pooled[:, 2:]], axis=1),
        context[:, 2:].reshape(n, -1),
    ]
    shares = np.stack([part[:, 0] for part in parts], axis=1)
    for i, part in enumerate(parts):
        np.testing.assert_array_equal(part, np.broadcast_to(shares[:, i : i + 1], part.shape))
    # every one of the eight subsets as often as three independent coins give it
    for subset in itertools.product((0, 1), repeat=3):
        want = np.prod([rate if gone else 1 - rate for gone in subset])
        share = np.mean((shares == 1 - np.asarray(subset)).all(axis=1))
        assert abs(share - want) < 4 * np.sqrt(want * (1 - want) / n)
    assert rate**3 == pytest.approx(0.1, abs=1e-3)
    np.testing.assert_array_equal(cond["other"], 1.0)


def test_encoders_of_another_layout_are_refused() -> None:
    cond = sd3_condition(2)
    with pytest.raises(ValueError, match="does not fit a context of 7 tokens and 9 channels with 7 pooled channels"):
        drop_encoders(jax.random.key(0), cond, TextEncoders(), 0.5)
    with pytest.raises(ValueError, match=r"needs the leaves context and pooled, the conditioning has \['context'\]"):
        drop_encoders(jax.random.key(0), {"context": cond["context"]}, ENCODERS, 0.5)
    with pytest.raises(ValueError, match="must name the same CLIPs"):
        TextEncoders(clip_widths=(3,), pooled_widths=(2, 5))


def test_null_of_another_make_is_refused() -> None:
    with pytest.raises(ValueError, match="pooled"):
        without_caption({"pooled": jnp.zeros((1, 5))}, {"context": jnp.ones((2, 2, 3))})


def test_quarters_average_to_the_mean() -> None:
    values = jnp.asarray(np.random.default_rng(0).random(1000), jnp.float32)
    quarters = by_quarter(values, (jnp.arange(1000) + 1) / 1000)
    np.testing.assert_allclose(np.mean(list(quarters.values())), values.mean(), rtol=1e-5)
    np.testing.assert_allclose(quarters["loss_t2"], values[250:500].mean(), rtol=1e-5)
