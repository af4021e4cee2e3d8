"""Every sampler under every sigma rule against diffusers' scheduler of the same config, under one nonlinear network.

The network's output is of unit size and depends on the time as fast as an embedding does, so that a time that is rounded
otherwise shows.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lcm_jax.diffusion.parameterization import bind
from lcm_jax.diffusion.samplers import SAMPLERS, walk
from lcm_jax.diffusion.sampling import sample
from lcm_jax.diffusion.schedules import OnGrid
from lcm_jax.diffusion.time_grids import SIGMAS, Grid, Spacing, pad
from lcm_jax.typing import Kind, Schedule, Solver
from lcm_jax.weights.scheduler_config import read_scheduler, read_spacing, sampler_of

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
schedulers = pytest.importorskip("diffusers.schedulers")

SHAPE = (2, 4, 4, 3)
LATENT = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
X = np.random.default_rng(0).standard_normal(SHAPE).astype(np.float32)
NOISE = np.random.default_rng(1).standard_normal((60, *SHAPE)).astype(np.float32)
KEEPS_RATIO = ("Euler", "Heun", "LMS", "KDPM2", "DPMSolverSDE")  # keep x / alpha


@pytest.fixture(autouse=True)
def _quiet_torch() -> Iterator[None]:
    torch.set_num_threads(1)
    with torch.no_grad():
        yield


def network(xp: Any, x: Any, t: Any) -> Any:
    """tanh of an affine map of (x, t), with a wave of two timesteps' length: the same in jax and in torch."""
    return xp.tanh(0.8 * x + 0.002 * t - 0.7) + 0.3 * xp.sin(0.9 * t)


@functools.cache
def program(solver: Solver, schedule: Schedule, kind: Kind) -> Callable[[Grid, jax.Array, Any], jax.Array]:
    """One program for every grid, number of steps and noise of a solver."""

    def run(grid: Grid, x: jax.Array, noise: Any) -> jax.Array:
        denoise = bind(lambda params, x, t, cond: network(jnp, x, t), None, {}, OnGrid(schedule, grid), kind)
        return sample(denoise, schedule, solver, grid, x, jax.random.key(0), noise=noise)

    return jax.jit(run)


def ours(config: dict[str, Any], steps: int, noise: np.ndarray | None = None, **placed: Any) -> np.ndarray:
    (schedule, kind), spacing = read_scheduler(config), read_spacing(config)
    sampler = SAMPLERS[sampler_of(config)].configured(spacing, kind)
    steps_of = walk(sampler, schedule, steps, spacing=spacing, **placed)
    x = jnp.asarray(sampler.init_noise_sigma(schedule, steps_of.times, spacing) * X)
    return np.asarray(program(sampler.solver, schedule, kind)(pad(steps_of), x, noise))


def theirs(config: dict[str, Any], steps: int, *, drawn: list[np.ndarray] | None = None, **placed: Any) -> np.ndarray:
    """What diffusers' scheduler delivers, in our scale where it keeps x / alpha."""
    name = config["_class_name"]
    scheduler = getattr(diffusers, name).from_config(config)
    scheduler.set_timesteps(**(placed or {"num_inference_steps": steps}))
    flow = name.startswith("FlowMatch")
    x = torch.from_numpy(X).double() * (1.0 if flow else float(scheduler.init_noise_sigma))
    if drawn is not None and name == "DPMSolverSDEScheduler":
        noises = iter(drawn)
        scheduler.noise_sampler = lambda *_: torch.from_numpy(next(noises))
    for t in scheduler.timesteps:
        y = network(torch, x if flow else scheduler.scale_model_input(x, t), t.double())
        x = scheduler.step(y, t, x).prev_sample
    if name.startswith(KEEPS_RATIO):
        x = x / (1 + float(scheduler.sigmas[-1]) ** 2) ** 0.5
    return x.numpy()


def close(got: np.ndarray, want: np.ndarray, tolerance: float = 2e-4) -> None:
    """Pictures of the range [-1, 1]: the tolerance is a hundredth of a step of their 255."""
    assert np.abs(got - want).max() <= tolerance * np.abs(want).max(), np.abs(got - want).max() / np.abs(want).max()


DETERMINISTIC = {
    "PNDMScheduler": ({"skip_prk_steps": True},),
    "EulerDiscreteScheduler": ({},),
    "HeunDiscreteScheduler": ({},),
    "LMSDiscreteScheduler": ({},),
    "KDPM2DiscreteScheduler": ({},),
    "DPMSolverMultistepScheduler": ({}, {"solver_order": 1}, {"solver_order": 3}, {"solver_type": "heun"}),
    "DPMSolverSinglestepScheduler": ({}, {"solver_order": 3}),
    "UniPCMultistepScheduler": ({}, {"solver_order": 1}, {"solver_order": 3}, {"solver_type": "bh1"}),
    "DEISMultistepScheduler": ({}, {"solver_order": 1}, {"solver_order": 3}),
}
KINDS = {"sd1": {}, "sd2": {"prediction_type": "v_prediction"}}


def rules_of(name: str) -> list[str | None]:
    sampler = next(spec for spec in SAMPLERS.values() if name in spec.diffusers)
    return [None, *(key for key, rule in SIGMAS.items() if rule in sampler.rules)]


CASES = [
    (name, options, rule, kind)
    for name, variants in DETERMINISTIC.items()
    for options in variants
    for rule in rules_of(name)
    for kind in KINDS
]


@pytest.mark.parametrize(("name", "options", "rule", "kind"), CASES)
def test_a_table(name: str, options: dict[str, Any], rule: str | None, kind: str) -> None:
    config = LATENT | KINDS[kind] | options | {"_class_name": name} | ({rule: True} if rule else {})
    for steps in (1, 6, 20):
        close(ours(config, steps), theirs(config, steps))
