"""Samplers by name: a solver with its time grid and its starting noise, which is what diffusers calls a scheduler."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from lcm_jax.diffusion.multistep_solvers import DEIS, LMS, PLMS, DPMppMultistep, DPMppSinglestep, UniPC
from lcm_jax.diffusion.schedules import DDPM, RectifiedFlow
from lcm_jax.diffusion.solvers import DDIM, LCM, TCD, DPM2Ancestral, DPMppSDE, DPMSolver2, Euler, Heun
from lcm_jax.diffusion.time_grids import (
    ALIGNED,
    RULES,
    Spacing,
    Walk,
    aligned_levels,
    check_steps,
    check_strength,
    even_grid,
    lcm_grid,
    noise_levels,
    spaced_times,
    table_network_times,
    table_times,
    truncate,
)
from lcm_jax.typing import Kind, Schedule, Solver

TableGrid = Callable[[int, Spacing, float], np.ndarray]
"""(steps, spacing, strength) -> the times of a table at which a sampler evaluates the network, and its end."""
FlowGrid = Callable[[int, RectifiedFlow, Spacing], np.ndarray]
"""(steps, schedule, spacing) -> the times of a flow where the scheduler config says use_flow_sigmas."""
Levels = Float[Array | np.ndarray, " n"] | Int[Array | np.ndarray, " n"] | Sequence[float]
"""Noise levels or timesteps, one for each step."""


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """A solver with the time grid and the starting noise that go with it.

    grid: the times on a discrete table; None: the schedule's own (`Schedule.grid`). `time_grid` serves all schedules.
    flow_grid: the times of a flow where a scheduler config says use_flow_sigmas; None: the flow's own.
    spacing: the timestep spacing, where the sampler passes over that of a scheduler config.
    spread_start: the noise starts at sigma(t_0), not at 1, unless the spacing is leading (diffusers' Euler and Heun).
    consistency: the denoiser must be a consistency function. ValueError for a solver that lacks one of its facts.
    even: in continuous time its steps are equally long, and all lie below the strength.
    rules: the sigma rules of a scheduler config that its scheduler in diffusers reads; a call may ask for any
    (`time_grid`). table_ends: they run over the whole table, not from the first spaced time to the last.
    rounds: how the network's times between the timesteps are rounded there ("": they are not; "nearest"; "whole", which
    is nearest for karras and lu, and down otherwise).
    orders: the highest order of each of N steps, for multistep solvers that lower it.
    options: fields of the solver that a scheduler config sets, by their names there.
    repeats_second: the walk visits its second time twice (`PLMS`).
    usual_steps: the number of steps that a picture is drawn in where none is given.
    diffusers: the scheduler classes of diffusers that are this sampler, step by step.

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
    flow_grid: FlowGrid | None = None
    spacing: str | None = None
    spread_start: bool = False
    consistency: bool = False
    even: bool = False
    rules: tuple[str, ...] = ()
    table_ends: bool = False
    rounds: str = ""
    orders: Callable[[int, Spacing, Solver], list[int]] | None = None
    options: tuple[str, ...] = ()
    repeats_second: bool = False
    usual_steps: int = 25
    diffusers: tuple[str, ...] = ()

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

    def configured(self, spacing: Spacing, kind: Kind) -> Sampler:
        """Return the sampler with the solver's options of a scheduler config, for networks of an output kind.

        A solver_type that is another solver's is passed over, as in diffusers.
        """
        changes: dict[str, Any] = {"kind": kind} if isinstance(self.solver, PLMS) else {}
        for name in self.options:
            value = getattr(spacing, name)
            if value is not None and (name != "solver_type" or value in _solver_types(self.solver)):
                changes[name] = value
        return replace(self, solver=replace(self.solver, **changes)) if changes else self  # type: ignore[type-var]

    def init_noise_sigma(self, schedule: Schedule, grid: np.ndarray, spacing: Spacing) -> float:
        """Return the factor that makes unit noise x at grid[0]."""
        return float(schedule.sigma(grid[0])) if self.spread_start and spacing.timestep_spacing != "leading" else 1.0


