from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lcm_jax.diffusion.guidance import cfg, skip_layer_guidance
from lcm_jax.diffusion.parameterization import to_prediction
from lcm_jax.diffusion.schedules import DDPM
from lcm_jax.typing import Prediction

SCHEDULE = DDPM()
T = 400.0
X, UNCOND, COND = jax.random.normal(jax.random.key(0), (3, 2, 4, 4, 3))


def paired(x: jax.Array, t: jax.Array) -> Prediction:
    y = jnp.concatenate([UNCOND, COND])
    return to_prediction("epsilon", y, x, SCHEDULE.alpha(t), SCHEDULE.sigma(t))


def assert_same(got: Prediction, eps: jax.Array) -> None:
    want = to_prediction("epsilon", eps, X, SCHEDULE.alpha(T), SCHEDULE.sigma(T))
    np.testing.assert_allclose(got.eps, want.eps, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(got.x0, want.x0, rtol=1e-4, atol=1e-4)


def test_scale_one_is_conditional_and_zero_unconditional() -> None:
    assert_same(cfg(paired, 1.0)(X, T), COND)
    assert_same(cfg(paired, 0.0)(X, T), UNCOND)


def test_scale_per_row_and_vector_time() -> None:
    scale = jnp.asarray([1.0, 5.0])
    want = UNCOND + scale[:, None, None, None] * (COND - UNCOND)
    assert_same(cfg(paired, scale)(X, jnp.full(2, T)), want)


def test_both_halves_see_the_same_input() -> None:
    calls = []

    def spy(x: jax.Array, t: jax.Array) -> Prediction:
        calls.append((x, t))
        return paired(x, t)

    cfg(spy, 3.0)(X, jnp.asarray([T, 2 * T]))
    x, t = calls[0]
    np.testing.assert_array_equal(x[:2], x[2:])
    np.testing.assert_array_equal(t, [T, 2 * T, T, 2 * T])


@pytest.mark.parametrize(("interval", "guided"), [((300.0, 500.0), True), ((400.0, 400.0), True), ((0, 399.0), False)])
def test_interval(interval: tuple[float, float], guided: bool) -> None:
    assert_same(cfg(paired, 4.0, interval=interval)(X, T), UNCOND + 4.0 * (COND - UNCOND) if guided else COND)


def test_rescale() -> None:
    plain = cfg(paired, 4.0)(X, T)
    same = cfg(paired, 4.0, rescale=jnp.asarray(0.0), schedule=SCHEDULE)(X, T)
    np.testing.assert_allclose(same.eps, plain.eps, rtol=1e-5, atol=1e-5)
    full = cfg(paired, 4.0, rescale=1.0, schedule=SCHEDULE)(X, T)
    np.testing.assert_allclose(jnp.std(full.eps, axis=(1, 2, 3)), jnp.std(COND, axis=(1, 2, 3)), rtol=1e-5)
    alpha, sigma = SCHEDULE.alpha(T), SCHEDULE.sigma(T)
    np.testing.assert_allclose(alpha * full.x0 + sigma * full.eps, X, atol=1e-5)


def test_rescale_needs_the_schedule() -> None:
    with pytest.raises(ValueError, match="pass schedule="):
        cfg(paired, 4.0, rescale=0.7)


def test_changing_the_scale_does_not_recompile() -> None:
    traces = []

    @jax.jit
    def guided(scale: jax.Array) -> jax.Array:
        traces.append(None)
        return cfg(paired, scale, interval=(0.0, 999.0))(X, T).eps

    for scale in (1.0, 2.0, 7.5):
        np.testing.assert_allclose(guided(scale), UNCOND + scale * (COND - UNCOND), rtol=1e-4, atol=1e-5)
    assert len(traces) == 1


SKIPPED = jax.random.normal(jax.random.key(1), X.shape)


def skipped(x: jax.Array, t: jax.Array) -> Prediction:
    return to_prediction("epsilon", SKIPPED, x, SCHEDULE.alpha(t), SCHEDULE.sigma(t))


def test_skipped_layers_push_away_from_what_they_would_say() -> None:
    got = skip_layer_guidance(paired, skipped, 4.0, 2.5, interval=(T, T))(X, T)
    assert_same(got, UNCOND + 4.0 * (COND - UNCOND) + 2.5 * (COND - SKIPPED))


@pytest.mark.parametrize("interval", [(T + 1, 999.0), (0.0, T - 1), (np.inf, -np.inf)])
def test_outside_the_interval_no_layer_is_skipped(interval: tuple[float, float]) -> None:
    got = skip_layer_guidance(paired, skipped, 4.0, 2.5, interval=interval)(X, T)
    for a, b in zip(got, cfg(paired, 4.0)(X, T), strict=True):
        np.testing.assert_array_equal(a, b)


def test_rows_at_their_own_times_are_guided_by_their_own_interval() -> None:
    t = jnp.asarray([T, T - 1])
    got = skip_layer_guidance(paired, skipped, 4.0, 2.5, interval=(T, T))(X, t).eps
    plain = UNCOND + 4.0 * (COND - UNCOND)
    np.testing.assert_allclose(got, plain.at[0].add(2.5 * (COND - SKIPPED)[0]), rtol=1e-4, atol=1e-4)
