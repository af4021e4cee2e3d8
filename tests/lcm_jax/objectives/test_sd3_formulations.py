"""The laws of the thirteen formulations on Gaussian data, where the best network and its loss are known."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import kstest, norm

from lcm_jax.configs.sd3_formulations import FORMULATIONS, Formulation
from lcm_jax.diffusion.parameterization import bind, prediction_coefficients
from lcm_jax.diffusion.schedules import Cosine, log_snr

jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
M, V = 0.3, 0.7  # of the data
# One of each schedule, output and density in the fast tests; the others differ from them in numbers.
FAST = {"rf", "rf/lognorm(0,1)", "eps/linear", "v/cos", "edm(0,0.6)", "edm/rf"}
named = pytest.mark.parametrize(
    "form",
    [
        pytest.param(form, id=name, marks=() if name in FAST else pytest.mark.slow)
        for name, form in FORMULATIONS.items()
    ],
)


def test_thirteen_of_them() -> None:
    assert len({form.objective for form in FORMULATIONS.values()}) == 13
    assert set(FORMULATIONS) > FAST


@named
def test_the_posterior_mean_is_the_minimum(form: Formulation, gaussian_on, make_batch) -> None:
    """Given x, x0 varies by (V sigma / S)^2 and y = a x0 + b eps by ((a sigma - b alpha) V / S)^2: the least loss."""
    objective = replace(form.objective, caption_dropout=0.0)
    gaussian, batch = gaussian_on(objective.schedule), make_batch(24_000, channels=1)
    nets = gaussian.nets(objective.kind)
    value = jit(jax.value_and_grad(lambda p: objective(nets._replace(student=p), batch, jax.random.key(0))[0]))
    loss, grad = value(gaussian.teacher(m=M, v=V))
    u = (jnp.arange(2000) + 0.5) / 2000
    t = u * objective.schedule.t_max if objective.times is None else objective.times.quantile(u)
    alpha, sigma = objective.schedule.alpha(t), objective.schedule.sigma(t)
    a, b = prediction_coefficients(objective.kind, alpha, sigma)
    want = jnp.mean(((a * sigma - b * alpha) * V) ** 2 / ((alpha * V) ** 2 + sigma**2))
    np.testing.assert_allclose(loss, want, rtol=0.03)
    wrong = value(gaussian.teacher(m=0.6, v=0.9))[1]
    for name in ("m", "v"):
        assert abs(grad[name]) < 0.1 * abs(wrong[name])


WEIGHTS = {
    "rf": lambda t, alpha, sigma: 1.0 / t**2,
    "eps/linear": lambda t, alpha, sigma: alpha**2 / sigma**2,
    "v/linear": lambda t, alpha, sigma: alpha**2 / sigma**2 + 1.0,
    "v/cos": lambda t, alpha, sigma: 1.0 / np.sin(0.5 * np.pi * t) ** 2,
    "edm/rf": lambda t, alpha, sigma: 4.0 + ((1.0 - t) / t) ** 2,  # (s^2 + k^2) / (s k)^2
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_the_loss_is_a_weighted_error_of_x0(name: str, gaussian_on, make_batch) -> None:
    """A mean that is off by 1 moves x0 by sigma^2 / S^2, which is added to its variance (V sigma / S)^2."""
    schedule, batch = FORMULATIONS[name].objective.schedule, make_batch(6000)
    gaussian = gaussian_on(schedule)

    @jit
    def loss(t):
        objective = replace(FORMULATIONS[name].objective, caption_dropout=0.0, times=lambda key, n: jnp.full((n,), t))
        nets = gaussian.nets(objective.kind, student=gaussian.teacher(m=M + 1.0, v=V))
        return objective(nets, batch, jax.random.key(0))[0]

    for share in (0.2, 0.6):
        t = share * schedule.t_max
        alpha, sigma = float(schedule.alpha(t)), float(schedule.sigma(t))
        variance = (alpha * V) ** 2 + sigma**2
        error = (sigma**2 / variance) ** 2 + V**2 * sigma**2 / variance
        assert float(loss(t)) == pytest.approx(WEIGHTS[name](t, alpha, sigma) * error, rel=0.02)


@named
def test_euler_converges_to_the_data(form: Formulation, gaussian_on) -> None:
    """At first order to the exact ODE, which takes unit noise to the data but for what signal the noise end keeps."""
    schedule, kind = form.objective.schedule, form.objective.kind
    gaussian = gaussian_on(schedule)
    noise = jnp.asarray(norm.ppf((np.arange(200) + 0.5) / 200), jnp.float32)[:, None, None, None]
    denoise = bind(gaussian.network(kind), gaussian.teacher(), {"context": jnp.zeros((200, 1, 1))}, schedule, kind)
    steps, errors = (25, 50, 100), []
    for n in steps:
        start = form.grid(n, schedule)[0]
        alpha, sigma = float(schedule.alpha(start)), float(schedule.sigma(start))
        exact = M + V * (sigma * noise - alpha * M) / np.sqrt((alpha * V) ** 2 + sigma**2)
        made = form.sample(denoise, noise, n)
        errors.append(float(jnp.abs(made - exact).max()))
    assert -np.polyfit(np.log(steps), np.log(errors), 1)[0] == pytest.approx(1.0, abs=0.25)
    np.testing.assert_allclose([made.mean(), made.std()], [M, V], atol=0.03)


def test_weights_of_the_paper() -> None:
    """L = 1/2 E[w_t |lambda'_t| |eps error|^2], t uniform, lambda = 2 log(alpha / sigma): eq. 13-16 and section 3.1."""
    t = jnp.linspace(0.05, 0.95, 19)

    def weight(name: str) -> np.ndarray:
        objective = FORMULATIONS[name].objective
        density = 1.0 if objective.times is None else objective.times.pdf(t)
        alpha, sigma = objective.schedule.alpha(t), objective.schedule.sigma(t)
        a, b = prediction_coefficients(objective.kind, alpha, sigma)
        slope = jax.vmap(jax.grad(lambda t: 2.0 * log_snr(objective.schedule, t)))(t)
        return np.asarray(2.0 * density * (b - a * sigma / alpha) ** 2 / jnp.abs(slope))

    straight = np.asarray(t / (1 - t))
    lam = -2.0 * np.log(straight)
    np.testing.assert_allclose(weight("rf"), straight, rtol=1e-4)
    for name in ("rf/lognorm(0.5,0.6)", "rf/cosmap"):
        density = FORMULATIONS[name].objective.times.pdf(t)
        np.testing.assert_allclose(weight(name), straight * density, rtol=1e-4)
    np.testing.assert_allclose(weight("v/cos"), 2 / np.pi * np.tan(np.pi / 2 * np.asarray(t)), rtol=1e-4)
    for name, mean, std in (("edm(0,0.6)", 0.0, 0.6), ("edm(-1.2,1.2)", -1.2, 1.2)):
        want = norm.pdf(lam, -2 * mean, 2 * std) * (np.exp(-lam) + 0.5**2)
        np.testing.assert_allclose(weight(name), 2.0 / 0.5**2 * want, rtol=1e-3)


@pytest.mark.parametrize(
    ("name", "distribution"),
    [
        ("edm(0,0.6)", norm(0.0, 0.6).cdf),
        ("edm(-1.2,1.2)", norm(-1.2, 1.2).cdf),
        ("edm/rf", lambda level: FORMULATIONS["rf"].objective.schedule.time_at(-level)),
        ("edm/cos", lambda level: Cosine().time_at(-level)),
    ],
)
def test_noise_levels_of_edm(name: str, distribution) -> None:
    """Log-normal, or those that another schedule has at uniform times."""
    objective = FORMULATIONS[name].objective
    t = objective.times(jax.random.key(0), 5000) if objective.times else jax.random.uniform(jax.random.key(0), (5000,))
    levels = np.asarray(-log_snr(objective.schedule, t))
    assert kstest(levels, lambda x: np.asarray(distribution(x))).pvalue > 1e-3
