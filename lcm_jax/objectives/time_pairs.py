"""Rules for the pairs of times t > s between which consistency is trained: they are how CM, iCT and ECT differ.

Karras et al.'s noise level is sigma / alpha, so their grids fit any schedule; the lowest level counts as clean.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lcm_jax.diffusion.schedules import log_snr
from lcm_jax.typing import Key, Schedule, Time

Pair = tuple[Float[Array, " n"], Float[Array, " n"]]


@runtime_checkable
class Pairs(Protocol):
    """A function (schedule, key, n, step) -> (t, s) of n examples at a training step."""

    def __call__(self, schedule: Schedule, key: Key, n: int, step: Array | float) -> Pair: ...


def level(schedule: Schedule, t: Time) -> Float[Array, "*b"]:
    """Return the noise level sigma / alpha at a time.

    >>> from lcm_jax.diffusion.schedules import RectifiedFlow
    >>> from lcm_jax.objectives.time_pairs import level
    >>> round(float(level(RectifiedFlow(), 0.75)), 6)
    3.0
    """
    return jnp.exp(-log_snr(schedule, t))


def at_level(schedule: Schedule, level: Float[Array, "*b"]) -> Float[Array, "*b"]:
    """Return the time of a noise level; 0 gives the clean time.

    >>> import jax.numpy as jnp
    >>> from lcm_jax.diffusion.schedules import RectifiedFlow
    >>> from lcm_jax.objectives.time_pairs import at_level
    >>> at_level(RectifiedFlow(), jnp.array([3.0, 0.0])).round(6).tolist()
    [0.75, 0.0]
    """
    return schedule.time_at(-jnp.log(level))


def _highest(schedule: Schedule, high: float) -> Float[Array, ""]:
    """Return the highest level that the schedule has, at most `high`: a table ends before Karras' 80."""
    return jnp.minimum(high, level(schedule, jnp.float32(schedule.t_max)))


def _karras(index: Array, points: Array | int, low: float, high: Array, rho: float) -> Array:
    """Return level number `index` of `points`, from 0 (in place of `low`) to `high` at points - 1."""
    share = index / (points - 1)
    levels = (low ** (1 / rho) + share * (high ** (1 / rho) - low ** (1 / rho))) ** rho
    return jnp.where(index == 0, 0.0, levels)


@dataclass(frozen=True, kw_only=True)
class KarrasPairs:
    """Neighbours on Karras' grid (2206.00364 eq. 5) of `points` noise levels, drawn uniformly.

    CM (2303.01469) has 18 points up to a level of 80. ValueError for fewer than two points.

    >>> import jax
    >>> from lcm_jax.diffusion.schedules import DDPM
    >>> from lcm_jax.objectives import KarrasPairs
    >>> t, s = KarrasPairs()(DDPM(), jax.random.key(0), 8, 0)
    >>> bool((t > s).all())
    True
    """

    points: int = 18
    low: float = 0.002
    high: float = 80.0
    rho: float = 7.0

    def __post_init__(self) -> None:
        if self.points < 2:
            raise ValueError(f"points={self.points}: a grid needs at least 2")

    def __call__(self, schedule: Schedule, key: Key, n: int, step: Array | float) -> Pair:
        index = jax.random.randint(key, (n,), 1, self.points)
        high = _highest(schedule, self.high)
        t, s = (at_level(schedule, _karras(i, self.points, self.low, high, self.rho)) for i in (index, index - 1))
        return t, s


@dataclass(frozen=True, kw_only=True)
class ICTPairs:
    """Neighbours on a grid that doubles from `first` to `last` points over `steps`, at log-normal levels (iCT).

    Song & Dhariwal 2023 (2310.14189) sec. 3.4, 3.5: N(k) = min(first 2^floor(k / K'), last) + 1 with
    K' = steps / (log2(last / first) + 1); the pair's lower neighbour is the one below log level ~ N(mean, std^2).
    ValueError unless 1 <= first <= last.

    >>> import jax
    >>> from lcm_jax.diffusion.schedules import DDPM
    >>> from lcm_jax.objectives import ICTPairs
    >>> t, s = ICTPairs()(DDPM(), jax.random.key(0), 8, 0)
    >>> bool((t > s).all())
    True
    """

    first: int = 10
    last: int = 1280
    steps: int = 400_000
    mean: float = -1.1
    std: float = 2.0
    low: float = 0.002
    high: float = 80.0
    rho: float = 7.0

    def __post_init__(self) -> None:
        if not 1 <= self.first <= self.last:
            raise ValueError(f"first={self.first} and last={self.last} must be in order and at least 1")

    def points(self, step: Array | float) -> Float[Array, ""]:
        """Return N at a training step."""
        doublings = jnp.log2(self.last / self.first)
        stage = jnp.floor(step / (self.steps / (doublings + 1.0)))
        return jnp.minimum(self.first * 2.0**stage, self.last) + 1.0

    def __call__(self, schedule: Schedule, key: Key, n: int, step: Array | float) -> Pair:
        high, points = _highest(schedule, self.high), self.points(step)
        ends = (jnp.log(jnp.array([self.low, high])) - self.mean) / self.std
        drawn = jnp.exp(self.mean + self.std * jax.random.truncated_normal(key, ends[0], ends[1], (n,)))
        root, bottom, top = (x ** (1 / self.rho) for x in (drawn, self.low, high))
        index = jnp.clip(jnp.floor((points - 1) * (root - bottom) / (top - bottom)), 0, points - 2)
        t, s = (at_level(schedule, _karras(i, points, self.low, high, self.rho)) for i in (index + 1, index))
        return t, s


@dataclass(frozen=True, kw_only=True)
class ECTPairs:
    """A level drawn from a log-normal and one below it, whose distance shrinks by stages (ECT, 2406.14548 eq. 17):

    r = t max(0, 1 - (1 + k sigmoid(-b t)) / q^(1 + stage)), stage = floor(step / stage_steps), from diffusion (r = 0)
    to consistency.

    >>> import jax
    >>> from lcm_jax.diffusion.schedules import DDPM
    >>> from lcm_jax.objectives import ECTPairs
    >>> t, s = ECTPairs()(DDPM(), jax.random.key(0), 8, 0)
    >>> bool((t >= s).all())
    True
    """

    mean: float = -1.1
    std: float = 2.0
    q: float = 2.0
    k: float = 8.0
    b: float = 1.0
    stage_steps: int = 10_000
    stages: int = 8
    low: float = 0.002
    high: float = 80.0

    def __call__(self, schedule: Schedule, key: Key, n: int, step: Array | float) -> Pair:
        drawn = jnp.exp(self.mean + self.std * jax.random.normal(key, (n,)))
        drawn = jnp.clip(drawn, self.low, _highest(schedule, self.high))
        stage = jnp.minimum(jnp.floor(step / self.stage_steps), self.stages - 1)
        below = drawn * jnp.maximum(0.0, 1.0 - (1.0 + self.k * jax.nn.sigmoid(-self.b * drawn)) / self.q ** (1 + stage))
        return at_level(schedule, drawn), at_level(schedule, below)
