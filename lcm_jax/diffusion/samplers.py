"""TODO."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float

from lcm_jax.diffusion.schedules import DDPM, RectifiedFlow
from lcm_jax.diffusion.solvers import DDIM, LCM, TCD, DPMpp2M, DPMSolver2, Euler, Heun
from lcm_jax.diffusion.time_grids import (
    Spacing,
    _check_strength,
    even_grid,
    flow_grid,
    lcm_grid,
    spaced_times,
    truncate,
)
from lcm_jax.typing import Schedule, Solver


def _ddim_grid(steps: int, spacing: Spacing, strength: float) -> np.ndarray:
    return _table_grid(steps, spacing, strength, default="leading", clean=spacing.set_alpha_to_one)


def _euler_grid(steps: int, spacing: Spacing, strength: float) -> np.ndarray:
    return _table_grid(steps, spacing, strength, clean=spacing.final_sigmas_type == "zero", fractional=True)


def _heun_grid(steps: int, spacing: Spacing, strength: float) -> np.ndarray:
    return _table_grid(steps, spacing, strength, clean=True, fractional=True)


def _dpm_grid(steps: int, spacing: Spacing, strength: float) -> np.ndarray:
    return _table_grid(steps, spacing, strength, clean=spacing.final_sigmas_type == "zero", skip_first=True)


def _consistency_grid(steps: int, spacing: Spacing, strength: float) -> np.ndarray:
    original, total = spacing.original_inference_steps, spacing.num_train_timesteps
    return lcm_grid(steps, original_steps=original, num_train_timesteps=total, strength=strength)


def _tcd_grid(steps: int, spacing: Spacing, strength: float) -> np.ndarray:
    return np.maximum(_consistency_grid(steps, spacing, strength), 0.0)  # diffusers' ends at timestep 0


def _trailing_grid(steps: int, spacing: Spacing, strength: float) -> np.ndarray:
    return _ddim_grid(steps, replace(spacing, timestep_spacing="trailing"), strength)


def _table_grid(
    steps: int, spacing: Spacing, strength: float, *, clean: bool, default: str = "linspace", **rule: bool
) -> np.ndarray:
    times = spaced_times(
        steps,
        spacing=spacing.timestep_spacing or default,
        steps_offset=spacing.steps_offset,
        num_train_timesteps=spacing.num_train_timesteps,
        **rule,
    )
    return truncate(np.append(times, -1.0 if clean else 0.0), strength)


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """A solver with the grid and the starting noise that go with it.

    grid(steps, spacing, strength) is for table schedules; `time_grid` serves all. spread_start: the noise starts at
    sigma(t_0), not at 1, unless spacing is leading (diffusers' Euler and Heun). consistency: the denoiser must be one.
    even: in continuous time its steps are equally long, and all lie below the strength.
    """

    solver: Solver
    grid: Callable[[int, Spacing, float], np.ndarray]
    spread_start: bool = False
    consistency: bool = False
    even: bool = False

    def at(self, steps: int, spacing: Spacing) -> Sampler:
        """The sampler of a grid of so many steps: to a final sigma above 0 a short DPM++(2M) ends in first order."""
        lower = spacing.euler_at_final or (spacing.lower_order_final and steps < 15)
        if isinstance(self.solver, DPMpp2M) and spacing.final_sigmas_type == "sigma_min" and lower:
            return replace(self, solver=replace(self.solver, lower_final=True))
        return self

    def init_noise_sigma(self, schedule: Schedule, grid: np.ndarray, spacing: Spacing) -> float:
        """What unit noise is multiplied by to be x at grid[0]."""
        return float(schedule.sigma(grid[0])) if self.spread_start and spacing.timestep_spacing != "leading" else 1.0


SAMPLERS: Mapping[str, Sampler] = {
    "lcm": Sampler(solver=LCM(), grid=_consistency_grid, consistency=True, even=True),
    "tcd": Sampler(solver=TCD(), grid=_tcd_grid, even=True),
    "flow_map": Sampler(solver=TCD(gamma=0.0), grid=_trailing_grid, even=True),
    "ddim": Sampler(solver=DDIM(), grid=_ddim_grid),
    "euler": Sampler(solver=Euler(), grid=_euler_grid, spread_start=True),
    "euler_a": Sampler(solver=DDIM(eta=1.0), grid=_heun_grid, spread_start=True),  # ancestral: DDPM's noise
    "heun": Sampler(solver=Heun(), grid=_heun_grid, spread_start=True),
    "dpm++2m": Sampler(solver=DPMpp2M(), grid=_dpm_grid),
    "dpm2": Sampler(solver=DPMSolver2(), grid=_dpm_grid),
}


def time_grid(
    sampler: Sampler, schedule: Schedule, steps: int, *, spacing: Spacing = Spacing(), strength: float = 1.0
) -> Float[np.ndarray, " n_plus_1"]:
    """The grid of a sampler on a schedule; strength below 1 is image-to-image.

    LCM spends all its steps below the strength, on the times it was distilled on; the others drop their first steps.
    In continuous time those are evenly spaced down from the strength: none is wasted on an almost clean latent.
    """
    if isinstance(schedule, DDPM):
        return sampler.grid(steps, spacing, strength)
    if sampler.even:
        _check_strength(strength)
        return strength * even_grid(steps, schedule)
    if isinstance(schedule, RectifiedFlow):
        return truncate(flow_grid(steps, schedule, spacing), strength, up=True)
    return truncate(even_grid(steps, schedule), strength)
