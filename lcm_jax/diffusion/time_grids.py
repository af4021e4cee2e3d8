"""TODO."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from lcm_jax.diffusion.schedules import RectifiedFlow
from lcm_jax.typing import Schedule

CAPACITY = 1000
"""Steps the padded grid holds: as many as the longest table has entries."""


SPACINGS = ("leading", "trailing", "linspace")


class Grid(NamedTuple):
    """A grid padded to a fixed length, so that its number of steps is data and not a shape."""

    times: Float[Array, " capacity_plus_1"]
    steps: Int[Array, ""]


def pad(grid: Float[np.ndarray, " n_plus_1"], capacity: int = CAPACITY) -> Grid:
    """The grid with its last time repeated up to `capacity` steps."""
    steps = len(grid) - 1
    _check_steps(steps, capacity)
    times = np.concatenate([grid, np.full(capacity - steps, grid[-1])]).astype(np.float32)
    return Grid(jnp.asarray(times), jnp.asarray(steps, jnp.int32))


@dataclass(frozen=True, kw_only=True)
class Spacing:
    """The keys of a diffusers scheduler_config.json that place timesteps; names and meanings are diffusers'.

    timestep_spacing None leaves each sampler its own default: leading for DDIM, linspace for the others.
    set_alpha_to_one is read by DDIM, final_sigmas_type by Euler and the DPM solvers, original_inference_steps by LCM,
    lower_order_final and euler_at_final by DPM++(2M) where the final sigma is above 0.

    On a rectified flow use_flow_sigmas spaces as diffusers' DPM solvers do, and double_shift, which is no key of
    diffusers', as its flow-matching schedulers do (`flow_grid`).
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

    def __post_init__(self) -> None:
        if self.timestep_spacing not in (None, *SPACINGS):
            raise ValueError(f"timestep_spacing {self.timestep_spacing!r} is unknown: use one of {', '.join(SPACINGS)}")
        if self.final_sigmas_type not in ("zero", "sigma_min"):
            raise ValueError(f"final_sigmas_type {self.final_sigmas_type!r} is unknown: use zero or sigma_min")

    @classmethod
    def from_config(cls, config: Mapping[str, Any], *, source: str = "scheduler_config.json") -> Spacing:
        """Read the known keys; ValueError for a value, or a noise spacing such as Karras', that is unsupported."""
        for key in ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas"):
            if config.get(key):
                raise ValueError(f"{source}: {key} is unsupported (its value is {config[key]!r}): set it to false")
        try:
            return cls(**{field.name: config[field.name] for field in fields(cls) if field.name in config})
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
    """The N descending times a network is evaluated at (2305.08891, table 2), without the final one.

    leading: multiples of T // N, plus steps_offset. trailing: T - i T / N - 1. linspace: both ends of the table.
    skip_first: space N + 1 times and drop the smallest (diffusers' DPM solvers, in leading and linspace).
    fractional: leave linspace unrounded (diffusers' Euler and Heun).
    """
    total = num_train_timesteps
    _check_steps(steps, total)
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
    """LCM's own grid: N of the original_steps times {k - 1, 2k - 1, ...} it was distilled on, and the clean end -1.

    The original list is cut to its first int(original_steps * strength) times, reversed, and indexed at
    floor(linspace(0, len, N, endpoint=False)); "old" takes every (len // N)-th instead, as diffusers did before 0.23:
    4 steps are 999, 759, 499, 259 now and were 999, 759, 519, 279.
    """
    _check_strength(strength)
    if not 1 <= original_steps <= num_train_timesteps:
        raise ValueError(f"original_steps is {original_steps}: it must be between 1 and {num_train_timesteps}")
    origin = np.arange(int(original_steps * strength), 0, -1) * (num_train_timesteps // original_steps) - 1
    _check_steps(steps, len(origin))
    if schedule == "old":
        times = origin[:: len(origin) // steps][:steps]
    else:
        times = origin[np.floor(np.linspace(0, len(origin), steps, endpoint=False)).astype(int)]
    return np.append(times, -1.0)


def flow_grid(steps: int, schedule: RectifiedFlow, spacing: Spacing = Spacing()) -> Float[np.ndarray, " n_plus_1"]:
    """N times of a rectified flow, evenly spaced from 1 down to its last nonzero time, and the clean end 0.

    Both SD3 references shift twice: they space evenly between the shifted ends, and shift again. With double_shift the
    last sigma of shift 3 is 0.00893 as theirs is; without, the ends are 1 and 1/T and it is 0.00299. use_flow_sigmas
    spaces all N + 1 times evenly from 1 - 1/T.
    """
    _check_steps(steps, spacing.num_train_timesteps)
    last = 1.0 / spacing.num_train_timesteps
    if spacing.use_flow_sigmas:
        return np.linspace(1.0 - last, 0.0, steps + 1)
    if spacing.double_shift:
        last = schedule.shift * last / (1.0 + (schedule.shift - 1.0) * last)
    return np.append(np.linspace(1.0, last, steps), 0.0)


def even_grid(steps: int, schedule: Schedule) -> Float[np.ndarray, " n_plus_1"]:
    """N steps of equal length in the schedule's time, from noise to the clean end."""
    _check_steps(steps, CAPACITY)
    return np.linspace(schedule.t_max, schedule.t_min, steps + 1)


def karras_grid(
    steps: int, schedule: Schedule, *, low: float = 0.002, high: float = 80.0, rho: float = 7.0
) -> Float[np.ndarray, " n_plus_1"]:
    """N times whose noise level sigma / alpha falls from `high` to `low`, even in its rho-th root, and the clean end.

    Karras 2022 (2206.00364) eq. 5. The start is not quite pure noise: x there is sigma(t_0) times unit noise.
    """
    _check_steps(steps, CAPACITY)
    levels = np.linspace(high ** (1.0 / rho), low ** (1.0 / rho), steps) ** rho
    return np.append(np.asarray(schedule.time_at(jnp.asarray(-np.log(levels)))), schedule.t_min)


def truncate(
    grid: Float[np.ndarray, " n_plus_1"], strength: float, *, up: bool = False
) -> Float[np.ndarray, " m_plus_1"]:
    """The last N strength steps: image-to-image starts from the image noised to the first time left.

    A fraction of a step is left out, or with `up` counts as one, as diffusers has it for Stable Diffusion 3.
    """
    _check_strength(strength)
    steps = len(grid) - 1
    kept = steps - int(steps - steps * strength) if up else int(steps * strength)
    if kept < 1:
        raise ValueError(f"strength {strength} of {steps} steps leaves none: raise the strength or the steps")
    return grid[steps - kept :]


def _check_steps(steps: int, most: int) -> None:
    if not 1 <= steps <= most:
        raise ValueError(f"steps is {steps}: it must be between 1 and {most}")


def _check_strength(strength: float) -> None:
    if not 0.0 < strength <= 1.0:
        raise ValueError(f"strength is {strength}: it must be above 0 and at most 1")
