"""Objectives whose network is the mean velocity from one time to another: MeanFlow and its followers, Shortcut, AYF.

On the flow x_t = (1 - t) x0 + t eps the mean velocity u(x, t, s) takes x from t to s: x - (t - s) u, which is
`flow_map`. Networks with a span embedding are it, whatever their kind and schedule. The sampler is "flow_map".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float

from lcm_jax.diffusion.parameterization import add_noise, expand, flow_map
from lcm_jax.diffusion.schedules import log_snr, round_to_timestep
from lcm_jax.objectives.continuous import FLOW, Continuous, Velocity, velocity
from lcm_jax.objectives.few_step import RandomKeys
from lcm_jax.objectives.terms import check_choice, frozen, jvp, without_caption
from lcm_jax.objectives.time_densities import LogitNormal
from lcm_jax.typing import Array, Cond, Image, Key, Nets, Params

Derivative = Literal["eulerian", "lagrangian"]


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

    def times(self, key: Key, n: int) -> tuple[Float[Array, " n"], Float[Array, " n"]]:
        """Draw (t, r) of n examples."""
        first, second, third = jax.random.split(key, 3)
        density = LogitNormal(mean=self.mean, std=self.std)
        one, two = density(first, n), density(second, n)
        t = jnp.maximum(one, two)
        return t, jnp.where(jax.random.bernoulli(third, self.share, (n,)), jnp.minimum(one, two), t)

    def __call__(self, nets: Nets, batch: dict[str, Any], key: Key) -> tuple[Float[Array, ""], dict[str, Array]]:
        draw, keys = self.draw(nets, batch, key), RandomKeys.of(key)
        t, r = self.times(keys.time, len(draw.x0))
        x = add_noise(FLOW, draw.x0, draw.eps, t)
        x0, eps = self.trajectory_prediction(nets, draw, FLOW, x, t, keys)
        v = eps - x0

        def u(x: Image, t: Array) -> Image:
            return velocity(self.student_on(nets, nets.student, draw, FLOW), x, t, r)

        mean, derivative = jvp(u, (x, t), (v, jnp.ones_like(t)))
        return self.compare(mean, frozen(v - expand(t - r, x) * derivative))

    def compare(
        self, value: Image, target: Image, weight: Float[Array, " b"] | float = 1.0
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        """Return the loss of a value, weighted by its own size, and its metrics."""
        square = jnp.sum((value - target) ** 2, axis=(1, 2, 3))
        loss = jnp.mean(weight * square / frozen(square + self.c) ** self.power)
        return loss, {"loss": loss, "error": jnp.mean(jnp.abs(value - target))}


@dataclass(frozen=True, kw_only=True)
class ImprovedMeanFlow(MeanFlow):
    """iMF (Geng et al. 2025, 2512.02012): MeanFlow as a regression of the velocity, with guidance as an input.

    The compound V = u + (t - r) sg[jvp(u; (v, 0, 1))] learns v_g = eps - x0 + (1 - 1 / omega) (v(c) - v(null)), where v
    is the student's own velocity u(x, t, t), which is also the tangent: the network's input is all it depends on. The
    scale omega = 1 + w is log-uniform in [1 + w_min, 1 + w_max], and guides within an interval of times whose ends are
    uniform in [0, 1/2] and [1/2, 1]; scale and interval are inputs, cond["guidance"] = (w, start, end). A dropped
    caption has no guidance. The released code's second head for v is the network itself here, at r = t.

    >>> import jax
    >>> from lcm_jax.diffusion.schedules import RectifiedFlow
    >>> from lcm_jax.objectives import method, toy_batch, toy_nets
    >>> objective = method("imf", schedule=RectifiedFlow(), kind="flow")
    >>> loss, metrics = objective(toy_nets(), toy_batch(), jax.random.key(0))
    >>> bool(loss >= 0.0), objective.sampler
    (True, 'flow_map')
    """

    w_min: float = 0.0
    w_max: float = 7.0
    embed_w: bool = True
    share: float = 0.5
    c: float = 1e-2

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.velocity != "data":
            raise ValueError(f"velocity={self.velocity!r}: improved MeanFlow learns from data alone, so leave it out")

    def guidance(self, key: Key, n: int) -> Float[Array, " n"]:
        """Draw w, log-uniform as 1 + w."""
        low, high = jnp.log1p(self.w_min), jnp.log1p(self.w_max)
        return jnp.expm1(low + jax.random.uniform(key, (n,)) * (high - low))

    def interval(self, key: Key, t: Float[Array, " b"], r: Float[Array, " b"]) -> tuple[Array, Array]:
        """Draw the interval in which the student is guided; that of an instant is whole."""
        start, end = 0.5 * jax.random.uniform(key, (2, len(t)))
        instant = r == t
        return jnp.where(instant, 0.0, start), jnp.where(instant, 1.0, 0.5 + end)

    def __call__(self, nets: Nets, batch: dict[str, Any], key: Key) -> tuple[Float[Array, ""], dict[str, Array]]:
        draw, keys = self.draw(nets, batch, key), RandomKeys.of(key)
        t, r = self.times(keys.time, len(draw.x0))
        start, end = self.interval(keys.end, t, r)
        x = add_noise(FLOW, draw.x0, draw.eps, t)
        w = jnp.where((start <= t) & (t <= end), draw.w, 0.0)
        whole_interval = (jnp.zeros_like(t), jnp.ones_like(t))

        def guided_cond(cond: Cond, w: Array, start: Array, end: Array) -> Cond:
            return {**cond, "guidance": jnp.stack([w, start, end], axis=1)} if self.embed_w else cond

        def instant(cond: Cond, w: Array) -> Image:
            there = draw._replace(student_cond=guided_cond(cond, w, *whole_interval))
            return frozen(velocity(self.student_on(nets, frozen(nets.student), there, FLOW), x, t))

        conditional = instant(draw.cond, w)
        without = instant(without_caption(nets.null, draw.cond), jnp.zeros_like(w))
        strength = jnp.where(self.dropped(keys, len(t)), 0.0, w / (1.0 + w))
        target = draw.eps - draw.x0 + expand(strength, x) * (conditional - without)
        guided = draw._replace(student_cond=guided_cond(draw.cond, draw.w, start, end))

        def u(x: Image, t: Array) -> Image:
            return velocity(self.student_on(nets, nets.student, guided, FLOW), x, t, r)

        mean, derivative = jvp(u, (x, t), (conditional, jnp.ones_like(t)))
        return self.compare(mean + expand(t - r, x) * frozen(derivative), target)


@dataclass(frozen=True, kw_only=True)
class AlphaFlow(MeanFlow):
    """alpha-Flow (Zhang et al. 2025, 2510.20771): from flow matching through Shortcut to MeanFlow, without derivatives.

    The target is a v + (1 - a) u^-(x_s, s, r) with s = t - a (t - r) and x_s = x - a (t - r) v, of the student without
    gradient. With a = 1 it is flow matching's, with a = 1/2 a shortcut's, and for a -> 0 the loss's gradient is that of
    MeanFlow. a falls from 1 to `last` along a sigmoid of the run's progress, of steepness `gamma`. Steps of a length
    have the weight a, instants (r = t) 1. The published curriculum ends in MeanFlow's own derivative; this one ends at
    a = `last`, so that flash attention and adapters serve to the end.

    >>> import jax
    >>> from lcm_jax.diffusion.schedules import RectifiedFlow
    >>> from lcm_jax.objectives import method, toy_batch, toy_nets
    >>> objective = method("alphaflow", schedule=RectifiedFlow(), kind="flow")
    >>> loss, metrics = objective(toy_nets(), toy_batch(), jax.random.key(0))
    >>> bool(loss >= 0.0), [round(float(objective.alpha(p)), 3) for p in (0.0, 0.5, 1.0)]
    (True, [1.0, 0.5, 0.005])
    """

    share: float = 0.5
    gamma: float = 25.0
    last: float = 0.005

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 < self.last <= 1.0:
            raise ValueError(f"last={self.last} must be above 0 and at most 1")

    def alpha(self, progress: Array | float) -> Float[Array, ""]:
        """Return a."""
        fallen = jax.nn.sigmoid(-self.gamma * (jnp.float32(progress) - 0.5))
        return jnp.where(fallen > 1.0 - 0.005, 1.0, jnp.maximum(fallen, self.last))

    def __call__(self, nets: Nets, batch: dict[str, Any], key: Key) -> tuple[Float[Array, ""], dict[str, Array]]:
        draw, keys = self.draw(nets, batch, key), RandomKeys.of(key)
        t, r = self.times(keys.time, len(draw.x0))
        x = add_noise(FLOW, draw.x0, draw.eps, t)
        x0, eps = self.trajectory_prediction(nets, draw, FLOW, x, t, keys)
        v, a = eps - x0, self.alpha(nets.progress)
        s = t - a * (t - r)
        still = self.student_on(nets, frozen(nets.student), draw, FLOW)
        following = frozen(velocity(still, x - expand(t - s, x) * v, s, r))
        instant = expand(r == t, x)
        target = frozen(jnp.where(instant, v, a * v + (1.0 - a) * following))
        u = velocity(self.student_on(nets, nets.student, draw, FLOW), x, t, r)
        return self.compare(u, target, jnp.where(r == t, 1.0, a))


@dataclass(frozen=True, kw_only=True)
class AlignYourFlow(Continuous):
    """AYF (Sabour et al. 2025, 2506.14603, Alg. 1): the teacher's flow map, by its derivative at one of its ends.

    Of the map f(x, t, s) = x + (s - t) F(x, t, s), "eulerian" moves the start along the teacher's trajectory, which
    leaves f as it is: g = F^- - v(x, t) + r (t - s) dF^-/dt, by one forward-mode product with the tangent (v, 1, 0).
    "lagrangian" moves the end, where f follows the teacher: g = F^- - v(f, s) - r (t - s) dF^-/ds. F learns
    F^- - g / (|g| + c), where |g| is the root mean square. t - s is logit-normal (mean, std), s uniform in what is
    left. r rises to `largest` over `warmup` steps, at most over a quarter of the run.

    >>> import jax
    >>> from lcm_jax.diffusion.schedules import RectifiedFlow
    >>> from lcm_jax.objectives import method, toy_batch, toy_nets
    >>> objective = method("ayf", schedule=RectifiedFlow(), kind="flow")
    >>> loss, metrics = objective(toy_nets(), toy_batch(), jax.random.key(0))
    >>> bool(loss >= 0.0), objective.sampler
    (True, 'flow_map')
    """

    spans: ClassVar[bool] = True
    sampler: ClassVar[str] = "flow_map"

    derivative: Derivative = "eulerian"
    mean: float = -0.8
    std: float = 1.0
    warmup: int = 10_000
    largest: float = 0.99
    c: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("derivative", self.derivative, Derivative)

    def times(self, key: Key, n: int) -> tuple[Float[Array, " n"], Float[Array, " n"]]:
        """Draw (t, s) of n examples."""
        first, second = jax.random.split(key)
        length = LogitNormal(mean=self.mean, std=self.std)(first, n)
        s = jax.random.uniform(second, (n,)) * (1.0 - length)
        return s + length, s

    def tangent_weight(self, step: Array | float, steps: Array | float) -> Float[Array, ""]:
        """Return r."""
        done = (jnp.float32(step) + 1.0) / jnp.minimum(self.warmup, 0.25 * jnp.float32(steps))
        return jnp.minimum(self.largest, done)

    def __call__(self, nets: Nets, batch: dict[str, Any], key: Key) -> tuple[Float[Array, ""], dict[str, Array]]:
        draw, keys = self.draw(nets, batch, key), RandomKeys.of(key)
        t, s = self.times(keys.time, len(draw.x0))
        x = add_noise(FLOW, draw.x0, draw.eps, t)
        r = self.tangent_weight(nets.step, nets.steps)

        def F(params: Params, x: Image, t: Array, s: Array) -> Image:
            return velocity(self.student_on(nets, params, draw, FLOW), x, t, s)

        def v(x: Image, t: Array) -> Image:
            x0, eps = self.trajectory_prediction(nets, draw, FLOW, x, t, keys)
            return eps - x0

        still, one, zero = frozen(nets.student), jnp.ones_like(t), jnp.zeros_like(t)
        if self.derivative == "eulerian":
            follow = v(x, t)
            before, slope = jvp(lambda *at: F(still, *at), (x, t, s), (follow, one, zero))
            g = before - follow + r * expand(t - s, x) * slope
        else:
            before, slope = jvp(lambda *at: F(still, *at), (x, t, s), (jnp.zeros_like(x), zero, one))
            g = before - v(x - expand(t - s, x) * before, s) - r * expand(t - s, x) * slope
        rms = jnp.sqrt(jnp.mean(g**2, axis=(1, 2, 3), keepdims=True))
        target = frozen(before - g / (rms + self.c))
        loss = jnp.mean((F(nets.student, x, t, s) - target) ** 2)
        return loss, {"loss": loss, "error": jnp.mean(rms)}


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
        u = velocity(self.student_on(nets, nets.student, draw, FLOW), x, t, end)
        per_example = jnp.mean((u - target) ** 2, axis=(1, 2, 3))
        loss = jnp.mean(per_example)
        return loss, {
            "loss": loss,
            "error": jnp.mean(jnp.abs(u - target)),
            "pairs": jnp.mean(jnp.where(pairs, per_example, 0.0)),
        }
