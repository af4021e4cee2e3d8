from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lcm_jax.diffusion.parameterization import KINDS
from lcm_jax.diffusion.schedules import DDPM, RectifiedFlow, at_resolution
from lcm_jax.objectives.diffusion import Diffusion, min_snr_weight, validation_losses
from lcm_jax.objectives.terms import TextEncoders
from lcm_jax.objectives.time_densities import CosMap, LogitNormal
from lcm_jax.typing import Nets

# most of the time here is compilation
jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def test_posterior_mean_has_the_known_loss_and_no_gradient(gaussian, make_batch) -> None:
    """E|eps - E[eps|x]|^2 = alpha^2 v^2 / S^2 for a Gaussian, and the loss is stationary there."""
    batch = make_batch(20_000)
    objective = Diffusion(schedule=gaussian.schedule, caption_dropout=0.0, times=lambda key, n: jnp.full((n,), 500.0))
    nets = gaussian.nets("epsilon", student=gaussian.teacher())
    value = jit(jax.value_and_grad(lambda p: objective(nets._replace(student=p), batch, jax.random.key(0))[0]))
    loss, grad = value(gaussian.teacher())
    a, s = float(gaussian.schedule.alpha(500.0)), float(gaussian.schedule.sigma(500.0))
    np.testing.assert_allclose(loss, a**2 * 0.49 / (a**2 * 0.49 + s**2), rtol=0.01)
    wrong = value(gaussian.teacher(m=0.6, v=0.9))[1]
    for name in ("m", "v"):
        assert abs(grad[name]) < 0.03 * abs(wrong[name])
        assert wrong[name] > 0  # both are too large


def test_errors_agree_in_x0_space_under_min_snr(gaussian, make_batch) -> None:
    """min-SNR weighs the error of x0 by min(SNR, gamma), whatever the output: equivalent networks have one loss."""
    batch, losses = make_batch(256), []
    for kind in KINDS:
        objective = Diffusion(schedule=gaussian.schedule, kind=kind, min_snr_gamma=5.0)
        nets = gaussian.nets(kind, student=gaussian.teacher(m=0.5))
        losses.append(objective(nets, batch, jax.random.key(3))[0])  # its operations are the same for every kind
    np.testing.assert_allclose(losses, losses[0], rtol=2e-3)


def test_min_snr_weights_of_the_paper() -> None:
    schedule, t = DDPM(), jnp.arange(0.0, 1000.0, 37.0)
    a, s = schedule.alpha(t), schedule.sigma(t)
    weights = jit(lambda a, s: {kind: min_snr_weight(kind, a, s, 5.0) for kind in KINDS})
    snr = np.asarray(a**2 / s**2)
    top = np.minimum(snr, 5.0)
    np.testing.assert_allclose(weights(a, s)["epsilon"], top / snr, rtol=1e-4)
    np.testing.assert_allclose(weights(a, s)["v_prediction"], top / (snr + 1), rtol=1e-4)
    np.testing.assert_allclose(weights(a, s)["sample"], top, rtol=1e-4)
    zero_snr = weights(jnp.zeros_like(a), jnp.ones_like(s))
    np.testing.assert_array_equal(zero_snr["epsilon"], 1.0)
    assert all(jnp.isfinite(w).all() for w in zero_snr.values())


def test_validation_loss_is_that_of_even_times(gaussian_on, make_batch) -> None:
    """Of the posterior mean it is v^2 / S^2 for a flow, at t = 1/16, 3/16, ..., 15/16, whatever the training draws."""
    schedule, batch = RectifiedFlow(), make_batch(4000)
    gaussian = gaussian_on(schedule)
    nets = gaussian.nets("flow", student=gaussian.teacher())
    t = (np.arange(8) + 0.5) / 8
    want = 0.49 / ((1 - t) ** 2 * 0.49 + t**2)
    plain = Diffusion(schedule=schedule, kind="flow", caption_dropout=1.0, times=LogitNormal(mean=1.0, std=0.3))
    run, keys = jit(partial(validation_losses, plain, nets)), jax.random.split(jax.random.key(0), 4000)
    losses = run(batch, keys)
    np.testing.assert_allclose(losses.mean(0), want, rtol=0.03)
    np.testing.assert_array_equal(run(batch, keys), losses)
    assert (run(batch, jax.random.split(jax.random.key(1), 4000)) != losses).all()
    some = run(jax.tree.map(lambda leaf: leaf[5:9], batch), keys[5:9])
    np.testing.assert_allclose(some, losses[5:9], rtol=1e-5)
    weighted = dataclasses.replace(plain, weight=CosMap())
    losses = jit(partial(validation_losses, weighted, nets))(batch, keys)
    np.testing.assert_allclose(losses.mean(0), want * CosMap().pdf(jnp.asarray(t)), rtol=0.03)


