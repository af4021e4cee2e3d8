"""Solvers: one step of the reverse process from time t to time s.

Each is written in alpha, sigma and the two predictions, in a form that stays finite at the clean end (sigma_s = 0) and,
for outputs that define x0 there (v_prediction, flow), at pure noise (alpha_t = 0). Where the formula needs a neighbour
at an infinite log-SNR the step falls back to first order, which is exact there in the limit.

Those that remember the steps before are in `multistep_solvers`, and are named here too.

A solver of your own is a frozen dataclass with `order`, `evaluations`, `stochastic`, `init` and `step` (see
`lcm_jax.typing.Solver`); `lcm_jax.diffusion.samplers.register` gives it a name.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lcm_jax.diffusion.multistep_solvers import DEIS, LMS, PLMS, DPMpp2M, DPMppMultistep, DPMppSinglestep, UniPC
from lcm_jax.diffusion.parameterization import add_noise, expand, flow_map, noise_further
from lcm_jax.diffusion.schedules import floor_to_timestep
from lcm_jax.diffusion.solver_steps import middle_time, midpoint, move, scales, unit_noise
from lcm_jax.typing import Carry, Denoiser, Image, Key, Schedule, Solver, Time

__all__ = ["DDIM", "DEIS", "LCM", "LMS", "PLMS", "TCD", "DPM2Ancestral", "DPMSolver2", "DPMpp2M", "DPMpp2S"]
__all__ += ["DPMppMultistep", "DPMppSDE", "DPMppSinglestep", "Euler", "Heun", "Inpaint", "InpaintTarget", "UniPC"]
__all__ += ["move", "unit_noise"]


@dataclass(frozen=True, kw_only=True)
class DDIM:
    """Song 2021 (2010.02502) eq. 12 and 16: x_s = alpha_s x0 + sqrt(sigma_s^2 - v) eps + sqrt(v) z,

    v = (eta sigma_s)^2 (1 - (alpha_t sigma_s / (alpha_s sigma_t))^2). eta 0 is deterministic and of first order, eta 1
    is DDPM.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> from lcm_jax.diffusion.schedules import RectifiedFlow
    >>> from lcm_jax.diffusion.solvers import DDIM
    >>> from lcm_jax.typing import Prediction
    >>> x = jnp.full((1, 1, 1, 1), 2.0)
    >>> perfect = lambda x, t, s=None: Prediction(jnp.ones_like(x), 3.0 * jnp.ones_like(x))  # x0 1, eps 3
    >>> solver = DDIM()
    >>> x, carry = solver.step(perfect, RectifiedFlow(), x, 0.5, 0.0, solver.init(x), jax.random.key(0))
    >>> float(x.squeeze())
    1.0
    """

    order: ClassVar[int] = 1
    evaluations: ClassVar[int] = 1

    eta: float = 0.0

    @property
    def stochastic(self) -> bool:
        return self.eta != 0.0

    def init(self, x: Image) -> Carry:
        return ()

    def step(
        self, denoise: Denoiser, schedule: Schedule, x: Image, t: Time, s: Time, carry: Carry, key: Key | Image
    ) -> tuple[Image, Carry]:
        prediction = denoise(x, t)
        alpha_s, sigma_s = scales(schedule, s, x)
        if self.eta == 0.0:
            return move(prediction, alpha_s, sigma_s), carry
        alpha_t, sigma_t = scales(schedule, t, x)
        shrink = jnp.clip(alpha_t * sigma_s / (alpha_s * sigma_t), 0.0, 1.0)
        std = self.eta * sigma_s * jnp.sqrt(1.0 - shrink**2)
        drift = move(prediction, alpha_s, jnp.sqrt(jnp.maximum(sigma_s**2 - std**2, 0.0)))
        return drift + std * unit_noise(key, x), carry


@dataclass(frozen=True, kw_only=True)
class Euler:
    """Euler's rule for d(x/alpha) = eps d(sigma/alpha) (Karras 2022, 2206.00364), and for the flow, dx = v dsigma.

    Both follow the prediction's straight line, so this is DDIM with eta 0; k-diffusion's differs in its grid only.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> from lcm_jax.diffusion.schedules import RectifiedFlow
    >>> from lcm_jax.diffusion.solvers import Euler
    >>> from lcm_jax.typing import Prediction
    >>> x = jnp.full((1, 1, 1, 1), 2.0)
    >>> perfect = lambda x, t, s=None: Prediction(jnp.ones_like(x), 3.0 * jnp.ones_like(x))  # x0 1, eps 3
    >>> solver = Euler()
    >>> x, carry = solver.step(perfect, RectifiedFlow(), x, 0.5, 0.25, solver.init(x), jax.random.key(0))
    >>> float(x.squeeze())
    1.5
    """

    order: ClassVar[int] = 1
    evaluations: ClassVar[int] = 1
    stochastic: ClassVar[bool] = False

    def init(self, x: Image) -> Carry:
        return ()

    def step(
        self, denoise: Denoiser, schedule: Schedule, x: Image, t: Time, s: Time, carry: Carry, key: Key | Image
    ) -> tuple[Image, Carry]:
        return move(denoise(x, t), *scales(schedule, s, x)), carry


@dataclass(frozen=True, kw_only=True)
class Heun:
    """The trapezoidal rule (Karras 2022, Alg. 1) in y = x / (alpha + k sigma), where k is the schedule's gauge.

    With tau = sigma / (alpha + k sigma), dy/dtau = eps - k x0: k = 0 is Karras' x / alpha over sigma / alpha, k = 1 the
    flow's velocity over its time. Two evaluations a step; where sigma_s = 0 the step is Euler's.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> from lcm_jax.diffusion.schedules import RectifiedFlow
    >>> from lcm_jax.diffusion.solvers import Heun
    >>> from lcm_jax.typing import Prediction
    >>> x = jnp.full((1, 1, 1, 1), 2.0)
    >>> perfect = lambda x, t, s=None: Prediction(jnp.ones_like(x), 3.0 * jnp.ones_like(x))  # x0 1, eps 3
    >>> solver = Heun()
    >>> x, carry = solver.step(perfect, RectifiedFlow(), x, 0.5, 0.25, solver.init(x), jax.random.key(0))
    >>> float(x.squeeze())
    1.5
    """

    order: ClassVar[int] = 2
    evaluations: ClassVar[int] = 2
    stochastic: ClassVar[bool] = False

    def init(self, x: Image) -> Carry:
        return ()

    def step(
        self, denoise: Denoiser, schedule: Schedule, x: Image, t: Time, s: Time, carry: Carry, key: Key | Image
    ) -> tuple[Image, Carry]:
        k = schedule.gauge
        (alpha_t, sigma_t), (alpha_s, sigma_s) = scales(schedule, t, x), scales(schedule, s, x)
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

    >>> import jax
    >>> import jax.numpy as jnp
    >>> from lcm_jax.diffusion.schedules import RectifiedFlow
    >>> from lcm_jax.diffusion.solvers import DPMSolver2
    >>> from lcm_jax.typing import Prediction
    >>> x = jnp.full((1, 1, 1, 1), 2.0)
    >>> perfect = lambda x, t, s=None: Prediction(jnp.ones_like(x), 3.0 * jnp.ones_like(x))  # x0 1, eps 3
    >>> solver = DPMSolver2()
    >>> x, carry = solver.step(perfect, RectifiedFlow(), x, 0.5, 0.25, solver.init(x), jax.random.key(0))
    >>> round(float(x.squeeze()), 4)
    1.5
    """

    order: ClassVar[int] = 2
    evaluations: ClassVar[int] = 2
    stochastic: ClassVar[bool] = False

    def init(self, x: Image) -> Carry:
        return ()

    def step(
        self, denoise: Denoiser, schedule: Schedule, x: Image, t: Time, s: Time, carry: Carry, key: Key | Image
    ) -> tuple[Image, Carry]:
        first, second, finite = midpoint(denoise, schedule, x, t, s)
        (alpha_t, sigma_t), (alpha_s, sigma_s) = scales(schedule, t, x), scales(schedule, s, x)
        # (alpha_s / alpha_t) x = alpha_s x0 + sigma_s e^h eps, so the rule bends the straight line by eps(u) - eps(x)
        span = sigma_s - alpha_s * sigma_t / jnp.where(finite, alpha_t, 1.0)
        straight = move(first, alpha_s, sigma_s)
        return jnp.where(finite, straight + span * (second.eps - first.eps), straight), carry


