from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lcm_jax.diffusion.schedules import DDPM, Cosine, RectifiedFlow, at_resolution, log_snr
from lcm_jax.typing import Schedule
from lcm_jax.weights.scheduler_config import from_config

LATENT = DDPM(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
ZERO_SNR = DDPM(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", rescale_betas_zero_snr=True)
TABLES = [DDPM(), LATENT, ZERO_SNR, DDPM(beta_schedule="squaredcos_cap_v2"), DDPM(num_train_timesteps=1)]
SCHEDULES = [*TABLES[:4], RectifiedFlow(), RectifiedFlow(shift=3.0), Cosine()]


@pytest.mark.parametrize("schedule", [*TABLES, Cosine()])
def test_variance_is_preserved(schedule: Schedule) -> None:
    t = jnp.linspace(schedule.t_min, schedule.t_max, 777)
    np.testing.assert_allclose(schedule.alpha(t) ** 2 + schedule.sigma(t) ** 2, 1.0, atol=1e-6)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_ends_and_monotony(schedule: Schedule) -> None:
    assert float(schedule.alpha(schedule.t_min)) == 1.0
    assert float(schedule.sigma(schedule.t_min)) == 0.0
    t = jnp.linspace(schedule.t_min, schedule.t_max, 3001)
    assert np.all(np.diff(schedule.alpha(t)) < 1e-7)
    assert np.all(np.diff(schedule.sigma(t)) > -1e-7)


@pytest.mark.parametrize("schedule", [ZERO_SNR, RectifiedFlow(), RectifiedFlow(shift=3.0), Cosine()])
def test_zero_terminal_snr(schedule: Schedule) -> None:
    assert float(schedule.alpha(schedule.t_max)) == 0.0
    assert float(schedule.sigma(schedule.t_max)) == 1.0


def test_zero_snr_keeps_the_first_entry() -> None:
    np.testing.assert_allclose(ZERO_SNR.alpha(0), LATENT.alpha(0), rtol=1e-6)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_time_at_inverts_log_snr(schedule: Schedule) -> None:
    inner = jnp.linspace(schedule.t_min, schedule.t_max, 501)[1:-6]
    span = schedule.t_max - schedule.t_min
    np.testing.assert_allclose(schedule.time_at(log_snr(schedule, inner)), inner, atol=1e-4 * span)
    assert float(schedule.time_at(jnp.inf)) == schedule.t_min
    assert float(schedule.time_at(-jnp.inf)) == schedule.t_max


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_batches_jit_and_hash(schedule: Schedule) -> None:
    t = jnp.asarray([0.3, 0.9]) * schedule.t_max
    once = jax.jit(lambda schedule, t: schedule.alpha(t), static_argnums=0)(schedule, t)
    assert once.shape == (2,)
    assert once.dtype == jnp.float32
    np.testing.assert_allclose(once, [schedule.alpha(t[0]), schedule.alpha(t[1])], rtol=1e-6)
    assert hash(schedule) == hash(type(schedule)(**vars(schedule)))


def test_between_integers_the_ratio_is_linear() -> None:
    def ratio(t: float) -> float:
        return float(LATENT.sigma(t) / LATENT.alpha(t))

    assert ratio(500.25) == pytest.approx(0.75 * ratio(500) + 0.25 * ratio(501), rel=1e-5)
    assert ratio(-0.5) == pytest.approx(0.5 * ratio(0), rel=1e-5)


def test_shift_and_network_time() -> None:
    flow = RectifiedFlow(shift=3.0)
    assert float(flow.sigma(0.5)) == pytest.approx(0.75)
    assert float(flow.network_time(0.5)) == pytest.approx(750.0)
    assert float(LATENT.network_time(19)) == 19.0


def test_at_resolution() -> None:
    flow, t = RectifiedFlow(), jnp.linspace(0.05, 0.95, 10)
    assert at_resolution(flow, 1024**2, 256**2) == RectifiedFlow(shift=4.0)
    assert at_resolution(flow, 1024**2, 1024**2 / 9) == RectifiedFlow(shift=3.0)  # what the paper's study preferred
    # eq. 23; the log of alpha^2 / sigma^2 falls by log(m / n), and ours, of alpha / sigma, by half of it
    large, ratio = at_resolution(flow, 768 * 512, 256**2), np.sqrt(6.0)
    np.testing.assert_allclose(large.sigma(t), ratio * t / (1 + (ratio - 1) * t), rtol=1e-6)
    np.testing.assert_allclose(log_snr(large, t), log_snr(flow, t) - 0.5 * np.log(6.0), atol=1e-5)
    # a constant picture of m pixels is known to within sigma / (alpha sqrt(m)), the same for both
    for schedule, pixels in ((flow, 256**2), (large, 768 * 512)):
        known = schedule.sigma(t) / schedule.alpha(t) / np.sqrt(pixels)
        np.testing.assert_allclose(known, t / (1 - t) / 256, rtol=1e-5)
    there = at_resolution(RectifiedFlow(shift=3.0), 512**2, 1024**2)
    assert at_resolution(there, 1024**2, 512**2) == RectifiedFlow(shift=3.0)
    with pytest.raises(ValueError, match="pixels=0 and base=65536 must be positive"):
        at_resolution(flow, 0, 65536)


def test_from_config() -> None:
    config = {"_class_name": "PNDMScheduler", "skip_prk_steps": True, "beta_schedule": "scaled_linear"}
    assert from_config(config | {"beta_start": 0.00085, "beta_end": 0.012}) == LATENT
    assert from_config({"_class_name": "LCMScheduler"}) == LATENT
    assert from_config({"_class_name": "DDIMScheduler"}) == DDPM()
    flow = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}
    assert from_config(flow) == RectifiedFlow(shift=3.0)
    dpm = {"_class_name": "DPMSolverMultistepScheduler", "use_flow_sigmas": True, "flow_shift": 3.0}
    assert from_config(dpm) == RectifiedFlow(shift=3.0)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"beta_schedule": "sigmoid"}, r"a/scheduler_config.json: beta_schedule 'sigmoid' is unknown"),
        ({"trained_betas": [0.1]}, "trained_betas"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler", "use_dynamic_shifting": True}, "use_dynamic_shifting"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 0}, "shift"),
        ({"num_train_timesteps": 0}, "num_train_timesteps"),
    ],
)
def test_bad_config(config: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        from_config(config, source="a/scheduler_config.json")
    assert "\n" not in str(error.value)
