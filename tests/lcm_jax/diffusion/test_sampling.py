from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lcm_jax.diffusion.samplers import SAMPLERS, check_given_steps, time_grid, walk
from lcm_jax.diffusion.sampling import sample, trajectory
from lcm_jax.diffusion.schedules import DDPM, Cosine, OnGrid, RectifiedFlow
from lcm_jax.diffusion.solvers import DDIM, LCM
from lcm_jax.diffusion.time_grids import (
    ALIGNED,
    CAPACITY,
    Spacing,
    Walk,
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


def placed(name: str = "euler", **options: object) -> Walk:
    return walk(SAMPLERS[name], SCHEDULE, 4, **options)


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


@pytest.mark.parametrize("name", [name for name, sampler in SAMPLERS.items() if not sampler.rules])
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
            ends_at_timestep_0 = name == "tcd" or (name == "deis" and schedule is SCHEDULE)  # as diffusers'
            assert grid[-1] == (0.0 if ends_at_timestep_0 else schedule.t_min)
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
        (lambda: placed(sigmas="karras", timesteps=[999, 0]), "sigmas and timesteps are both given"),
        (lambda: placed(sigmas="karas"), "sigmas 'karas' is unknown: use one of karras, exponential, beta, lu, ays"),
        (lambda: placed(sigmas=[0.5, 2.0]), r"sigmas must fall from step to step"),
        (lambda: placed(sigmas=[20.0, 2.0]), r"sigmas begin at 20, and this model's noise ends at 14.615"),
        (lambda: placed(sigmas=[2.0, -1.0]), r"are not above 0"),
        (lambda: placed(sigmas=[2.0, float("nan")]), r"give finite numbers, one for each step"),
        (lambda: placed(sigmas=[]), r"sigmas is \[\]: give finite numbers"),
        (lambda: placed(timesteps=[1000, 0]), r"timesteps \[1000, 0\] must lie between 0 and 999"),
        (lambda: placed(timesteps=[5, 5]), r"timesteps must fall"),
        (lambda: placed(timesteps=[500], timestep_spacing="trailing"), r"spacing 'trailing' and timesteps are both"),
        (lambda: placed("lcm", timestep_spacing="trailing"), r"sampler lcm takes its own timesteps"),
        (
            lambda: placed("unipc", sigmas="beta", timestep_spacing="leading"),
            r"unipc spreads sigmas 'beta' over the wh",
        ),
        (lambda: placed(timestep_spacing="log"), r"timestep_spacing 'log' is unknown"),
        (lambda: walk(SAMPLERS["euler"], FLOW, 4, sigmas="ays"), r"'ays' has steps for Stable Diffusion 1, 2 and XL"),
        (lambda: walk(SAMPLERS["euler"], FLOW, 4, timestep_spacing="trailing"), r"this model's time is continuous"),
        (lambda: walk(SAMPLERS["euler"], FLOW, 4, sigmas=[2.0, 1.0]), r"those of a rectified flow are between 0 and 1"),
        (lambda: walk(SAMPLERS["euler"], DDPM(num_train_timesteps=100), 4, sigmas="ays"), r"tables of 1000 timesteps"),
        (lambda: check_given_steps(4, None, [800]), "steps is 4, and timesteps are those of 1 steps: leave steps out"),
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


RULES = ("karras", "exponential", "beta", "lu", "ays")


@pytest.mark.parametrize("name", sorted(SAMPLERS))
def test_every_rule_places_the_steps_of_every_sampler(name: str) -> None:
    for schedule in (SCHEDULE, DDPM(rescale_betas_zero_snr=True), FLOW, Cosine()):
        for rule in RULES if isinstance(schedule, DDPM) else RULES[:-1]:
            for steps in (1, 2, 10, 17):
                made = walk(SAMPLERS[name], schedule, steps, sigmas=rule)
                plain = walk(SAMPLERS[name], schedule, steps)
                assert len(made.times) == len(plain.times) == len(made.network_times) == len(made.orders) + 1
                assert made.times[-1] == plain.times[-1]
                falls = np.diff(made.times)
                # PLMS visits its second time twice; DEIS and TCD end at timestep 0, where a rule's last step may be
                still = [1] * (name == "pndm" and steps > 1) + [len(falls) - 1] * bool(made.times[-1] == 0.0)
                assert np.all(np.delete(falls, still) < 0.0)
                assert np.all(falls <= 0.0)
                assert np.isfinite(made.network_times).all()


def test_align_your_steps_is_the_published_list_and_its_interpolation() -> None:
    for family, times in ALIGNED.items():
        np.testing.assert_array_equal(placed_ays(family, 10)[:-1], times[:-1])
    # log-linear: with twice the steps every other level is one of the list's
    np.testing.assert_allclose(placed_ays("sdxl", 20)[:-1:2], ALIGNED["sdxl"][:-1], atol=0.01)


def placed_ays(family: str, steps: int) -> np.ndarray:
    return walk(SAMPLERS["dpm++2m"], SCHEDULE, steps, sigmas="ays", family=family).times


def test_given_levels_and_timesteps_are_the_steps() -> None:
    made = walk(SAMPLERS["euler"], SCHEDULE, 1, sigmas=[10.0, 2.0, 0.5, 0.0])
    alpha, sigma = (np.asarray(f(made.times[:-1].astype(np.float32))) for f in (SCHEDULE.alpha, SCHEDULE.sigma))
    np.testing.assert_allclose(sigma / alpha, [10.0, 2.0, 0.5], rtol=1e-5)
    assert made.times[-1] == -1.0
    flow = walk(SAMPLERS["euler"], FLOW, 1, timesteps=[1000, 600, 250])
    np.testing.assert_allclose(FLOW.network_time(flow.times[:-1].astype(np.float32)), [1000, 600, 250], rtol=1e-5)
    np.testing.assert_array_equal(flow.network_times, [1000, 600, 250, 0])


def test_strength_and_rules_go_together() -> None:
    complete, part = (walk(SAMPLERS["dpm++3m_sde"], SCHEDULE, 20, sigmas="karras", strength=s) for s in (1.0, 0.4))
    assert len(part.times) == 9
    for row, rest in zip(complete, part, strict=True):
        np.testing.assert_array_equal(row[12:], rest)
    mended = walk(SAMPLERS["pndm"], SCHEDULE, 4, strength=0.5).times
    np.testing.assert_array_equal(mended, [250.0, 0.0, 0.0, -1.0])  # the second of the steps that are left, again


def test_published_grids_of_few_steps() -> None:
    """Hyper-SD's one step, Lightning's and Turbo's trailing ones, PeRFlow's windows."""
    np.testing.assert_array_equal(walk(SAMPLERS["lcm"], SCHEDULE, 1, timesteps=[800]).times, [800, -1])
    for steps, want in ((1, [999]), (2, [999, 499]), (4, [999, 749, 499, 249]), (8, range(999, 0, -125))):
        for name in ("euler", "euler_a", "ddim"):
            made = walk(SAMPLERS[name], SCHEDULE, steps, timestep_spacing="trailing")
            np.testing.assert_array_equal(made.times, [*want, -1.0])
            np.testing.assert_array_equal(made.network_times[:-1], list(want))
    # PeRFlow: four windows of 250 timesteps, so many steps in each, from 1000 down; its last time counts from 1
    windows = np.concatenate([np.linspace(start, start - 250, 2, endpoint=False) for start in (1000, 750, 500, 250)])
    made = walk(SAMPLERS["ddim"], SCHEDULE, 8, timesteps=windows - 1)
    np.testing.assert_array_equal(made.times, [999, 874, 749, 624, 499, 374, 249, 124, -1])


def test_nothing_compiles_anew_for_other_steps_levels_or_seeds() -> None:
    for name in ("unipc", "dpm++2s", "dpm++3m_sde", "deis", "lms", "pndm", "dpm2_a"):
        sampler, traces = SAMPLERS[name], []

        @jax.jit
        def draw(grid, x, key, sampler=sampler, traces=traces):
            traces.append(grid)
            on_grid = OnGrid(SCHEDULE, grid)
            return sample(
                lambda x, t, s=None: denoise(x, on_grid.network_time(t)), SCHEDULE, sampler.solver, grid, x, key
            )

        options = [{}, {"sigmas": "karras"}, {"sigmas": "beta"}, {"sigmas": [9.0, 3.0, 1.0]}, {"timesteps": [900, 3]}]
        for steps in (2, 14, 15):
            for i, placing in enumerate(options):
                made = draw(pad(walk(sampler, SCHEDULE, steps, **placing)), X, jax.random.key(i))
                assert bool(jnp.isfinite(made).all())
        assert len(traces) == 1, name
