"""Solvers: one step of the reverse process from time t to time s.

Each is written in alpha, sigma and the two predictions, in a form that stays finite at the clean end (sigma_s = 0) and,
for outputs that say so (v_prediction, flow), at pure noise (alpha_t = 0). Where the formula needs a neighbour at an
infinite log-SNR the step falls back to first order, which is exact there in the limit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lcm_jax.diffusion.parameterization import add_noise, expand, flow_map, noise_further
from lcm_jax.diffusion.schedules import floor_to_timestep, log_snr
from lcm_jax.typing import Carry, Denoiser, Image, Key, Prediction, Schedule, Solver, Time


def unit_noise(key: Key | Image, x: Image) -> Image:
    """Unit normal noise of x's shape from a key, or the noise itself if that is what was passed."""
    return jax.random.normal(key, x.shape, x.dtype) if jnp.issubdtype(key.dtype, jax.dtypes.prng_key) else key


def move(prediction: Prediction, alpha: Array, sigma: Array) -> Image:
    """alpha x0 + sigma eps: where the straight line of a prediction is at another time (DDIM, Euler, DPM-Solver-1)."""
    return alpha * prediction.x0 + sigma * prediction.eps


def _scales(schedule: Schedule, t: Time, x: Image) -> tuple[Array, Array]:
    return expand(schedule.alpha(t), x), expand(schedule.sigma(t), x)


@dataclass(frozen=True, kw_only=True)
class DDIM:
    """Song 2021 (2010.02502) eq. 12 and 16: x_s = alpha_s x0 + sqrt(sigma_s^2 - v) eps + sqrt(v) z,

    v = (eta sigma_s)^2 (1 - (alpha_t sigma_s / (alpha_s sigma_t))^2). eta 0 is deterministic, eta 1 is DDPM.
    """

    eta: float = 0.0

    def init(self, x: Image) -> Carry:
        return ()

    def step(
        self, denoise: Denoiser, schedule: Schedule, x: Image, t: Time, s: Time, carry: Carry, key: Key | Image
    ) -> tuple[Image, Carry]:
        prediction = denoise(x, t)
        alpha_s, sigma_s = _scales(schedule, s, x)
        if self.eta == 0.0:
            return move(prediction, alpha_s, sigma_s), carry
        alpha_t, sigma_t = _scales(schedule, t, x)
        shrink = jnp.clip(alpha_t * sigma_s / (alpha_s * sigma_t), 0.0, 1.0)
        std = self.eta * sigma_s * jnp.sqrt(1.0 - shrink**2)
        drift = move(prediction, alpha_s, jnp.sqrt(jnp.maximum(sigma_s**2 - std**2, 0.0)))
        return drift + std * unit_noise(key, x), carry


@dataclass(frozen=True, kw_only=True)
class Euler:
    """Euler's rule for d(x/alpha) = eps d(sigma/alpha) (Karras 2022, 2206.00364), and for the flow, dx = v dsigma.

    Both follow the prediction's straight line, so this is DDIM with eta 0; k-diffusion's differs in its grid only.
    """

    def init(self, x: Image) -> Carry:
        return ()

    def step(
        self, denoise: Denoiser, schedule: Schedule, x: Image, t: Time, s: Time, carry: Carry, key: Key | Image
    ) -> tuple[Image, Carry]:
        return move(denoise(x, t), *_scales(schedule, s, x)), carry


@dataclass(frozen=True, kw_only=True)
class Heun:
    """The trapezoidal rule (Karras 2022, Alg. 1) in y = x / (alpha + k sigma), where k is the schedule's gauge.

    With tau = sigma / (alpha + k sigma), dy/dtau = eps - k x0: k = 0 is Karras' x / alpha over sigma / alpha, k = 1 the
    flow's velocity over its time. Two evaluations a step; where sigma_s = 0 the step is Euler's.
    """

    def init(self, x: Image) -> Carry:
        return ()

    def step(
        self, denoise: Denoiser, schedule: Schedule, x: Image, t: Time, s: Time, carry: Carry, key: Key | Image
    ) -> tuple[Image, Carry]:
        k = schedule.gauge
        (alpha_t, sigma_t), (alpha_s, sigma_s) = _scales(schedule, t, x), _scales(schedule, s, x)
        first = denoise(x, t)
        euler = move(first, alpha_s, sigma_s)
        # at the clean end an eps-prediction network is asked again at t instead: any finite answer does
        second = denoise(euler, jnp.where(schedule.sigma(s) > 0.0, s, t))
        norm_s = alpha_s + k * sigma_s
        span = sigma_s - norm_s * sigma_t / (alpha_t + k * sigma_t)
        bend = (second.eps - first.eps) - k * (second.x0 - first.x0)
        return jnp.where(sigma_s > 0.0, euler + 0.5 * span * bend, euler), carry