def _solver_types(solver: Solver) -> tuple[str, ...]:
    return ("bh1", "bh2") if isinstance(solver, UniPC) else ("midpoint", "heun")


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
    if spacing.sigmas in sampler.rules:
        return walk(sampler, schedule, steps, spacing=spacing, strength=strength).times
    if sampler.spacing is not None:
        spacing = replace(spacing, timestep_spacing=sampler.spacing)
    if schedule.timesteps is not None and sampler.grid is not None:
        return sampler.grid(steps, spacing, strength)
    if schedule.timesteps is None and sampler.even:
        check_strength(strength)
        return strength * even_grid(steps, schedule)
    if spacing.use_flow_sigmas and sampler.flow_grid is not None and isinstance(schedule, RectifiedFlow):
        check_steps(steps, spacing.num_train_timesteps)
        times = sampler.flow_grid(steps, schedule, spacing)
    else:
        times = schedule.grid(steps, spacing)
    return truncate(times, strength, up=schedule.keeps_partial_step)


def walk(
    sampler: Sampler,
    schedule: Schedule,
    steps: int,
    *,
    spacing: Spacing = Spacing(),
    strength: float = 1.0,
    sigmas: str | Levels | None = None,
    timesteps: Levels | None = None,
    timestep_spacing: str | None = None,
    family: str = "sd1",
) -> Walk:
    """Return all that a sampler's N steps are: `time_grid`, with the network's times and the orders of the steps.

    sigmas: a rule of `time_grids.RULES`, or the N noise levels themselves, a last 0 given or not: sigma / alpha of a
    table, sigma before the shift of a rectified flow, as in diffusers. timesteps: what the network is to be told, N
    times. Without either the rule is the spacing's, where the sampler reads it. timestep_spacing: in place of the
    spacing's. family: whose steps "ays" are, "sd1" or "sdxl". The end is the sampler's own. ValueError for rules that
    contradict one another, and for steps that do not fall or are not in the schedule.

    >>> from lcm_jax.diffusion.samplers import get_sampler, walk
    >>> from lcm_jax.diffusion.schedules import DDPM
    >>> walk(get_sampler("euler"), DDPM(), 3, sigmas="karras").times.round().astype(int).tolist()
    [999, 593, 0, -1]
    >>> walk(get_sampler("lcm"), DDPM(), 1, timesteps=[800]).times.tolist()
    [800.0, -1.0]
    """
    if sigmas is not None and timesteps is not None:
        raise ValueError("sigmas and timesteps are both given, and each places the steps: leave one out")
    if timestep_spacing is not None:
        sampler, spacing = _respaced(sampler, schedule, spacing, timestep_spacing, sigmas, timesteps)
    rule = sigmas if sigmas is not None else spacing.sigmas if spacing.sigmas in sampler.rules else None
    plain = replace(spacing, sigmas=None)
    if timesteps is not None:
        times, network_times = _given_timesteps(sampler, schedule, timesteps, plain)
    elif rule is None:
        times = time_grid(sampler, schedule, steps, spacing=plain, strength=strength)
        network_times = _network_times(sampler, schedule, times, plain)
    elif isinstance(rule, str):
        times, network_times = _by_rule(sampler, schedule, rule, steps, plain, family)
    else:
        times, network_times = _given_sigmas(sampler, schedule, rule, plain)
    total = steps if timesteps is None and rule is None else len(times) - 1
    if timesteps is not None or rule is not None:
        left = truncate(times, strength, up=schedule.keeps_partial_step)
        times, network_times = left, network_times[-len(left) :]
    n = len(times) - 1
    orders = [9] * total if sampler.orders is None else sampler.orders(total, spacing, sampler.solver)
    made = Walk(times, network_times, np.asarray(orders[-n:], np.int32))
    return made.with_second_repeated() if sampler.repeats_second else made


