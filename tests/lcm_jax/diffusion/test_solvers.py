"""Laws of the solvers: their order, exactness for a point mass, agreement with one another."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lcm_jax.diffusion.parameterization import expand
from lcm_jax.diffusion.sampling import sample
from lcm_jax.diffusion.schedules import DDPM, Cosine, RectifiedFlow
from lcm_jax.diffusion.solvers import (
    DDIM,
    DEIS,
    LCM,
    LMS,
    PLMS,
    DPM2Ancestral,
    DPMpp2M,
    DPMpp2S,
    DPMppMultistep,
    DPMppSDE,
    DPMppSinglestep,
    DPMSolver2,
    Euler,
    Heun,
    Inpaint,
    InpaintTarget,
    UniPC,
)
from lcm_jax.diffusion.time_grids import pad
from lcm_jax.runtime.user_code import load_object
from lcm_jax.typing import Denoiser, Prediction, Schedule, Solver

LATENT = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
TABLE, ZERO_SNR, FLOW = DDPM(**LATENT), DDPM(**LATENT, rescale_betas_zero_snr=True), RectifiedFlow(shift=3.0)
# A solver of your own passes the laws of this file by one entry here, as the one of docs/examples does.
OWN = load_object(f"{Path(__file__).parents[3]}/docs/examples/own_solver.py:AdamsBashforth2", option="tests")
SOLVERS = [DDIM(), DDIM(eta=1.0), Euler(), Heun(), DPMSolver2(), DPMpp2S(), DPMpp2M(), LCM(), OWN()]
SOLVERS += [DPMppSinglestep(), DEIS(), PLMS(), DPM2Ancestral(), DPMppSDE(), DPMppMultistep(sde=True, solver_order=3)]
# Those that begin at first order and rise: their error falls at least as fast as they declare.
RISING = [DPMppMultistep(solver_order=3), DPMppSinglestep(solver_order=3), DEIS(solver_order=3), LMS(), PLMS()]
RISING += [UniPC(solver_order=1), UniPC(), UniPC(solver_order=3), UniPC(solver_type="bh1")]
KEY = jax.random.key(0)
X = jax.random.normal(jax.random.key(1), (3, 2, 2, 3))
MEAN, STD = 0.7, 0.4


def gaussian(schedule: Schedule, std: float | jax.Array = STD) -> Denoiser:
    """The exact denoiser of independent pixels N(MEAN, STD^2)."""

    def denoise(x: jax.Array, t: jax.Array, s: object = None) -> Prediction:
        alpha, sigma = expand(schedule.alpha(t), x), expand(schedule.sigma(t), x)
        variance = (alpha * std) ** 2 + sigma**2
        centred = (x - alpha * MEAN) / variance
        return Prediction(MEAN + alpha * std**2 * centred, sigma * centred)

    return denoise


def flow_of_gaussian(schedule: Schedule, x: jax.Array, t: float, s: float, std: float | jax.Array = STD) -> jax.Array:
    """The probability-flow ODE from t to s in closed form: the standardised pixel is constant."""
    (a, b), (c, d) = ((schedule.alpha(u), schedule.sigma(u)) for u in (t, s))
    return c * MEAN + jnp.sqrt((c * std) ** 2 + d**2) * (x - a * MEAN) / jnp.sqrt((a * std) ** 2 + b**2)


def point(schedule: Schedule, x0: jax.Array) -> Denoiser:
    """The exact denoiser of data that is always x0."""

    def denoise(x: jax.Array, t: jax.Array, s: object = None) -> Prediction:
        alpha, sigma = expand(schedule.alpha(t), x), expand(schedule.sigma(t), x)
        return Prediction(jnp.broadcast_to(x0, x.shape), (x - alpha * x0) / sigma)

    return denoise


def runner(denoise: Denoiser, schedule: Schedule, solver: Solver) -> Callable[[np.ndarray], jax.Array]:
    walk = jax.jit(lambda grid: sample(denoise, schedule, solver, grid, X, KEY))
    return lambda grid: walk(pad(grid, 64))


@pytest.mark.parametrize(
    "solver", [solver for solver in SOLVERS if not solver.stochastic and not isinstance(solver, PLMS)]
)
@pytest.mark.parametrize("schedule", [FLOW, TABLE, Cosine()])
def test_the_order_is_the_declared_one(schedule: Schedule, solver: Solver) -> None:
    start, end = 0.8 * schedule.t_max, 0.2 * schedule.t_max
    want = flow_of_gaussian(schedule, X, start, end)
    run = runner(gaussian(schedule), schedule, solver)
    steps = np.array([6, 12, 24, 48])
    errors = [float(jnp.abs(run(np.linspace(start, end, n + 1)) - want).max()) for n in steps]
    slope = -np.polyfit(np.log(steps), np.log(errors), 1)[0]
    assert abs(slope - solver.order) < 0.3, (slope, errors)


@pytest.mark.parametrize("solver", SOLVERS)
def test_evaluations_and_noise_are_the_declared_ones(solver: Solver) -> None:
    calls = []

    def counted(x: jax.Array, t: jax.Array, s: object = None) -> Prediction:
        calls.append(t)
        return gaussian(FLOW)(x, t, s)

    assert isinstance(solver, Solver)
    ends = [
        solver.step(counted, FLOW, X, jnp.float32(0.8), jnp.float32(0.4), solver.init(X), jax.random.key(seed))[0]
        for seed in (0, 1)
    ]
    assert len(calls) == 2 * solver.evaluations
    assert solver.stochastic == bool(jnp.any(ends[0] != ends[1]))


@pytest.mark.parametrize("solver", RISING)
@pytest.mark.parametrize("schedule", [FLOW, TABLE])
def test_the_order_is_at_least_the_declared_one(schedule: Schedule, solver: Solver) -> None:
    start, end = 0.8 * schedule.t_max, 0.2 * schedule.t_max
    std = jnp.array([0.2, 0.4, 0.8])  # so that no error is near a change of its sign in all of them
    want = flow_of_gaussian(schedule, X, start, end, std)
    run = runner(gaussian(schedule, std), schedule, solver)
    steps = np.array([6, 12, 24])
    errors = [float(jnp.abs(run(np.linspace(start, end, n + 1)) - want).max()) for n in steps]
    slope = -np.polyfit(np.log(steps), np.log(errors), 1)[0]
    assert slope > solver.order - 0.4, (slope, errors)


@pytest.mark.parametrize("schedule", [TABLE, ZERO_SNR, FLOW, Cosine()])
@pytest.mark.parametrize("solver", [*SOLVERS, *RISING])
def test_perfect_denoiser_of_a_point_lands_on_it(schedule: Schedule, solver: Solver) -> None:
    x0 = jax.random.normal(jax.random.key(2), X.shape)
    run = runner(point(schedule, x0), schedule, solver)
    for steps in (1, 2, 3, 10, 50):
        grid = np.linspace(schedule.t_max, schedule.t_min, steps + 1)
        np.testing.assert_allclose(run(grid), x0, atol=1e-4)


@pytest.mark.parametrize(
    "solver", [Heun(), DPMSolver2(), DPMpp2S(), DPMpp2M(), DPMppSinglestep(), DEIS(), UniPC(), LMS(), PLMS()]
)
def test_second_order_from_pure_noise(solver: Solver) -> None:
    """The fall-backs at alpha 0 and sigma 0 leave the answer finite and better than first order's."""
    grid = np.linspace(1.0, 0.0, 21)
    want = flow_of_gaussian(FLOW, X, 1.0, 0.0)
    first = jnp.abs(runner(gaussian(FLOW), FLOW, DDIM())(grid) - want).max()
    assert float(jnp.abs(runner(gaussian(FLOW), FLOW, solver)(grid) - want).max()) < float(first)