@dataclass(frozen=True, kw_only=True)
class DPMSolver2:
    """DPM-Solver-2, singlestep (Lu 2022, 2206.00927, Alg. 1 with r1 = 1/2), in the noise prediction:

    u = DDIM from t to the time m halfway in log-SNR;  x_s = (alpha_s / alpha_t) x - sigma_s (e^h - 1) eps(u, m).
    Two evaluations a step; first order where lambda_t or lambda_s is infinite.
    """

    def init(self, x: Image) -> Carry:
        return ()

    def step(
        self, denoise: Denoiser, schedule: Schedule, x: Image, t: Time, s: Time, carry: Carry, key: Key | Image
    ) -> tuple[Image, Carry]:
        first, second, finite = _midpoint(denoise, schedule, x, t, s)
        (alpha_t, sigma_t), (alpha_s, sigma_s) = _scales(schedule, t, x), _scales(schedule, s, x)
        # (alpha_s / alpha_t) x = alpha_s x0 + sigma_s e^h eps, so the rule bends the straight line by eps(u) - eps(x)
        span = sigma_s - alpha_s * sigma_t / jnp.where(finite, alpha_t, 1.0)
        straight = move(first, alpha_s, sigma_s)
        return jnp.where(finite, straight + span * (second.eps - first.eps), straight), carry


@dataclass(frozen=True, kw_only=True)
class DPMpp2S:
    """DPM-Solver++(2S) (Lu 2022b, 2211.01095, Alg. 1 with r = 1/2): the midpoint rule in the data prediction,

    x_s = (sigma_s / sigma_t) x - alpha_s (e^-h - 1) x0(u, m). Two evaluations a step; first order at infinite log-SNR.
    """

    def init(self, x: Image) -> Carry:
        return ()

    def step(
        self, denoise: Denoiser, schedule: Schedule, x: Image, t: Time, s: Time, carry: Carry, key: Key | Image
    ) -> tuple[Image, Carry]:
        first, second, finite = _midpoint(denoise, schedule, x, t, s)
        (alpha_t, sigma_t), (alpha_s, sigma_s) = _scales(schedule, t, x), _scales(schedule, s, x)
        span = alpha_s - sigma_s * alpha_t / sigma_t
        straight = move(first, alpha_s, sigma_s)
        return jnp.where(finite, straight + span * (second.x0 - first.x0), straight), carry


@dataclass(frozen=True, kw_only=True)
class DPMpp2M:
    """DPM-Solver++(2M) (Lu 2022b, 2211.01095, Alg. 2): the data prediction extrapolated from the last two steps,

    x_s = (sigma_s / sigma_t) x - alpha_s (e^-h - 1) (x0 + (h / 2 h_prev) (x0 - x0_prev)), one evaluation a step.

    The carry is (x0_prev, lambda_prev). The first step and a step to sigma_s = 0 are first order: there h_prev or h is
    infinite. So is h_prev after alpha_t = 0, where lambda_prev counts as diffusers' -log 4096. lower_final: the step to
    timestep 0 is first order as well (diffusers, in fewer than 15 steps that end there).
    """

    lower_final: bool = False

    def init(self, x: Image) -> Carry:
        return jnp.zeros_like(x), jnp.full(x.shape[:1], -jnp.inf, jnp.float32)

    def step(
        self, denoise: Denoiser, schedule: Schedule, x: Image, t: Time, s: Time, carry: Carry, key: Key | Image
    ) -> tuple[Image, Carry]:
        previous, lambda_prev = carry
        prediction = denoise(x, t)
        (alpha_t, sigma_t), (alpha_s, sigma_s) = _scales(schedule, t, x), _scales(schedule, s, x)
        lambda_t, lambda_s = (jnp.broadcast_to(log_snr(schedule, u), x.shape[:1]) for u in (t, s))
        lambda_t = jnp.where(lambda_t == -jnp.inf, -jnp.log(4096.0), lambda_t)
        finite = jnp.isfinite(lambda_prev) & jnp.isfinite(lambda_t) & jnp.isfinite(lambda_s)
        if self.lower_final:
            finite &= s > 0.0
        ratio = (lambda_s - lambda_t) / jnp.where(finite, lambda_t - lambda_prev, 1.0)
        slope = 0.5 * expand(jnp.where(finite, ratio, 0.0), x)
        bend = slope * (prediction.x0 - previous)
        span = alpha_s - sigma_s * alpha_t / sigma_t
        return move(prediction, alpha_s, sigma_s) + span * bend, (prediction.x0, lambda_t)