@dataclass(frozen=True, kw_only=True)
class DPMpp2S:
    """DPM-Solver++(2S) (Lu 2022b, 2211.01095, Alg. 1 with r = 1/2): the midpoint rule in the data prediction,

    x_s = (sigma_s / sigma_t) x - alpha_s (e^-h - 1) x0(u, m). Two evaluations a step; first order at infinite log-SNR.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> from lcm_jax.diffusion.schedules import RectifiedFlow
    >>> from lcm_jax.diffusion.solvers import DPMpp2S
    >>> from lcm_jax.typing import Prediction
    >>> x = jnp.full((1, 1, 1, 1), 2.0)
    >>> perfect = lambda x, t, s=None: Prediction(jnp.ones_like(x), 3.0 * jnp.ones_like(x))  # x0 1, eps 3
    >>> solver = DPMpp2S()
    >>> x, carry = solver.step(perfect, RectifiedFlow(), x, 0.5, 0.25, solver.init(x), jax.random.key(0))
    >>> round(float(x.squeeze()), 4)
    1.5
    """

    order: ClassVar[int] = 2
    evaluations: ClassVar[int] = 2
    stochastic: ClassVar[bool] = False

    def init(self, x: Image) -> Carry:
        return ()

    def step(
        self, denoise: Denoiser, schedule: Schedule, x: Image, t: Time, s: Time, carry: Carry, key: Key | Image
    ) -> tuple[Image, Carry]:
        first, second, finite = midpoint(denoise, schedule, x, t, s)
        (alpha_t, sigma_t), (alpha_s, sigma_s) = scales(schedule, t, x), scales(schedule, s, x)
        span = alpha_s - sigma_s * alpha_t / sigma_t
        straight = move(first, alpha_s, sigma_s)
        return jnp.where(finite, straight + span * (second.x0 - first.x0), straight), carry


