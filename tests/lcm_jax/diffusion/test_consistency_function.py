from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lcm_jax.diffusion.consistency_function import boundary_scalings, consistency
from lcm_jax.diffusion.schedules import DDPM, RectifiedFlow
from lcm_jax.typing import Prediction, Schedule

X = jax.random.normal(jax.random.key(0), (2, 2, 2, 3))


def denoise(x: jax.Array, t: jax.Array, s: object = None) -> Prediction:
    return Prediction(x0=jnp.full_like(x, 7.0), eps=2.0 * x)


@pytest.mark.parametrize(("schedule", "times"), [(DDPM(), (0.0, -1.0)), (RectifiedFlow(shift=3.0), (0.0,))])
def test_identity_at_zero(schedule: Schedule, times: tuple[float, ...]) -> None:
    for t in times:
        np.testing.assert_array_equal(consistency(denoise, schedule)(X, t).x0, X)


def test_identity_even_where_the_network_is_not_finite() -> None:
    bad = consistency(lambda x, t, s: Prediction(x0=x / 0.0, eps=x), DDPM())
    np.testing.assert_array_equal(bad(X, 0.0).x0, X)


def test_scalings() -> None:
    t = np.array([0.0, 0.05, 19.0, 999.0])
    c_skip, c_out = boundary_scalings(DDPM(), jnp.asarray(t))
    np.testing.assert_allclose(c_skip, 0.25 / ((10 * t) ** 2 + 0.25), rtol=1e-5)
    np.testing.assert_allclose(c_out, 10 * t / np.sqrt((10 * t) ** 2 + 0.25), rtol=1e-5)


def test_far_from_zero_it_is_the_denoiser() -> None:
    prediction = consistency(denoise, DDPM())(X, jnp.asarray([499.0, 999.0]))
    np.testing.assert_allclose(prediction.x0, 7.0, rtol=1e-5)
    np.testing.assert_array_equal(prediction.eps, 2.0 * X)
