from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lcm_jax.diffusion.parameterization import KINDS
from lcm_jax.diffusion.schedules import DDPM, RectifiedFlow
from lcm_jax.objectives.consistency import (
    TEACHER_SOLVERS,
    LatentConsistencyDistillation,
    LatentConsistencyFinetuning,
    augmented_step,
)
from lcm_jax.typing import Nets

# most of the time here is compilation
jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def recorded(recorder, objective, inner, batch, null, net=None, seed=0):
    """(loss, metrics, calls of each tree), everything under one jit; names cannot be traced, arrays can."""

    def run(batch, key):
        record = recorder(inner)
        nets = Nets(record, {"student": net}, {"target": net}, {"teacher": net}, null)
        return (*objective(nets, batch, key), record.calls)

    return jit(run)(batch, jax.random.key(seed))


# -- The closed form: an exact teacher and an exact student disagree by the solver's local error alone.


@pytest.mark.parametrize(("solver", "order"), [("ddim", 1), ("dpm", 2), ("dpm++", 2)])
def test_exact_student_differs_by_the_local_error_of_the_solver(solver, order, gaussian, make_batch) -> None:
    """|f(z_t) - f(z_s)| falls as skip^(order + 1), with guidance: Psi of these Gaussians is affine in the mean."""
    batch, nets = make_batch(64), gaussian.nets("v_prediction")
    z, cond, w = batch["x0"], batch["cond"], jnp.linspace(2.0, 14.0, 64)

    @jit
    def error(skip):
        t = jnp.full((64,), 600.0)
        z_s = augmented_step(TEACHER_SOLVERS[solver], nets, gaussian.schedule, "v_prediction", z, t, t - skip, cond, w)
        guided = {**cond, "guidance": w}
        end = gaussian.solution(nets.student, z_s, t - skip, guided)
        return jnp.sqrt(jnp.mean((end - gaussian.solution(nets.student, z, t, guided)) ** 2))

    errors = [float(error(skip)) for skip in (80.0, 40.0, 20.0)]
    slopes = np.diff(-np.log2(errors))
    assert abs(slopes[-1] - (order + 1)) < 0.2, (errors, slopes)


def test_distillation_loss_of_the_exact_student_is_that_error(gaussian, make_batch) -> None:
    batch, nets = make_batch(64), gaussian.nets("epsilon")
    objective = LatentConsistencyDistillation(schedule=gaussian.schedule, grid_points=4, skip=25.0)
    loss = jit(lambda student: objective(nets._replace(student=student), batch, jax.random.key(0))[0])
    assert loss(nets.student) < 1e-5
    assert loss(gaussian.student(m=0.32)) > 1e-4
    assert loss(gaussian.student(v=0.72)) > 1e-4


def test_gradient_finite_differences_and_frozen_trees(gaussian, make_batch) -> None:
    batch = make_batch(64)
    objective = LatentConsistencyDistillation(schedule=gaussian.schedule, w_min=0.0, w_max=3.0)
    start = gaussian.nets("epsilon", student=gaussian.student(m=0.5, v=0.8))

    @jit
    def value(student, target, teacher):
        def loss(s, t, p):
            return objective(start._replace(student=s, target=t, teacher=p), batch, jax.random.key(0))[0]

        return jax.value_and_grad(loss, argnums=(0, 1, 2))(student, target, teacher)

    _, (grad, to_target, to_teacher) = value(start.student, start.target, start.teacher)
    for frozen in (to_target, to_teacher):
        assert all(g == 0 for g in jax.tree.leaves(frozen))
    for name, h in (("m", 0.02), ("v", 0.02)):
        assert grad[name] > 0  # both are above the truth: descent leads back
        later, earlier = (
            value(start.student | {name: start.student[name] + d}, start.target, start.teacher)[0] for d in (h, -h)
        )
        np.testing.assert_allclose(grad[name], (later - earlier) / (2 * h), rtol=5e-3)


