"""A solver in a file of your own: the second-order Adams-Bashforth rule, one evaluation a step.

Its sampler is named on the command line:

    lcm-jax sample --model openmoji-teacher --sampler docs/examples/own_solver.py:ab2 --steps 12 --prompt "red heart"
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp

from lcm_jax.diffusion.parameterization import expand
from lcm_jax.diffusion.samplers import Sampler
from lcm_jax.typing import Carry, Denoiser, Image, Key, Schedule, Time


@dataclass(frozen=True, kw_only=True)
class AdamsBashforth2:
    """Adams-Bashforth for steps of any length, in y = x / (alpha + sigma) over tau = sigma / (alpha + sigma).

    There dy/dtau = f = eps - x0, and y_s = y_t + h (f + h / (2 h_prev) (f - f_prev)) with h = tau_s - tau_t. The first
    step is Euler's. The carry is f and h of the last step, h zero before the first.
    """

    order: ClassVar[int] = 2
    evaluations: ClassVar[int] = 1
    stochastic: ClassVar[bool] = False

    def init(self, x: Image) -> Carry:
        return jnp.zeros_like(x), jnp.zeros((x.shape[0], 1, 1, 1))

    def step(
        self, denoise: Denoiser, schedule: Schedule, x: Image, t: Time, s: Time, carry: Carry, key: Key | Image
    ) -> tuple[Image, Carry]:
        f_prev, h_prev = carry
        x0, eps = denoise(x, t)
        f = eps - x0
        (alpha_t, sigma_t), (alpha_s, sigma_s) = (
            (expand(schedule.alpha(u), x), expand(schedule.sigma(u), x)) for u in (t, s)
        )
        norm_t, norm_s = alpha_t + sigma_t, alpha_s + sigma_s
        h = sigma_s / norm_s - sigma_t / norm_t
        ratio = jnp.where(h_prev == 0.0, 0.0, h / jnp.where(h_prev == 0.0, 1.0, h_prev))
        y = x / norm_t + h * (f + 0.5 * ratio * (f - f_prev))
        return norm_s * y, (f, jnp.broadcast_to(h, h_prev.shape))


ab2 = Sampler(solver=AdamsBashforth2())
