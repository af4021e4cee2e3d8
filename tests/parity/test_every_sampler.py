"""Every sampler under every sigma rule against diffusers' scheduler of the same config, under one nonlinear network.

The network's output is of unit size and depends on the time as fast as an embedding does: a time that is rounded in
another way shows.
"""

from __future__ import annotations

import functools
import importlib
import sys
import types
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
from lcm_jax.diffusion.time_grids import SIGMAS, Grid, pad
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


def scheduler_class(name: str) -> Any:
    if name != "DPMSolverSDEScheduler":
        return getattr(diffusers, name)
    # it needs torchsde for the noise, which these tests give it
    sys.modules.setdefault("torchsde", types.ModuleType("torchsde"))
    return getattr(importlib.import_module("diffusers.schedulers.scheduling_dpmsolver_sde"), name)


def theirs(config: dict[str, Any], steps: int, *, drawn: list[np.ndarray] | None = None, **placed: Any) -> np.ndarray:
    """What diffusers' scheduler delivers, in our scale where it keeps x / alpha."""
    name = config["_class_name"]
    scheduler = scheduler_class(name).from_config(config)
    scheduler.set_timesteps(**(placed or {"num_inference_steps": steps}))
    if name.startswith("DEIS"):  # whose coefficients cancel in float32
        scheduler.sigmas = scheduler.sigmas.double()
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


# at a final sigma of 0, and where a rule repeats the last sigma, diffusers' bh1 is nan
BH1 = {"solver_type": "bh1", "solver_order": 3, "final_sigmas_type": "sigma_min"}
DETERMINISTIC = {
    "PNDMScheduler": ({"skip_prk_steps": True},),
    "EulerDiscreteScheduler": ({},),
    "HeunDiscreteScheduler": ({},),
    "LMSDiscreteScheduler": ({},),
    "KDPM2DiscreteScheduler": ({},),
    "DPMSolverMultistepScheduler": ({}, {"solver_order": 1}, {"solver_order": 3}, {"solver_type": "heun"}),
    "DPMSolverSinglestepScheduler": ({}, {"solver_order": 3}),
    "UniPCMultistepScheduler": ({}, {"solver_order": 1}, {"solver_order": 3}, BH1),
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
    for rule in ([None] if options is BH1 else rules_of(name))
    for kind in KINDS
]


def in_gate(name: str, options: dict[str, Any], rule: str | None, kind: str) -> bool:
    """One of each in the gate, and each rule once."""
    rules = {
        "DPMSolverMultistepScheduler": RULED,
        "EulerDiscreteScheduler": RULED[:1],
        "UniPCMultistepScheduler": RULED[2:],
    }
    return not options and kind == "sd1" and rule in (None, *rules.get(name, ()))


RULED = tuple(SIGMAS)
SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("name", "options", "rule", "kind"), [case if in_gate(*case) else pytest.param(*case, marks=SLOW) for case in CASES]
)
def test_a_table(name: str, options: dict[str, Any], rule: str | None, kind: str) -> None:
    config = LATENT | KINDS[kind] | options | {"_class_name": name} | ({rule: True} if rule else {})
    # one step of DEIS by a rule does nothing in diffusers: it ends where it begins
    for steps in (2 if name.startswith("DEIS") else 1, 6, 20):
        close(ours(config, steps), theirs(config, steps))


FLOW = {"use_flow_sigmas": True, "flow_shift": 3.0, "prediction_type": "flow_prediction"}
MATCH = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}
FLOWS = {
    "euler": MATCH,
    "euler karras": MATCH | {"use_karras_sigmas": True},
    "euler exponential": MATCH | {"use_exponential_sigmas": True},
    "euler beta": MATCH | {"use_beta_sigmas": True},
    "dpm++1m": FLOW | {"_class_name": "DPMSolverMultistepScheduler", "solver_order": 1},
    "dpm++2m": FLOW | {"_class_name": "DPMSolverMultistepScheduler"},
    "dpm++3m": FLOW | {"_class_name": "DPMSolverMultistepScheduler", "solver_order": 3},
    "dpm++2s": FLOW | {"_class_name": "DPMSolverSinglestepScheduler"},
    "deis": FLOW | {"_class_name": "DEISMultistepScheduler"},
    "deis 3": FLOW | {"_class_name": "DEISMultistepScheduler", "solver_order": 3},
    "unipc": FLOW | {"_class_name": "UniPCMultistepScheduler"},
    "unipc 3": FLOW | {"_class_name": "UniPCMultistepScheduler", "solver_order": 3},
    "unipc karras": FLOW | {"_class_name": "UniPCMultistepScheduler", "use_karras_sigmas": True},
}


