"""Time grids: the descending times at which a solver evaluates the network, as diffusers and the papers place them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from scipy.special import betaincinv

from lcm_jax.typing import Schedule

CAPACITY = 1000
"""The number of steps that a padded grid holds: as many as the longest table has entries."""

SPACINGS = ("leading", "trailing", "linspace")
SIGMAS = {
    "use_karras_sigmas": "karras",
    "use_exponential_sigmas": "exponential",
    "use_beta_sigmas": "beta",
    "use_lu_lambdas": "lu",
}
"""The keys of a scheduler config that place the steps by their noise levels -> the rule (`noise_levels`)."""
RULES = (*SIGMAS.values(), "ays")
"""The rules that place the steps of any sampler by their noise levels."""


class Walk(NamedTuple):
    """The N steps of a sampler: the times of a grid, the times that the network is told, and the steps' highest orders.

    The network's time differs from the schedule's where a scheduler of diffusers rounds it for noise levels that are
    between the timesteps. An order is the highest that a multistep solver may take there.

    >>> import numpy as np
    >>> from lcm_jax.diffusion.time_grids import Walk
    >>> walk = Walk(np.array([750.0, 500.0, -1.0]), np.array([750.0, 500.0, 0.0]), np.array([9, 9]))
    >>> walk.with_second_repeated().times.tolist(), walk.last(1).times.tolist()
    ([750.0, 500.0, 500.0, -1.0], [500.0, -1.0])
    """

    times: Float[np.ndarray, " n_plus_1"]
    network_times: Float[np.ndarray, " n_plus_1"]
    orders: Int[np.ndarray, " n"]

    def last(self, steps: int) -> Walk:
        """Return the last steps."""
        first = len(self.orders) - steps
        return Walk(self.times[first:], self.network_times[first:], self.orders[first:])

    def with_second_repeated(self) -> Walk:
        """Return the steps with one of no length after the first, in which `PLMS` mends it."""
        if len(self.orders) < 2:
            return self
        return Walk(*(np.insert(row, 1, row[1]) for row in self))


class Grid(NamedTuple):
    """A grid padded to a fixed length, so that its number of steps is data, not a shape: `pad` -> Grid.

    network_times and orders are those of a `Walk`; None: the schedule's own, and no limit.

    >>> from lcm_jax.diffusion.time_grids import lcm_grid, pad
    >>> grid = pad(lcm_grid(4), 6)
    >>> grid.times.tolist(), int(grid.steps)
    ([999.0, 759.0, 499.0, 259.0, -1.0, -1.0, -1.0], 4)
    """

    times: Float[Array, " capacity_plus_1"]
    steps: Int[Array, ""]
    network_times: Float[Array, " capacity_plus_1"] | None = None
    orders: Int[Array, " capacity"] | None = None


def pad(grid: Float[np.ndarray, " n_plus_1"] | Walk, capacity: int = CAPACITY) -> Grid:
    """Return the grid with its last time repeated up to `capacity` steps, so that all lengths share one compilation.

    >>> from lcm_jax.diffusion.time_grids import lcm_grid, pad
    >>> padded = pad(lcm_grid(4))
    >>> padded.times.shape, int(padded.steps)
    ((1001,), 4)
    """
    times = grid.times if isinstance(grid, Walk) else grid
    steps = len(times) - 1
    check_steps(steps, capacity)

    def longer(row: np.ndarray, dtype: Any) -> Array:
        return jnp.asarray(np.append(row, np.full(capacity - steps, row[-1])).astype(dtype))

    padded = Grid(longer(times, np.float32), jnp.asarray(steps, jnp.int32))
    if not isinstance(grid, Walk):
        return padded
    return padded._replace(network_times=longer(grid.network_times, np.float32), orders=longer(grid.orders, np.int32))


@dataclass(frozen=True, kw_only=True)
class Spacing:
    """The keys of a diffusers scheduler_config.json that place timesteps or choose a solver; the names are diffusers'.

    timestep_spacing None leaves each sampler its own default: leading for DDIM, linspace for the others.
    set_alpha_to_one is read by DDIM, final_sigmas_type by Euler and the DPM solvers, original_inference_steps by LCM,
    lower_order_final and euler_at_final by multistep solvers, solver_order and solver_type by solvers that have them.

    On a rectified flow use_flow_sigmas spaces as diffusers' DPM solvers do, and double_shift, which is no key of
    diffusers', as its flow-matching schedulers do (`RectifiedFlow.grid`).

    sigmas is the rule of `RULES` that the config asks for; the samplers read it that read its key in diffusers, and the
    others pass over it there and here.

    >>> from lcm_jax.diffusion.time_grids import Spacing
    >>> Spacing.from_config({"timestep_spacing": "trailing", "beta_start": 0.00085}).timestep_spacing
    'trailing'
    """

    timestep_spacing: str | None = None
    steps_offset: int = 0
    set_alpha_to_one: bool = True
    final_sigmas_type: str = "zero"
    num_train_timesteps: int = 1000
    original_inference_steps: int = 50
    lower_order_final: bool = True
    euler_at_final: bool = False
    use_flow_sigmas: bool = False
    double_shift: bool = True
    sigmas: str | None = None
    solver_order: int | None = None
    solver_type: str | None = None

    def __post_init__(self) -> None:
        if self.timestep_spacing not in (None, *SPACINGS):
            raise ValueError(f"timestep_spacing {self.timestep_spacing!r} is unknown: use one of {', '.join(SPACINGS)}")
        if self.final_sigmas_type not in ("zero", "sigma_min"):
            raise ValueError(f"final_sigmas_type {self.final_sigmas_type!r} is unknown: use zero or sigma_min")

    @classmethod
    def from_config(cls, config: Mapping[str, Any], *, source: str = "scheduler_config.json") -> Spacing:
        """Read the keys that are known; ValueError for a value that is unsupported."""
        sigmas = next((rule for key, rule in SIGMAS.items() if config.get(key)), None)
        values = {field.name: config[field.name] for field in fields(cls) if field.name in config}
        try:
            return cls(**values | {"sigmas": sigmas})
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from None


def spaced_times(
    steps: int,
    *,
    spacing: str,
    steps_offset: int = 0,
    num_train_timesteps: int = 1000,
    fractional: bool = False,
    skip_first: bool = False,
) -> Float[np.ndarray, " n"]:
    """Return the N descending timesteps a network is evaluated at (2305.08891, table 2), without the final one.

    leading: multiples of T // N, plus steps_offset. trailing: T - i T / N - 1. linspace: both ends of the table.
    skip_first: space N + 1 times and drop the smallest (diffusers' DPM solvers, in leading and linspace).
    fractional: leave linspace unrounded (diffusers' Euler and Heun). ValueError where the first time is no entry.

    >>> from lcm_jax.diffusion.time_grids import spaced_times
    >>> for spacing in ("leading", "trailing", "linspace"):
    ...     print(spaced_times(4, spacing=spacing).tolist())
    [750.0, 500.0, 250.0, 0.0]
    [999.0, 749.0, 499.0, 249.0]
    [999.0, 666.0, 333.0, 0.0]
    """
    total = num_train_timesteps
    check_steps(steps, total)
    n = steps + 1 if skip_first else steps
    if spacing == "trailing":
        times: np.ndarray = np.round(total - np.arange(steps) * (total / steps)) - 1.0
    elif spacing == "leading":
        times = np.arange(n)[::-1] * float(total // n) + steps_offset
    else:
        times = np.linspace(0, total - 1, n)[::-1]
        times = times if fractional else np.round(times)
    if times[0] > total - 1:
        raise ValueError(f"{steps} steps with steps_offset {steps_offset} start beyond timestep {total - 1}: use fewer")
    return times[:steps]


def lcm_grid(
    steps: int,
    *,
    original_steps: int = 50,
    strength: float = 1.0,
    schedule: Literal["current", "old"] = "current",
    num_train_timesteps: int = 1000,
) -> Float[np.ndarray, " n_plus_1"]:
    """Return LCM's own grid: N of the original_steps times {k - 1, 2k - 1, ...} it was distilled on, and the clean -1.

    The original list is cut to its first int(original_steps * strength) times, reversed, and indexed at
    floor(linspace(0, len, N, endpoint=False)); "old" takes every (len // N)-th instead, as diffusers did before 0.23:
    4 steps are 999, 759, 499, 259 now and were 999, 759, 519, 279.

    >>> from lcm_jax.diffusion.time_grids import lcm_grid
    >>> lcm_grid(4).tolist(), lcm_grid(4, schedule="old").tolist()
    ([999.0, 759.0, 499.0, 259.0, -1.0], [999.0, 759.0, 519.0, 279.0, -1.0])
    """
    check_strength(strength)
    if not 1 <= original_steps <= num_train_timesteps:
        raise ValueError(f"original_steps is {original_steps}: it must be between 1 and {num_train_timesteps}")
    count = int(original_steps * strength)
    check_steps(steps, original_steps)
    if steps > count:
        enough, one = (next(s / 100 for s in range(1, 101) if int(original_steps * (s / 100)) >= n) for n in (steps, 1))
        if count == 0:
            raise ValueError(
                f"strength {strength:g} leaves none of the {original_steps} times that LCM was distilled on: raise the "
                f"strength to {enough:g} for {steps} steps, or to {one:g} and take 1 step"
            )
        raise ValueError(
            f"steps is {steps}: it must be between 1 and {count} at strength {strength:g}, which leaves {count} of the "
            f"{original_steps} times that LCM was distilled on: raise the strength to {enough:g}, or take fewer steps"
        )
    origin = np.arange(count, 0, -1) * (num_train_timesteps // original_steps) - 1
    if schedule == "old":
        times = origin[:: len(origin) // steps][:steps]
    else:
        times = origin[np.floor(np.linspace(0, len(origin), steps, endpoint=False)).astype(int)]
    return np.append(times, -1.0)


def noise_levels(rule: str, steps: int, high: float, low: float) -> Float[np.ndarray, " n"]:
    """Return N noise levels that fall from high to low: sigma / alpha of a table, sigma of a flow.

    karras: even in their 7th root (2206.00364 eq. 5). exponential: even in the logarithm, and so is lu (2206.00927).
    beta: quantiles of Beta(0.6, 0.6) (2407.12173). All as diffusers has them. ValueError for an unknown rule.

    >>> from lcm_jax.diffusion.time_grids import noise_levels
    >>> for rule in ("karras", "exponential", "beta"):
    ...     print(noise_levels(rule, 3, 10.0, 0.1).round(3).tolist())
    [10.0, 1.451, 0.1]
    [10.0, 1.0, 0.1]
    [10.0, 5.05, 0.1]
    """
    check_steps(steps, CAPACITY)
    ramp = np.linspace(0.0, 1.0, steps)
    if rule == "karras":
        return (high ** (1.0 / 7.0) + ramp * (low ** (1.0 / 7.0) - high ** (1.0 / 7.0))) ** 7.0
    if rule == "exponential":
        return np.exp(np.linspace(math.log(high), math.log(low), steps))
    if rule == "lu":
        first, last = (float(np.log(np.float32(level))) for level in (high, low))
        return np.exp(first + ramp * (last - first))
    if rule == "beta":
        return low + betaincinv(0.6, 0.6, 1.0 - ramp) * (high - low)
    raise ValueError(f"sigmas {rule!r} is unknown: use one of {', '.join(RULES)}, or an array of noise levels")


# Align Your Steps (2404.14507): the timesteps of ten steps, and the first timestep, where they end.
ALIGNED = {
    "sd1": (999, 850, 736, 645, 545, 455, 343, 233, 124, 24, 0),
    "sdxl": (999, 845, 730, 587, 443, 310, 193, 116, 53, 13, 0),
}


def aligned_levels(family: str, steps: int, ratios: Float[np.ndarray, " t"]) -> Float[np.ndarray, " n"]:
    """Return the noise levels of Align Your Steps for N steps: its ten for ten, else log-linear between them.

    family: "sd1" or "sdxl". ratios: sigma / alpha at the timesteps 0, 1, ... of the table, of which it needs 1000.

    >>> from lcm_jax.diffusion.schedules import DDPM
    >>> from lcm_jax.diffusion.time_grids import aligned_levels
    >>> table = DDPM(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear").ratios
    >>> aligned_levels("sd1", 10, table).round(2).tolist()
    [14.61, 6.47, 3.86, 2.69, 1.88, 1.39, 0.96, 0.65, 0.4, 0.15]
    """
    if len(ratios) != 1000:
        raise ValueError(f"sigmas 'ays' is made for tables of 1000 timesteps, and this one has {len(ratios)}")
    levels = np.log(np.asarray(ratios, np.float64)[list(ALIGNED[family])])
    return np.exp(np.interp(np.linspace(0.0, 10.0, steps + 1), np.arange(11), levels))[:-1]


def table_times(levels: Float[np.ndarray, " n"], ratios: Float[np.ndarray, " t"]) -> Float[np.ndarray, " n"]:
    """Return the times at which a table has these sigma / alpha, which is linear between its timesteps.

    >>> import numpy as np
    >>> from lcm_jax.diffusion.time_grids import table_times
    >>> table_times(np.array([4.0, 1.5, 0.0]), np.array([1.0, 2.0, 4.0])).tolist()
    [2.0, 0.5, -1.0]
    """
    return np.interp(levels, np.append(0.0, ratios.astype(np.float64)), np.arange(-1.0, len(ratios)))


def table_network_times(levels: Float[np.ndarray, " n"], ratios: Float[np.ndarray, " t"]) -> Float[np.ndarray, " n"]:
    """Return the timesteps that diffusers tells the network for these sigma / alpha: linear in the logarithm.

    >>> import numpy as np
    >>> from lcm_jax.diffusion.time_grids import table_network_times
    >>> table_network_times(np.array([4.0, 2.0**0.5]), np.array([1.0, 2.0, 4.0])).round(3).tolist()
    [2.0, 0.5]
    """
    logs, log_levels = np.log(ratios), np.log(np.maximum(levels, 1e-10))
    low = np.clip(np.searchsorted(logs, log_levels, side="right") - 1, 0, len(logs) - 2)
    gap = logs[low + 1] - logs[low]  # 0 where two entries count as the same noise, beside a zero terminal SNR
    weight = np.clip(np.divide(log_levels - logs[low], gap, out=np.ones_like(log_levels), where=gap > 0.0), 0.0, 1.0)
    return (1.0 - weight) * low + weight * (low + 1)


def even_grid(steps: int, schedule: Schedule) -> Float[np.ndarray, " n_plus_1"]:
    """Return the N + 1 times of N equal steps in the schedule's time, from noise to the clean end.

    >>> from lcm_jax.diffusion.schedules import Cosine
    >>> from lcm_jax.diffusion.time_grids import even_grid
    >>> even_grid(4, Cosine()).tolist()
    [1.0, 0.75, 0.5, 0.25, 0.0]
    """
    check_steps(steps, CAPACITY)
    return np.linspace(schedule.t_max, schedule.t_min, steps + 1)


def karras_grid(
    steps: int, schedule: Schedule, *, low: float = 0.002, high: float = 80.0, rho: float = 7.0
) -> Float[np.ndarray, " n_plus_1"]:
    """Return N times whose noise level sigma / alpha falls from `high` to `low`, and the clean end.

    Karras 2022 (2206.00364) eq. 5: the levels are even in their rho-th root,
    level_i = (high^(1/rho) + i / (N - 1) (low^(1/rho) - high^(1/rho)))^rho. The start is not quite pure noise: x there
    is sigma(t_0) times unit noise.

    >>> from lcm_jax.diffusion.schedules import RectifiedFlow
    >>> from lcm_jax.diffusion.time_grids import karras_grid
    >>> karras_grid(3, RectifiedFlow()).round(3).tolist()
    [0.988, 0.716, 0.002, 0.0]
    """
    check_steps(steps, CAPACITY)
    levels = np.linspace(high ** (1.0 / rho), low ** (1.0 / rho), steps) ** rho
    return np.append(np.asarray(schedule.time_at(jnp.asarray(-np.log(levels)))), schedule.t_min)


def truncate(
    grid: Float[np.ndarray, " n_plus_1"], strength: float, *, up: bool = False
) -> Float[np.ndarray, " m_plus_1"]:
    """Return the last N strength steps: image-to-image starts from the image noised to the first time left.

    A fraction of a step is left out, or with `up` counts as one, as diffusers has it for Stable Diffusion 3.
    ValueError where no step is left.

    >>> import numpy as np
    >>> from lcm_jax.diffusion.time_grids import truncate
    >>> truncate(np.array([1.0, 0.75, 0.5, 0.25, 0.0]), 0.6).tolist()
    [0.5, 0.25, 0.0]
    """
    check_strength(strength)
    steps = len(grid) - 1
    count = steps - int(steps - steps * strength) if up else int(steps * strength)
    if count < 1:
        more = next((f", or take at least {n} steps" for n in range(1, CAPACITY + 1) if int(n * strength) >= 1), "")
        enough = math.ceil(100 / steps) / 100
        raise ValueError(f"strength {strength:g} of {steps} steps leaves none: raise the strength to {enough:g}{more}")
    return grid[steps - count :]


def check_steps(steps: int, most: int) -> None:
    """Raise ValueError unless 1 <= steps <= most."""
    if not 1 <= steps <= most:
        raise ValueError(f"steps is {steps}: it must be between 1 and {most}")


def check_strength(strength: float) -> None:
    """Raise ValueError unless 0 < strength <= 1."""
    if not 0.0 < strength <= 1.0:
        raise ValueError(f"strength is {strength}: it must be above 0 and at most 1")
