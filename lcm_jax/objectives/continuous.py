"""Continuous-time objectives: the velocity that they follow, sCM, and sCM with another loss beside it.

Each is written in its paper's time; `on_schedule` takes any teacher and student there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float

from lcm_jax.diffusion.parameterization import add_noise, expand, on_schedule
from lcm_jax.diffusion.schedules import RectifiedFlow, TrigFlow
from lcm_jax.objectives.distribution import DistributionMatching
from lcm_jax.objectives.few_step import Draw, FewStep, RandomKeys
from lcm_jax.objectives.terms import check_choice, frozen, jvp, without_caption
from lcm_jax.typing import Array, Cond, Denoiser, Image, Key, Nets, Params, Prediction, Schedule, Time

Velocity = Literal["teacher", "data"]
FLOW = RectifiedFlow()


def velocity(denoise: Denoiser, x: Image, t: Time, s: Time | None = None) -> Image:
    """Return dx/dt = eps - x0 on the straight path; with a span embedding the mean velocity from t to s.

    >>> import jax.numpy as jnp
    >>> from lcm_jax.objectives.continuous import velocity
    >>> from lcm_jax.typing import Prediction
    >>> float(velocity(lambda x, t, s: Prediction(x, 3.0 * x), jnp.ones((1, 1, 1, 1)), 0.5).squeeze())
    2.0
    """
    prediction = denoise(x, t, s)
    return prediction.eps - prediction.x0


@dataclass(frozen=True, kw_only=True)
class Continuous(FewStep):
    """The base of the continuous-time objectives, which follow a trajectory's velocity v = dx/dt.

    velocity: "teacher" follows the guided teacher's trajectory. "data" follows the line from x0 to eps of the example,
    whose mean is the velocity of the data, and trains without a teacher. For a guidance of 1 + w its velocity v becomes
    v_g = omega v + (1 - omega - kappa) u(null) + kappa u(c), of the student's own velocities u, where
    omega = (1 - kappa) (1 + w): the student that equals its mean has u(c) = v(null) + (1 + w) (v(c) - v(null))
    (MeanFlow, 2505.13447 eq. 21). A dropped caption's is v. kappa: in [0, 1), ValueError outside.
    """

    velocity: Velocity = "teacher"
    kappa: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("velocity", self.velocity, Velocity)
        if not 0.0 <= self.kappa < 1.0:
            raise ValueError(f"kappa={self.kappa} must be at least 0 and below 1")

    @property
    def needs_teacher(self) -> bool:  # type: ignore[override]
        return self.velocity == "teacher"

    def student_on(self, nets: Nets, params: Params, draw: Draw, schedule: Schedule) -> Denoiser:
        """Return the student's denoiser on the paper's schedule."""
        return on_schedule(self.student(nets, params, draw.student_cond), self.schedule, schedule)

    def trajectory_prediction(
        self, nets: Nets, draw: Draw, schedule: Schedule, x: Image, t: Array, keys: RandomKeys, s: Array | None = None
    ) -> tuple[Image, Image]:
        """Return the (x0, eps) whose velocity is followed; s: the end of a step that is taken for an instant."""
        if self.velocity == "data":
            dropped = self.dropped(keys, len(x))
            return self.guided(nets, draw, schedule, x, t, s, dropped) if self.w_max > 0.0 else (draw.x0, draw.eps)
        return frozen(tuple(on_schedule(self.teacher(nets, draw.cond, draw.w), self.schedule, schedule)(x, t)))

    def guided(
        self,
        nets: Nets,
        draw: Draw,
        schedule: Schedule,
        x: Image,
        t: Array,
        s: Array | None,
        dropped: Bool[Array, " b"],
    ) -> tuple[Image, Image]:
        """Return the (x0, eps) of v_g, as it is linear in v and u."""

        def guess(cond: Cond) -> Prediction:
            there = draw._replace(student_cond=cond)
            return frozen(self.student_on(nets, frozen(nets.student), there, schedule)(x, t, s))

        null, conditional = guess(without_caption(nets.null, draw.student_cond)), guess(draw.student_cond)
        omega = expand((1.0 - self.kappa) * (1.0 + draw.w), x)

        def mix(data: Image, null: Image, conditional: Image) -> Image:
            guided = omega * data + (1.0 - omega - self.kappa) * null + self.kappa * conditional
            return jnp.where(expand(dropped, x), data, guided)

        return mix(draw.x0, null.x0, conditional.x0), mix(draw.eps, null.eps, conditional.eps)


@dataclass(frozen=True, kw_only=True)
class ContinuousConsistency(Continuous):
    """sCM (Lu & Song 2024, 2410.11081, Alg. 1), in TrigFlow: x = cos t x0 + sin t z, f = cos t x - sin t sigma_d F.

    loss = |F - F^- - g / (|g| + c)|^2 (exp(w) / D, and - w, with a learned w(t) where `adaptive`), where F^- is without
    gradient, v = dx/dt and  g = -cos^2 t (sigma_d F^- - v) - r cos t sin t (x + sigma_d dF^-/dt).
    The derivative is one forward-mode product with the tangent (cos t sin t v, cos t sin t). r rises to 1 over `warmup`
    steps, at most over a quarter of the run; |g| is the root mean square. t = arctan(e^tau / sigma_d) with
    tau ~ N(mean + log(sigma_d / 0.5), std^2): the published mean is for data of a standard deviation of 0.5.

    >>> import jax
    >>> from lcm_jax.diffusion.schedules import DDPM
    >>> from lcm_jax.objectives import method, toy_batch, toy_nets
    >>> objective = method("scm", schedule=DDPM())
    >>> loss, metrics = objective(toy_nets(), toy_batch(), jax.random.key(0))
    >>> bool(loss >= 0.0), objective.sampler
    (True, 'lcm')
    """

    mean: float = -1.0
    std: float = 1.4
    sigma_data: float = 1.0
    warmup: int = 10_000
    c: float = 0.1
    adaptive: bool = True

    def times(self, key: Key, n: int) -> Float[Array, " n"]:
        """Draw the times of TrigFlow."""
        tau = self.mean + jnp.log(self.sigma_data / 0.5) + self.std * jax.random.normal(key, (n,))
        return jnp.arctan(jnp.exp(tau) / self.sigma_data)

    def tangent_weight(self, step: Array | float, steps: Array | float) -> Float[Array, ""]:
        """Return r."""
        return jnp.minimum(1.0, (jnp.float32(step) + 1.0) / jnp.minimum(self.warmup, 0.25 * jnp.float32(steps)))

    def others(self, key: Key, teacher: Params) -> dict[str, Params]:
        """Return the weights of w(t), a linear map of sines and cosines of t, zero at first."""
        return {"weight": jnp.zeros(2 * _WAVES + 1)} if self.adaptive else {}

    def __call__(self, nets: Nets, batch: dict[str, Any], key: Key) -> tuple[Float[Array, ""], dict[str, Array]]:
        draw, keys = self.draw(nets, batch, key), RandomKeys.of(key)
        schedule, scale = TrigFlow(sigma_data=self.sigma_data), self.sigma_data
        t = self.times(keys.time, len(draw.x0))
        x = add_noise(schedule, draw.x0, draw.eps, t)
        cos, sin = expand(jnp.cos(t), x), expand(jnp.sin(t), x)

        def slope(x0: Image, eps: Image, cos: Array, sin: Array) -> Image:
            return cos * scale * eps - sin * x0  # dx/dt

        def F(params: Params, x: Image, t: Array) -> Image:
            prediction = self.student_on(nets, params, draw, schedule)(x, t)
            return slope(*prediction, expand(jnp.cos(t), x), expand(jnp.sin(t), x)) / scale

        v = slope(*self.trajectory_prediction(nets, draw, schedule, x, t, keys), cos, sin)
        still = frozen(nets.student)
        tangent = (cos * sin * v, jnp.cos(t) * jnp.sin(t))
        before, derivative = jvp(lambda x, t: F(still, x, t), (x, t), tangent)
        r = self.tangent_weight(nets.step, nets.steps)
        g = -(cos**2) * (scale * before - v) - r * (cos * sin * x + scale * derivative)
        rms = jnp.sqrt(jnp.mean(g**2, axis=(1, 2, 3), keepdims=True))
        target = frozen(before + g / (rms + self.c))
        per_example = jnp.mean((F(nets.student, x, t) - target) ** 2, axis=(1, 2, 3))
        loss = jnp.mean(per_example)
        metrics = {"error": jnp.mean(rms), "squares": loss}
        if self.adaptive:
            w = _waves(t) @ nets.others["weight"]
            loss = jnp.mean(jnp.exp(w) * per_example - w)
        return loss, {"loss": loss, **metrics}


_WAVES = 4


def _waves(t: Float[Array, " b"]) -> Float[Array, "b w"]:
    angles = 2.0 * t[:, None] * jnp.arange(1, _WAVES + 1)
    return jnp.concatenate([jnp.ones_like(t)[:, None], jnp.sin(angles), jnp.cos(angles)], axis=1)


@dataclass(frozen=True, kw_only=True)
class ScoreRegularizedConsistency(ContinuousConsistency):
    """rCM (Zheng et al. 2025, 2510.08431): sCM, whose student also follows DMD2's difference of scores.

    sCM covers what the teacher draws, the difference of scores on the student's own pictures makes them sharp; there is
    no discriminator. matching: the weight of DMD2's loss, that of sCM being 1. The student learns in one of `every`
    steps, the fake score in all. steps: those in which the student draws its pictures. The defaults are the released
    ones, whose levels are for data of a standard deviation of 1.

    >>> import jax
    >>> from lcm_jax.diffusion.schedules import DDPM
    >>> from lcm_jax.objectives import method, toy_batch, toy_nets
    >>> objective = method("rcm", schedule=DDPM())
    >>> loss, metrics = objective(toy_nets(), toy_batch(), jax.random.key(0))
    >>> bool(loss >= 0.0), objective.sampler
    (True, 'lcm')
    """

    mean: float = -1.493  # -0.8 - log 2: -0.8 for data of a standard deviation of 1
    std: float = 1.6
    warmup: int = 1
    adaptive: bool = False
    matching: float = 0.01
    steps: int = 4
    every: int = 5

    @property
    def scores(self) -> DistributionMatching:
        """DMD2's objective, without its discriminator."""
        shared = {name: getattr(self, name) for name in ("schedule", "kind", "w_min", "w_max", "embed_w", "steps")}
        return DistributionMatching(**shared, every=self.every, adversarial=0.0)

    def others(self, key: Key, teacher: Params) -> dict[str, Params]:
        """Return the fake score, which starts as the teacher, and what sCM has."""
        return {**super().others(key, teacher), **self.scores.others(key, teacher)}

    @property
    def updates(self) -> Mapping[str, int]:
        return {"student": self.every, "weight": self.every}

    def __call__(self, nets: Nets, batch: dict[str, Any], key: Key) -> tuple[Float[Array, ""], dict[str, Array]]:
        def consistency() -> tuple[Array, Array]:
            loss, metrics = super(ScoreRegularizedConsistency, self).__call__(nets, batch, key)
            return loss, metrics["error"]

        learns = jnp.asarray(nets.step) % self.every == 0
        loss, error = jax.lax.cond(learns, consistency, lambda: (jnp.float32(0.0), jnp.float32(0.0)))
        scores, metrics = self.scores(nets, batch, RandomKeys.of(key).second)
        total = loss + self.matching * metrics["student"] + (scores - metrics["student"])
        return total, {**metrics, "loss": total, "consistency": loss, "error": error}