@pytest.mark.parametrize(
    "title",
    [title if title in ("euler karras", "unipc", "deis") else pytest.param(title, marks=SLOW) for title in FLOWS],
)
def test_a_flow(title: str) -> None:
    for steps in (2, 6, 20):
        # beside pure noise, where the log-SNR of UniPC's first step is of a difference in the last bits
        close(ours(FLOWS[title], steps), theirs(FLOWS[title], steps), 2e-3 if "unipc" in title else 2e-4)


ZERO_SNR = LATENT | {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}


@pytest.mark.parametrize("rule", [pytest.param(None, marks=SLOW), "use_karras_sigmas"])
@pytest.mark.parametrize("options", [pytest.param({}, marks=SLOW), {"solver_order": 3}])
@pytest.mark.parametrize("name", ["DPMSolverMultistepScheduler", "UniPCMultistepScheduler", "EulerDiscreteScheduler"])
def test_zero_terminal_snr(name: str, options: dict[str, Any], rule: str | None) -> None:
    config = ZERO_SNR | options | {"_class_name": name, "timestep_spacing": "trailing"} | ({rule: True} if rule else {})
    for steps in (2, 6, 20):
        close(ours(config, steps), theirs(config, steps), 2e-3)  # diffusers gives pure noise 2^-12 of the signal


SDE = {"_class_name": "DPMSolverMultistepScheduler", "algorithm_type": "sde-dpmsolver++"}
STOCHASTIC = {
    "euler_a": {"_class_name": "EulerAncestralDiscreteScheduler"},
    "ddpm": {"_class_name": "DDPMScheduler", "clip_sample": False},
    "dpm++2m_sde": SDE,
    "dpm++2m_sde heun": SDE | {"solver_type": "heun"},
    "dpm++3m_sde": SDE | {"solver_order": 3},
    "dpm2_a": {"_class_name": "KDPM2AncestralDiscreteScheduler"},
    "dpm++sde": {"_class_name": "DPMSolverSDEScheduler"},
}


@pytest.mark.parametrize("kind", ["sd1", pytest.param("sd2", marks=SLOW)])
@pytest.mark.parametrize(
    "title", [t if t in ("dpm++3m_sde", "dpm++sde") else pytest.param(t, marks=SLOW) for t in STOCHASTIC]
)
def test_with_their_noise(title: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name = STOCHASTIC[title]["_class_name"]
    modules = [getattr(schedulers, module) for module in dir(schedulers) if module.startswith("scheduling_")]
    for rule in rules_of(name):
        config = LATENT | KINDS[kind] | STOCHASTIC[title] | ({rule: True} if rule else {})
        for steps in (1, 6, 20):
            two = name == "DPMSolverSDEScheduler"
            drawn = iter(torch.from_numpy(NOISE))
            for module in modules:
                if hasattr(module, "randn_tensor"):
                    monkeypatch.setattr(module, "randn_tensor", lambda *_, drawn=drawn, **__: next(drawn))
            want = theirs(config, steps, drawn=list(NOISE))
            close(ours(config, steps, NOISE.reshape(30, 2, *SHAPE) if two else NOISE), want)


@pytest.mark.slow
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("name", ["LMSDiscreteScheduler", "KDPM2DiscreteScheduler", "UniPCMultistepScheduler"])
def test_spacings(name: str, spacing: str) -> None:
    config = LATENT | {"_class_name": name, "timestep_spacing": spacing, "steps_offset": int(spacing == "leading")}
    for steps in (4, 20):
        close(ours(config, steps), theirs(config, steps))
        karras = config | {"use_karras_sigmas": True}
        close(ours(karras, steps), theirs(karras, steps))


def test_given_steps() -> None:
    times, levels = [999, 759, 499, 259, 20], [14.0, 5.0, 2.0, 0.7, 0.1]
    euler, dpm = ({"_class_name": f"{name}Scheduler"} | LATENT for name in ("EulerDiscrete", "DPMSolverMultistep"))
    for config in (euler, dpm):
        close(ours(config, 5, timesteps=times), theirs(config, 5, timesteps=times))
    close(ours(euler, 5, sigmas=levels), theirs(euler, 5, sigmas=[*levels, 0.0]))
    flow = [1.0, 0.8, 0.5, 0.2]
    close(ours(MATCH, 4, sigmas=flow), theirs(MATCH, 4, sigmas=flow))