def test_a_shifted_flow_trains_at_the_shifted_noise(recorder, make_batch) -> None:
    """The density is that of the unshifted time; x, the target and the network's time are the shifted ones."""
    schedule = at_resolution(RectifiedFlow(), 1024**2, 1024**2 / 9)
    t, shifted = 0.4, 3 * 0.4 / (1 + 2 * 0.4)
    objective = Diffusion(schedule=schedule, kind="flow", caption_dropout=0.0, times=lambda key, n: jnp.full((n,), t))
    record, batch = recorder(lambda net, x, t, cond: x), make_batch(8)
    loss, _ = objective(Nets(apply=record, student={"student": None}), batch, jax.random.key(0))
    ((x, time, _),) = record.calls["student"]
    np.testing.assert_allclose(time, 1000 * shifted, rtol=1e-6)
    eps = (x - (1 - shifted) * batch["x0"]) / shifted
    np.testing.assert_allclose(loss, jnp.mean((x - (eps - batch["x0"])) ** 2), rtol=1e-5)
    assert abs(float(eps.std()) - 1) < 0.2


def test_flow_target_and_network_time(recorder, make_batch) -> None:
    batch = make_batch(8)
    record = recorder(lambda net, x, t, cond: x * 0)
    objective = Diffusion(
        schedule=RectifiedFlow(), kind="flow", caption_dropout=1.0, times=lambda key, n: jnp.full((n,), 0.25)
    )
    nets = Nets(apply=record, student={"student": None}, null={"context": jnp.zeros((1, 1, 1))})
    loss, metrics = objective(nets, batch, jax.random.key(0))
    ((x, t, cond),) = record.calls["student"]
    eps = (x - 0.75 * batch["x0"]) / 0.25
    np.testing.assert_allclose(t, 250.0)
    np.testing.assert_allclose(loss, jnp.mean((eps - batch["x0"]) ** 2), rtol=1e-5)
    assert not cond["context"].any()
    assert set(metrics) == {"loss", "error", "loss_t1", "loss_t2", "loss_t3", "loss_t4"}
    assert all(v.shape == () and v.dtype == jnp.float32 for v in metrics.values())
    np.testing.assert_allclose(metrics["loss_t1"], 4 * loss, rtol=1e-6)


def test_encoders_are_dropped_only_where_the_objective_says_so(recorder) -> None:
    """In training, as `drop_encoders` does it; the validation loss sees the whole conditioning."""
    cond = {"context": jnp.ones((64, 3, 4)), "pooled": jnp.ones((64, 2))}
    batch = {"x0": jnp.ones((64, 1, 1, 1)), "cond": cond}
    encoders = TextEncoders(clip_tokens=1, clip_widths=(2, 2), pooled_widths=(1, 1))
    plain = Diffusion(schedule=RectifiedFlow(), kind="flow", caption_dropout=0.0)
    for objective, share in (
        (plain, 1.0),
        (dataclasses.replace(plain, encoders=encoders), 0.536),
        (dataclasses.replace(plain, encoders=encoders, encoder_dropout=1.0), 0.0),
    ):
        record = recorder(lambda net, x, t, cond: x)
        nets = Nets(apply=record, student={"student": None})
        objective(nets, batch, jax.random.key(0))
        ((_, _, cond),) = record.calls["student"]
        assert float(cond["context"].mean()) == pytest.approx(share, abs=0.1)

    def apply(net, x, t, cond):
        return x * cond["pooled"].mean()

    keys = jax.random.split(jax.random.key(0), 64)
    losses = [
        jit(partial(validation_losses, dataclasses.replace(plain, encoders=e), Nets(apply, {})))(batch, keys)
        for e in (None, encoders)
    ]
    np.testing.assert_array_equal(*losses)


@pytest.mark.wrong_types
def test_options_are_checked_and_static() -> None:
    with pytest.raises(ValueError, match=r"kind='eps'.*epsilon"):
        Diffusion(schedule=DDPM(), kind="eps")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"loss='l1'.*huber"):
        Diffusion(schedule=DDPM(), loss="l1")  # type: ignore[arg-type]
    one = Diffusion(schedule=DDPM())
    assert len({one, dataclasses.replace(one)}) == 1
