"""Consistency functions: a denoiser whose x0 is f(x, t), the end of the trajectory through x, with f(x, 0) = x."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

from lcm_jax.diffusion.parameterization import expand
from lcm_jax.typing import Denoiser, Image, Prediction, Schedule, Time


def boundary_scalings(
    schedule: Schedule, t: Time, *, sigma_data: float = 0.5, timestep_scaling: float = 10.0
) -> tuple[Float[Array, "*b"], Float[Array, "*b"]]:
    """Return (c_skip, c_out) of f = c_skip x + c_out x0 (2310.04378 sec. 4.1); u = timestep_scaling * network time:

    c_skip = sd^2 / (u^2 + sd^2),  c_out = u / sqrt(u^2 + sd^2)

    They hold the boundary condition f(x, 0) = x: at t = 0 they are 1 and 0. Already at t = 19 c_skip is 7e-6, so only
    t = 0 is special. Times before 0 (a DDPM's clean end) count as 0.

    >>> from lcm_jax.diffusion.consistency_function import boundary_scalings
    >>> from lcm_jax.diffusion.schedules import DDPM
    >>> [float(c) for c in boundary_scalings(DDPM(), 0.0)]
    [1.0, 0.0]
    """
    u = timestep_scaling * jnp.maximum(schedule.network_time(t), 0.0)
    square = u**2 + sigma_data**2
    return sigma_data**2 / square, u / jnp.sqrt(square)


def consistency(
    denoise: Denoiser, schedule: Schedule, *, sigma_data: float = 0.5, timestep_scaling: float = 10.0
) -> Denoiser:
    """Return the consistency function of a denoiser: x0 becomes f(x, t) = c_skip x + c_out x0; eps stays the network's.

    The boundary condition f(x, t_min) = x holds for any network (2310.04378 eq. 9).

    >>> import jax.numpy as jnp
    >>> from lcm_jax.diffusion.consistency_function import consistency
    >>> from lcm_jax.diffusion.schedules import RectifiedFlow
    >>> from lcm_jax.typing import Prediction
    >>> f = consistency(lambda x, t, s=None: Prediction(7.0 + 0.0 * x, x), RectifiedFlow())
    >>> float(f(jnp.ones((1, 1, 1, 1)), 0.0).x0.squeeze()), round(float(f(jnp.ones((1, 1, 1, 1)), 1.0).x0.squeeze()), 3)
    (1.0, 7.0)
    """

    def f(x: Image, t: Time, s: Time | None = None) -> Prediction:
        prediction = denoise(x, t, schedule.t_min)
        scalings = boundary_scalings(schedule, t, sigma_data=sigma_data, timestep_scaling=timestep_scaling)
        c_skip, c_out = (expand(c, x) for c in scalings)
        # where c_out is 0 the network is not asked: its x0 may be inf there
        x0 = c_skip * x + jnp.where(c_out == 0.0, 0.0, c_out * prediction.x0)
        return Prediction(x0, prediction.eps)

    return f
