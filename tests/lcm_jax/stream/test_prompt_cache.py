"""Blending of prompts and seeds."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lcm_jax
from lcm_jax.stream.controls import blended_noise
from lcm_jax.stream.prompt_cache import PromptCache, lerp, slerp


def test_lerp_is_the_mean() -> None:
    a = jax.random.normal(jax.random.key(0), (3, 1, 4, 5))
    found = lerp(a, jnp.asarray([1.0, 2.0, 1.0]))
    np.testing.assert_allclose(found, (a[0] + 2 * a[1] + a[2]) / 4, rtol=1e-6)


def test_slerp_walks_the_arc() -> None:
    """Equal angles for equal shares, and the length in between."""
    a, b = jnp.asarray([[2.0, 0.0]]), jnp.asarray([[0.0, 4.0]])
    for share in (0.0, 0.25, 0.5, 1.0):
        found = np.asarray(slerp(jnp.stack([a, b]), jnp.asarray([1.0 - share, share])))[0]
        angle, length = share * np.pi / 2, 2.0 + 2.0 * share
        np.testing.assert_allclose(found, length * np.array([np.cos(angle), np.sin(angle)]), atol=1e-5)


def test_slerp_of_one_and_of_equal_vectors() -> None:
    a = jax.random.normal(jax.random.key(1), (1, 4, 5))
    np.testing.assert_allclose(slerp(jnp.stack([a, a, a]), jnp.asarray([1.0, 0.0, 0.0])), a, rtol=1e-6)
    np.testing.assert_allclose(slerp(jnp.stack([a, a, a]), jnp.asarray([1.0, 2.0, 3.0])), a, rtol=1e-5)
    zero = jnp.zeros((2, 3, 4))
    assert np.isfinite(slerp(zero, jnp.asarray([0.5, 0.5]))).all()


def test_blended_noise_is_unit_noise() -> None:
    draw = lambda seed: jax.random.normal(jax.random.key(seed), (100_000,))  # noqa: E731
    for seeds in ([(1, 1.0)], [(1, 0.5), (2, 0.5)], [(1, 0.9), (2, 0.1), (3, 0.4)]):
        assert float(jnp.std(blended_noise(draw, seeds))) == pytest.approx(1.0, abs=0.01)
    np.testing.assert_array_equal(blended_noise(draw, [(7, 3.0)]), draw(7))


def test_keys_and_values_given_are_those_computed(tiny_model: Path) -> None:
    """A UNet that is given the text's keys and values answers as one that computes them."""
    pipe = lcm_jax.load(tiny_model)
    cond = PromptCache(pipe, pipe.size)(pipe.net_params, [("red heart", 1.0)])
    assert cond["cross"]
    net, x = pipe.model, jax.random.normal(jax.random.key(0), (2, 8, 8, 4))
    from lcm_jax.models.latent_diffusion import as_apply

    apply = jax.jit(as_apply(net.net))
    rows = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (2, *leaf.shape[1:])), cond)
    given = apply(pipe.net_params, x, jnp.full(2, 300.0), rows)
    computed = apply(pipe.net_params, x, jnp.full(2, 300.0), {"context": rows["context"]})
    np.testing.assert_allclose(given, computed, atol=1e-5)
    wrong = {**rows, "cross": jax.tree.map(jnp.zeros_like, rows["cross"])}
    assert np.abs(apply(pipe.net_params, x, jnp.full(2, 300.0), wrong) - computed).max() > 1e-4
