"""Densities of the training times: how often each time of the path from data (t = 0) to noise (t = 1) is trained.

SD3 (Esser et al. 2024, arXiv:2403.03206, section 3.1) compares these. Each is given by its quantile function, the time
below which a share u lies, so that t = quantile(u) of a uniform u has the density pdf(t).

t = 1 is noise, as in the whole library, so a positive mean of the logit-normal favours noise. Trainers on diffusers
draw u and take the timestep numbered u T of a scheduler whose list begins at noise, so that their time is 1 - u and
their `logit_mean` has the opposite sign.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from math import pi

import jax
import jax.numpy as jnp
from jax.scipy.special import logit, ndtri
from jax.scipy.stats import norm
from jaxtyping import Array, Float

from lcm_jax.typing import Key, Schedule

Times = Callable[[Key, int], Float[Array, " n"]]  # (key, n) -> times of the schedule
TINY = 2.0**-24


@dataclass(frozen=True, kw_only=True)
class TimeDensity(ABC):
    """A density pi(t) on [0, 1], the time of a rectified flow or of the cosine schedule, by t = quantile(u)."""

    @abstractmethod
    def quantile(self, u: Float[Array, "*n"]) -> Float[Array, "*n"]:
        """Return the time below which a share u in (0, 1) of the draws lies; it rises with u."""

    @abstractmethod
    def pdf(self, t: Float[Array, "*n"]) -> Float[Array, "*n"]:
        """Return the density at t in (0, 1); it integrates to 1."""

    def __call__(self, key: Key, n: int) -> Float[Array, " n"]:
        """Draw n independent times."""
        return self.quantile(jax.random.uniform(key, (n,), minval=TINY))


@dataclass(frozen=True, kw_only=True)
class Uniform(TimeDensity):
    """The uniform density pi(t) = 1.

    >>> import jax
    >>> from lcm_jax.objectives import Uniform
    >>> times = Uniform()(jax.random.key(0), 1000)
    >>> round(float(Uniform().quantile(jax.numpy.float32(0.5))), 3)
    0.5
    """

    def quantile(self, u: Float[Array, "*n"]) -> Float[Array, "*n"]:
        return jnp.asarray(u, jnp.float32)

    def pdf(self, t: Float[Array, "*n"]) -> Float[Array, "*n"]:
        return jnp.ones_like(t)


@dataclass(frozen=True, kw_only=True)
class LogitNormal(TimeDensity):
    """The logit-normal density, logit t ~ N(mean, std^2) (eq. 19), which favours the middle, the hardest to predict.

    ValueError for a std that is not positive.

    >>> import jax
    >>> from lcm_jax.objectives import LogitNormal
    >>> times = LogitNormal()(jax.random.key(0), 1000)
    >>> round(float(LogitNormal().quantile(jax.numpy.float32(0.5))), 3)
    0.5
    """

    mean: float = 0.0
    std: float = 1.0

    def __post_init__(self) -> None:
        if not self.std > 0.0:
            raise ValueError(f"std is {self.std}: the logit-normal density needs a positive one")

    def quantile(self, u: Float[Array, "*n"]) -> Float[Array, "*n"]:
        return jax.nn.sigmoid(self.mean + self.std * ndtri(jnp.asarray(u, jnp.float32)))

    def pdf(self, t: Float[Array, "*n"]) -> Float[Array, "*n"]:
        t = jnp.clip(t, TINY, 1.0 - TINY)  # 0 at the ends, and not 0 / 0
        return norm.pdf(logit(t), self.mean, self.std) / (t * (1.0 - t))


MODE_SCALES = (-1.0, 2.0 / (pi - 2.0))
"""The scales between which `Mode` is monotone; at the first its density is infinite at 0 and 1, at the last at 1/2."""


@dataclass(frozen=True, kw_only=True)
class Mode(TimeDensity):
    """The mode density: t = 1 - v - s (cos^2(pi v / 2) - 1 + v), v uniform (eq. 20).

    s = scale in [-1, 2 / (pi - 2)] = [-1, 1.752]; ValueError outside. s > 0 favours the middle, s < 0 the ends, s = 0
    is uniform. Here v = 1 - u, so that the time rises with u.

    >>> import jax
    >>> from lcm_jax.objectives import Mode
    >>> times = Mode()(jax.random.key(0), 1000)
    >>> round(float(Mode().quantile(jax.numpy.float32(0.5))), 3)
    0.5
    """

    scale: float = 1.29

    def __post_init__(self) -> None:
        low, high = MODE_SCALES
        if not low <= self.scale <= high:
            raise ValueError(f"scale is {self.scale}: the mode density needs one between {low:g} and {high:.4g}")

    def quantile(self, u: Float[Array, "*n"]) -> Float[Array, "*n"]:
        return u + self.scale * (u - jnp.sin(0.5 * pi * u) ** 2)

    def pdf(self, t: Float[Array, "*n"]) -> Float[Array, "*n"]:
        """Return 1 / quantile'(u); u, which has no closed form, is found by bisection."""

        def halve(_: Array, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
            low, high = bounds
            middle = 0.5 * (low + high)
            below = self.quantile(middle) < t
            return jnp.where(below, middle, low), jnp.where(below, high, middle)

        low, high = jax.lax.fori_loop(0, 23, halve, (jnp.zeros_like(t), jnp.ones_like(t)))
        slope = 1.0 + self.scale * (1.0 - 0.5 * pi * jnp.sin(0.5 * pi * (low + high)))
        return 1.0 / jnp.maximum(slope, TINY)


@dataclass(frozen=True, kw_only=True)
class CosMap(TimeDensity):
    """The density of t = 1 - 1 / (tan(pi u / 2) + 1) (eq. 21): a straight path then has the cosine schedule's log-SNR.

    >>> import jax
    >>> from lcm_jax.objectives import CosMap
    >>> times = CosMap()(jax.random.key(0), 1000)
    >>> round(float(CosMap().quantile(jax.numpy.float32(0.5))), 3)
    0.5
    """

    def quantile(self, u: Float[Array, "*n"]) -> Float[Array, "*n"]:
        sine, cosine = jnp.sin(0.5 * pi * u), jnp.cos(0.5 * pi * u)
        return sine / (sine + cosine)

    def pdf(self, t: Float[Array, "*n"]) -> Float[Array, "*n"]:
        return 2.0 / (pi * (1.0 - 2.0 * t + 2.0 * t**2))


def even_times(schedule: Schedule, n: int) -> Float[Array, " n"]:
    """Return the middles of n equal parts of the schedule's time, rounded to the entries of a discrete table.

    >>> from lcm_jax.diffusion.schedules import RectifiedFlow
    >>> from lcm_jax.objectives.time_densities import even_times
    >>> even_times(RectifiedFlow(), 4).tolist()
    [0.125, 0.375, 0.625, 0.875]
    """
    t = schedule.t_min + (schedule.t_max - schedule.t_min) * (jnp.arange(n) + 0.5) / n
    return t if schedule.timesteps is None else jnp.round(t)


def uniform_times(schedule: Schedule, key: Key, n: int) -> Float[Array, " n"]:
    """Draw n times uniformly: from the integer timesteps 0 ... T-1 of a discrete table, else from [t_min, t_max].

    >>> import jax
    >>> from lcm_jax.diffusion.schedules import DDPM
    >>> from lcm_jax.objectives.time_densities import uniform_times
    >>> times = uniform_times(DDPM(), jax.random.key(0), 1000)
    >>> bool((times == times.round()).all())
    True
    """
    if schedule.timesteps is not None:
        return jax.random.randint(key, (n,), 0, schedule.timesteps).astype(jnp.float32)
    return jax.random.uniform(key, (n,), minval=schedule.t_min, maxval=schedule.t_max)