@dataclass(frozen=True, kw_only=True)
class DPM2Ancestral:
    """DPM-Solver-2 with ancestral noise (KDPM2AncestralDiscreteScheduler, k-diffusion's DPM2 a).

    The midpoint rule in log-SNR from sigma / alpha at t to that at s squared over it, which is what is left of it when
    the ancestral noise comes on top. Halfway there is the noise level of s, so the second evaluation is at s:

        u = DDIM from t to s;  x_s = alpha_s (x / alpha_t - (sigma_t / alpha_t - q sigma_s / alpha_s) eps(u, s))
                                     + sigma_s sqrt(1 - q^2) z,    q = alpha_t sigma_s / (alpha_s sigma_t).

    Two evaluations a step; where alpha_t = 0 or sigma_s = 0 it is DDIM with eta 1.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> from lcm_jax.diffusion.schedules import RectifiedFlow
    >>> from lcm_jax.diffusion.solvers import DPM2Ancestral
    >>> from lcm_jax.typing import Prediction
    >>> x = jnp.full((1, 1, 1, 1), 2.0)
    >>> perfect = lambda x, t, s=None: Prediction(jnp.ones_like(x), 3.0 * jnp.ones_like(x))  # x0 1, eps 3
    >>> solver = DPM2Ancestral()
    >>> x, carry = solver.step(perfect, RectifiedFlow(), x, 0.5, 0.0, solver.init(x), jax.random.key(0))
    >>> float(x.squeeze())
    1.0
    """

    order: ClassVar[int] = 1
    evaluations: ClassVar[int] = 2
    stochastic: ClassVar[bool] = True

    def init(self, x: Image) -> Carry:
        return ()

    def step(
        self, denoise: Denoiser, schedule: Schedule, x: Image, t: Time, s: Time, carry: Carry, key: Key | Image
    ) -> tuple[Image, Carry]:
        (alpha_t, sigma_t), (alpha_s, sigma_s) = scales(schedule, t, x), scales(schedule, s, x)
        first = denoise(x, t)
        inner = (alpha_t > 0.0) & (sigma_s > 0.0)
        # not quite s: the network's time is that of an inner point, which diffusers does not round
        near = jnp.where(schedule.sigma(s) > 0.0, jnp.nextafter(jnp.asarray(s, jnp.float32), jnp.float32(jnp.inf)), t)
        second = denoise(move(first, alpha_s, sigma_s), near)
        shrink = jnp.clip(alpha_t * sigma_s / (alpha_s * sigma_t), 0.0, 1.0)
        drift = move(first, alpha_s, sigma_s * shrink)
        span = sigma_s * shrink - alpha_s * sigma_t / jnp.where(inner, alpha_t, 1.0)
        drift = jnp.where(inner, drift + span * (second.eps - first.eps), drift)
        return drift + sigma_s * jnp.sqrt(1.0 - shrink**2) * unit_noise(key, x), carry


