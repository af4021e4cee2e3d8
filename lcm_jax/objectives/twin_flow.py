"""TwinFlow: a network that is its own fake score, at negative times."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from lcm_jax.diffusion.parameterization import add_noise, expand
from lcm_jax.objectives.continuous import FLOW, Continuous, Velocity, velocity
from lcm_jax.objectives.few_step import Draw, RandomKeys
from lcm_jax.objectives.terms import frozen, without_caption
from lcm_jax.typing import Array, Image, Key, Nets, Params, Time

ONE_STEP, NEAR, ANY, FAKE = range(4)


@dataclass(frozen=True, kw_only=True)
class TwinFlow(Continuous):
    """TwinFlow (Cheng et al. 2025, 2512.05150): the mean velocity, matched to the data's by its own twin.

    The network u(x, t, s) is the flow's mean velocity, and at negative times, u(x, -t, -t), the velocity of its own
    pictures. A quarter of a batch each: the step from noise to the clean time, a short step, any step, and pictures
    drawn in one step, noised, from which the twin learns. Steps learn from a move of 0.01 along the velocity eps - x0
    and `order` steps of the moving average over the rest (recursive consistency, 2505.07447). Pictures of the first
    quarter also follow the difference of the twin's velocity and their own at a random time, with the weight
    `matching`. eps - x0 is sharpened by `enhance` (v(c) - v(null)) of the average. All differences are cut at 1, and
    the loss of an example is divided by its own root.

    >>> import jax
    >>> from lcm_jax.diffusion.schedules import RectifiedFlow
    >>> from lcm_jax.objectives import method, toy_batch, toy_nets
    >>> objective = method("twinflow", schedule=RectifiedFlow(), kind="flow")
    >>> loss, metrics = objective(toy_nets(), toy_batch(4), jax.random.key(0))
    >>> bool(loss >= 0.0), objective.sampler
    (True, 'flow_map')
    """

    spans: ClassVar[bool] = True
    sampler: ClassVar[str] = "flow_map"

    velocity: Velocity = "data"
    w_min: float = 0.0
    w_max: float = 0.0
    embed_w: bool = False
    order: int = 2
    enhance: float = 0.5
    matching: float = 0.5
    target_ema: float = 0.99
    c: float = 1e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.velocity != "data":
            raise ValueError(f"velocity={self.velocity!r}: TwinFlow learns from data alone, so leave it out")
        if self.order < 1:
            raise ValueError(f"order={self.order} must be positive")

    @property
    def needs_target(self) -> bool:
        return True

    @property
    def target_decay(self) -> Callable[[Array | float, Array | float], Array]:
        return lambda step, steps: jnp.float32(self.target_ema)

    def quarters(self, key: Key, n: int) -> Int[Array, " n"]:
        """Draw which part of the loss each of n examples has; a small batch has each as often as a large one."""
        return jnp.floor(4.0 * (jnp.arange(n) + jax.random.uniform(key)) / n).astype(jnp.int32) % 4

    def u(self, nets: Nets, params: Params, draw: Draw, x: Image, t: Time, s: Time, sign: Array | float = 1.0) -> Image:
        """Return the mean velocity from t to s; where `sign` is -1 the network is told -t."""

        def signed_apply(params: Params, x: Image, time: Time, cond: Any) -> Image:
            return nets.apply(params, x, jnp.broadcast_to(sign * time, x.shape[:1]), cond)

        return velocity(self.student_on(nets._replace(apply=signed_apply), params, draw, FLOW), x, t, s)

    def size(self, difference: Image) -> Float[Array, " b"]:
        """Return each example's mean square divided by its own root."""
        square = jnp.mean(difference**2, axis=(1, 2, 3))
        return square / jnp.sqrt(frozen(square) + self.c**2)

    def __call__(self, nets: Nets, batch: dict[str, Any], key: Key) -> tuple[Float[Array, ""], dict[str, Array]]:
        draw, keys = self.draw(nets, batch, key), RandomKeys.of(key)
        n, still = len(draw.x0), frozen(nets.student)
        part = self.quarters(keys.end, n)
        first, second, third = jax.random.split(keys.time, 3)
        one, zero = jnp.ones(n), jnp.zeros(n)
        t = jnp.where(part == ONE_STEP, 1.0, jax.random.uniform(first, (n,), minval=1e-3))
        length = t * jax.random.uniform(second, (n,)) * jnp.where(part == NEAR, 0.05, 1.0)
        s = jnp.select([part == ONE_STEP, part == FAKE], [zero, t], t - length)
        fake, sign = expand(part == FAKE, draw.x0), jnp.where(part == FAKE, -1.0, 1.0)
        noise, again = jax.random.normal(keys.student, (2, *draw.x0.shape))
        drawn = frozen(noise - self.u(nets, still, draw, noise, one, zero))
        x0 = jnp.where(fake, drawn, draw.x0)
        x, v = add_noise(FLOW, x0, draw.eps, t), draw.eps - x0
        if self.enhance:
            empty = draw._replace(student_cond=without_caption(nets.null, draw.student_cond))
            sharper = self.u(nets, nets.target, draw, x, t, t) - self.u(nets, nets.target, empty, x, t, t)
            v = v + jnp.where(fake, 0.0, self.enhance * sharper)
        v = frozen(v)
        mean = self.u(nets, nets.student, draw, x, t, s, sign)
        target = jnp.where(fake, v, self.recursive(nets, draw, frozen(mean), v, x, t, s))
        weight = jnp.where(part == FAKE, 1.0, jnp.tan((1.0 - (t - s)) * jnp.pi / 2.5) + 1.0)
        loss = jnp.mean(weight * self.size(mean - frozen(target)))
        later = jax.random.uniform(third, (n,), minval=1e-3)
        picture = add_noise(FLOW, frozen(x - expand(t - s, x) * mean), again, later)
        network_velocity, twin = (self.u(nets, still, draw, picture, later, later, side) for side in (1.0, -1.0))
        gap = frozen(jnp.clip(twin - network_velocity, -1.0, 1.0))
        steps = jnp.where(part == ONE_STEP, self.size(mean - frozen(mean - gap)), 0.0)
        matching = jnp.sum(steps) / jnp.maximum(jnp.sum(part == ONE_STEP), 1)
        total = loss + self.matching * matching
        return total, {"loss": total, "steps": loss, "matching": matching, "error": jnp.mean(jnp.abs(mean - target))}

    def recursive(self, nets: Nets, draw: Draw, mean: Image, v: Image, x: Image, t: Array, s: Array) -> Image:
        """Return the aim of u(x, t, s): a move of 0.01 along v, then the average's steps to s, as a mean velocity."""
        near = jnp.maximum(t - 0.01, s)
        z, travelled = x - 0.01 * v, jnp.zeros_like(x)
        for i in range(self.order):
            a, b = (near + (s - near) * (j / self.order) for j in (i, i + 1))
            step = expand(a - b, x) * self.u(nets, nets.target, draw, z, a, b)
            z, travelled = z - step, travelled + step
        length = expand(t - s, x)
        short = length < 0.01
        error = jnp.where(short, mean, 100.0 * (length * mean - travelled)) - v
        return mean - jnp.clip(error, -1.0, 1.0)