def _respaced(
    sampler: Sampler, schedule: Schedule, spacing: Spacing, asked: str, sigmas: Any, timesteps: Any
) -> tuple[Sampler, Spacing]:
    """Return the sampler and the spacing of a call that asks for a timestep spacing; ValueError where it has none."""
    changed = replace(spacing, timestep_spacing=asked)
    name = _name(sampler)
    if given_steps(sigmas, timesteps) is not None:
        given = "sigmas" if timesteps is None else "timesteps"
        raise ValueError(f"spacing {asked!r} and {given} are both given, and each places the steps: leave one out")
    if schedule.timesteps is None:
        raise ValueError(f"spacing {asked!r} places timesteps of a table, and this model's time is continuous")
    if sampler.even:
        raise ValueError(f"sampler {name} takes its own timesteps: leave spacing {asked!r} out, or give timesteps")
    if sampler.table_ends and isinstance(sigmas, str) and sigmas != "ays":
        raise ValueError(
            f"sampler {name} spreads sigmas {sigmas!r} over the whole table, whatever the spacing: leave spacing out"
        )
    return replace(sampler, spacing=None), changed


def given_steps(sigmas: str | Levels | None, timesteps: Levels | None) -> int | None:
    """Return the number of steps of given noise levels or timesteps, None where they are not given.

    >>> from lcm_jax.diffusion.samplers import given_steps
    >>> given_steps([10.0, 1.0, 0.0], None), given_steps(None, [800]), given_steps("karras", None)
    (2, 1, None)
    """
    if timesteps is not None:
        return len(_numbers("timesteps", timesteps))
    return None if sigmas is None or isinstance(sigmas, str) else len(_levels(sigmas))


def check_given_steps(steps: int | None, sigmas: str | Levels | None, timesteps: Levels | None) -> int | None:
    """Return the number of steps that is given, by itself or as a list; ValueError where the two differ.

    >>> from lcm_jax.diffusion.samplers import check_given_steps
    >>> check_given_steps(None, None, [800]), check_given_steps(4, "karras", None)
    (1, 4)
    """
    given = given_steps(sigmas, timesteps)
    if given is not None and steps is not None and steps != given:
        name = "sigmas" if timesteps is None else "timesteps"
        raise ValueError(f"steps is {steps!r:.80}, and {name} are those of {given} steps: leave steps out")
    return steps if given is None else given


def _numbers(name: str, values: Levels) -> np.ndarray:
    try:
        row = np.asarray(values, np.float64)
    except (TypeError, ValueError):
        row = np.zeros(0)
    if row.ndim != 1 or not row.size or not np.isfinite(row).all():
        raise ValueError(f"{name} is {values!r:.80}: give finite numbers, one for each step")
    if (np.diff(row) >= 0.0).any():
        raise ValueError(f"{name} must fall from step to step, from noise to picture, and {values!r:.80} do not")
    return row


def _levels(sigmas: Levels) -> np.ndarray:
    """Return noise levels without a last 0."""
    row = _numbers("sigmas", sigmas)
    row = row[:-1] if row[-1] == 0.0 else row
    if not row.size or row[-1] <= 0.0:
        raise ValueError(f"sigmas {sigmas!r:.80} are not above 0: give the noise levels of the steps")
    return row


def _end(sampler: Sampler, schedule: Schedule, spacing: Spacing) -> float:
    """Return the time at which the sampler delivers."""
    return float(time_grid(sampler, schedule, 1, spacing=spacing)[-1])


def _given_timesteps(
    sampler: Sampler, schedule: Schedule, timesteps: Levels, spacing: Spacing
) -> tuple[np.ndarray, np.ndarray]:
    row = _numbers("timesteps", timesteps)
    most = spacing.num_train_timesteps - 1 if schedule.timesteps is None else schedule.timesteps - 1
    most += schedule.timesteps is None
    if row[0] > most or row[-1] < 0:
        raise ValueError(f"timesteps {timesteps!r:.80} must lie between 0 and {most}")
    times = row
    if isinstance(schedule, RectifiedFlow):
        times = _unshifted(schedule, row / 1000.0)
    elif schedule.timesteps is None:
        times = row / 1000.0 / (float(schedule.network_time(1.0)) / 1000.0)
    if schedule.timesteps is None and row[-1] == 0.0:
        raise ValueError("timesteps end at 0, which is the clean picture here: leave it out")
    end = _end(sampler, schedule, spacing)
    return np.append(times, min(end, times[-1])), np.append(row, max(end, 0.0))