@dataclass(frozen=True, kw_only=True)
class DPMppSDE:
    """DPM-Solver++ (SDE) (k-diffusion's dpmpp_sde with r = 1/2; DPMSolverSDEScheduler): the midpoint rule with noise.

    u is DDIM with eta 1 from t to the time m halfway to s in log-SNR. From x again, with q = e^-h,

        x_s = alpha_s (x0(u) + q^2 (x0(x) - x0(u))) + sigma_s (q eps(x) + sqrt(1 - q^2) z).

    Two evaluations and two noises a step, which are independent here (in k-diffusion both are of one Brownian path);
    given noise is (2, b, h, w, c), or one for both. Where lambda_t or lambda_s is infinite it is DDIM with eta 1.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> from lcm_jax.diffusion.schedules import RectifiedFlow
    >>> from lcm_jax.diffusion.solvers import DPMppSDE
    >>> from lcm_jax.typing import Prediction
    >>> x = jnp.full((1, 1, 1, 1), 2.0)
    >>> perfect = lambda x, t, s=None: Prediction(jnp.ones_like(x), 3.0 * jnp.ones_like(x))  # x0 1, eps 3
    >>> solver = DPMppSDE()
    >>> x, carry = solver.step(perfect, RectifiedFlow(), x, 0.5, 0.0, solver.init(x), jax.random.key(0))
    >>> float(x.squeeze())
    1.0
    """

    order: ClassVar[int] = 1
    evaluations: ClassVar[int] = 2
    stochastic: ClassVar[bool] = True

    def init(self, x: Image) -> Carry:
        return ()

    def step(
        self,
        denoise: Denoiser,
        schedule: Schedule,
        x: Image,
        t: Time,
        s: Time,
        carry: Carry,
        key: Key | Float[Array, "*2 b h w c"],
    ) -> tuple[Image, Carry]:
        is_key = jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
        pair = jax.random.split(key) if is_key else jnp.broadcast_to(key, (2, *x.shape))
        noises = [unit_noise(part, x) for part in pair]
        middle, finite = middle_time(schedule, t, s)
        first, (alpha_t, sigma_t) = denoise(x, t), scales(schedule, t, x)

        def shrink_to(time: Time) -> tuple[Array, Array, Array]:
            alpha, sigma = scales(schedule, time, x)
            return alpha, sigma, jnp.clip(alpha_t * sigma / (alpha * sigma_t), 0.0, 1.0)

        alpha, sigma, shrink = shrink_to(middle)
        inner = move(first, alpha, sigma * shrink) + sigma * jnp.sqrt(1.0 - shrink**2) * noises[0]
        second = denoise(inner, middle)
        alpha, sigma, shrink = shrink_to(s)
        x0 = jnp.where(expand(finite, x), second.x0 + shrink**2 * (first.x0 - second.x0), first.x0)
        return alpha * x0 + sigma * (shrink * first.eps + jnp.sqrt(1.0 - shrink**2) * noises[1]), carry


@dataclass(frozen=True, kw_only=True)
class LCM:
    """Multistep consistency sampling (2310.04378 Alg. 3): x_s = alpha_s f(x, t) + sigma_s z.

    The denoiser is a consistency function, its x0 being f. A grid that ends at the clean time adds no noise at its
    last step, as sigma_s = 0 there.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> from lcm_jax.diffusion.schedules import RectifiedFlow
    >>> from lcm_jax.diffusion.solvers import LCM
    >>> from lcm_jax.typing import Prediction
    >>> x = jnp.full((1, 1, 1, 1), 2.0)
    >>> perfect = lambda x, t, s=None: Prediction(jnp.ones_like(x), 3.0 * jnp.ones_like(x))  # x0 1, eps 3
    >>> solver = LCM()
    >>> x, carry = solver.step(perfect, RectifiedFlow(), x, 0.5, 0.0, solver.init(x), jax.random.key(0))
    >>> float(x.squeeze())
    1.0
    """

    order: ClassVar[int] = 0
    evaluations: ClassVar[int] = 1
    stochastic: ClassVar[bool] = True

    def init(self, x: Image) -> Carry:
        return ()

    def step(
        self, denoise: Denoiser, schedule: Schedule, x: Image, t: Time, s: Time, carry: Carry, key: Key | Image
    ) -> tuple[Image, Carry]:
        alpha_s, sigma_s = scales(schedule, s, x)
        return alpha_s * denoise(x, t).x0 + sigma_s * unit_noise(key, x), carry