def test_online_target_is_the_student_without_gradient(gaussian, make_batch) -> None:
    batch, student = make_batch(16), gaussian.student(m=0.5, v=0.8)
    nets = gaussian.nets("sample", student=student, target=student)

    def grad(target, nets):
        objective = LatentConsistencyDistillation(
            schedule=gaussian.schedule, kind="sample", target=target, loss="huber"
        )
        return jit(jax.grad(lambda p: objective(nets._replace(student=p), batch, jax.random.key(0))[0]))(student)

    online, ema = grad("online", nets._replace(target=None)), grad("ema", nets)
    assert abs(ema["m"]) > 1e-3
    for name in ("m", "v"):
        np.testing.assert_allclose(online[name], ema[name], rtol=1e-6)


def test_equivalent_networks_of_any_kind_have_one_loss(gaussian, make_batch) -> None:
    batch = make_batch(64)
    losses = []
    for kind in KINDS:
        nets = gaussian.nets(kind, student=gaussian.teacher(m=0.5), target=gaussian.teacher(m=0.4))
        objective = LatentConsistencyDistillation(schedule=gaussian.schedule, kind=kind, w_min=8.0, w_max=8.0)
        losses.append(objective(nets, batch, jax.random.key(0))[0])  # its operations are the same for every kind
    np.testing.assert_allclose(losses, losses[0], rtol=1e-4)


def test_finetuning_has_the_gradient_of_distillation_from_the_exact_teacher(gaussian, make_batch) -> None:
    """E[z_s | z_t] under shared noise is the exact teacher's DDIM step, so for l2 and an affine f^- they agree."""
    n = 100_000
    batch = {"x0": make_batch(n, channels=1)["x0"][:, :1, :1], "cond": {"context": make_batch(n)["cond"]["context"]}}
    nets = gaussian.nets("sample", student=gaussian.student(m=0.5, v=0.8), target=gaussian.student(m=0.4, v=0.6))
    grads = []
    for make in (LatentConsistencyFinetuning, LatentConsistencyDistillation):
        objective = make(schedule=gaussian.schedule, kind="sample", grid_points=2, skip=250.0, w_min=0.0, w_max=0.0)

        def loss(p, batch, objective=objective):
            return objective(nets._replace(student=p), batch, jax.random.key(5))[0]

        grads.append(jit(jax.grad(loss))(nets.student, batch))
    for name in ("m", "v"):
        np.testing.assert_allclose(grads[0][name], grads[1][name], rtol=0.02)
        assert abs(grads[0][name]) > 0.01


def test_finetuning_pairs_share_the_noise(recorder, gaussian, make_batch) -> None:
    batch = make_batch(32)
    objective = LatentConsistencyFinetuning(schedule=gaussian.schedule, grid_points=1000, skip=70.0)
    _, _, calls = recorded(recorder, objective, lambda net, x, t, cond: 0 * x, batch, {"context": jnp.zeros((1, 1, 1))})
    assert set(calls) == {"student", "target"}
    ((z, t, _),), ((z_s, s, _),) = calls["student"], calls["target"]
    np.testing.assert_array_equal(s, jnp.maximum(t - 70, 0))
    eps = (z - gaussian.scales(t, z)[0] * batch["x0"]) / gaussian.scales(t, z)[1]
    a, b = gaussian.scales(s, z)
    np.testing.assert_allclose(z_s, a * batch["x0"] + b * eps, atol=1e-4)


# -- The draws.


def test_pairs_of_times(gaussian) -> None:
    def draw(schedule, **options):
        return LatentConsistencyDistillation(schedule=schedule, **options).times(jax.random.key(0), 4000)

    t, s = draw(gaussian.schedule)
    np.testing.assert_array_equal(np.unique(t), np.arange(19, 1000, 20))
    np.testing.assert_array_equal(s, np.maximum(t - 20, 0))
    t, s = draw(gaussian.schedule, grid_points=1000, skip=5.0)  # the skip is not the grid's spacing
    assert len(np.unique(t)) > 950
    assert (np.asarray(t) == np.floor(t)).all()
    assert t.max() == 999
    np.testing.assert_array_equal(s, np.maximum(t - 5, 0))
    t, s = draw(RectifiedFlow(), grid_points=10, skip=0.05, kind="flow")
    np.testing.assert_allclose(np.unique(t), np.arange(1, 11) / 10, rtol=1e-6)
    np.testing.assert_allclose(s, t - 0.05, rtol=1e-5)


