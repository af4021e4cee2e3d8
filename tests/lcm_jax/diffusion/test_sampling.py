from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lcm_jax.diffusion.samplers import SAMPLERS, time_grid
from lcm_jax.diffusion.sampling import sample, trajectory
from lcm_jax.diffusion.schedules import DDPM, Cosine, RectifiedFlow
from lcm_jax.diffusion.solvers import DDIM, LCM
from lcm_jax.diffusion.time_grids import (
    CAPACITY,
    Spacing,
    even_grid,
    karras_grid,
    lcm_grid,
    pad,
    spaced_times,
    truncate,
)
from lcm_jax.typing import Prediction

SCHEDULE = DDPM(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
FLOW = RectifiedFlow(shift=3.0)
KARRAS = Spacing.from_config({"use_karras_sigmas": True, "use_beta_sigmas": False})
KEY = jax.random.key(0)
X = jax.random.normal(jax.random.key(1), (2, 2, 2, 3))


def denoise(x: jax.Array, t: jax.Array, s: object = None) -> Prediction:
    eps = jnp.tanh(x + 0.001 * t)
    return Prediction((x - SCHEDULE.sigma(t) * eps) / SCHEDULE.alpha(t), eps)


def test_one_compilation_for_any_number_of_steps() -> None:
    traces = []

    @jax.jit
    def run(grid, x, key):
        traces.append(None)
        return sample(denoise, SCHEDULE, LCM(), grid, x, key)

    results = [run(pad(lcm_grid(steps)), X, KEY) for steps in (1, 2, 4, 50)]
    assert len(traces) == 1
    for steps, got in zip((1, 2, 4, 50), results, strict=True):
        want = trajectory(denoise, SCHEDULE, LCM(), lcm_grid(steps), X, KEY)[-1]
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


def test_noise_is_drawn_per_step_from_the_key() -> None:
    grid = lcm_grid(4)
    noise = jnp.stack([jax.random.normal(jax.random.fold_in(KEY, i), X.shape) for i in range(4)])
    drawn = trajectory(denoise, SCHEDULE, LCM(), grid, X, KEY)
    np.testing.assert_allclose(drawn, trajectory(denoise, SCHEDULE, LCM(), grid, X, KEY, noise=noise), rtol=1e-5)
    np.testing.assert_allclose(
        drawn[-1], sample(denoise, SCHEDULE, LCM(), pad(grid), X, KEY, noise=noise), rtol=1e-4, atol=1e-4
    )
    other = trajectory(denoise, SCHEDULE, LCM(), grid, X, jax.random.key(5))
    assert float(jnp.abs(drawn - other)[-1].max()) > 0.1


def test_one_lcm_step_adds_no_noise() -> None:
    results = [sample(denoise, SCHEDULE, LCM(), pad(lcm_grid(1)), X, jax.random.key(i)) for i in range(2)]
    np.testing.assert_array_equal(*results)
    np.testing.assert_allclose(results[0], denoise(X, 999.0).x0, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("steps", "times"),
    [(1, [999]), (2, [999, 499]), (4, [999, 759, 499, 259]), (8, [999, 879, 759, 639, 499, 379, 259, 139])],
)
def test_lcm_grid(steps: int, times: list[int]) -> None:
    np.testing.assert_array_equal(lcm_grid(steps), [*times, -1])


def test_lcm_grid_of_old_releases_and_strength() -> None:
    np.testing.assert_array_equal(lcm_grid(4, schedule="old"), [999, 759, 519, 279, -1])
    np.testing.assert_array_equal(lcm_grid(4, strength=0.5), [499, 379, 259, 139, -1])
    assert lcm_grid(25, strength=0.5)[0] == 499


def test_stable_diffusion_grids() -> None:
    # SD 1.5's scheduler config: leading, offset 1, final alpha of step 0
    folder = {"timestep_spacing": "leading", "steps_offset": 1, "set_alpha_to_one": False, "skip_prk_steps": True}
    spacing = Spacing.from_config(folder)
    ddim = time_grid(SAMPLERS["ddim"], SCHEDULE, 4, spacing=spacing)
    np.testing.assert_array_equal(ddim, [751, 501, 251, 1, 0])
    euler = time_grid(SAMPLERS["euler"], SCHEDULE, 4, spacing=spacing)
    np.testing.assert_array_equal(euler, [751, 501, 251, 1, -1])
    dpm = time_grid(SAMPLERS["dpm++2m"], SCHEDULE, 4, spacing=spacing)
    np.testing.assert_array_equal(dpm, [801, 601, 401, 201, -1])
    np.testing.assert_array_equal(spaced_times(4, spacing="trailing"), [999, 749, 499, 249])
    np.testing.assert_array_equal(spaced_times(4, spacing="linspace"), [999, 666, 333, 0])


@pytest.mark.parametrize("name", [name for name, sampler in SAMPLERS.items() if not sampler.spaces_sigmas])
def test_samplers_that_do_not_read_karras_sigmas_pass_over_them(name: str) -> None:
    want = time_grid(SAMPLERS[name], SCHEDULE, 4)
    np.testing.assert_array_equal(time_grid(SAMPLERS[name], SCHEDULE, 4, spacing=KARRAS), want)


def test_flow_grid() -> None:
    twice, once = FLOW.grid(50), FLOW.grid(50, Spacing(double_shift=False))
    assert float(FLOW.sigma(twice[-2])) == pytest.approx(0.00893, abs=1e-5)
    assert float(FLOW.sigma(once[-2])) == pytest.approx(0.00299, abs=1e-5)
    assert twice[0] == 1.0
    assert twice[-1] == 0.0


def test_karras_grid() -> None:
    """sigma_i = (80^(1/7) + i / (n - 1) (0.002^(1/7) - 80^(1/7)))^7 on any schedule, then 0."""
    root = np.linspace(80.0 ** (1 / 7), 0.002 ** (1 / 7), 18)
    for schedule in (RectifiedFlow(), FLOW, Cosine()):
        grid = karras_grid(18, schedule)
        assert grid[-1] == schedule.t_min
        np.testing.assert_allclose(schedule.sigma(grid[:-1]) / schedule.alpha(grid[:-1]), root**7, rtol=1e-3)


def test_continuous_schedules_have_even_grids() -> None:
    np.testing.assert_allclose(even_grid(4, SCHEDULE), [999, 749, 499, 249, -1])
    np.testing.assert_allclose(time_grid(SAMPLERS["ddim"], Cosine(), 4, strength=0.5), [0.5, 0.25, 0.0])
    np.testing.assert_allclose(time_grid(SAMPLERS["lcm"], Cosine(), 4, strength=0.8), [0.8, 0.6, 0.4, 0.2, 0.0])
    np.testing.assert_allclose(time_grid(SAMPLERS["lcm"], FLOW, 2, strength=0.8), [0.8, 0.4, 0.0])


def test_strength_drops_the_first_steps() -> None:
    grid = time_grid(SAMPLERS["ddim"], SCHEDULE, 10)
    np.testing.assert_array_equal(truncate(grid, 0.5), grid[5:])
    np.testing.assert_array_equal(truncate(grid, 0.39), grid[7:])
    np.testing.assert_array_equal(truncate(grid, 1.0), grid)
    np.testing.assert_array_equal(time_grid(SAMPLERS["ddim"], SCHEDULE, 10, strength=0.5), grid[5:])
    assert len(time_grid(SAMPLERS["euler"], FLOW, 10, strength=0.3)) == 4
    assert len(time_grid(SAMPLERS["lcm"], SCHEDULE, 4, strength=0.5)) == 5


@pytest.mark.parametrize("name", sorted(SAMPLERS))
@pytest.mark.parametrize("spacing", [None, "leading", "trailing", "linspace"])
def test_every_sampler_descends_on_every_schedule(name: str, spacing: str | None) -> None:
    for schedule in (SCHEDULE, FLOW, Cosine()):
        for steps in (1, 3, 50):
            grid = time_grid(SAMPLERS[name], schedule, steps, spacing=Spacing(timestep_spacing=spacing))
            assert len(grid) == steps + 1
            assert np.all(np.diff(grid) < 0)
            assert grid[-1] == (0.0 if name == "tcd" else schedule.t_min)  # diffusers' ends at timestep 0
            assert grid[0] <= schedule.t_max


def test_init_noise_sigma() -> None:
    linspace, leading = Spacing(), Spacing(timestep_spacing="leading")
    for name in ("euler", "heun"):
        grid = time_grid(SAMPLERS[name], SCHEDULE, 10)
        want = float(SCHEDULE.sigma(999))
        assert SAMPLERS[name].init_noise_sigma(SCHEDULE, grid, linspace) == pytest.approx(want)
        assert SAMPLERS[name].init_noise_sigma(SCHEDULE, grid, leading) == 1.0
    assert SAMPLERS["ddim"].init_noise_sigma(SCHEDULE, grid, linspace) == 1.0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: time_grid(SAMPLERS["ddim"], SCHEDULE, 0), "steps is 0: it must be between 1 and 1000"),
        (lambda: time_grid(SAMPLERS["ddim"], SCHEDULE, -3), "steps is -3"),
        (lambda: time_grid(SAMPLERS["euler"], SCHEDULE, 1001), "steps is 1001: it must be between 1 and 1000"),
        (lambda: time_grid(SAMPLERS["lcm"], SCHEDULE, 51), "steps is 51: it must be between 1 and 50"),
        (lambda: time_grid(SAMPLERS["lcm"], SCHEDULE, 26, strength=0.5), "steps is 26: it must be between 1 and 25"),
        (lambda: time_grid(SAMPLERS["ddim"], FLOW, 0), "steps is 0"),
        (lambda: spaced_times(1000, spacing="leading", steps_offset=1), "steps_offset 1"),
        (lambda: lcm_grid(4, strength=0.01), "strength 0.01 leaves none .* to 0.08 for 4 steps, or to 0.02 and take 1"),
        (lambda: truncate(np.arange(5.0), 0.0), "strength is 0.0"),
        (lambda: truncate(np.arange(5.0), 1.5), "strength is 1.5"),
        (lambda: truncate(np.arange(5.0), 0.1), "strength 0.1 of 4 steps leaves none"),
        (lambda: lcm_grid(1, original_steps=0), "original_steps is 0"),
        (lambda: pad(np.arange(CAPACITY + 2.0)), "steps is 1001"),
        (lambda: Spacing.from_config({"timestep_spacing": "karras"}), "timestep_spacing 'karras' is unknown"),
        (lambda: Spacing.from_config({"final_sigmas_type": "last"}), "final_sigmas_type 'last' is unknown"),
        (
            lambda: time_grid(SAMPLERS["euler"], SCHEDULE, 4, spacing=KARRAS),
            "use_karras_sigmas, which the sampler euler",
        ),
        (lambda: time_grid(SAMPLERS["heun"], FLOW, 4, spacing=KARRAS), r"--scheduler use_karras_sigmas=false"),
    ],
)
def test_bad_input(call, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        call()
    assert "\n" not in str(error.value)


def test_gradients_pass_through_a_trajectory() -> None:
    def loss(x: jax.Array) -> jax.Array:
        return jnp.mean(trajectory(denoise, SCHEDULE, DDIM(), np.array([999.0, 500.0, -1.0]), x, KEY)[-1] ** 2)

    assert bool(jnp.all(jnp.isfinite(jax.grad(loss)(X))))


def test_flow_grid_of_the_dpm_solvers_is_even_down_to_the_clean_end() -> None:
    grid = time_grid(SAMPLERS["dpm++2m"], FLOW, 9, spacing=Spacing(use_flow_sigmas=True))
    np.testing.assert_allclose(grid, 0.999 * np.arange(9, -1, -1) / 9)


@pytest.mark.parametrize("sampler", ["lcm", "ddim"])
@pytest.mark.parametrize("strength", [1e-300, 0.001, 0.019, 0.05, 0.07, 0.3, 0.57])
@pytest.mark.parametrize("steps", [1, 2, 4, 29, 45])
def test_what_the_message_of_a_small_strength_advises_works(sampler: str, strength: float, steps: int) -> None:
    """Both ways out: a larger strength, or another number of steps."""
    spec = SAMPLERS[sampler]
    try:
        time_grid(spec, SCHEDULE, steps, strength=strength)
    except ValueError as error:
        said = str(error)
        assert f"strength {strength:g}" in said
        time_grid(spec, SCHEDULE, steps, strength=float(re.search(r"raise the strength to ([\d.]+)", said)[1]))
        if other := re.search(r"between 1 and (\d+) at|take at least (\d+) steps", said):
            time_grid(spec, SCHEDULE, int(other[1] or other[2]), strength=strength)
        if other := re.search(r"or to ([\d.]+) and take 1 step", said):
            time_grid(spec, SCHEDULE, 1, strength=float(other[1]))


def test_strength_of_a_flow_counts_a_fraction_of_a_step_as_one() -> None:
    grid = time_grid(SAMPLERS["euler"], FLOW, 10)
    for strength, steps in ((0.01, 1), (0.5, 5), (0.51, 6), (1.0, 10)):
        np.testing.assert_array_equal(time_grid(SAMPLERS["euler"], FLOW, 10, strength=strength), grid[10 - steps :])
