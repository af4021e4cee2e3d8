from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lcm_jax.diffusion.parameterization import (
    KINDS,
    SIGMA_DATA,
    add_noise,
    bind,
    expand,
    prediction_coefficients,
    target,
    to_prediction,
)
from lcm_jax.diffusion.schedules import DDPM, Cosine, RectifiedFlow
from lcm_jax.typing import Kind, Schedule

X0 = jax.random.normal(jax.random.key(0), (3, 2, 2, 4))
EPS = jax.random.normal(jax.random.key(1), (3, 2, 2, 4))
SCHEDULES = [DDPM(), RectifiedFlow(shift=3.0), Cosine()]


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("kind", KINDS)
def test_there_and_back(schedule: Schedule, kind: Kind) -> None:
    t = jnp.asarray([0.1, 0.4, 0.6]) * schedule.t_max
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    x = add_noise(schedule, X0, EPS, t)
    x0, eps = to_prediction(kind, target(kind, X0, EPS, alpha, sigma), x, alpha, sigma)
    np.testing.assert_allclose(x0, X0, atol=1e-4)
    np.testing.assert_allclose(eps, EPS, atol=1e-4)


@pytest.mark.parametrize("schedule", [DDPM(rescale_betas_zero_snr=True), RectifiedFlow()])
@pytest.mark.parametrize("kind", ["sample", "v_prediction", "flow", "edm"])
def test_pure_noise_is_regular(schedule: Schedule, kind: Kind) -> None:
    alpha, sigma = schedule.alpha(schedule.t_max), schedule.sigma(schedule.t_max)
    x0, eps = to_prediction(kind, target(kind, X0, EPS, alpha, sigma), EPS, alpha, sigma)
    np.testing.assert_allclose(x0, X0, atol=1e-6)
    np.testing.assert_allclose(eps, EPS, atol=1e-6)


def test_flow_is_v_up_to_scale_at_the_middle() -> None:
    half = jnp.sqrt(0.5)
    np.testing.assert_allclose(
        target("flow", X0, EPS, half, half) * half, target("v_prediction", X0, EPS, half, half), atol=1e-6
    )


def test_bind_passes_network_time_and_cond() -> None:
    schedule = RectifiedFlow()
    given = {}

    def apply(params: dict, x: jax.Array, t: jax.Array, cond: dict) -> jax.Array:
        given.update(t=t, cond=cond)
        return (params["scale"] * x).astype(jnp.bfloat16)

    prediction = bind(apply, {"scale": jnp.float32(2.0)}, {"context": EPS}, schedule, "flow")(X0, 0.25)
    assert float(given["t"]) == 250.0
    assert given["cond"]["context"] is EPS
    assert prediction.x0.dtype == jnp.float32
    np.testing.assert_allclose(0.75 * prediction.x0 + 0.25 * prediction.eps, X0, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_edm_is_the_preconditioning_of_karras(schedule: Schedule) -> None:
    """D(x; s) = c_skip x + c_out F(c_in x) of 2206.00364, table 1, with x our x_t / alpha and s = sigma / alpha."""
    t = jnp.asarray([0.1, 0.4, 0.8]) * schedule.t_max
    alpha, sigma = (expand(scale(t), X0) for scale in (schedule.alpha, schedule.sigma))
    x_t, given = add_noise(schedule, X0, EPS, t), []

    def apply(params: dict, x: jax.Array, t: jax.Array, cond: dict) -> jax.Array:
        given.append(x)
        return jnp.tanh(x) + 0.3

    x0 = bind(apply, {}, {}, schedule, "edm")(x_t, t).x0
    x, s = x_t / alpha, sigma / alpha
    c_skip, c_out = 0.25 / (s**2 + 0.25), 0.5 * s / jnp.sqrt(s**2 + 0.25)
    c_in = 1.0 / jnp.sqrt(s**2 + 0.25)
    np.testing.assert_allclose(given[0], c_in * x, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(x0, c_skip * x + c_out * apply({}, c_in * x, t, {}), rtol=1e-4, atol=1e-5)


def test_edm_is_minus_v_of_data_of_its_deviation() -> None:
    """On x / S a data set of deviation k, divided by k, is preserved in variance, and F is -v of it (2202.00512)."""
    alpha, sigma = jnp.float32(0.3), jnp.float32(0.6)
    deviation = jnp.sqrt((SIGMA_DATA * alpha) ** 2 + sigma**2)
    unit = (SIGMA_DATA * alpha / deviation, sigma / deviation)
    np.testing.assert_allclose(
        target("edm", X0, EPS, alpha, sigma), -target("v_prediction", X0 / SIGMA_DATA, EPS, *unit), atol=1e-5
    )


def test_expand() -> None:
    assert expand(jnp.ones(3), X0).shape == (3, 1, 1, 1)
    assert expand(0.5, X0).shape == ()


@pytest.mark.wrong_types
def test_unknown_kind() -> None:
    with pytest.raises(ValueError, match="prediction type 'score' is unknown: use one of epsilon"):
        prediction_coefficients("score", jnp.ones(()), jnp.ones(()))  # type: ignore[arg-type]