def test_w_is_drawn_per_example_and_reaches_the_student_only(recorder, gaussian, make_batch) -> None:
    batch, null = make_batch(512), {"context": jnp.zeros((1, 1, 1))}
    objective = LatentConsistencyDistillation(schedule=gaussian.schedule, w_min=5.0, w_max=15.0)
    loss, metrics, calls = recorded(recorder, objective, lambda net, x, t, cond: 0 * x, batch, null)
    w = calls["student"][0][2]["guidance"]
    assert w.shape == (512,)
    assert 5 <= w.min() < 5.2
    assert 14.8 < w.max() <= 15
    assert abs(w.mean() - 10) < 0.6
    np.testing.assert_array_equal(calls["target"][0][2]["guidance"], w)
    ((z, t, cond),) = calls["teacher"]  # one call of 2n rows
    assert set(cond) == {"context"}
    assert z.shape[0] == t.shape[0] == 1024
    np.testing.assert_array_equal(cond["context"][:512], 0.0)
    np.testing.assert_array_equal(cond["context"][512:], batch["cond"]["context"])
    assert set(metrics) == {"loss", "error", "loss_t1", "loss_t2", "loss_t3", "loss_t4"}
    assert all(v.shape == () and v.dtype == jnp.float32 for v in metrics.values())
    np.testing.assert_allclose(sum(metrics[f"loss_t{i}"] for i in range(1, 5)) / 4, loss, rtol=1e-5)


def test_fixed_w_without_embedding_and_dropped_captions(recorder, gaussian, make_batch) -> None:
    """LCM-LoRA: no cond["guidance"]; a dropped caption is dropped for student, target and teacher alike."""
    batch, null = make_batch(512), {"context": jnp.full((1, 1, 1), 9.0)}
    objective = LatentConsistencyDistillation(
        schedule=gaussian.schedule, w_min=7.5, w_max=7.5, embed_w=False, caption_dropout=0.25
    )
    _, _, calls = recorded(recorder, objective, lambda net, x, t, cond: 0 * x + cond["context"][..., None], batch, null)
    cond = calls["student"][0][2]
    assert set(cond) == {"context"}
    dropped = np.asarray(cond["context"] == 9.0).ravel()
    assert abs(dropped.mean() - 0.25) < 0.08
    np.testing.assert_array_equal(cond["context"][~dropped], batch["cond"]["context"][~dropped])
    np.testing.assert_array_equal(calls["target"][0][2]["context"], cond["context"])
    np.testing.assert_array_equal(calls["teacher"][0][2]["context"][512:], cond["context"])
    # the network says eps = context, so the guided eps is w-linear and known: eps_c + 7.5 (eps_c - 9)
    ((z, t, _),), ((z_s, s, _),) = calls["student"], calls["target"]
    (a, b), (a_s, b_s) = gaussian.scales(t, z), gaussian.scales(s, z)
    eps = 8.5 * cond["context"][..., None] - 7.5 * 9.0
    np.testing.assert_allclose(z_s, a_s * (z - b * eps) / a + b_s * eps, atol=1e-3)


# -- The boundary.


def test_solution_at_the_start_is_the_identity(gaussian, make_batch) -> None:
    z = make_batch(4)["x0"]
    nets = Nets(apply=lambda p, x, t, cond: jnp.full_like(x, 1e3), student={})
    for kind, schedule in (
        ("v_prediction", gaussian.schedule),
        ("epsilon", RectifiedFlow()),
        ("sample", RectifiedFlow()),
    ):
        objective = LatentConsistencyFinetuning(schedule=schedule, kind=kind)  # x0hat may be infinite there
        start = jit(lambda z, o=objective: o.solution(nets, {}, {}, z, jnp.zeros(4), jnp.zeros(4)))(z)
        np.testing.assert_array_equal(start, z)