@pytest.mark.parametrize("schedule", [TABLE, FLOW])
def test_euler_is_ddim(schedule: Schedule) -> None:
    grid = np.linspace(schedule.t_max, schedule.t_min, 8)
    results = [runner(gaussian(schedule), schedule, solver)(grid) for solver in (Euler(), DDIM())]
    np.testing.assert_array_equal(*results)


def test_euler_is_the_velocity_step_on_a_flow() -> None:
    flow, t, s = RectifiedFlow(), jnp.float32(0.8), jnp.float32(0.55)
    x0, eps = gaussian(flow)(X, t)
    x, _ = Euler().step(gaussian(flow), flow, X, t, s, (), KEY)
    np.testing.assert_allclose(x, X + (s - t) * (eps - x0), atol=1e-6)


@pytest.mark.parametrize("schedule", [TABLE, FLOW])
@pytest.mark.parametrize("solver", SOLVERS)
def test_rows_may_have_their_own_times(schedule: Schedule, solver: Solver) -> None:
    # row 0 starts at pure noise and row 2 ends clean, where the second-order rules fall back
    t = jnp.asarray([1.0, 0.7, 0.2]) * schedule.t_max
    s = jnp.asarray([0.6 * schedule.t_max, 0.5 * schedule.t_max, schedule.t_min])
    noise = jax.random.normal(KEY, X.shape)
    denoise = gaussian(schedule)

    @jax.jit
    def step(x: jax.Array, t: jax.Array, s: jax.Array, noise: jax.Array) -> jax.Array:
        return solver.step(denoise, schedule, x, t, s, solver.init(x), noise)[0]

    together = step(X, t, s, noise)
    assert together.shape == X.shape
    for i in range(3):
        alone = step(X, jnp.full(3, t[i]), jnp.full(3, s[i]), noise)
        np.testing.assert_allclose(together[i], alone[i], rtol=1e-5, atol=1e-5)


