"""Samplers by name: a solver with its time grid and its starting noise, which is what diffusers calls a scheduler."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float

from lcm_jax.diffusion.solvers import DDIM, LCM, TCD, DPMpp2M, DPMSolver2, Euler, Heun
from lcm_jax.diffusion.time_grids import Spacing, check_strength, even_grid, lcm_grid, spaced_times, truncate
from lcm_jax.typing import Schedule, Solver

TableGrid = Callable[[int, Spacing, float], np.ndarray]
"""(steps, spacing, strength) -> the times of a table at which a sampler evaluates the network, and its end."""


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """A solver with the time grid and the starting noise that go with it.

    grid: the times on a discrete table; None: the schedule's own (`Schedule.grid`). `time_grid` serves all schedules.
    spread_start: the noise starts at sigma(t_0), not at 1, unless the spacing is leading (diffusers' Euler and Heun).
    consistency: the denoiser must be a consistency function. ValueError for a solver that lacks one of its facts.
    even: in continuous time its steps are equally long, and all lie below the strength.
    spaces_sigmas: diffusers' scheduler places its steps by noise levels, and so reads use_karras_sigmas and the like.
    usual_steps: the number of steps that a picture is drawn in where none is given.
    diffusers: the scheduler classes of diffusers that are this sampler, step by step.
    replaces: scheduler classes of diffusers that this library lacks: this sampler draws for them, with a warning.

    >>> from lcm_jax.diffusion.samplers import get_sampler
    >>> heun = get_sampler("heun")
    >>> heun.solver.order, heun.solver.evaluations, heun.solver.stochastic
    (2, 2, False)
    >>> heun.diffusers
    ('HeunDiscreteScheduler', 'FlowMatchHeunDiscreteScheduler')
    >>> heun.usual_steps, get_sampler("lcm").usual_steps
    (25, 4)
    """

    solver: Solver
    grid: TableGrid | None = None
    spread_start: bool = False
    consistency: bool = False
    even: bool = False
    spaces_sigmas: bool = False
    usual_steps: int = 25
    diffusers: tuple[str, ...] = ()
    replaces: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        facts = ("order", "evaluations", "stochastic", "init", "step")
        if missing := [name for name in facts if not hasattr(self.solver, name)]:
            raise ValueError(
                f"solver {type(self.solver).__name__} has no {', '.join(missing)}: see lcm_jax.typing.Solver"
            )

    @property
    def few_steps(self) -> bool:
        """True if it draws with students, whose guidance is part of what they learned or an input."""
        return self.usual_steps <= 8

    @property
    def streams(self) -> bool:
        """True if a stream batch can use it: the network is evaluated once for each frame in flight."""
        return self.solver.evaluations == 1

    def at(self, steps: int, spacing: Spacing) -> Sampler:
        """Return the sampler for a grid of `steps`: to a final sigma above 0 a short DPM++(2M) ends in first order."""
        lower = spacing.euler_at_final or (spacing.lower_order_final and steps < 15)
        if isinstance(self.solver, DPMpp2M) and spacing.final_sigmas_type == "sigma_min" and lower:
            return replace(self, solver=replace(self.solver, lower_final=True))
        return self

    def init_noise_sigma(self, schedule: Schedule, grid: np.ndarray, spacing: Spacing) -> float:
        """Return the factor that makes unit noise x at grid[0]."""
        return float(schedule.sigma(grid[0])) if self.spread_start and spacing.timestep_spacing != "leading" else 1.0


def time_grid(
    sampler: Sampler, schedule: Schedule, steps: int, *, spacing: Spacing = Spacing(), strength: float = 1.0
) -> Float[np.ndarray, " n_plus_1"]:
    """Return the times of a sampler on a schedule, from noise to the clean end; strength below 1 is image-to-image.

    LCM spends all its steps below the strength, on the times it was distilled on; the others drop their first steps.
    In continuous time LCM's steps are evenly spaced down from the strength: none is wasted on an almost clean latent.
    ValueError for steps or a strength that the grid does not have.

    >>> from lcm_jax.diffusion.samplers import get_sampler, time_grid
    >>> from lcm_jax.diffusion.schedules import DDPM, RectifiedFlow
    >>> time_grid(get_sampler("lcm"), DDPM(), 4).tolist()
    [999.0, 759.0, 499.0, 259.0, -1.0]
    >>> time_grid(get_sampler("ddim"), DDPM(), 4, strength=0.5).tolist()
    [250.0, 0.0, -1.0]
    >>> time_grid(get_sampler("lcm"), RectifiedFlow(), 4).tolist()
    [1.0, 0.75, 0.5, 0.25, 0.0]
    """
    if spacing.sigmas is not None and sampler.spaces_sigmas:
        raise ValueError(
            f"the scheduler config sets {spacing.sigmas}, which the sampler {_name(sampler)} reads in diffusers and "
            f"does not have here: load with scheduler={{{spacing.sigmas!r}: False}} (--scheduler "
            f"{spacing.sigmas}=false), or name a sampler that passes over it, such as ddim"
        )
    if schedule.timesteps is not None and sampler.grid is not None:
        return sampler.grid(steps, spacing, strength)
    if schedule.timesteps is None and sampler.even:
        check_strength(strength)
        return strength * even_grid(steps, schedule)
    return truncate(schedule.grid(steps, spacing), strength, up=schedule.keeps_partial_step)


def _euler_grid(steps: int, spacing: Spacing, strength: float) -> np.ndarray:
    return _table_grid(steps, spacing, strength, clean=spacing.final_sigmas_type == "zero", fractional=True)


def _heun_grid(steps: int, spacing: Spacing, strength: float) -> np.ndarray:
    return _table_grid(steps, spacing, strength, clean=True, fractional=True)


def _dpm_grid(steps: int, spacing: Spacing, strength: float) -> np.ndarray:
    return _table_grid(steps, spacing, strength, clean=spacing.final_sigmas_type == "zero", skip_first=True)


def _lcm_grid(steps: int, spacing: Spacing, strength: float) -> np.ndarray:
    original, total = spacing.original_inference_steps, spacing.num_train_timesteps
    return lcm_grid(steps, original_steps=original, num_train_timesteps=total, strength=strength)


def _tcd_grid(steps: int, spacing: Spacing, strength: float) -> np.ndarray:
    return np.maximum(_lcm_grid(steps, spacing, strength), 0.0)  # diffusers' ends at timestep 0


def _trailing_grid(steps: int, spacing: Spacing, strength: float) -> np.ndarray:
    trailing = replace(spacing, timestep_spacing="trailing")
    return _table_grid(steps, trailing, strength, clean=spacing.set_alpha_to_one)


def _table_grid(steps: int, spacing: Spacing, strength: float, *, clean: bool, **rule: bool) -> np.ndarray:
    times = spaced_times(
        steps,
        spacing=spacing.timestep_spacing or "linspace",
        steps_offset=spacing.steps_offset,
        num_train_timesteps=spacing.num_train_timesteps,
        **rule,
    )
    return truncate(np.append(times, -1.0 if clean else 0.0), strength)


SAMPLERS: dict[str, Sampler] = {
    "lcm": Sampler(
        solver=LCM(),
        grid=_lcm_grid,
        consistency=True,
        even=True,
        usual_steps=4,
        diffusers=("LCMScheduler", "FlowMatchLCMScheduler"),
    ),
    "tcd": Sampler(solver=TCD(), grid=_tcd_grid, even=True, usual_steps=4, diffusers=("TCDScheduler",)),
    "flow_map": Sampler(solver=TCD(gamma=0.0), grid=_trailing_grid, even=True, usual_steps=4),
    "ddim": Sampler(
        solver=DDIM(), usual_steps=50, diffusers=("DDIMScheduler",), replaces=("DDPMScheduler", "PNDMScheduler")
    ),
    "euler": Sampler(
        solver=Euler(),
        grid=_euler_grid,
        spread_start=True,
        spaces_sigmas=True,
        usual_steps=28,
        diffusers=("EulerDiscreteScheduler", "FlowMatchEulerDiscreteScheduler"),
        replaces=("LMSDiscreteScheduler",),
    ),
    "euler_a": Sampler(  # ancestral: DDPM's noise
        solver=DDIM(eta=1.0),
        grid=_heun_grid,
        spread_start=True,
        usual_steps=28,
        diffusers=("EulerAncestralDiscreteScheduler",),
    ),
    "heun": Sampler(
        solver=Heun(),
        grid=_heun_grid,
        spread_start=True,
        spaces_sigmas=True,
        diffusers=("HeunDiscreteScheduler", "FlowMatchHeunDiscreteScheduler"),
        replaces=("KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler"),
    ),
    "dpm++2m": Sampler(
        solver=DPMpp2M(),
        grid=_dpm_grid,
        spaces_sigmas=True,
        diffusers=("DPMSolverMultistepScheduler",),
        replaces=(
            *("DPMSolverSinglestepScheduler", "DPMSolverSDEScheduler"),
            *("DEISMultistepScheduler", "UniPCMultistepScheduler"),
        ),
    ),
    "dpm2": Sampler(solver=DPMSolver2(), grid=_dpm_grid),
}
"""Every sampler by its name; `register` adds one."""

_RENAMED = {"jump": "flow_map"}


def _name(sampler: Sampler) -> str:
    """Return a sampler's name, or that of its solver where it is not registered."""
    names = (name for name, known in SAMPLERS.items() if known == sampler)
    return next(names, type(sampler.solver).__name__)


def register(name: str, sampler: Sampler) -> Sampler:
    """Add a sampler under a new name, for `pipe(..., sampler=name)`; ValueError where the name is taken.

    >>> from lcm_jax.diffusion.samplers import SAMPLERS, Sampler, get_sampler, register
    >>> from lcm_jax.diffusion.solvers import TCD
    >>> noisy = register("tcd-noisy", Sampler(solver=TCD(gamma=0.9), grid=SAMPLERS["tcd"].grid, even=True))
    >>> get_sampler("tcd-noisy").solver.gamma
    0.9
    >>> del SAMPLERS["tcd-noisy"]
    """
    if not isinstance(sampler, Sampler):
        raise ValueError(f"sampler {name!r} is a {type(sampler).__name__}: give a Sampler, such as Sampler(solver=...)")
    if SAMPLERS.get(name, sampler) != sampler:
        raise ValueError(f"sampler {name!r} is registered already: give yours another name")
    SAMPLERS[name] = sampler
    return sampler


def sampler_name(name: str) -> str:
    """Return the name a sampler has now; a name of earlier versions warns. ValueError lists the known names.

    >>> from lcm_jax.diffusion.samplers import sampler_name
    >>> sampler_name("dpm2")
    'dpm2'
    >>> sampler_name("dmp2")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ValueError: sampler 'dmp2' is unknown, did you mean dpm2? known are lcm, tcd, ...
    """
    if name in _RENAMED:
        warnings.warn(f"sampler {name!r} is now called {_RENAMED[name]!r}", DeprecationWarning, stacklevel=3)
        name = _RENAMED[name]
    if name not in SAMPLERS:
        near = difflib.get_close_matches(str(name).lower().replace("pp", "++").replace("_", ""), SAMPLERS, n=1)
        hint = f", did you mean {near[0]}?" if near else ";"
        raise ValueError(f"sampler {name!r} is unknown{hint} known are {', '.join(SAMPLERS)}")
    return name


def get_sampler(name: str | Sampler) -> Sampler:
    """Return the sampler of a name, or a sampler itself; ValueError lists the known names.

    >>> from lcm_jax.diffusion.samplers import get_sampler
    >>> get_sampler("euler_a").solver
    DDIM(eta=1.0)
    """
    return name if isinstance(name, Sampler) else SAMPLERS[sampler_name(name)]
