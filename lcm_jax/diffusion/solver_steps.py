"""The parts of solvers: the straight line of a prediction, its midpoint, unit noise, exponential integrals."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lcm_jax.diffusion.parameterization import expand
from lcm_jax.diffusion.schedules import OnGrid, log_snr
from lcm_jax.typing import Denoiser, Image, Key, Prediction, Schedule, Time

LOWEST_LOG_SNR = -math.log(4096.0)
"""The log-SNR that pure noise counts as where it is a neighbour; diffusers' value."""


def unit_noise(key: Key | Image, x: Image) -> Image:
    """Return unit normal noise of x's shape drawn from a key, or the noise itself if that is what was passed.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> from lcm_jax.diffusion.solver_steps import unit_noise
    >>> x = jnp.zeros((1, 2, 2, 4))
    >>> unit_noise(jax.random.key(0), x).shape, bool(unit_noise(x, x) is x)
    ((1, 2, 2, 4), True)
    """
    return jax.random.normal(key, x.shape, x.dtype) if jnp.issubdtype(key.dtype, jax.dtypes.prng_key) else key


def move(prediction: Prediction, alpha: Array, sigma: Array) -> Image:
    """Return alpha x0 + sigma eps: the straight line of a prediction at another time (DDIM, Euler, DPM-Solver-1).

    >>> import jax.numpy as jnp
    >>> from lcm_jax.diffusion.solver_steps import move
    >>> from lcm_jax.typing import Prediction
    >>> x0, eps = jnp.full((1, 1, 1, 1), 1.0), jnp.full((1, 1, 1, 1), 3.0)
    >>> float(move(Prediction(x0, eps), jnp.float32(0.5), jnp.float32(0.5)).squeeze())
    2.0
    """
    return alpha * prediction.x0 + sigma * prediction.eps


def scales(schedule: Schedule, t: Time, x: Image) -> tuple[Array, Array]:
    """Return alpha(t) and sigma(t), scalars or (b,) -> (b, 1, 1, 1), ready to multiply x."""
    return expand(schedule.alpha(t), x), expand(schedule.sigma(t), x)


def middle_time(schedule: Schedule, t: Time, s: Time) -> tuple[Time, Array]:
    """Return the time halfway from t to s in log-SNR, and where it exists; elsewhere it is t.

    >>> from lcm_jax.diffusion.schedules import RectifiedFlow
    >>> from lcm_jax.diffusion.solver_steps import middle_time
    >>> time, exists = middle_time(RectifiedFlow(), 0.8, 0.2)
    >>> round(float(time), 4), bool(exists)
    (0.5, True)
    """
    lambda_t, lambda_s = log_snr(schedule, t), log_snr(schedule, s)
    finite = jnp.isfinite(lambda_t) & jnp.isfinite(lambda_s)
    return jnp.where(finite, schedule.time_at(jnp.where(finite, 0.5 * (lambda_t + lambda_s), 0.0)), t), finite


def midpoint(denoise: Denoiser, schedule: Schedule, x: Image, t: Time, s: Time) -> tuple[Prediction, Prediction, Array]:
    """Return the predictions at t and at m, lambda_m = (lambda_t + lambda_s) / 2, and where that time exists."""
    middle, finite = middle_time(schedule, t, s)
    first = denoise(x, t)
    second = denoise(move(first, *scales(schedule, middle, x)), middle)
    return first, second, expand(finite, x)


def finite_log_snr(schedule: Schedule, t: Time, x: Image) -> Float[Array, " b"]:
    """Return lambda(t) -> (b,) for the rows of x; pure noise counts as `LOWEST_LOG_SNR`, and the clean end is +inf."""
    value = jnp.broadcast_to(log_snr(schedule, t), x.shape[:1])
    return jnp.where(value == -jnp.inf, LOWEST_LOG_SNR, value)


def highest_order(schedule: Schedule, t: Time, x: Image, order: int) -> Float[Array, " b"]:
    """Return the order -> (b,) that each row's step from t may have: `order`, or that of the grid where it is lower."""
    named = schedule.order_at(t) if isinstance(schedule, OnGrid) else order
    return jnp.broadcast_to(jnp.minimum(jnp.asarray(named, jnp.float32), order), x.shape[:1])


def phi(k: int, z: Float[Array, "*b"]) -> Float[Array, "*b"]:
    """Return phi_k(z), the integral of e^((1 - u) z) u^(k - 1) / (k - 1)! over u from 0 to 1; phi_1 = (e^z - 1) / z.

    Near 0 it is its series, as the recursion phi_(k+1) = (phi_k - 1 / k!) / z cancels there.

    >>> import jax.numpy as jnp
    >>> from lcm_jax.diffusion.solver_steps import phi
    >>> [round(float(phi(k, jnp.float32(0.0))), 4) for k in (1, 2, 3)]
    [1.0, 0.5, 0.1667]
    """
    near = jnp.abs(z) < 1.0
    far, small = jnp.where(near, 1.0, z), jnp.where(near, z, 0.0)
    value = jnp.expm1(far) / far
    for i in range(1, k):
        value = (value - 1.0 / math.factorial(i)) / far
    series = jnp.zeros_like(small)
    for i in reversed(range(10)):
        series = series * small + 1.0 / math.factorial(i + k)
    return jnp.where(near, series, value)
