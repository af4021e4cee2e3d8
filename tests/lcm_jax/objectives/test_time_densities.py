from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import logit
from scipy.stats import kstest, norm

from lcm_jax.diffusion.schedules import DDPM, RectifiedFlow
from lcm_jax.objectives import CosMap, Diffusion, LogitNormal, Mode, Uniform
from lcm_jax.objectives.time_densities import TimeDensity, even_times, uniform_times
from lcm_jax.train.overrides import flatten, override
from lcm_jax.typing import Nets

DENSITIES = [
    Uniform(),
    LogitNormal(),
    LogitNormal(mean=0.5, std=0.6),
    Mode(scale=1.29),
    Mode(scale=1.7),
    Mode(scale=-0.9),
    CosMap(),
]
U = jnp.linspace(0.0, 1.0, 4001)[1:-1]


@pytest.mark.parametrize("density", DENSITIES)
def test_quantiles_rise_from_0_to_1(density: TimeDensity) -> None:
    t = density.quantile(U)
    assert np.all(np.diff(t) > 0)
    np.testing.assert_allclose(density.quantile(jnp.asarray([0.0, 1.0])), [0.0, 1.0], atol=1e-6)


@pytest.mark.parametrize("density", DENSITIES)
def test_density_is_the_slope_of_the_distribution(density: TimeDensity) -> None:
    """pi(quantile(u)) quantile'(u) = 1."""
    inner = U[::40]

    @jax.jit
    def product(u: jax.Array) -> jax.Array:
        return density.pdf(density.quantile(u)) * jax.vmap(jax.grad(density.quantile))(u)

    np.testing.assert_allclose(product(inner), 1.0, rtol=2e-3)
    assert np.all(np.isfinite(density.pdf(jnp.asarray([0.0, 0.5, 1.0]))))


@pytest.mark.parametrize("density", DENSITIES)
def test_draws_follow_the_density(density: TimeDensity) -> None:
    t = np.asarray(density(jax.random.key(0), 20_000))
    edges = np.linspace(0.0, 1.0, 40_001)
    pdf = np.asarray(density.pdf(jnp.asarray((edges[1:] + edges[:-1]) / 2)), np.float64)
    cumulated = np.append(0.0, np.cumsum(pdf)) / 40_000
    assert cumulated[-1] == pytest.approx(1.0, abs=2e-3)
    assert kstest(t, lambda x: np.interp(x, edges, cumulated)).pvalue > 1e-3


def test_closed_forms_of_the_paper() -> None:
    u = np.asarray(U[::100], np.float64)
    flipped = 1.0 - u
    f = 1.0 - flipped - 1.29 * (np.cos(np.pi / 2 * flipped) ** 2 - 1.0 + flipped)
    np.testing.assert_allclose(Mode(scale=1.29).quantile(jnp.asarray(u)), f, atol=1e-6)
    np.testing.assert_allclose(CosMap().quantile(jnp.asarray(u)), 1.0 - 1.0 / (np.tan(np.pi / 2 * u) + 1.0), atol=1e-6)
    t = LogitNormal(mean=0.5, std=0.6).quantile(jnp.asarray(u))
    np.testing.assert_allclose(logit(np.asarray(t, np.float64)), 0.5 + 0.6 * norm.ppf(u), atol=1e-4)


def test_a_positive_mean_leans_to_noise() -> None:
    assert LogitNormal(mean=0.5)(jax.random.key(0), 4000).mean() > 0.58


def test_sampling_by_a_density_is_weighting_by_it() -> None:
    """E_pi[l(t)] = E_U[pi(t) l(t)], for a network whose loss depends on t."""
    n, density = 200_000, LogitNormal(mean=0.5, std=0.6)
    batch = {"x0": jnp.zeros((n, 1, 1, 1)), "cond": {"context": jnp.zeros((n, 1, 1))}}

    # of x0 = 0 the velocity is x / t; the rest is an error that grows to noise
    def apply(params, x, t, cond):
        t = t[:, None, None, None] / 1000
        return x / t + 3 * (t - 0.2) ** 2

    nets, losses = Nets(apply, {}), {}
    for name in ("times", "weight"):
        objective = Diffusion(schedule=RectifiedFlow(), kind="flow", caption_dropout=0.0, **{name: density})
        losses[name] = float(jax.jit(partial(objective, nets))(batch, jax.random.key(1))[0])
    t = np.linspace(0, 1, 20_001)[1:-1]
    want = np.mean(9 * (t - 0.2) ** 4 * np.asarray(density.pdf(jnp.asarray(t))))
    assert losses["times"] == pytest.approx(want, rel=0.01)
    assert losses["weight"] == pytest.approx(want, rel=0.01)
    objective = Diffusion(schedule=RectifiedFlow(), kind="flow", caption_dropout=0.0)
    plain = jax.jit(partial(objective, nets))(batch, jax.random.key(1))[0]
    assert abs(float(plain) - want) > 0.1 * want


@pytest.mark.parametrize("scale", [-1.1, 1.8])
def test_a_mode_that_folds_back_is_refused(scale: float) -> None:
    """Beyond the paper's range the quantile function is not monotone."""
    v = np.linspace(0, 1, 1001)
    assert np.any(np.diff(v + scale * (v - np.sin(np.pi / 2 * v) ** 2)) < 0)
    with pytest.raises(ValueError, match=r"scale is .*between -1 and 1.752"):
        Mode(scale=scale)


def test_bad_densities_are_refused() -> None:
    with pytest.raises(ValueError, match="std is 0"):
        LogitNormal(std=0.0)
    with pytest.raises(ValueError, match=r"times=CosMap is a density on \[0, 1\], but the times of DDPM end at 999"):
        Diffusion(schedule=DDPM(), times=CosMap())


def test_densities_are_config_values() -> None:
    config = Diffusion(schedule=RectifiedFlow(), kind="flow", times=LogitNormal())
    assert dict(flatten(config))["times.mean"] == 0.0
    made = override(config, ["--times.mean", "0.5", "--times.std", "0.6", "--schedule.shift", "3"], "x")
    assert made.times == LogitNormal(mean=0.5, std=0.6)
    assert made.schedule == RectifiedFlow(shift=3.0)
    assert override(Diffusion(schedule=RectifiedFlow(), times=Mode()), ["--times.scale", "1"], "x").times == Mode(
        scale=1
    )


def test_even_times() -> None:
    np.testing.assert_allclose(even_times(RectifiedFlow(shift=3.0), 4), [0.125, 0.375, 0.625, 0.875])
    np.testing.assert_array_equal(even_times(DDPM(), 4), [124, 374, 624, 874])


def test_uniform_times() -> None:
    t = uniform_times(DDPM(), jax.random.key(0), 20_000)
    assert t.dtype == jnp.float32
    assert (t.min(), t.max()) == (0, 999)
    assert (t == jnp.floor(t)).all()
    np.testing.assert_allclose(t.mean(), 499.5, atol=8)
    t = uniform_times(RectifiedFlow(), jax.random.key(0), 20_000)
    assert 0 <= t.min() < 0.01
    assert 0.99 < t.max() <= 1
    assert abs(t.mean() - 0.5) < 0.01