def _given_sigmas(
    sampler: Sampler, schedule: Schedule, sigmas: Levels, spacing: Spacing
) -> tuple[np.ndarray, np.ndarray]:
    levels = _levels(sigmas)
    if isinstance(schedule, DDPM):
        high = float(schedule.ratios[-1])
        if levels[0] > high * 1.001:
            raise ValueError(f"sigmas begin at {levels[0]:g}, and this model's noise ends at {high:.5g}")
        times = table_times(levels, schedule.ratios)
        network_times = table_network_times(levels, schedule.ratios)
    elif isinstance(schedule, RectifiedFlow):
        if levels[0] > 1.0:
            raise ValueError(f"sigmas begin at {levels[0]:g}: those of a rectified flow are between 0 and 1")
        times = levels
        network_times = np.asarray(schedule.network_time(times.astype(np.float32)))
    else:
        times = np.asarray(schedule.time_at(jnp.asarray(-np.log(levels), jnp.float32)), np.float64)
        network_times = np.asarray(schedule.network_time(times.astype(np.float32)))
    end = _end(sampler, schedule, spacing)
    return np.append(times, min(end, times[-1])), np.append(network_times, max(end, 0.0))


def _by_rule(
    sampler: Sampler, schedule: Schedule, rule: str, steps: int, spacing: Spacing, family: str
) -> tuple[np.ndarray, np.ndarray]:
    """Return the times whose noise levels a rule makes of the ends of the table or of the sampler's grid."""
    if rule not in RULES:
        raise ValueError(f"sigmas {rule!r} is unknown: use one of {', '.join(RULES)}, or an array of noise levels")
    if rule == "ays" and not isinstance(schedule, DDPM):
        raise ValueError("sigmas 'ays' has steps for Stable Diffusion 1, 2 and XL: this model needs another rule")
    base = time_grid(sampler, schedule, steps, spacing=spacing)
    n, end = len(base) - 1, float(base[-1])
    if isinstance(schedule, DDPM):
        ratios = schedule.ratios
        high, low = float(ratios[-1]), float(ratios[0])
        if not sampler.table_ends:
            high, low = (float(np.interp(t, np.arange(len(ratios)), ratios)) for t in (base[0], base[-2]))
        if rule == "ays" and n == 10:
            times = np.asarray(ALIGNED[family][:-1], np.float64)
            return np.append(times, end), np.append(times, max(end, 0.0))
        levels = aligned_levels(family, n, ratios) if rule == "ays" else noise_levels(rule, n, high, low)
        network_times = _rounded(table_network_times(levels, ratios), sampler, rule, schedule)
        return np.append(np.maximum(table_times(levels, ratios), end), end), np.append(network_times, max(end, 0.0))
    if isinstance(schedule, RectifiedFlow):
        if spacing.use_flow_sigmas:  # diffusers' UniPC: the levels of a table, as those of a flow of the same log-SNR
            ratios = DDPM().ratios
            levels = noise_levels(rule, n, float(ratios[-1]), float(ratios[0]))
            levels = levels / (1.0 + levels)
            network_times = np.trunc(1000.0 * levels) if sampler.rounds else 1000.0 * levels
        else:
            high, low = (float(schedule.sigma(float(t))) for t in (base[0], base[-2]))
            levels = noise_levels(rule, n, high, low)
            network_times = 1000.0 * levels
        return np.append(_unshifted(schedule, levels), end), np.append(network_times, 0.0)
    levels = noise_levels(rule, n, 80.0, 0.002)
    times = np.asarray(schedule.time_at(jnp.asarray(-np.log(levels), jnp.float32)), np.float64)
    return np.append(times, end), np.asarray(schedule.network_time(np.append(times, end).astype(np.float32)))