@dataclass(frozen=True, kw_only=True)
class TCD:
    """Strategic stochastic sampling (Zheng et al. 2024, 2402.19159 Alg. 4): to s' = (1 - gamma) s, and noise:

    x_s = (alpha_s / alpha_s') x_s' + sqrt(sigma_s^2 - (alpha_s / alpha_s')^2 sigma_s'^2) z.

    gamma 0 is deterministic DDIM, gamma 1 goes to the clean time as LCM does. A network with a span embedding receives
    s'. ValueError for a gamma outside [0, 1].

    >>> import jax
    >>> import jax.numpy as jnp
    >>> from lcm_jax.diffusion.schedules import RectifiedFlow
    >>> from lcm_jax.diffusion.solvers import TCD
    >>> from lcm_jax.typing import Prediction
    >>> x = jnp.full((1, 1, 1, 1), 2.0)
    >>> perfect = lambda x, t, s=None: Prediction(jnp.ones_like(x), 3.0 * jnp.ones_like(x))  # x0 1, eps 3
    >>> solver = TCD(gamma=0.3)
    >>> x, carry = solver.step(perfect, RectifiedFlow(), x, 0.5, 0.0, solver.init(x), jax.random.key(0))
    >>> float(x.squeeze())
    1.0
    """

    evaluations: ClassVar[int] = 1

    gamma: float = 0.3

    def __post_init__(self) -> None:
        if not 0.0 <= self.gamma <= 1.0:
            raise ValueError(f"gamma is {self.gamma}: it must be between 0 and 1")

    @property
    def order(self) -> int:
        return 1 if self.gamma == 0.0 else 0

    @property
    def stochastic(self) -> bool:
        return self.gamma != 0.0

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
    """The part that inpainting keeps: x_s = alpha_s x0 + sigma_s eps from clean latents x0 and one noise eps.

    mask is 1 where the image is redrawn and 0 where it is kept.
    """

    mask: Float[Array, "b h w 1"]
    x0: Image
    eps: Image


@dataclass(frozen=True, kw_only=True)
class Inpaint:
    """A solver that puts the kept part back after every step (RePaint, 2201.09865 eq. 8, with one noise for all):

    x_s = mask x_s + (1 - mask) (alpha_s x0 + sigma_s eps). It holds arrays, so make it inside the jitted function.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> from lcm_jax.diffusion.schedules import RectifiedFlow
    >>> from lcm_jax.diffusion.solvers import Euler, Inpaint, InpaintTarget
    >>> from lcm_jax.typing import Prediction
    >>> one = jnp.ones((1, 1, 2, 1))
    >>> kept = InpaintTarget(mask=jnp.array([1.0, 0.0]).reshape(1, 1, 2, 1), x0=5.0 * one, eps=0.0 * one)
    >>> solver = Inpaint(solver=Euler(), target=kept)
    >>> denoise = lambda x, t, s=None: Prediction(one, one)
    >>> x, carry = solver.step(denoise, RectifiedFlow(), one, 0.5, 0.0, (), jax.random.key(0))
    >>> x.ravel().tolist()
    [1.0, 5.0]
    """

    solver: Solver
    target: InpaintTarget

    @property
    def order(self) -> int:
        return self.solver.order

    @property
    def evaluations(self) -> int:
        return self.solver.evaluations

    @property
    def stochastic(self) -> bool:
        return self.solver.stochastic

    def init(self, x: Image) -> Carry:
        return self.solver.init(x)

    def step(
        self, denoise: Denoiser, schedule: Schedule, x: Image, t: Time, s: Time, carry: Carry, key: Key | Image
    ) -> tuple[Image, Carry]:
        x, carry = self.solver.step(denoise, schedule, x, t, s, carry, key)
        mask, x0, eps = self.target
        return mask * x + (1.0 - mask) * add_noise(schedule, x0, eps, s), carry
