"""Densities of the training times: what of the path from data (t = 0) to noise (t = 1) is trained how often.

SD3 (Esser et al. 2024, arXiv:2403.03206, section 3.1) compares these. Each is given by its quantile function, the time
below which a share u lies, so that t = quantile(u) of a uniform u has the density pdf(t).

Time runs as everywhere here: t = 1 is noise, and a positive mean of the logit-normal leans to noise. Trainers on
diffusers draw u and take the timestep numbered u T of a scheduler whose list begins at noise, so that their time is
1 - u and their `logit_mean` has the opposite sign.
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
    """A density on [0, 1], the time of a rectified flow or of the cosine schedule."""

    @abstractmethod
    def quantile(self, u: Float[Array, "*n"]) -> Float[Array, "*n"]:
        """The time below which a share u in (0, 1) of the draws lies; it rises with u."""

    @abstractmethod
    def pdf(self, t: Float[Array, "*n"]) -> Float[Array, "*n"]:
        """The density at t in (0, 1); it integrates to 1."""

    def __call__(self, key: Key, n: int) -> Float[Array, " n"]:
        """n independent times."""
        return self.quantile(jax.random.uniform(key, (n,), minval=TINY))


@dataclass(frozen=True, kw_only=True)
class Uniform(TimeDensity):
    """pi(t) = 1."""

    def quantile(self, u: Float[Array, "*n"]) -> Float[Array, "*n"]:
        return jnp.asarray(u, jnp.float32)

    def pdf(self, t: Float[Array, "*n"]) -> Float[Array, "*n"]:
        return jnp.ones_like(t)


@dataclass(frozen=True, kw_only=True)
class LogitNormal(TimeDensity):
    """logit t ~ N(mean, std^2) (eq. 19): times in the middle, where the straight path is hardest to predict."""

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
"""Between these `Mode` is monotone; at the first the density is infinite at 0 and 1, at the last at 1/2."""


@dataclass(frozen=True, kw_only=True)
class Mode(TimeDensity):
    """t = 1 - v - s (cos^2(pi v / 2) - 1 + v), v uniform (eq. 20), s = scale in [-1, 2 / (pi - 2)] = [-1, 1.752].

    s > 0 favours the middle, s < 0 the ends, s = 0 is uniform. Here v = 1 - u, so that the time rises with u.
    """

    scale: float = 1.29

    def __post_init__(self) -> None:
        low, high = MODE_SCALES
        if not low <= self.scale <= high:
            raise ValueError(f"scale is {self.scale}: the mode density needs one between {low:g} and {high:.4g}")

    def quantile(self, u: Float[Array, "*n"]) -> Float[Array, "*n"]:
        return u + self.scale * (u - jnp.sin(0.5 * pi * u) ** 2)

    def pdf(self, t: Float[Array, "*n"]) -> Float[Array, "*n"]:
        """1 / quantile'(u), where u, which has no closed form, is found by bisection."""

        def halve(_: int, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
            low, high = bounds
            middle = 0.5 * (low + high)
            below = self.quantile(middle) < t
            return jnp.where(below, middle, low), jnp.where(below, high, middle)

        low, high = jax.lax.fori_loop(0, 23, halve, (jnp.zeros_like(t), jnp.ones_like(t)))
        slope = 1.0 + self.scale * (1.0 - 0.5 * pi * jnp.sin(0.5 * pi * (low + high)))
        return 1.0 / jnp.maximum(slope, TINY)


@dataclass(frozen=True, kw_only=True)
class CosMap(TimeDensity):
    """t = 1 - 1 / (tan(pi u / 2) + 1) (eq. 21): the log-SNR of a straight path is then the cosine schedule's."""

    def quantile(self, u: Float[Array, "*n"]) -> Float[Array, "*n"]:
        sine, cosine = jnp.sin(0.5 * pi * u), jnp.cos(0.5 * pi * u)
        return sine / (sine + cosine)

    def pdf(self, t: Float[Array, "*n"]) -> Float[Array, "*n"]:
        return 2.0 / (pi * (1.0 - 2.0 * t + 2.0 * t**2))


def even_times(schedule: Schedule, n: int) -> Float[Array, " n"]:
    """The middles of n equal parts of the schedule's time; of a DDPM table rounded to timesteps."""
    t = schedule.t_min + (schedule.t_max - schedule.t_min) * (jnp.arange(n) + 0.5) / n
    return t if schedule.timesteps is None else jnp.round(t)


def uniform_times(schedule: Schedule, key: Key, n: int) -> Float[Array, " n"]:
    """Times drawn uniformly: from the integer timesteps 0 ... T-1 of a DDPM table, else from [t_min, t_max]."""
    if schedule.timesteps is not None:
        return jax.random.randint(key, (n,), 0, schedule.timesteps).astype(jnp.float32)
    return jax.random.uniform(key, (n,), minval=schedule.t_min, maxval=schedule.t_max)