def _rounded(network_times: np.ndarray, sampler: Sampler, rule: str, schedule: DDPM) -> np.ndarray:
    near = rule in ("karras", "lu") and not (
        sampler.rounds == "whole" and schedule.beta_schedule == "squaredcos_cap_v2"
    )
    if sampler.rounds and near:
        return np.round(network_times)
    return np.trunc(network_times) if sampler.rounds == "whole" else network_times


def _unshifted(flow: RectifiedFlow, sigma: np.ndarray) -> np.ndarray:
    """Return the times at which a flow has these sigmas."""
    return sigma / (flow.shift - (flow.shift - 1.0) * sigma)


def _network_times(sampler: Sampler, schedule: Schedule, times: np.ndarray, spacing: Spacing) -> np.ndarray:
    """Return what the network is told at the times of a grid without a rule."""
    if schedule.timesteps is not None:
        return np.maximum(times, 0.0)
    if isinstance(schedule, RectifiedFlow) and spacing.use_flow_sigmas and sampler.rounds == "whole":
        sigma = schedule.shift * times / (1.0 + (schedule.shift - 1.0) * times)
        return np.trunc(1000.0 * sigma)  # diffusers' DPM solvers
    return np.asarray(schedule.network_time(times.astype(np.float32)))


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


def _clean_grid(steps: int, spacing: Spacing, strength: float) -> np.ndarray:
    return _ddim_grid(steps, replace(spacing, set_alpha_to_one=True), strength)


def _ddim_grid(steps: int, spacing: Spacing, strength: float) -> np.ndarray:
    leading = replace(spacing, timestep_spacing=spacing.timestep_spacing or "leading")
    return _table_grid(steps, leading, strength, clean=spacing.set_alpha_to_one)


def _deis_grid(steps: int, spacing: Spacing, strength: float) -> np.ndarray:
    return _table_grid(steps, spacing, strength, clean=False, skip_first=True)


def _dpm_flow(steps: int, flow: RectifiedFlow, spacing: Spacing) -> np.ndarray:
    return np.linspace(1.0 - 1.0 / spacing.num_train_timesteps, 0.0, steps + 1)


def _deis_flow(steps: int, flow: RectifiedFlow, spacing: Spacing) -> np.ndarray:
    times = _dpm_flow(steps, flow, spacing)
    return np.append(times[:-1], times[-2])  # diffusers' DEIS ends where its last step begins


def _unipc_flow(steps: int, flow: RectifiedFlow, spacing: Spacing) -> np.ndarray:
    times = np.linspace(1.0, 1.0 / spacing.num_train_timesteps, steps + 1)[:-1]
    times[:1] = _unshifted(flow, np.array([1.0 - 1e-6]))  # not quite pure noise, whose log-SNR is infinite
    return np.append(times, 0.0)


def _dpm_orders(steps: int, spacing: Spacing, solver: Any) -> list[int]:
    last = spacing.euler_at_final or spacing.final_sigmas_type == "zero"
    return _lower_at_the_end(steps, spacing, 1 if last else 3)


def _deis_orders(steps: int, spacing: Spacing, solver: Any) -> list[int]:
    return _lower_at_the_end(steps, spacing, 3)


def _lower_at_the_end(steps: int, spacing: Spacing, last: int) -> list[int]:
    """Return the orders of N steps: fewer than 15 end with a step of second order and one of first."""
    few = spacing.lower_order_final and steps < 15
    return [3] * (steps - 2) + [2 if few else 3] * (steps > 1) + [1 if few else last]


def _unipc_orders(steps: int, spacing: Spacing, solver: Any) -> list[int]:
    return [steps - i if spacing.lower_order_final else 3 for i in range(steps)]