@dataclass(frozen=True, kw_only=True)
class LCM:
    """Multistep consistency sampling (2310.04378 Alg. 3): x_s = alpha_s f(x, t) + sigma_s z.

    The denoiser is a consistency function, its x0 being f. A grid that ends at the clean time adds no noise at its
    last step, as sigma_s = 0 there.
    """

    def init(self, x: Image) -> Carry:
        return ()

    def step(
        self, denoise: Denoiser, schedule: Schedule, x: Image, t: Time, s: Time, carry: Carry, key: Key | Image
    ) -> tuple[Image, Carry]:
        alpha_s, sigma_s = _scales(schedule, s, x)
        return alpha_s * denoise(x, t).x0 + sigma_s * unit_noise(key, x), carry


@dataclass(frozen=True, kw_only=True)
class TCD:
    """Strategic stochastic sampling (Zheng et al. 2024, 2402.19159 Alg. 4), a jump to s' = (1 - gamma) s and noise:

    x_s = (alpha_s / alpha_s') x_s' + sqrt(sigma_s^2 - (alpha_s / alpha_s')^2 sigma_s'^2) z.

    gamma 0 is deterministic DDIM, gamma 1 jumps to the clean time as LCM does. A network that knows its end knows s'.
    """

    gamma: float = 0.3

    def __post_init__(self) -> None:
        if not 0.0 <= self.gamma <= 1.0:
            raise ValueError(f"gamma is {self.gamma}: it must be between 0 and 1")

    def init(self, x: Image) -> Carry:
        return ()

    def step(
        self, denoise: Denoiser, schedule: Schedule, x: Image, t: Time, s: Time, carry: Carry, key: Key | Image
    ) -> tuple[Image, Carry]:
        if self.gamma == 0.0:
            return flow_map(denoise, schedule, x, t, s), carry
        below = floor_to_timestep(schedule, jnp.maximum((1.0 - self.gamma) * s, schedule.t_min))
        reached = flow_map(denoise, schedule, x, t, below)
        return noise_further(schedule, reached, unit_noise(key, x), below, s), carry


class InpaintTarget(NamedTuple):
    """What inpainting keeps: clean latents and the noise that takes them to any time; mask is 1 where redrawn."""

    mask: Float[Array, "b h w 1"]
    x0: Image
    eps: Image


@dataclass(frozen=True, kw_only=True)
class Inpaint:
    """A solver after each of whose steps the kept part is put back (RePaint, 2201.09865 eq. 8, with one noise for all):

    x_s = mask x_s + (1 - mask) (alpha_s x0 + sigma_s eps). Made inside a jitted function, as it holds arrays.
    """

    solver: Solver
    target: InpaintTarget

    def init(self, x: Image) -> Carry:
        return self.solver.init(x)

    def step(
        self, denoise: Denoiser, schedule: Schedule, x: Image, t: Time, s: Time, carry: Carry, key: Key | Image
    ) -> tuple[Image, Carry]:
        x, carry = self.solver.step(denoise, schedule, x, t, s, carry, key)
        mask, x0, eps = self.target
        return mask * x + (1.0 - mask) * add_noise(schedule, x0, eps, s), carry


def _midpoint(
    denoise: Denoiser, schedule: Schedule, x: Image, t: Time, s: Time
) -> tuple[Prediction, Prediction, Array]:
    """Predictions at t and at the time halfway to s in log-SNR, and where that time exists."""
    lambda_t, lambda_s = log_snr(schedule, t), log_snr(schedule, s)
    finite = jnp.isfinite(lambda_t) & jnp.isfinite(lambda_s)
    middle = jnp.where(finite, schedule.time_at(jnp.where(finite, 0.5 * (lambda_t + lambda_s), 0.0)), t)
    first = denoise(x, t)
    second = denoise(move(first, *_scales(schedule, middle, x)), middle)
    return first, second, expand(finite, x)
