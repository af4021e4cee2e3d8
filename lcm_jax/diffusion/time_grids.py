"""Time grids: the descending times at which a solver evaluates the network, as diffusers and the papers place them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from lcm_jax.typing import Schedule

CAPACITY = 1000
"""The number of steps that a padded grid holds: as many as the longest table has entries."""

SPACINGS = ("leading", "trailing", "linspace")
SIGMAS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas")


class Grid(NamedTuple):
    """A grid padded to a fixed length, so that its number of steps is data, not a shape: `pad` -> Grid."""

    times: Float[Array, " capacity_plus_1"]
    steps: Int[Array, ""]


def pad(grid: Float[np.ndarray, " n_plus_1"], capacity: int = CAPACITY) -> Grid:
    """Return the grid with its last time repeated up to `capacity` steps, so that all lengths share one compilation.

    >>> from lcm_jax.diffusion.time_grids import lcm_grid, pad
    >>> padded = pad(lcm_grid(4))
    >>> padded.times.shape, int(padded.steps)
    ((1001,), 4)
    """
    steps = len(grid) - 1
    check_steps(steps, capacity)
    times = np.concatenate([grid, np.full(capacity - steps, grid[-1])]).astype(np.float32)
    return Grid(jnp.asarray(times), jnp.asarray(steps, jnp.int32))


@dataclass(frozen=True, kw_only=True)
class Spacing:
    """The keys of a diffusers scheduler_config.json that place timesteps; names and meanings are diffusers'.

    timestep_spacing None leaves each sampler its own default: leading for DDIM, linspace for the others.
    set_alpha_to_one is read by DDIM, final_sigmas_type by Euler and the DPM solvers, original_inference_steps by LCM,
    lower_order_final and euler_at_final by DPM++(2M) where the final sigma is above 0.

    On a rectified flow use_flow_sigmas spaces as diffusers' DPM solvers do, and double_shift, which is no key of
    diffusers', as its flow-matching schedulers do (`RectifiedFlow.grid`).

    sigmas is the key in `SIGMAS` that asks for other noise levels, such as Karras'. No sampler has them: `time_grid`
    raises ValueError for the samplers that read the key in diffusers; the others pass over it there and here.

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

    def __post_init__(self) -> None:
        if self.timestep_spacing not in (None, *SPACINGS):
            raise ValueError(f"timestep_spacing {self.timestep_spacing!r} is unknown: use one of {', '.join(SPACINGS)}")
        if self.final_sigmas_type not in ("zero", "sigma_min"):
            raise ValueError(f"final_sigmas_type {self.final_sigmas_type!r} is unknown: use zero or sigma_min")

    @classmethod
    def from_config(cls, config: Mapping[str, Any], *, source: str = "scheduler_config.json") -> Spacing:
        """Read the keys that are known; ValueError for a value that is unsupported."""
        sigmas = next((key for key in SIGMAS if config.get(key)), None)
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