def _singlestep_orders(steps: int, spacing: Spacing, solver: Any) -> list[int]:
    """Return 1, 2, 1, 2, ... (1, 2, 3, ...), with the last group cut such that the last step is of first order.

    With final_sigmas_type sigma_min and lower_order_final false the groups stay whole where the number of steps allows.
    """
    order = solver.solver_order
    group = list(range(1, order + 1))
    if spacing.lower_order_final or spacing.final_sigmas_type == "zero" or steps % order:
        short = {1: [1], 2: [1, 1], 3: [1, 2, 1]}[order] if steps % order == 0 else {1: [1], 2: [1, 2]}[steps % order]
        orders = group * ((steps - len(short)) // order) + short
    else:
        orders = group * (steps // order)
    if spacing.final_sigmas_type == "zero":
        orders[-1] = 1
    return orders


_RULES = ("karras", "exponential", "beta")
_DPM: dict[str, Any] = {
    "grid": _dpm_grid,
    "flow_grid": _dpm_flow,
    "rules": (*_RULES, "lu"),
    "table_ends": True,
    "rounds": "whole",
    "orders": _dpm_orders,
}

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
    "ddim": Sampler(solver=DDIM(), usual_steps=50, diffusers=("DDIMScheduler",)),
    "ddpm": Sampler(solver=DDIM(eta=1.0), grid=_clean_grid, usual_steps=50, diffusers=("DDPMScheduler",)),
    "pndm": Sampler(solver=PLMS(), grid=_ddim_grid, repeats_second=True, usual_steps=50, diffusers=("PNDMScheduler",)),
    "euler": Sampler(
        solver=Euler(),
        grid=_euler_grid,
        spread_start=True,
        rules=_RULES,
        usual_steps=28,
        diffusers=("EulerDiscreteScheduler", "FlowMatchEulerDiscreteScheduler"),
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
        rules=_RULES,
        diffusers=("HeunDiscreteScheduler", "FlowMatchHeunDiscreteScheduler"),
    ),
    "lms": Sampler(solver=LMS(), grid=_heun_grid, spread_start=True, rules=_RULES, diffusers=("LMSDiscreteScheduler",)),
    "dpm2": Sampler(
        solver=DPMSolver2(),
        grid=_heun_grid,
        spread_start=True,
        rules=_RULES,
        rounds="nearest",
        diffusers=("KDPM2DiscreteScheduler",),
    ),
    "dpm2_a": Sampler(
        solver=DPM2Ancestral(),
        grid=_heun_grid,
        spread_start=True,
        rules=_RULES,
        rounds="nearest",
        diffusers=("KDPM2AncestralDiscreteScheduler",),
    ),
    "dpm++2s": Sampler(
        solver=DPMppSinglestep(),
        grid=_dpm_grid,
        flow_grid=_dpm_flow,
        spacing="linspace",
        rules=_RULES,
        table_ends=True,
        rounds="whole",
        orders=_singlestep_orders,
        options=("solver_order",),
        diffusers=("DPMSolverSinglestepScheduler",),
    ),
    "dpm++2m": Sampler(
        solver=DPMppMultistep(),
        **_DPM,
        options=("solver_order", "solver_type"),
        diffusers=("DPMSolverMultistepScheduler",),
    ),
    "dpm++2m_sde": Sampler(solver=DPMppMultistep(sde=True), **_DPM, options=("solver_type",)),
    "dpm++3m_sde": Sampler(solver=DPMppMultistep(sde=True, solver_order=3), **_DPM),
    "dpm++sde": Sampler(
        solver=DPMppSDE(),
        grid=_heun_grid,
        spread_start=True,
        rules=_RULES,
        diffusers=("DPMSolverSDEScheduler",),
    ),
    "unipc": Sampler(
        solver=UniPC(),
        **_DPM | {"rules": _RULES, "flow_grid": _unipc_flow, "orders": _unipc_orders},
        options=("solver_order", "solver_type"),
        diffusers=("UniPCMultistepScheduler",),
    ),
    "deis": Sampler(
        solver=DEIS(),
        **_DPM | {"rules": _RULES, "grid": _deis_grid, "flow_grid": _deis_flow, "orders": _deis_orders},
        options=("solver_order",),
        diffusers=("DEISMultistepScheduler",),
    ),
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
