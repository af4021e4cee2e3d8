"""Noise schedules: x_t = alpha(t) x0 + sigma(t) eps.

`DDPM` holds the discrete tables of Stable Diffusion 1, 2 and XL, `RectifiedFlow` the straight paths of SD3, `Cosine` a
quarter of a circle. Tables are made once with numpy, bit for bit as torch cumulates them, and enter a jitted function
as constants.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lcm_jax.diffusion.time_grids import Grid, Spacing, check_steps, even_grid, spaced_times
from lcm_jax.typing import Kind, Schedule, Time

BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")


@dataclass(frozen=True, kw_only=True)
class DDPM:
    """Variance-preserving table over integer timesteps (Ho 2020, 2006.11239): alpha^2 = prod(1 - beta) = 1 - sigma^2.

    Time t in [-1, num_train_timesteps - 1], in timesteps. t = -1 is the clean sample (alpha 1, sigma 0), an integer t
    is an entry of the table, and between integers sigma/alpha is interpolated linearly (as diffusers' Euler does).

    rescale_betas_zero_snr shifts and scales alpha so that the last entry is exactly 0 (2305.08891, Alg. 1). There
    sigma/alpha is infinite; on the last open interval it is interpolated towards 4096, the value diffusers uses.
    ValueError for an unknown beta_schedule or an empty table.

    >>> from lcm_jax.diffusion.schedules import DDPM
    >>> sd15 = DDPM(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    >>> float(sd15.alpha(-1)), float(sd15.sigma(-1)), sd15.timesteps
    (1.0, 0.0, 1000)
    >>> round(float(sd15.alpha(999) ** 2 + sd15.sigma(999) ** 2), 6)
    1.0
    """

    keeps_partial_step: ClassVar[bool] = False
    usual_kind: ClassVar[Kind] = "epsilon"
    usual_sampler: ClassVar[str] = "ddim"

    num_train_timesteps: int = 1000
    beta_start: float = 0.0001
    beta_end: float = 0.02
    beta_schedule: str = "linear"
    rescale_betas_zero_snr: bool = False

    def __post_init__(self) -> None:
        if self.beta_schedule not in BETA_SCHEDULES:
            raise ValueError(f"beta_schedule {self.beta_schedule!r} is unknown: use one of {', '.join(BETA_SCHEDULES)}")
        if self.num_train_timesteps < 1:
            raise ValueError(f"num_train_timesteps is {self.num_train_timesteps}: it must be at least 1")

    @property
    def timesteps(self) -> int:
        return self.num_train_timesteps

    @property
    def t_min(self) -> float:
        return -1.0

    @property
    def t_max(self) -> float:
        return float(self.num_train_timesteps - 1)

    @property
    def gauge(self) -> float:
        # x / alpha is infinite where the terminal SNR is zero
        return 1.0 if self.rescale_betas_zero_snr else 0.0

    def alpha(self, t: Time) -> Float[Array, "*b"]:
        table, exact, ratio = self._look_up(t)
        return jnp.where(exact, table.alpha, 1.0 / jnp.sqrt(1.0 + ratio**2))

    def sigma(self, t: Time) -> Float[Array, "*b"]:
        table, exact, ratio = self._look_up(t)
        return jnp.where(exact, table.sigma, ratio / jnp.sqrt(1.0 + ratio**2))

    def network_time(self, t: Time) -> Float[Array, "*b"]:
        return jnp.asarray(t, jnp.float32)

    def time_at(self, log_snr: Time) -> Float[Array, "*b"]:
        times = np.arange(-1, self.num_train_timesteps, dtype=np.float32)
        return jnp.interp(jnp.exp(-jnp.asarray(log_snr, jnp.float32)), _tables(self).ratio, times)

    def log_time(self, t: Time) -> Float[Array, "*b"]:
        """Return the time between two timesteps as diffusers places it: by the logarithm of sigma/alpha at t."""
        t = jnp.clip(jnp.asarray(t, jnp.float32), 0.0, self.t_max)
        low = jnp.minimum(jnp.floor(t), max(self.t_max - 1.0, 0.0))
        ratio, index = jnp.asarray(_tables(self).ratio), low.astype(jnp.int32) + 1
        below, above = ratio[index], ratio[jnp.minimum(index + 1, self.num_train_timesteps)]
        part = t - low
        between = (part > 0.0) & (part < 1.0)
        weight = jnp.log1p(part * (above - below) / below) / jnp.log(jnp.where(between, above / below, 2.0))
        return low + jnp.where(between, weight, part)

    @property
    def ratios(self) -> Float[np.ndarray, " n"]:
        """sigma / alpha at the timesteps 0, 1, ..., from data to noise; a zero terminal SNR counts as 4096."""
        return np.asarray(_tables(self).ratio)[1:]

    def grid(self, steps: int, spacing: Spacing = Spacing()) -> Float[np.ndarray, " n_plus_1"]:
        """Return DDIM's grid: N timesteps, leading unless `spacing` says otherwise, and the clean end.

        The end is -1, or with set_alpha_to_one false the table's first entry, 0.
        """
        times = spaced_times(
            steps,
            spacing=spacing.timestep_spacing or "leading",
            steps_offset=spacing.steps_offset,
            num_train_timesteps=spacing.num_train_timesteps,
        )
        return np.append(times, -1.0 if spacing.set_alpha_to_one else 0.0)

    def _look_up(self, t: Time) -> tuple[_Tables, Array, Array]:
        """Return the entries at floor(t), whether t is that integer, and the interpolated sigma/alpha."""
        t = jnp.asarray(t, jnp.float32)
        low = jnp.clip(jnp.floor(t), self.t_min, self.t_max)
        weight = jnp.clip(t - low, 0.0, 1.0)
        index = low.astype(jnp.int32) + 1
        tables = _Tables(*(jnp.asarray(table) for table in _tables(self)))
        entries = _Tables(*(table[index] for table in tables))
        above = tables.ratio[jnp.minimum(index + 1, self.num_train_timesteps)]
        return entries, (weight == 0.0) | (low == self.t_max), (1.0 - weight) * entries.ratio + weight * above


class _Continuous:
    """The facts that schedules in continuous time share, where they do not say otherwise."""

    timesteps: ClassVar[None] = None
    keeps_partial_step: ClassVar[bool] = False
    usual_kind: ClassVar[Kind] = "flow"
    usual_sampler: ClassVar[str] = "euler"
    t_min: ClassVar[float] = 0.0
    gauge: ClassVar[float] = 1.0  # x / alpha is infinite at the end

    def grid(self: Schedule, steps: int, spacing: Spacing = Spacing()) -> Float[np.ndarray, " n_plus_1"]:
        """Return the times of N equal steps."""
        return even_grid(steps, self)


@dataclass(frozen=True, kw_only=True)
class RectifiedFlow(_Continuous):
    """Straight paths (2209.03003; SD3, 2403.03206): alpha = 1 - t', sigma = t', t' = shift t / (1 + (shift - 1) t).

    Time t in [0, 1], no unit; the shift (2403.03206 eq. 23) belongs to the schedule, so a uniform grid in t is the
    shifted one in sigma. The network receives 1000 t'. ValueError for a shift that is not positive.

    >>> from lcm_jax.diffusion.schedules import RectifiedFlow
    >>> flow = RectifiedFlow(shift=3.0)
    >>> float(flow.alpha(0.5)), float(flow.sigma(0.5)), float(flow.network_time(0.5))
    (0.25, 0.75, 750.0)
    """

    keeps_partial_step: ClassVar[bool] = True

    shift: float = 1.0

    def __post_init__(self) -> None:
        if not self.shift > 0.0:
            raise ValueError(f"shift is {self.shift}: it must be positive (1 for none, 3 for SD3)")

    @property
    def t_max(self) -> float:
        return 1.0

    def alpha(self, t: Time) -> Float[Array, "*b"]:
        t = jnp.asarray(t, jnp.float32)
        return (1.0 - t) / (1.0 + (self.shift - 1.0) * t)

    def sigma(self, t: Time) -> Float[Array, "*b"]:
        t = jnp.asarray(t, jnp.float32)
        return self.shift * t / (1.0 + (self.shift - 1.0) * t)

    def network_time(self, t: Time) -> Float[Array, "*b"]:
        return 1000.0 * self.sigma(t)

    def time_at(self, log_snr: Time) -> Float[Array, "*b"]:
        sigma = jax.nn.sigmoid(-jnp.asarray(log_snr, jnp.float32))
        return sigma / (self.shift - (self.shift - 1.0) * sigma)

    def grid(self, steps: int, spacing: Spacing = Spacing()) -> Float[np.ndarray, " n_plus_1"]:
        """Return N times, evenly spaced from 1 down to the last nonzero time, and the clean end 0.

        Both SD3 references shift twice: they space evenly between the shifted ends, and shift again. With double_shift
        the last sigma of shift 3 is 0.00893 as theirs is; without, the ends are 1 and 1/T and it is 0.00299.
        use_flow_sigmas spaces all N + 1 times evenly from 1 - 1/T, as diffusers' DPM solvers do.

        >>> from lcm_jax.diffusion.schedules import RectifiedFlow
        >>> RectifiedFlow(shift=3.0).grid(3).round(4).tolist()
        [1.0, 0.5015, 0.003, 0.0]
        """
        check_steps(steps, spacing.num_train_timesteps)
        last = 1.0 / spacing.num_train_timesteps
        if spacing.use_flow_sigmas:
            return np.linspace(1.0 - last, 0.0, steps + 1)
        if spacing.double_shift:
            last = self.shift * last / (1.0 + (self.shift - 1.0) * last)
        return np.append(np.linspace(1.0, last, steps), 0.0)


def at_resolution(schedule: RectifiedFlow, pixels: float, base: float) -> RectifiedFlow:
    """Return the schedule on which images of `pixels` = height x width are as uncertain as those of `base` pixels.

    2403.03206 eq. 23: t_m = sqrt(m / n) t_n / (1 + (sqrt(m / n) - 1) t_n): the shift grows with the edge, and
    log(alpha^2 / sigma^2) falls by log(m / n). From 256^2 to 1024^2 that is a shift of 4; in the paper's study people
    preferred 3. Buckets of about side^2 pixels (lcm_jax.data.buckets) all have the shift of side^2.
    ValueError unless both are positive.

    >>> from lcm_jax.diffusion.schedules import RectifiedFlow, at_resolution
    >>> at_resolution(RectifiedFlow(), 1024**2, 256**2)
    RectifiedFlow(shift=4.0)
    """
    if not (pixels > 0 and base > 0):
        raise ValueError(f"pixels={pixels} and base={base} must be positive: give height x width of each")
    return replace(schedule, shift=schedule.shift * math.sqrt(pixels / base))


@dataclass(frozen=True, kw_only=True)
class Cosine(_Continuous):
    """Variance-preserving in continuous time (Nichol & Dhariwal, 2102.09672; as in 2403.03206 sec. 2):

    alpha = cos(pi t / 2), sigma = sin(pi t / 2), time t in [0, 1]. The network receives 1000 t.

    >>> from lcm_jax.diffusion.schedules import Cosine
    >>> schedule = Cosine()
    >>> float(schedule.alpha(1.0)), round(float(schedule.sigma(1 / 3)), 6)
    (0.0, 0.5)
    """

    @property
    def t_max(self) -> float:
        return 1.0

    def alpha(self, t: Time) -> Float[Array, "*b"]:
        return jnp.sin(0.5 * jnp.pi * (1.0 - jnp.asarray(t, jnp.float32)))  # exactly 0 at 1

    def sigma(self, t: Time) -> Float[Array, "*b"]:
        return jnp.sin(0.5 * jnp.pi * jnp.asarray(t, jnp.float32))

    def network_time(self, t: Time) -> Float[Array, "*b"]:
        return 1000.0 * jnp.asarray(t, jnp.float32)

    def time_at(self, log_snr: Time) -> Float[Array, "*b"]:
        return jnp.arctan(jnp.exp(-jnp.asarray(log_snr, jnp.float32))) / (0.5 * jnp.pi)


@dataclass(frozen=True, kw_only=True)
class TrigFlow(_Continuous):
    """An arc (Lu & Song 2024, 2410.11081 sec. 3.1): alpha = cos t, sigma = sigma_data sin t, t in [0, pi / 2].

    x has the standard deviation sigma_data at every time if the data have. The network receives 1000 t.

    >>> from lcm_jax.diffusion.schedules import TrigFlow
    >>> schedule = TrigFlow(sigma_data=0.5)
    >>> float(schedule.sigma(0.0)), round(float(schedule.sigma(schedule.t_max)), 6)
    (0.0, 0.5)
    """

    sigma_data: float = 1.0

    @property
    def t_max(self) -> float:
        return 0.5 * math.pi

    def alpha(self, t: Time) -> Float[Array, "*b"]:
        return jnp.sin(0.5 * jnp.pi - jnp.asarray(t, jnp.float32))

    def sigma(self, t: Time) -> Float[Array, "*b"]:
        return self.sigma_data * jnp.sin(jnp.asarray(t, jnp.float32))

    def network_time(self, t: Time) -> Float[Array, "*b"]:
        return 1000.0 * jnp.asarray(t, jnp.float32)

    def time_at(self, log_snr: Time) -> Float[Array, "*b"]:
        return jnp.arctan(jnp.exp(-jnp.asarray(log_snr, jnp.float32)) / self.sigma_data)


@dataclass(frozen=True)
class OnGrid:
    """A schedule on which a sampler walks one grid: it knows the network's times there, and the orders of the steps.

    At a time of the grid the network receives that of the grid, which a sampler of diffusers may have rounded. At a
    time between, where solvers of two evaluations ask, it is interpolated in log(sigma / alpha) as diffusers does. All
    else is the schedule's. It holds arrays, so make it inside the jitted function.

    >>> from lcm_jax.diffusion.schedules import DDPM, OnGrid
    >>> from lcm_jax.diffusion.time_grids import Walk, pad
    >>> import numpy as np
    >>> walk = Walk(times=np.array([900.4, -1.0]), network_times=np.array([900.0, -1.0]), orders=np.array([1]))
    >>> float(OnGrid(DDPM(), pad(walk)).network_time(np.float32(900.4)))
    900.0
    """

    schedule: Schedule
    walk: Grid

    @property
    def timesteps(self) -> int | None:
        return self.schedule.timesteps

    @property
    def keeps_partial_step(self) -> bool:
        return self.schedule.keeps_partial_step

    @property
    def usual_kind(self) -> Kind:
        return self.schedule.usual_kind

    @property
    def usual_sampler(self) -> str:
        return self.schedule.usual_sampler

    @property
    def t_min(self) -> float:
        return self.schedule.t_min

    @property
    def t_max(self) -> float:
        return self.schedule.t_max

    @property
    def gauge(self) -> float:
        return self.schedule.gauge

    def alpha(self, t: Time) -> Float[Array, "*b"]:
        return self.schedule.alpha(t)

    def sigma(self, t: Time) -> Float[Array, "*b"]:
        return self.schedule.sigma(t)

    def time_at(self, log_snr: Time) -> Float[Array, "*b"]:
        return self.schedule.time_at(log_snr)

    def network_time(self, t: Time) -> Float[Array, "*b"]:
        found, index = self._find(t)
        between = self.schedule.log_time(t) if isinstance(self.schedule, DDPM) else self.schedule.network_time(t)
        if self.walk.network_times is None:
            return self.schedule.network_time(t)
        return jnp.where(found, self.walk.network_times[index], between)

    def order_at(self, t: Time) -> Float[Array, "*b"]:
        """Return the order that the step of the grid from t may have; infinite at other times."""
        found, index = self._find(t)
        if self.walk.orders is None:
            return jnp.full(found.shape, jnp.inf)
        return jnp.where(found, self.walk.orders[index].astype(jnp.float32), jnp.inf)

    def grid(self, steps: int, spacing: Any) -> Float[np.ndarray, " n_plus_1"]:
        return self.schedule.grid(steps, spacing)

    def _find(self, t: Time) -> tuple[Array, Array]:
        """Return whether t is a time of the grid, and the first step from it."""
        equal = jnp.asarray(t, jnp.float32)[..., None] == self.walk.times[:-1]
        return equal.any(-1), jnp.argmax(equal, -1)


def log_snr(schedule: Schedule, t: Time) -> Float[Array, "*b"]:
    """Return lambda(t) = log(alpha / sigma) in nats (Lu 2022, 2206.00927).

    It is +inf at the clean end and -inf where alpha is 0.

    >>> from lcm_jax.diffusion.schedules import RectifiedFlow, log_snr
    >>> float(log_snr(RectifiedFlow(), 0.5)), float(log_snr(RectifiedFlow(), 0.0))
    (0.0, inf)
    """
    return jnp.log(schedule.alpha(t)) - jnp.log(schedule.sigma(t))


def floor_to_timestep(schedule: Schedule, t: Time) -> Float[Array, "*b"]:
    """Return times rounded down to the entries of a discrete table; continuous times as they are.

    >>> from lcm_jax.diffusion.schedules import DDPM, Cosine, floor_to_timestep
    >>> float(floor_to_timestep(DDPM(), 499.5)), float(floor_to_timestep(Cosine(), 0.75))
    (499.0, 0.75)
    """
    return jnp.asarray(t) if schedule.timesteps is None else jnp.floor(t)


def round_to_timestep(schedule: Schedule, t: Time) -> Float[Array, "*b"]:
    """Return times rounded to the entries of a discrete table, as trailing grids are; continuous times as they are.

    >>> from lcm_jax.diffusion.schedules import DDPM, Cosine, round_to_timestep
    >>> float(round_to_timestep(DDPM(), 498.7)), float(round_to_timestep(Cosine(), 0.75))
    (499.0, 0.75)
    """
    # the number of timesteps to the clean end is rounded: a half goes to the even number
    return jnp.asarray(t) if schedule.timesteps is None else jnp.round(t - schedule.t_min) + schedule.t_min


class _Tables(NamedTuple):
    """float32 columns over t = -1, 0, ..., num_train_timesteps - 1."""

    alpha: Any
    sigma: Any
    ratio: Any


@functools.lru_cache(maxsize=32)
def _tables(ddpm: DDPM) -> _Tables:
    alpha_bar = _alpha_bar(ddpm)
    one = np.float32(1.0)
    alpha = np.concatenate([[one], np.sqrt(alpha_bar)])
    sigma = np.concatenate([[np.float32(0.0)], np.sqrt(one - alpha_bar)])
    floored = np.maximum(alpha_bar, np.float32(2.0**-24))
    ratio = np.concatenate([[np.float32(0.0)], np.sqrt((one - floored) / floored)])
    return _Tables(alpha, sigma, ratio)


def _alpha_bar(ddpm: DDPM) -> np.ndarray:
    betas = _betas(ddpm)
    if ddpm.rescale_betas_zero_snr:
        root = np.sqrt(_cumprod(np.float32(1.0) - betas))
        first, last = root[0], root[-1]
        root = (root - last) * (first / (first - last))
        bar = root**2
        betas = np.float32(1.0) - np.concatenate([bar[:1], bar[1:] / bar[:-1]])
    return _cumprod(np.float32(1.0) - betas)


def _betas(ddpm: DDPM) -> np.ndarray:
    n = ddpm.num_train_timesteps
    if ddpm.beta_schedule == "linear":
        return _linspace(ddpm.beta_start, ddpm.beta_end, n)
    if ddpm.beta_schedule == "scaled_linear":
        return _linspace(math.sqrt(ddpm.beta_start), math.sqrt(ddpm.beta_end), n) ** 2

    def cosine(u: float) -> float:
        return math.cos((u + 0.008) / 1.008 * math.pi / 2.0) ** 2

    return np.array([min(1.0 - cosine((i + 1) / n) / cosine(i / n), 0.999) for i in range(n)], np.float32)


def _linspace(start: float, end: float, n: int) -> np.ndarray:
    """torch.linspace in float32: it counts from both ends and rounds once; numpy's differs in the last bit."""
    a, b = float(np.float32(start)), float(np.float32(end))
    step = float((np.float32(end) - np.float32(start)) / np.float32(max(n - 1, 1)))
    i = np.arange(n)
    return np.where((i < n // 2) | (n == 1), a + step * i, b - step * (n - 1 - i)).astype(np.float32)


def _cumprod(values: np.ndarray) -> np.ndarray:
    """torch.cumprod of float32, which accumulates in float64."""
    return np.cumprod(values.astype(np.float64)).astype(np.float32)
