"""Rules for the pairs of times t > s between which consistency is trained: they are how CM, iCT and ECT differ.

Karras et al.'s noise level is sigma / alpha, so their grids fit any schedule; the lowest level counts as clean. The
published levels are for data of a standard deviation of 0.5 and move with the data's, `sigma_data`. What changes in
training does so with `progress`, the share of the run that is done, whatever its length.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lcm_jax.diffusion.schedules import log_snr
from lcm_jax.typing import Key, Schedule, Time

Pair = tuple[Float[Array, " n"], Float[Array, " n"]]


@runtime_checkable
class Pairs(Protocol):
    """A function (schedule, key, n, progress) -> (t, s) of n examples."""

    def __call__(self, schedule: Schedule, key: Key, n: int, progress: Array | float) -> Pair: ...


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


@dataclass(frozen=True, kw_only=True)
class Levels:
    """The range of noise levels from `low` to `high`, and Karras' grid in it (2206.00364 eq. 5) of exponent `rho`.

    low, high and the levels of a log-normal are those for data of a standard deviation of 0.5; sigma_data is the
    data's own. Scaled latents have 1.
    """

    low: float = 0.002
    high: float = 80.0
    rho: float = 7.0
    sigma_data: float = 1.0

    @property
    def unit(self) -> float:
        """The factor of all published levels."""
        return self.sigma_data / 0.5

    def bounds(self, schedule: Schedule) -> tuple[Array, Array]:
        """Return the lowest and the highest level that the schedule has.

        A table begins at timestep 1, as a consistency function is the identity up to timestep 0, and may end before 80.
        """
        top = jnp.minimum(self.high * self.unit, level(schedule, jnp.float32(schedule.t_max)))
        first = 0.0 if schedule.timesteps is None else level(schedule, jnp.float32(1.0))
        return jnp.maximum(self.low * self.unit, first), top

    def neighbours(self, schedule: Schedule, index: Array, points: Array | int) -> Pair:
        """Return the times of levels number index + 1 and index of `points`."""
        return self.time(schedule, index + 1, points), self.time(schedule, index, points)

    def time(self, schedule: Schedule, index: Array, points: Array | int) -> Float[Array, " n"]:
        """Return the time of level number `index` of `points`; number 0 is the clean time."""
        low, high = (x ** (1 / self.rho) for x in self.bounds(schedule))
        at = (low + index / (points - 1) * (high - low)) ** self.rho
        return at_level(schedule, jnp.where(index == 0, 0.0, at))

    def index(self, schedule: Schedule, t: Float[Array, " n"], points: Array | int) -> Int[Array, " n"]:
        """Return the number of the level at a time of the grid: the inverse of `time`."""
        low, high = (x ** (1 / self.rho) for x in self.bounds(schedule))
        root = level(schedule, t) ** (1 / self.rho)
        return jnp.round(jnp.maximum(root - low, 0.0) / (high - low) * (points - 1)).astype(jnp.int32)


@dataclass(frozen=True, kw_only=True)
class KarrasPairs(Levels):
    """Neighbours on Karras' grid of `points` noise levels, drawn uniformly: those of CD.

    CM (2303.01469) has 18 points for CIFAR, and 40 for ImageNet. ValueError for fewer than two points.

    >>> import jax
    >>> from lcm_jax.diffusion.schedules import DDPM
    >>> from lcm_jax.objectives import KarrasPairs
    >>> t, s = KarrasPairs()(DDPM(), jax.random.key(0), 8, 0.0)
    >>> bool((t > s).all())
    True
    """

    points: int = 18

    def __post_init__(self) -> None:
        if self.points < 2:
            raise ValueError(f"points={self.points}: a grid needs at least 2")

    def __call__(self, schedule: Schedule, key: Key, n: int, progress: Array | float) -> Pair:
        return self.neighbours(schedule, jax.random.randint(key, (n,), 0, self.points - 1), self.points)


@dataclass(frozen=True, kw_only=True)
class CTPairs(Levels):
    """Neighbours on a grid of Karras that grows from `first` to `last` + 1 points, drawn uniformly: those of CT.

    CM (2303.01469) app. C: N(k) = ceil(sqrt(k / K ((s_1 + 1)^2 - s_0^2) + s_0^2) - 1) + 1 with s_0 = first, s_1 = last
    and k / K the progress. The decay of the average that gives the target is mu(k) = exp(s_0 log mu_0 / N(k)), with
    mu_0 = `decay`. ValueError unless 2 <= first <= last.

    >>> import jax
    >>> from lcm_jax.diffusion.schedules import DDPM
    >>> from lcm_jax.objectives import CTPairs
    >>> pairs = CTPairs()
    >>> float(pairs.points(0.0)), float(pairs.points(1.0)), round(float(pairs.target_decay(0.0)), 6)
    (2.0, 151.0, 0.9)
    >>> t, s = pairs(DDPM(), jax.random.key(0), 8, 0.5)
    >>> bool((t > s).all())
    True
    """

    first: int = 2
    last: int = 150
    decay: float = 0.9

    def __post_init__(self) -> None:
        if not 2 <= self.first <= self.last:
            raise ValueError(f"first={self.first} and last={self.last} must be in order and at least 2")

    def points(self, progress: Array | float) -> Float[Array, ""]:
        """Return N."""
        square = progress * ((self.last + 1.0) ** 2 - self.first**2) + self.first**2
        return jnp.ceil(jnp.sqrt(jnp.float32(square)) - 1.0 - 1e-4) + 1.0  # the root of a square may be rounded up

    def target_decay(self, progress: Array | float) -> Float[Array, ""]:
        """Return mu."""
        return jnp.exp(self.first * jnp.log(self.decay) / self.points(progress))

    def __call__(self, schedule: Schedule, key: Key, n: int, progress: Array | float) -> Pair:
        points = self.points(progress)
        index = jnp.floor(jax.random.uniform(key, (n,)) * (points - 1.0))
        return self.neighbours(schedule, jnp.minimum(index, points - 2.0), points)


@dataclass(frozen=True, kw_only=True)
class ICTPairs(Levels):
    """Neighbours on a grid that doubles from `first` to `last` points, at log-normal levels: those of iCT.

    Song & Dhariwal 2023 (2310.14189) sec. 3.4, 3.5: N(k) = min(first 2^floor(k / K'), last) + 1 with
    K' = K / (log2(last / first) + 1) and k / K the progress; the pair's lower neighbour is the one below
    log level ~ N(mean, std^2). ValueError unless 1 <= first <= last.

    >>> import jax
    >>> from lcm_jax.diffusion.schedules import DDPM
    >>> from lcm_jax.objectives import ICTPairs
    >>> t, s = ICTPairs()(DDPM(), jax.random.key(0), 8, 0.0)
    >>> bool((t > s).all()), float(ICTPairs().points(0.0)), float(ICTPairs().points(0.999))
    (True, 11.0, 1281.0)
    """

    first: int = 10
    last: int = 1280
    mean: float = -1.1
    std: float = 2.0

    def __post_init__(self) -> None:
        if not 1 <= self.first <= self.last:
            raise ValueError(f"first={self.first} and last={self.last} must be in order and at least 1")

    def points(self, progress: Array | float) -> Float[Array, ""]:
        """Return N."""
        stage = jnp.floor(jnp.float32(progress) * (jnp.log2(self.last / self.first) + 1.0))
        return jnp.minimum(self.first * 2.0**stage, self.last) + 1.0

    def __call__(self, schedule: Schedule, key: Key, n: int, progress: Array | float) -> Pair:
        (low, high), points = self.bounds(schedule), self.points(progress)
        mean = self.mean + jnp.log(self.unit)
        ends = (jnp.log(jnp.stack([low, high])) - mean) / self.std
        drawn = jnp.exp(mean + self.std * jax.random.truncated_normal(key, ends[0], ends[1], (n,)))
        root, bottom, top = (x ** (1 / self.rho) for x in (drawn, low, high))
        index = jnp.clip(jnp.floor((points - 1) * (root - bottom) / (top - bottom)), 0, points - 2)
        return self.neighbours(schedule, index, points)


@dataclass(frozen=True, kw_only=True)
class ECTPairs(Levels):
    """A level drawn from a log-normal and one below it, whose distance shrinks by stages (ECT, 2406.14548 eq. 17):

    r = t max(0, 1 - (1 + k sigmoid(-b t)) / q^(1 + stage)), stage = floor(progress * stages), from diffusion (r = 0)
    to consistency. mean and std are those of ImageNet; CIFAR has -1.1 and 2.

    >>> import jax
    >>> from lcm_jax.diffusion.schedules import DDPM
    >>> from lcm_jax.objectives import ECTPairs
    >>> t, s = ECTPairs()(DDPM(), jax.random.key(0), 8, 0.0)
    >>> bool((t > s).all())
    True
    """

    mean: float = -0.8
    std: float = 1.6
    q: float = 2.0
    k: float = 8.0
    b: float = 1.0
    stages: int = 8

    def stage(self, progress: Array | float) -> Float[Array, ""]:
        """Return the number of the stage, from 0."""
        return jnp.minimum(jnp.floor(jnp.float32(progress) * self.stages), self.stages - 1.0)

    def __call__(self, schedule: Schedule, key: Key, n: int, progress: Array | float) -> Pair:
        low, high = self.bounds(schedule)
        mean = self.mean + jnp.log(self.unit)
        ends = (jnp.log(jnp.stack([low, high])) - mean) / self.std
        drawn = jnp.exp(mean + self.std * jax.random.truncated_normal(key, ends[0], ends[1], (n,)))
        gap = (1.0 + self.k * jax.nn.sigmoid(-self.b * drawn / self.unit)) / self.q ** (1.0 + self.stage(progress))
        return at_level(schedule, drawn), at_level(schedule, drawn * jnp.maximum(0.0, 1.0 - gap))