@dataclass(frozen=True, kw_only=True)
class SanaSprint(ContinuousConsistency):
    """SANA-Sprint (Chen et al. 2025, 2503.09641): sCM with LADD's discriminator, on any teacher's exact TrigFlow.

    The discriminator's heads read the teacher's features of the student's pictures, noised to a level whose logarithm
    is N(critic_mean, critic_std^2) (hinge loss, weight `adversarial`). These pictures are drawn from sCM's times, half
    of them (`largest`) from pure noise. The levels are for data of a standard deviation of 0.5, and move with it.

    >>> import jax
    >>> from lcm_jax.diffusion.schedules import DDPM
    >>> from lcm_jax.objectives import method, toy_batch, toy_nets
    >>> objective = method("sana-sprint", schedule=DDPM())
    >>> loss, metrics = objective(toy_nets(), toy_batch(), jax.random.key(0))
    >>> bool(loss == loss), objective.sampler
    (True, 'lcm')
    """

    w_min: float = 3.0
    w_max: float = 4.0
    mean: float = 0.2
    std: float = 1.6
    warmup: int = 4000
    adversarial: float = 0.5
    largest: float = 0.5
    critic_mean: float = -0.6
    critic_std: float = 1.0

    def critic_times(self, key: Key, since: Float[Array, " b"]) -> Float[Array, " b"]:
        """Draw the log-normal levels, as times of the schedule."""
        mean = self.critic_mean + jnp.log(self.sigma_data / 0.5)
        return self.schedule.time_at(-mean - self.critic_std * jax.random.normal(key, since.shape))

    def __call__(self, nets: Nets, batch: dict[str, Any], key: Key) -> tuple[Float[Array, ""], dict[str, Array]]:
        loss, metrics = super().__call__(nets, batch, key)
        draw, keys = self.draw(nets, batch, key), RandomKeys.of(key)
        times, noise, first = jax.random.split(keys.student, 3)
        schedule, n = TrigFlow(sigma_data=self.sigma_data), len(draw.x0)
        t = jnp.where(jax.random.bernoulli(first, self.largest, (n,)), schedule.t_max, self.times(times, n))
        x = add_noise(schedule, draw.x0, jax.random.normal(noise, draw.x0.shape), t)
        picture = self.student_on(nets, nets.student, draw, schedule)(x, t).x0
        student, critic = self.adversarial_losses(nets, draw.x0, picture, draw.cond, keys.discriminator)
        total = loss + self.adversarial * student + critic
        return total, {**metrics, "loss": total, "student": student, "critic": critic}