def test_the_pair_at_the_start_has_no_loss(gaussian, make_batch) -> None:
    objective = LatentConsistencyDistillation(schedule=DDPM(num_train_timesteps=1), grid_points=1)  # t = s = 0 only
    nets = gaussian.nets("epsilon", student=gaussian.teacher(m=5.0), target=gaussian.teacher(m=-5.0))
    loss, _ = jit(partial(objective, nets))(make_batch(8), jax.random.key(0))
    assert loss < 1e-9


# -- Against the facts, by hand in numpy (float64).


def ddim_increment(z, eps, a, s, a_n, s_n):
    """Psi_DDIM of the facts: (a_n / a) z - s_n (s a_n / (a s_n) - 1) eps - z."""
    return a_n / a * z - s_n * (s * a_n / (a * s_n) - 1) * eps - z


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_one_training_loss_against_a_transcription_in_numpy(kind, recorder) -> None:
    """Steps 1 to 5 of the released training on a fixed random network; only the draws come from the objective."""
    rng = np.random.default_rng(0)
    n, c, d = 16, 3, 5
    shapes = {"x": (c, d), "c": (2, d), "w": (d,), "y": (d, c)}
    net = {name: rng.normal(size=shape) * 0.4 for name, shape in shapes.items()}

    def inner(p, x, t, cond, np=jnp):
        hidden = x @ p["x"] + (cond["context"].mean(1) @ p["c"])[:, None, None] + np.sin(t / 99)[:, None, None, None]
        if "guidance" in cond:
            hidden = hidden + np.cos(cond["guidance"])[:, None, None, None] * p["w"]
        return np.tanh(hidden) @ p["y"]

    x0, context, null = rng.normal(size=(n, 2, 2, c)), rng.normal(size=(n, 4, 2)), rng.normal(size=(1, 4, 2))
    objective = LatentConsistencyDistillation(
        schedule=DDPM(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"),
        kind=kind,
        w_min=5.0,
        w_max=15.0,
        loss="huber",
    )
    f32 = partial(jax.tree.map, lambda v: jnp.asarray(v, jnp.float32))
    loss, metrics, calls = recorded(
        recorder,
        objective,
        lambda p, x, t, cond: inner(p, x, t, cond),
        f32({"x0": x0, "cond": {"context": context}}),
        f32({"context": null}),
        net=f32(net),
    )
    z, t, cond = jax.tree.map(np.asarray, calls["student"][0])
    z, t, w = z.astype(np.float64), t.astype(np.float64), cond["guidance"].astype(np.float64)

    # 1. and 2. the grid, and abar[0] as the end of its first step
    abar = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)
    grid = np.arange(1, 51) * 20 - 1
    index = np.searchsorted(grid, t)
    np.testing.assert_array_equal(grid[index], t)
    t_n = np.maximum(t - 20, 0)
    end = np.concatenate([abar[:1], abar[grid[:-1]]])[index]
    column = (slice(None), None, None, None)
    a, s = np.sqrt(abar[t.astype(int)])[column], np.sqrt(1 - abar[t.astype(int)])[column]
    a_n, s_n = np.sqrt(end)[column], np.sqrt(1 - end)[column]

    def both(y, z, a, s):  # x0hat, epshat
        return ((z - s * y) / a, y) if kind == "epsilon" else (a * z - s * y, a * y + s * z)

    # 3. the teacher's guided step, on both x0hat and epshat
    (x0_c, eps_c), (x0_u, eps_u) = (
        both(inner(net, z, t, {"context": np.broadcast_to(e, context.shape)}, np=np), z, a, s) for e in (context, null)
    )
    w4 = w[column]
    z_n = a_n * (x0_c + w4 * (x0_c - x0_u)) + s_n * (eps_c + w4 * (eps_c - eps_u))
    increments = [ddim_increment(z, e, a, s, a_n, s_n) for e in (eps_c, eps_u)]
    np.testing.assert_allclose(z_n, z + (1 + w4) * increments[0] - w4 * increments[1], atol=1e-9)
    np.testing.assert_allclose(calls["target"][0][0], z_n, atol=3e-4)
    np.testing.assert_array_equal(calls["target"][0][1], t_n)

    # 4. and 5. the student at (z, t), the target at (z_n, t_n), and the distance
    def f(z, t, a, s):
        x0hat = both(inner(net, z, t, {"context": context, "guidance": w}, np=np), z, a, s)[0]
        u = (10 * t)[column]
        return 0.25 / (u**2 + 0.25) * z + u / np.sqrt(u**2 + 0.25) * x0hat

    difference = f(z, t, a, s) - f(z_n, t_n, a_n, s_n)
    expected = np.mean(np.sqrt(difference**2 + 0.001**2) - 0.001)
    np.testing.assert_allclose(loss, expected, rtol=1e-4)
    np.testing.assert_allclose(metrics["error"], np.abs(difference).mean(), rtol=1e-4)


