"""Every intermediate state of our samplers against diffusers' schedulers, under one fixed nonlinear network."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lcm_jax.diffusion.consistency_function import consistency
from lcm_jax.diffusion.guidance import cfg
from lcm_jax.diffusion.parameterization import add_noise, bind, to_prediction
from lcm_jax.diffusion.samplers import SAMPLERS, Sampler, time_grid
from lcm_jax.diffusion.schedules import DDPM, RectifiedFlow
from lcm_jax.diffusion.solvers import DDIM, TCD, Heun
from lcm_jax.diffusion.time_grids import Spacing, lcm_grid
from lcm_jax.typing import Kind, Prediction, Schedule, Solver
from lcm_jax.weights.scheduler_config import from_config

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
pipelines = pytest.importorskip("diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion")
schedulers = pytest.importorskip("diffusers.schedulers")

SHAPE = (2, 4, 4, 3)
LATENT = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
LINEAR = {"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02}
X = np.random.default_rng(0).standard_normal(SHAPE).astype(np.float32)
NOISE = np.random.default_rng(1).standard_normal((50, *SHAPE)).astype(np.float32)
TOLERANCE = 1e-5


@pytest.fixture(autouse=True)
def _quiet_torch() -> Iterator[None]:
    torch.set_num_threads(1)
    with torch.no_grad():
        yield


def network(xp: Any, x: Any, t: Any) -> Any:
    """tanh of an affine map of (x, t), the same in jax and in torch."""
    return xp.tanh(0.8 * x + 0.002 * t - 0.7)


def apply(params: Any, x: jax.Array, t: jax.Array, cond: Any) -> jax.Array:
    return network(jnp, x, t)


@functools.cache
def compiled(solver: Solver, schedule: Schedule, kind: Kind, is_consistency: bool) -> Callable:
    denoise = bind(apply, None, {}, schedule, kind)
    if is_consistency:
        denoise = consistency(denoise, schedule)
    return jax.jit(lambda x, t, s, carry, noise: solver.step(denoise, schedule, x, t, s, carry, noise))


def ours(sampler: Sampler, config: dict, kind: Kind, steps: int) -> np.ndarray:
    """States (steps + 1, ...) from the unit noise X. One compilation serves every spacing and number of steps."""
    schedule, spacing = from_config(config), Spacing.from_config(config)
    grid = time_grid(sampler, schedule, steps, spacing=spacing)
    x = jnp.asarray(sampler.init_noise_sigma(schedule, grid, spacing) * X)
    return walk(compiled(sampler.solver, schedule, kind, sampler.consistency), sampler.solver, grid, x)


def walk(step: Callable, solver: Solver, grid: np.ndarray, x: jax.Array) -> np.ndarray:
    states, carry = [x], solver.init(x)
    for t, s, noise in zip(grid[:-1], grid[1:], NOISE, strict=False):
        x, carry = step(x, np.float32(t), np.float32(s), carry, noise)
        states.append(x)
    return np.stack(states)


def theirs(scheduler: Any, steps: int, network: Callable = network, **extra: Any) -> np.ndarray:
    """States in our scale, x_t = alpha x0 + sigma eps, where a scheduler keeps x / alpha.

    In float64 as far as a scheduler keeps it: Heun there recovers eps as (x - (x - sigma eps)) / sigma.
    """
    scheduler.set_timesteps(steps)
    x = torch.from_numpy(X).double() * scheduler.init_noise_sigma
    keeps_ratio = isinstance(scheduler, (diffusers.EulerDiscreteScheduler, diffusers.HeunDiscreteScheduler))

    def scaled(i: int) -> np.ndarray:
        return (x / (1 + scheduler.sigmas[i] ** 2) ** 0.5 if keeps_ratio else x).numpy()

    states = [scaled(0)]
    for i, t in enumerate(scheduler.timesteps):
        y = network(torch, scheduler.scale_model_input(x, t), t)
        extra_i = {k: torch.from_numpy(v[i]) if isinstance(v, np.ndarray) else v for k, v in extra.items()}
        x = scheduler.step(y, t, x, **extra_i).prev_sample
        states.append(scaled(i + 1))
    if scheduler.order == 2:
        # Heun lists its inner evaluations too: keep the states between whole steps
        states = states[:1] + states[2::2] + states[-1:]
    return np.stack(states)


def close(got: np.ndarray, want: np.ndarray, tolerance: float = TOLERANCE) -> None:
    assert got.shape == want.shape
    scale = np.abs(want).max(axis=tuple(range(1, want.ndim)))
    error = np.abs(got - want).max(axis=tuple(range(1, want.ndim))) / scale
    assert error.max() <= tolerance, error


CASES = [(LATENT, "epsilon"), (LATENT, "v_prediction"), (LINEAR, "epsilon")]
STEPS = (1, 2, 4, 10, 25)


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize(("config", "kind"), CASES)
def test_ddim(config: dict, kind: Kind, spacing: str) -> None:
    # in linspace diffusers' DDIM steps to t - T // N, which is not its next timestep; that is not imitated
    config = config | {"timestep_spacing": spacing, "steps_offset": int(spacing == "leading")}
    for to_one in (True, False):
        config["set_alpha_to_one"] = to_one
        for steps in STEPS:
            scheduler = diffusers.DDIMScheduler(**config, prediction_type=kind, clip_sample=False)
            close(ours(SAMPLERS["ddim"], config, kind, steps), theirs(scheduler, steps))


@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_ddim_noise(eta: float) -> None:
    scheduler = diffusers.DDIMScheduler(**LATENT, steps_offset=1, clip_sample=False)
    sampler = replace(SAMPLERS["ddim"], solver=DDIM(eta=eta))
    got = ours(sampler, LATENT | {"steps_offset": 1}, "epsilon", 10)
    close(got, theirs(scheduler, 10, eta=eta, variance_noise=NOISE))


def test_ddim_zero_terminal_snr() -> None:
    config = LATENT | {"timestep_spacing": "trailing", "rescale_betas_zero_snr": True}
    scheduler = diffusers.DDIMScheduler(**config, prediction_type="v_prediction", clip_sample=False)
    close(ours(SAMPLERS["ddim"], config, "v_prediction", 10), theirs(scheduler, 10))


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize(("config", "kind"), CASES)
@pytest.mark.parametrize("name", ["euler", "heun", "dpm++2m"])
def test_ode(name: str, config: dict, kind: Kind, spacing: str) -> None:
    classes = {
        "euler": diffusers.EulerDiscreteScheduler,
        "heun": diffusers.HeunDiscreteScheduler,
        "dpm++2m": diffusers.DPMSolverMultistepScheduler,
    }
    config = config | {"timestep_spacing": spacing, "steps_offset": int(spacing == "leading")}
    for steps in STEPS:
        scheduler = classes[name](**config, prediction_type=kind)
        close(ours(SAMPLERS[name], config, kind, steps), theirs(scheduler, steps))


@pytest.mark.parametrize("name", ["euler", "dpm++2m"])
def test_final_sigma_min(name: str) -> None:
    classes = {"euler": diffusers.EulerDiscreteScheduler, "dpm++2m": diffusers.DPMSolverMultistepScheduler}
    config = LATENT | {"final_sigmas_type": "sigma_min"}
    close(ours(SAMPLERS[name], config, "epsilon", 20), theirs(classes[name](**config), 20))


@pytest.mark.parametrize("steps", [1, 2, 4, 8, 25])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_lcm(kind: Kind, steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = iter(torch.from_numpy(NOISE))
    monkeypatch.setattr(schedulers.scheduling_lcm, "randn_tensor", lambda *args, **kwargs: next(drawn))
    scheduler = diffusers.LCMScheduler(**LATENT, prediction_type=kind)
    close(ours(SAMPLERS["lcm"], LATENT, kind, steps), theirs(scheduler, steps))


@pytest.mark.parametrize("steps", [1, 2, 4, 8, 25])
@pytest.mark.parametrize("gamma", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_tcd(kind: Kind, gamma: float, steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = iter(torch.from_numpy(NOISE))
    monkeypatch.setattr(schedulers.scheduling_tcd, "randn_tensor", lambda *args, **kwargs: next(drawn))
    scheduler = diffusers.TCDScheduler(**LATENT, prediction_type=kind)
    sampler = replace(SAMPLERS["tcd"], solver=TCD(gamma=gamma))
    close(ours(sampler, LATENT, kind, steps), theirs(scheduler, steps, eta=gamma))


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("steps", [1, 4, 25])
def test_flow(shift: float, steps: int) -> None:
    config = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": shift}
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.init_noise_sigma = 1.0
    scheduler.scale_model_input = lambda x, t: x
    close(ours(SAMPLERS["euler"], config, "flow", steps), theirs(scheduler, steps))


@pytest.mark.parametrize("steps", [2, 10])
def test_flow_heun(steps: int) -> None:
    scheduler = diffusers.FlowMatchHeunDiscreteScheduler(shift=3.0)
    scheduler.init_noise_sigma = 1.0
    scheduler.scale_model_input = lambda x, t: x
    want = theirs(scheduler, steps)
    schedule = RectifiedFlow(shift=3.0)
    # this scheduler's sigmas run to 1 / T before the shift, on the grid shifted once more
    sigmas = np.append(scheduler.sigmas.numpy()[:-1:2], 0.0)
    grid = sigmas / (3.0 - 2.0 * sigmas)
    close(walk(compiled(Heun(), schedule, "flow", False), Heun(), grid, jnp.asarray(X)), want)


@pytest.mark.parametrize("name", ["ddim", "euler", "heun", "dpm++2m"])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_timesteps(name: str, spacing: str) -> None:
    classes = {
        "ddim": diffusers.DDIMScheduler,
        "euler": diffusers.EulerDiscreteScheduler,
        "heun": diffusers.HeunDiscreteScheduler,
        "dpm++2m": diffusers.DPMSolverMultistepScheduler,
    }
    for steps in (1, 2, 3, 4, 7, 10, 16, 25, 30, 50, 999):
        scheduler = classes[name](**LATENT, timestep_spacing=spacing)
        scheduler.set_timesteps(steps)
        want = scheduler.timesteps.numpy()
        want = np.append(want[:1], want[1::2]) if name == "heun" else want
        grid = time_grid(SAMPLERS[name], DDPM(**LATENT), steps, spacing=Spacing(timestep_spacing=spacing))
        np.testing.assert_allclose(grid[:-1], want, rtol=1e-6, atol=1e-4)


def test_lcm_timesteps() -> None:
    scheduler = diffusers.LCMScheduler()
    for original in (50, 100):
        for strength in (1.0, 0.8, 0.5, 0.33):
            for steps in range(1, int(original * strength) + 1, 3):
                scheduler.set_timesteps(steps, original_inference_steps=original, strength=strength)
                grid = lcm_grid(steps, original_steps=original, strength=strength)
                np.testing.assert_array_equal(grid[:-1], scheduler.timesteps.numpy())


def test_flow_sigmas() -> None:
    for shift in (1.0, 3.0):
        for steps in (1, 4, 28, 50):
            scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
            scheduler.set_timesteps(steps)
            schedule = RectifiedFlow(shift=shift)
            grid = schedule.grid(steps)
            np.testing.assert_allclose(schedule.sigma(grid), scheduler.sigmas.numpy(), rtol=1e-5, atol=1e-7)
            np.testing.assert_allclose(schedule.network_time(grid)[:-1], scheduler.timesteps.numpy(), rtol=1e-5)


@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("betas", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_tables(betas: str, zero: bool) -> None:
    scheduler = diffusers.DDIMScheduler(beta_schedule=betas, rescale_betas_zero_snr=zero)
    schedule = from_config(dict(scheduler.config))
    t = jnp.arange(1000.0)
    alpha_bar = scheduler.alphas_cumprod.numpy()
    # torch's float32 square root, which the rescaling takes, is off by a bit in places
    tolerance = 1e-5 if zero else 2e-7
    np.testing.assert_allclose(schedule.alpha(t), np.sqrt(alpha_bar), atol=tolerance)
    np.testing.assert_allclose(schedule.sigma(t), np.sqrt(1 - alpha_bar), atol=tolerance)


def test_add_noise() -> None:
    scheduler = diffusers.DDPMScheduler(**LATENT)
    t = np.array([3, 777])
    want = scheduler.add_noise(torch.from_numpy(X), torch.from_numpy(NOISE[0]), torch.from_numpy(t)).numpy()
    np.testing.assert_allclose(
        add_noise(DDPM(**LATENT), jnp.asarray(X), jnp.asarray(NOISE[0]), jnp.asarray(t, jnp.float32)),
        want,
        rtol=1e-5,
        atol=1e-6,
    )


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_guidance_rescale(kind: Kind) -> None:
    schedule, t, scale, phi = DDPM(**LATENT), 500.0, 7.5, 0.7
    uncond, cond = torch.from_numpy(NOISE[0]), torch.from_numpy(NOISE[1])
    want = pipelines.rescale_noise_cfg(uncond + scale * (cond - uncond), cond, guidance_rescale=phi).numpy()
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    x_t = jnp.asarray(X)
    expected = to_prediction(kind, jnp.asarray(want), x_t, alpha, sigma)

    def paired(x: jax.Array, t: jax.Array) -> Prediction:
        return to_prediction(kind, jnp.concatenate([NOISE[0], NOISE[1]]), x, alpha, sigma)

    got = cfg(paired, scale, rescale=phi, schedule=schedule, kind=kind)(x_t, t)
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