def test_ddim_eta_one_has_the_ancestral_variance() -> None:
    """Of x_s given x_t and x0: (sigma_s / sigma_t)^2 beta_{t|s}, the posterior of the forward process."""
    t, s = 600.0, 400.0
    x0 = jnp.zeros_like(X)
    moved = [
        DDIM(eta=1.0).step(point(TABLE, x0), TABLE, X, t, s, (), noise)[0] for noise in (X * 0.0, jnp.ones_like(X))
    ]
    beta = 1.0 - (TABLE.alpha(t) / TABLE.alpha(s)) ** 2
    want = (TABLE.sigma(s) / TABLE.sigma(t)) ** 2 * beta
    np.testing.assert_allclose((moved[1] - moved[0]) ** 2, want, rtol=1e-4)


def test_step_to_the_same_time_stays() -> None:
    for solver in (DDIM(), DDIM(eta=1.0), Heun(), DPMSolver2(), DPMpp2S(), DPMpp2M(), DEIS(), UniPC(), LMS()):
        x, _ = solver.step(gaussian(TABLE), TABLE, X, 300.0, 300.0, solver.init(X), KEY)
        np.testing.assert_allclose(x, X, atol=1e-5)


@pytest.mark.parametrize("solver", [DDIM(), Heun(), DPMpp2M(), LCM(), UniPC(), PLMS()], ids=lambda s: type(s).__name__)
def test_inpainting_keeps_what_the_mask_keeps_and_redraws_the_rest(solver: Solver) -> None:
    x0, eps = jax.random.normal(jax.random.key(2), (2, *X.shape))
    mask = jnp.zeros((*X.shape[:3], 1)).at[:, 0].set(1.0)
    grid = pad(np.linspace(1.0, 0.0, 9))

    def run(solver: Solver) -> jax.Array:
        return sample(gaussian(FLOW), FLOW, solver, grid, X, KEY)

    plain = run(solver)
    target = run(Inpaint(solver=solver, target=InpaintTarget(mask=mask, x0=x0, eps=eps)))
    np.testing.assert_array_equal(target[:, 1:], x0[:, 1:])
    # Pixels are independent here, so the others are drawn as if nothing were kept.
    np.testing.assert_allclose(target[:, 0], plain[:, 0], atol=1e-5)


def test_what_is_kept_has_the_noise_of_the_time() -> None:
    x0, eps = jax.random.normal(jax.random.key(2), (2, *X.shape))
    solver = Inpaint(solver=Euler(), target=InpaintTarget(mask=jnp.zeros((*X.shape[:3], 1)), x0=x0, eps=eps))
    x, _ = solver.step(gaussian(TABLE), TABLE, X, 900.0, 500.0, solver.init(X), KEY)
    np.testing.assert_allclose(x, TABLE.alpha(500.0) * x0 + TABLE.sigma(500.0) * eps, rtol=1e-5)