# -- End to end.


def test_distillation_converges_to_the_teacher_s_own_ddim_sampler(gaussian) -> None:
    """A student that can hold any affine map per time ends at the composition of the teacher's steps, not near it."""
    points, m, v = 5, 0.3, 0.7
    objective = LatentConsistencyDistillation(
        schedule=gaussian.schedule, kind="sample", grid_points=points, skip=200.0, target="online", embed_w=False
    )
    teacher = gaussian.network("sample")

    def apply(params, x, t, cond):
        if "v" in params:
            return teacher(params, x, t, cond)
        row = jnp.clip(jnp.round((t + 1) / 200).astype(jnp.int32) - 1, 0, points - 1)
        return params["shift"][row][:, None, None, None] + params["gain"][row][:, None, None, None] * x

    null = {"context": jnp.zeros((1, 1, 1))}
    optimizer = optax.adam(optax.cosine_decay_schedule(0.05, 1500))

    def step(carry, key):
        params, state = carry
        data_key, key = jax.random.split(key)
        batch = {
            "x0": m + v * jax.random.normal(data_key, (64, 1, 1, 1)),
            "cond": {"context": jnp.zeros((64, 1, 1))},
        }
        grad = jax.grad(lambda p: objective(Nets(apply, p, None, gaussian.teacher(m, v), null), batch, key)[0])(params)
        updates, state = optimizer.update(grad, state, params)
        return (optax.apply_updates(params, updates), state), None

    params = {"shift": jnp.zeros(points), "gain": jnp.ones(points)}
    start = (params, optimizer.init(params))
    (params, _), _ = jax.jit(partial(jax.lax.scan, step))(start, jax.random.split(jax.random.key(0), 1500))

    x = x_ddim = jnp.linspace(-2.0, 2.0, 9)[:, None, None, None]
    cond = {"context": jnp.zeros((9, 1, 1))}
    for t, s in ((999, 799), (799, 599), (599, 399), (399, 199), (199, 0)):
        a, b = gaussian.schedule.alpha(float(t)), gaussian.schedule.sigma(float(t))
        x0 = teacher(gaussian.teacher(m, v), x_ddim, jnp.full((9,), float(t)), cond)
        x_ddim = gaussian.schedule.alpha(float(s)) * x0 + gaussian.schedule.sigma(float(s)) * (x_ddim - a * x0) / b
    one_step = apply(params, x, jnp.full((9,), 999.0), cond)
    exact = gaussian.solution(gaussian.teacher(m, v), x, jnp.full((9,), 999.0), cond)
    np.testing.assert_allclose(one_step, x_ddim, atol=0.01)
    assert jnp.abs(x_ddim - exact).max() > 0.05  # so the above is not the ODE's own solution


@pytest.mark.wrong_types
def test_wrong_options_are_named() -> None:
    make = partial(LatentConsistencyDistillation, schedule=DDPM())
    for options, words in (
        ({"solver": "plms"}, "solver='plms'.*dpm"),
        ({"target": "slow"}, "target='slow'.*online"),
        ({"w_min": 3.0, "w_max": 2.0}, "w_min=3.0 is above"),
        ({"skip": 0.0}, "skip=0.0"),
    ):
        with pytest.raises(ValueError, match=words):
            make(**options)
    assert len({make(), make()}) == 1
