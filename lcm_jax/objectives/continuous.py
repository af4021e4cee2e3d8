"""Continuous-time objectives: forward-mode derivatives along the trajectory (sCM, MeanFlow), or half steps (Shortcut).

Each is written in its paper's time; `on_schedule` takes any teacher and student there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float

from lcm_jax.diffusion.parameterization import add_noise, expand, flow_map, on_schedule
from lcm_jax.diffusion.schedules import RectifiedFlow, TrigFlow, log_snr, round_to_timestep
from lcm_jax.objectives.few_step import Draw, FewStep, RandomKeys
from lcm_jax.objectives.terms import check_choice, frozen, without_caption
from lcm_jax.objectives.time_densities import LogitNormal
from lcm_jax.typing import Array, Cond, Denoiser, Image, Key, Nets, Params, Prediction, Schedule, Time

Velocity = Literal["teacher", "data"]
FLOW = RectifiedFlow()


def _velocity(denoise: Denoiser, x: Image, t: Time, s: Time | None = None) -> Image:
    """Return dx/dt = eps - x0 on the straight path; with a span embedding the mean velocity from t to s."""
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

    forward_mode: ClassVar[bool] = True

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
        before, derivative = jax.jvp(lambda x, t: F(still, x, t), (x, t), tangent)
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
class MeanFlow(Continuous):
    """MeanFlow (Geng et al. 2025, 2505.13447 eq. 10, 11): the network is the mean velocity u(x, r, t) on the flow,

    u_target = v - (t - r) (v d/dx + d/dt) u, one forward-mode product with the tangent (v, r: 0, t: 1); loss
    |u - u_target|^2 / (|u - u_target|^2 + c)^power, the denominator without gradient. t and r are the larger and the
    smaller of two logit-normal draws, r = t in all but `share` of the examples. The sampler "flow_map" draws with it.
    It trains from data with a guidance of 2, for which one caption in ten is dropped; see `Continuous` for a teacher.

    >>> import jax
    >>> from lcm_jax.diffusion.schedules import RectifiedFlow
    >>> from lcm_jax.objectives import method, toy_batch, toy_nets
    >>> objective = method("meanflow", schedule=RectifiedFlow(), kind="flow")
    >>> loss, metrics = objective(toy_nets(), toy_batch(), jax.random.key(0))
    >>> bool(loss >= 0.0), objective.sampler
    (True, 'flow_map')
    """

    spans: ClassVar[bool] = True
    forward_mode: ClassVar[bool] = True
    sampler: ClassVar[str] = "flow_map"

    velocity: Velocity = "data"
    w_min: float = 1.0
    w_max: float = 1.0
    embed_w: bool = False
    caption_dropout: float = 0.1
    mean: float = -0.4
    std: float = 1.0
    share: float = 0.25
    power: float = 1.0
    c: float = 1e-3

    def __call__(self, nets: Nets, batch: dict[str, Any], key: Key) -> tuple[Float[Array, ""], dict[str, Array]]:
        draw, keys = self.draw(nets, batch, key), RandomKeys.of(key)
        n = len(draw.x0)
        first, second, third = jax.random.split(keys.time, 3)
        density = LogitNormal(mean=self.mean, std=self.std)
        one, two = density(first, n), density(second, n)
        t = jnp.maximum(one, two)
        r = jnp.where(jax.random.bernoulli(third, self.share, (n,)), jnp.minimum(one, two), t)
        x = add_noise(FLOW, draw.x0, draw.eps, t)
        x0, eps = self.trajectory_prediction(nets, draw, FLOW, x, t, keys)
        v = eps - x0

        def u(x: Image, t: Array) -> Image:
            return _velocity(self.student_on(nets, nets.student, draw, FLOW), x, t, r)

        mean, derivative = jax.jvp(u, (x, t), (v, jnp.ones_like(t)))
        target = frozen(v - expand(t - r, x) * derivative)
        square = jnp.sum((mean - target) ** 2, axis=(1, 2, 3))
        loss = jnp.mean(square / frozen(square + self.c) ** self.power)
        return loss, {"loss": loss, "error": jnp.mean(jnp.abs(mean - target))}


@dataclass(frozen=True, kw_only=True)
class Shortcut(Continuous):
    """Shortcut models (Frans et al. 2024, 2410.12557 eq. 5): one step of 2d goes where two steps of d go, d = 2^-k.

    A step of d is a share d of the way in the time of `schedule`, from a multiple of d to the next: these are the steps
    that "flow_map" takes. For `share` of the batch the mean velocity over 2d is that of two steps of d by the moving
    average. The rest learns the velocity at the start of the finest steps, d = 1 / `finest`, as their mean velocity.
    It trains from data with a guidance of 2, for which one caption in ten is dropped; see `Continuous` for a teacher.
    ValueError for a `finest` that is no power of two.

    >>> import jax
    >>> from lcm_jax.diffusion.schedules import RectifiedFlow
    >>> from lcm_jax.objectives import method, toy_batch, toy_nets
    >>> objective = method("shortcut", schedule=RectifiedFlow(), kind="flow")
    >>> loss, metrics = objective(toy_nets(), toy_batch(), jax.random.key(0))
    >>> bool(loss >= 0.0), objective.sampler
    (True, 'flow_map')
    """

    spans: ClassVar[bool] = True
    sampler: ClassVar[str] = "flow_map"

    velocity: Velocity = "data"
    w_min: float = 1.0
    w_max: float = 1.0
    embed_w: bool = False
    caption_dropout: float = 0.1
    share: float = 0.25
    finest: int = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.finest < 2 or self.finest & (self.finest - 1):
            raise ValueError(f"finest={self.finest} must be a power of two")

    @property
    def needs_target(self) -> bool:
        return True

    def steps(self, key: Key, n: int) -> tuple[Float[Array, " n"], Float[Array, " n"], Bool[Array, " n"]]:
        """Draw n steps: the share of the way at the start, the length, and whether two halves teach the step."""
        first, second, third = jax.random.split(key, 3)
        # a batch of one or two holds a pair as often as a larger one, on average
        pairs = jnp.arange(n) < jnp.floor(self.share * n + jax.random.uniform(first))
        levels = self.finest.bit_length() - 1
        level = jnp.where(pairs, jax.random.randint(second, (n,), 0, levels), levels)
        length = 2.0 ** -level.astype(jnp.float32)
        start = length * jnp.floor(1.0 + jax.random.uniform(third, (n,)) / length)
        return jnp.minimum(start, 1.0), length, pairs

    def __call__(self, nets: Nets, batch: dict[str, Any], key: Key) -> tuple[Float[Array, ""], dict[str, Array]]:
        draw, keys = self.draw(nets, batch, key), RandomKeys.of(key)
        start, length, pairs = self.steps(keys.time, len(draw.x0))
        stops = [round_to_timestep(self.schedule, self.at(start - part * length)) for part in (0.0, 0.5, 1.0)]
        t, middle, end = (FLOW.time_at(log_snr(self.schedule, stop)) for stop in stops)
        x = add_noise(FLOW, draw.x0, draw.eps, t)
        x0, eps = self.trajectory_prediction(nets, draw, FLOW, x, t, keys, end)
        slow = self.student_on(nets, nets.target, draw, FLOW)
        last = flow_map(slow, FLOW, flow_map(slow, FLOW, x, t, middle), middle, end)
        target = frozen(jnp.where(expand(pairs, x), (x - last) / expand(t - end, x), eps - x0))
        u = _velocity(self.student_on(nets, nets.student, draw, FLOW), x, t, end)
        per_example = jnp.mean((u - target) ** 2, axis=(1, 2, 3))
        loss = jnp.mean(per_example)
        return loss, {
            "loss": loss,
            "error": jnp.mean(jnp.abs(u - target)),
            "pairs": jnp.mean(jnp.where(pairs, per_example, 0.0)),
        }
