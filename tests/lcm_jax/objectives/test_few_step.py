"""Laws of the few-step objectives, on Gaussian data, where every map along a trajectory has a closed form.

For x0 ~ N(m, v^2) on a flow the probability-flow ODE takes x_t to alpha_s m + (S_s / S_t) (x_t - alpha_t m), with
S^2 = alpha^2 v^2 + sigma^2. The network below is told its end and is that map, or the posterior mean where it is not.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lcm_jax.diffusion.consistency_function import boundary_scalings
from lcm_jax.diffusion.parameterization import bind, flow_map, on_schedule
from lcm_jax.diffusion.samplers import SAMPLERS, time_grid
from lcm_jax.diffusion.schedules import DDPM, Cosine, RectifiedFlow, TrigFlow, log_snr
from lcm_jax.diffusion.solvers import DDIM, LCM, TCD
from lcm_jax.diffusion.time_grids import Spacing
from lcm_jax.objectives import METHODS, method
from lcm_jax.objectives.continuous import FLOW
from lcm_jax.objectives.time_pairs import CTPairs, ECTPairs, ICTPairs, KarrasPairs, level
from lcm_jax.objectives.trajectory import PhasedConsistency
from lcm_jax.typing import Array, Cond, Image, Nets, Params

jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
PLAIN: dict[str, Any] = {"schedule": FLOW, "kind": "flow", "w_min": 0.0, "w_max": 0.0, "embed_w": False}
EXACT = {"m": jnp.float32(0.3), "v": jnp.float32(0.7), "map": jnp.float32(1.0)}
TEACHER = {**EXACT, "map": jnp.float32(0.0)}
OFF = {**EXACT, "m": jnp.float32(0.6), "v": jnp.float32(0.9)}
NULL = {"context": jnp.zeros((1, 1))}


def deviation(v: Array, t: Array) -> Array:
    return jnp.sqrt(((1 - t) * v) ** 2 + t**2)


def along(params: Params, x: Image, t: Array, s: Array) -> Image:
    """The ODE's map from t to s."""
    t, s = (jnp.broadcast_to(u, x.shape[:1]).reshape(-1, 1, 1, 1) for u in (t, s))
    return (1 - s) * params["m"] + deviation(params["v"], s) / deviation(params["v"], t) * (x - (1 - t) * params["m"])


def network(params: Params, x: Image, t: Array, cond: Cond) -> Image:
    """The mean velocity from t to t - span; at span 0 the velocity at t; without a span to the end, with "map"."""
    t = jnp.broadcast_to(jnp.asarray(t) / 1000.0, x.shape[:1])
    span = jnp.broadcast_to(cond["span"] / 1000.0 if "span" in cond else jnp.where(params["map"] > 0, t, 0.0), t.shape)
    rows = t.reshape(-1, 1, 1, 1)
    a, variance = 1 - rows, deviation(params["v"], rows) ** 2
    x0 = params["m"] + a * params["v"] ** 2 / variance * (x - a * params["m"])
    eps = rows / variance * (x - a * params["m"])
    far = jnp.maximum(span, 1e-6).reshape(-1, 1, 1, 1)
    return jnp.where(span.reshape(-1, 1, 1, 1) > 1e-5, (x - along(params, x, t, t - span)) / far, eps - x0)


def critic(heads: Params, base: Params, x: Image, t: Array, cond: Cond) -> Array:
    return heads * jnp.mean(x, axis=(1, 2, 3))[:, None]


def setting(n: int = 64, seed: int = 0) -> tuple[dict[str, Any], Nets]:
    noise = jax.random.normal(jax.random.key(seed), (n, 2, 2, 2))
    batch = {"x0": EXACT["m"] + EXACT["v"] * noise, "cond": {"context": jnp.zeros((n, 1))}}
    nets = Nets(network, EXACT, EXACT, TEACHER, NULL, {"heads": jnp.ones(3)}, critic, 20_000.0, 40_000.0)
    return batch, nets


# An exact student's loss: zero up to the teacher's solver.
FIXED: dict[str, tuple[dict[str, Any], float]] = {
    "lcm": ({"grid_points": 100, "skip": 0.01, "sigma_data": 1e-6}, 1e-7),
    "cd": ({"pairs": KarrasPairs(points=200), "sigma_data": 1e-6}, 5e-8),
    "ctm": ({"pairs": KarrasPairs(points=50), "denoising": 0.0}, 1e-7),
    "scm": ({}, 1e-6),
    "ayf": ({"largest": 1.0}, 1e-6),
    "ayf, lagrangian": ({"derivative": "lagrangian", "largest": 1.0}, 1e-6),
    "meanflow": ({"power": 0.0, "velocity": "teacher"}, 1e-5),
    "shortcut": ({"finest": 512, "velocity": "teacher"}, 1e-5),  # its finest step is Euler's
}


@pytest.mark.parametrize("name", FIXED)
def test_an_exact_student_has_no_loss(name: str) -> None:
    options, tolerance = FIXED[name]
    batch, nets = setting()
    objective = method(name.split(",")[0], **{**PLAIN, **options})
    nets = nets._replace(others=objective.others(jax.random.key(0), TEACHER))
    loss = jit(lambda p: objective(nets._replace(student=p, target=p), batch, jax.random.key(1))[0])
    assert abs(float(loss(EXACT))) < tolerance
    assert float(loss(OFF)) > 100 * tolerance


def test_guided_distillation_ends_at_the_guided_teacher() -> None:
    batch, nets = setting()
    objective = method("guided", **{**PLAIN, "w_min": 2.0, "w_max": 2.0})
    loss = jit(lambda p: objective(nets._replace(student=p), batch, jax.random.key(1))[0])
    assert loss(TEACHER) < 1e-9  # conditions do not differ here, so guidance changes nothing
    assert loss({**OFF, "map": jnp.float32(0.0)}) > 1e-2


def test_distribution_matching_rests_where_the_two_scores_agree() -> None:
    batch, nets = setting()
    objective = method("dmd2", **PLAIN)

    def direction(fake: Params) -> Array:
        others = {"fake": fake, "heads": jnp.ones(3)}
        return objective(nets._replace(others=others), batch, jax.random.key(1))[1]["error"]

    assert jit(direction)(TEACHER) == 0.0
    assert jit(direction)({**OFF, "map": jnp.float32(0.0)}) > 1e-2


def test_the_student_of_distribution_matching_rests_between_its_steps() -> None:
    batch, nets = setting(8)
    objective = method("dmd2", every=5, **PLAIN)
    off = {**OFF, "map": jnp.float32(0.0)}

    def loss(trees: Any, step: Array) -> Array:
        changed_nets = nets._replace(student=trees[0], others={"fake": trees[1], "heads": jnp.ones(3)}, step=step)
        return objective(changed_nets, batch, jax.random.key(1))[0]

    grad = jit(jax.grad(loss))
    for step, learns in ((0, True), (1, False), (4, False), (5, True)):
        student, fake = grad((EXACT, off), jnp.int32(step))
        assert (student["m"] != 0.0) == learns
        assert fake["m"] != 0.0


@pytest.mark.parametrize("name", ["dmd2", "ladd", "add"])
@pytest.mark.parametrize("schedule", [FLOW, RectifiedFlow(shift=3.0), DDPM(), DDPM(rescale_betas_zero_snr=True)])
def test_adversarial_students_learn_at_the_times_and_from_the_noise_they_draw_with(name: str, schedule: Any) -> None:
    objective = method(name, schedule=schedule, kind=schedule.usual_kind)
    sampler = SAMPLERS[objective.sampler]
    grid = time_grid(sampler, schedule, objective.steps)
    np.testing.assert_array_equal(objective.times, np.asarray(grid[:-1], np.float32))
    noise = jax.random.normal(jax.random.key(0), (2, 2, 2, 1))
    first = noise * sampler.init_noise_sigma(schedule, grid, Spacing())
    np.testing.assert_array_equal(objective.start(noise), first)


@pytest.mark.parametrize("name", ["dmd2", "ladd", pytest.param("add", marks=pytest.mark.slow)])
def test_the_first_input_of_an_adversarial_student_knows_nothing_of_the_data(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a table whose last entry still holds a trace of the data, which sampling's first latent does not have."""
    objective = method(name, schedule=DDPM(), w_min=0.0, w_max=0.0, embed_w=False, steps=1)
    given = []

    def record(params: Params, x: Image, t: Array, cond: Cond) -> Image:
        given.append((params, float(t[0]), x))
        return 0.0 * x

    batch = {"x0": jnp.full((4, 1, 1, 1), 100.0), "cond": {"context": jnp.zeros((4, 1))}}
    with jax.disable_jit():
        student, others = {"student": jnp.float32(0.0)}, {"fake": {}, "heads": jnp.ones(3)}
        objective(Nets(record, student, None, {}, NULL, others, critic), batch, jax.random.key(1))
    inputs = [x for params, t, x in given if "student" in params and t == 999.0]
    assert inputs
    assert all(float(jnp.abs(x).max()) < 5.0 for x in inputs)


def test_the_critic_of_latent_adversarial_distillation_looks_at_logit_normal_times() -> None:
    for schedule in (FLOW, RectifiedFlow(shift=3.0), DDPM()):
        objective = method("ladd", schedule=schedule)
        t = objective.critic_times(jax.random.key(0), jnp.full(4000, schedule.t_min))
        logits = -np.asarray(log_snr(schedule, t))  # on the flow log(sigma / alpha) is the logit of the time
        np.testing.assert_allclose([logits.mean(), logits.std()], [1.0, 1.0], atol=0.06)


def test_the_penalty_is_that_of_a_rough_critic() -> None:
    """E |D(x) - D(x + 0.1 n)|^2 of a linear critic is 0.01 |slope|^2, for any real pictures."""
    batch, nets = setting(4096)
    losses = []
    for r1 in (0.0, 1.0):
        objective = method("ladd", **PLAIN, r1=r1)
        arguments = (nets, batch["x0"], batch["x0"], batch["cond"], jax.random.key(0))
        losses.append(jit(lambda objective=objective, arguments=arguments: objective.adversarial_losses(*arguments)[1]))
    without, penalised = (float(loss()) for loss in losses)
    # the critic is heads * mean(x), of 8 elements, of an x that noise to time t has scaled by alpha = 1 - t
    t = objective.critic_times(jax.random.split(jax.random.split(jax.random.key(0))[1])[0], jnp.zeros(4096))
    np.testing.assert_allclose(penalised - without, 0.01 / 8 * float(jnp.mean((1 - t) ** 2)), rtol=0.1)


def test_the_fake_score_learns_through_its_heads_too() -> None:
    batch, nets = setting(8)

    def critic(heads: Params, base: Params, x: Image, t: Array, cond: Cond) -> Array:
        return heads * base["v"] * jnp.mean(x, axis=(1, 2, 3))[:, None]

    def loss(fake: Params, adversarial: float) -> Array:
        objective = method("dmd2", **PLAIN, adversarial=adversarial, critic=1.0)
        others = {"fake": fake, "heads": jnp.ones(3)}
        return objective(nets._replace(others=others, critic=critic), batch, jax.random.key(1))[0]

    off = {**OFF, "map": jnp.float32(0.0)}
    with_heads, alone = (jit(jax.grad(partial(loss, adversarial=weight)))(off)["v"] for weight in (1.0, 0.0))
    assert abs(float(with_heads - alone)) > 1e-3


def some(*names: str) -> pytest.MarkDecorator:
    """All methods as cases, of which these are fast: one of each way to a gradient."""
    cases = [pytest.param(name, marks=() if name in names else pytest.mark.slow) for name in METHODS]
    return pytest.mark.parametrize("name", cases)


@some("lcm", "scm", "dmd2", "add", "kd")
def test_gradients_are_finite_and_reach_the_student_alone(name: str) -> None:
    batch, nets = setting(16)
    objective = method(name, **PLAIN)
    others = {"heads": jnp.ones(3), **objective.others(jax.random.key(0), {**OFF, "map": jnp.float32(0.0)})}

    def loss(student: Params, target: Params, teacher: Params, others: Any) -> Array:
        changed_nets = nets._replace(student=student, target=target, teacher=teacher, others=others, step=0)
        return objective(changed_nets, batch, jax.random.key(1))[0]

    student, target, teacher, extra = jit(jax.grad(loss, argnums=(0, 1, 2, 3)))(OFF, EXACT, TEACHER, others)
    assert np.isfinite(student["m"])
    assert student["m"] != 0.0
    assert all(g == 0.0 for tree in (target, teacher) for g in jax.tree.leaves(tree))
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(extra))


# Through which of an objective's questions, in order, its gradient goes: those by the student that is trained, and in
# CTM the one by the student without gradient that maps its point on. All the others, the moving average's, the
# teacher's and the fake score's, are aims or what leads to them.
LIVE: dict[str, list[str]] = {
    **{name: ["teacher", "target", "student*"] for name in ("lcm", "cd", "tcd")},
    "pcm": ["teacher", "student", "student*"],
    **{name: ["target", "student*"] for name in ("lcf", "ct")},
    **{name: ["student", "student*"] for name in ("ict", "ect")},
    "ctm": ["teacher", "teacher", "student", "target", "student*", "target*", "student*"],
    "hyper-sd": ["teacher", "student", "student*"],
    "scm": ["teacher", "student", "student*"],
    "rcm": ["teacher", "student", "student*", *["student"] * 3, "student*", "teacher", "fake", "student", "fake*"],
    "sana-sprint": ["teacher", "student", "student*", "student*"],
    "ayf": ["teacher", "student", "student*"],
    "meanflow": ["student*"],
    "imf": ["student", "student", "student*"],
    "alphaflow": ["student", "student*"],
    "twinflow": [*["student", "target", "target", "student*"], *["target"] * 2, *["student"] * 2],
    "shortcut": ["target", "target", "student*"],
    "guided": ["teacher", "student*"],
    "progressive": ["teacher", "teacher", "student*"],
    "reflow": ["teacher", "student*"],
    "perflow": ["teacher", "student*"],
    **{name: [*["student"] * 3, "student*", "teacher", "fake", "student", "fake*"] for name in ("dmd2", "f-distill")},
    "add": ["student*", "teacher"],
    "ladd": ["student*"],
    "kd": [*["teacher"] * 4, "student*"],  # the method of docs/examples/own_method.py
}


@some("lcm", "pcm", "ict", "ctm", "scm", "shortcut", "imf", "twinflow", "progressive", "dmd2", "add", "kd")
def test_gradient_is_the_difference_quotient_with_what_is_stopped_held(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against central differences in m and v, in which every value that was stopped is put back as it was.

    What is stopped is one thing to get wrong, and LIVE says it: a nudge of an output has a gradient where, and only
    where, the gradient goes through that output. The branches of DMD2 and of progressive distillation are the
    first at step 0; a loop of the teacher's steps is taken once.
    """
    options = {"loss": "l2"} if "loss" in method(name, schedule=FLOW).__dataclass_fields__ else {}  # it has no kinks
    options |= {"adaptive": False} if name == "ctm" else {}  # its weights are gradients
    batch, nets = setting(8)
    objective = method(name, **{**PLAIN, **options})
    if name == "cd":  # one question in place of Heun's two
        objective = replace(objective, solver="ddim")
    off = {**OFF, "map": jnp.float32(0.0)}
    others = {"heads": jnp.ones(3), **objective.others(jax.random.key(0), off)}
    monkeypatch.setattr(jax.lax, "cond", lambda _, first, other: first())
    monkeypatch.setattr(jax.lax, "fori_loop", lambda first, last, step, x: step(0, x))
    stop = jax.lax.stop_gradient

    def evaluate(theta: Array, nudges: Array, tape: list[Array] | None = None) -> tuple[Array, tuple[list, list]]:
        asked: list[str] = []
        stopped: list[Array] = []

        def apply(params: Params, x: Image, t: Array, cond: Cond) -> Image:
            y = network({k: v for k, v in params.items() if k in EXACT}, x, t, cond)
            asked.append(next(role for role in ("student", "target", "teacher", "fake") if role in params))
            return y + nudges[len(asked) - 1] * jnp.sin(x + t[0] / 100.0)

        def hold(x: Array) -> Array:
            stopped.append(x)
            return stop(x) if tape is None else tape[len(stopped) - 1]

        def named(role: str, params: Params) -> Params:
            return {**params, role: jnp.float32(0.0)}

        student = named("student", {**OFF, "m": theta[0], "v": theta[1]})
        fakes = {k: named("fake", v) if k == "fake" else v for k, v in others.items()}
        trees = {"student": student, "target": named("target", EXACT), "teacher": named("teacher", TEACHER)}
        changed_nets = nets._replace(apply=apply, others=fakes, step=0.0, **trees)
        monkeypatch.setattr(jax.lax, "stop_gradient", hold)
        loss = objective(changed_nets, batch, jax.random.key(1))[0]
        monkeypatch.setattr(jax.lax, "stop_gradient", stop)
        calls[:] = asked
        return loss, stopped

    calls: list[str] = []
    theta, none, h = jnp.stack([OFF["m"], OFF["v"]]), jnp.zeros(12), 3e-3

    def both(theta: Array) -> tuple[Array, Array, Array]:
        (slope, nudged), tape = jax.grad(evaluate, argnums=(0, 1), has_aux=True)(theta, none)
        steps = h * jnp.concatenate([jnp.eye(2), -jnp.eye(2)])
        around = jax.vmap(lambda step: evaluate(theta + step, none, tape)[0])(steps)
        return slope, (around[:2] - around[2:]) / (2 * h), nudged

    slope, quotient, nudged = jit(both)(theta)
    np.testing.assert_allclose(slope, quotient, rtol=5e-3, atol=1e-4 * float(jnp.max(jnp.abs(slope))))
    assert [role + "*" * bool(nudged[i]) for i, role in enumerate(calls)] == LIVE[name]


# -- Reductions: one method is another's special case.


@cache
def loss_of(objective: Any) -> Array:
    batch, nets = setting()
    return jit(lambda: objective(nets._replace(student=OFF), batch, jax.random.key(1))[0])()


SHARED: dict[str, Any] = {**PLAIN, "grid_points": 20, "skip": 0.05, "loss": "l2", "sigma_data": 1e-6}


def test_one_phase_is_lcm() -> None:
    lcm, one, two = (method(name, **options, **SHARED) for name, options in (
        ("lcm", {}), ("pcm", {"phases": 1, "target": "ema"}), ("pcm", {"phases": 2, "target": "ema"})
    ))  # fmt: skip
    np.testing.assert_allclose(loss_of(one), loss_of(lcm), rtol=1e-5)
    assert abs(loss_of(two) - loss_of(lcm)) > 1e-3 * loss_of(lcm)


@pytest.mark.parametrize("name", ["tcd", "ctm"])
def test_with_the_clean_time_as_end_trajectories_are_lcm(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    method_options, both = {}, SHARED
    if name == "ctm":
        method_options, both = {"denoising": 0.0, "target": "ema"}, {**SHARED, "pairs": KarrasPairs(), "solver": "heun"}
    objective, lcm = method(name, **both, **method_options), method("lcm", **both)
    monkeypatch.setattr(type(objective), "end", type(lcm).end)
    if name == "ctm":
        monkeypatch.setattr(type(objective), "times", type(lcm).times)
    np.testing.assert_allclose(loss_of.__wrapped__(objective), loss_of(lcm), rtol=1e-5)  # this `end` is not cached


def test_the_phases_of_a_table_are_the_published_ones() -> None:
    objective = method("pcm", schedule=DDPM())
    assert objective.edges.tolist() == [-1.0, 239.0, 499.0, 739.0, 999.0]
    t = jnp.array([0.0, 239.0, 259.0, 499.0, 519.0, 999.0])
    assert objective.edge(t).tolist() == [-1.0, -1.0, 239.0, 239.0, 499.0, 739.0]


def test_the_critic_of_phases_looks_within_the_phase() -> None:
    for schedule in (FLOW, DDPM()):
        objective = method("pcm", schedule=schedule)
        since = jnp.repeat(objective.edges[:-1], 500)
        t = objective.critic_times(jax.random.key(0), since)
        following = jnp.repeat(objective.edges[1:], 500)
        assert bool(jnp.all((since <= t) & (t < following)))
        np.testing.assert_allclose(jnp.mean((t - since) / (following - since)), 0.5, atol=0.03)


def test_phases_do_not_cross_an_edge() -> None:
    for schedule, skip in ((FLOW, 0.2), (DDPM(), 200.0)):
        objective = PhasedConsistency(schedule=schedule, grid_points=1000, skip=skip, phases=4)
        t, s = objective.times(jax.random.key(0), 4096)
        edge = objective.end(jax.random.key(1), t, s)
        assert bool(jnp.all((edge <= s) & (s <= t)))
        assert len(np.unique(np.asarray(edge))) == 4


@pytest.mark.parametrize("name", ["meanflow", "shortcut", "imf", "alphaflow"])
def test_guidance_from_data_has_the_guided_flow_as_its_fixed_point(name: str) -> None:
    """Two classes, Gaussians around +m and -m: the student whose velocity is v(0) + (1 + w) (v(c) - v(0)) is at rest.

    A shift of its output, up for one class and down for the other, has no gradient in the mean over the data; that of a
    student of another guidance has one.
    """
    n, w, m, deviation = 20_000, 1.5, 1.0, 0.5
    label = jnp.where(jnp.arange(n) % 4 == 0, -1.0, 1.0)
    noise = jax.random.normal(jax.random.key(0), (n, 1, 1, 1))
    batch = {"x0": m * label[:, None, None, None] + deviation * noise, "cond": {"context": label[:, None]}}

    def velocity(x: Image, t: Array, mean: Array | float) -> Image:
        a, variance = 1 - t, ((1 - t) * deviation) ** 2 + t**2
        return t / variance * (x - a * mean) - mean - a * deviation**2 / variance * (x - a * mean)

    def network(params: Params, x: Image, t: Array, cond: Cond) -> Image:
        """The guided flow; the unconditional one is that of the mixture, three quarters of it at +m."""
        t, label = (jnp.broadcast_to(v, x.shape[:1])[:, None, None, None] for v in (t / 1000.0, cond["context"][:, 0]))
        plus = jax.nn.sigmoid(2 * (1 - t) * m * x / (((1 - t) * deviation) ** 2 + t**2) + jnp.log(3.0))
        uncond = plus * velocity(x, t, m) + (1 - plus) * velocity(x, t, -m)
        guided = uncond + (1.0 + params["w"]) * (velocity(x, t, m * label) - uncond)
        return jnp.where(label == 0.0, uncond, guided) + params["shift"] * label

    options = {"share": 0.0, "velocity": "data", "kappa": 0.6, "caption_dropout": 0.1, "w_min": w, "w_max": w}
    options |= {} if name == "shortcut" else {"power": 0.0}
    objective = method(name, **{**PLAIN, **options})

    def slope(guidance: Array) -> Array:
        def loss(shift: Array) -> Array:
            student = {"w": guidance, "shift": shift}
            nets = Nets(network, student, student, None, {"context": jnp.zeros((1, 1))}, step=0.0, steps=1e9)
            return objective(nets, batch, jax.random.key(1))[0]

        return jax.grad(loss)(jnp.float32(0.0))

    right, wrong = jit(jax.vmap(slope))(jnp.array([w, w + 1.0]))
    assert abs(float(right)) < 0.2 * abs(float(wrong))


def asked_of_student(objective: Any, n: int, monkeypatch: pytest.MonkeyPatch) -> set[tuple[float, float]]:
    """The network times and spans at which a loss asks the student that learns, to three digits."""
    asked: set[tuple[float, float]] = set()

    def record(params: Params, x: Image, t: Array, cond: Cond) -> Image:
        if "learns" in params:
            asked.update(zip(np.round(t, 3).tolist(), np.round(cond["span"], 3).tolist(), strict=True))
        return 0.0 * x

    monkeypatch.setattr(jax.lax, "stop_gradient", lambda x: x)
    batch = {"x0": jnp.zeros((n, 1, 1, 1)), "cond": {"context": jnp.zeros((n, 1))}}
    nets = Nets(record, {"learns": jnp.float32(0.0)}, {}, {}, NULL)
    with jax.disable_jit():
        objective(nets, batch, jax.random.key(1))
    return asked


@pytest.mark.parametrize("schedule", [FLOW, RectifiedFlow(shift=3.0), DDPM()])
def test_shortcut_trains_the_steps_that_sampling_takes(schedule: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    objective = method("shortcut", schedule=schedule, kind=schedule.usual_kind, w_min=0.0, w_max=0.0, embed_w=False)
    trained = np.array(sorted(asked_of_student(objective, 8192, monkeypatch)))
    for steps in (1, 2, 4, 8, objective.finest):
        grid = time_grid(SAMPLERS["flow_map"], schedule, steps)
        times = np.asarray(schedule.network_time(grid))
        for t, span in zip(times[:-1], times[:-1] - times[1:], strict=True):
            assert np.abs(trained - [t, span]).max(1).min() < 0.05, f"{steps} steps: {t} to {t - span} is not trained"


def test_a_small_batch_of_shortcut_holds_pairs_too() -> None:
    for n in (1, 2, 8):
        pairs = jax.vmap(lambda key, n=n: method("shortcut", **PLAIN).steps(key, n)[2])
        share = jnp.mean(pairs(jax.random.split(jax.random.key(0), 2000)))
        assert abs(share - 0.25) < 0.03


def test_an_average_that_is_wrong_below_the_end_changes_nothing_in_ctm() -> None:
    """Both points are mapped from the end on by the same average, so an exact student has no loss with any of them."""
    batch, nets = setting()
    objective = method("ctm", **{**PLAIN, "pairs": KarrasPairs(points=50), "denoising": 0.0})
    loss = jit(lambda student: objective(nets._replace(student=student, target=OFF), batch, jax.random.key(1))[0])
    assert float(loss(EXACT)) < 1e-7
    assert float(loss(OFF)) > 1e-3


def test_the_teacher_of_ctm_takes_as_many_steps_of_the_grid_as_were_drawn() -> None:
    objective = method("ctm", **PLAIN)
    lengths = set()
    for seed in range(40):
        t, u = objective.times(jax.random.key(seed), 256)
        index, below = (objective.pairs.index(FLOW, v, objective.pairs.points) for v in (t, u))
        steps = int(jnp.max(index - below))
        np.testing.assert_array_equal(below, jnp.maximum(index - steps, 0))  # one number for a batch, to the clean end
        lengths.add(steps)
    assert min(lengths) == 1
    assert max(lengths) == objective.solver_steps == 17


def test_the_weights_of_ctm_are_ratios_of_gradients() -> None:
    """A loss whose gradient is large is weighed down; both weights stay within 0.01 and 10."""
    batch, nets = setting(16)
    terms = {}
    for scale in (1.0, 1e3):
        heads = {"heads": jnp.full(3, scale)}
        objective = method("ctm", **PLAIN, adversarial=1.0, denoising=0.0)
        plain = replace(objective, adaptive=False)
        arguments = (nets._replace(student=OFF, others=heads), batch, jax.random.key(1))
        parts = jit(lambda arguments=arguments, plain=plain: plain.parts(*arguments)[:3])()
        weighed = jit(lambda arguments=arguments, objective=objective: objective(*arguments)[0])()
        terms[scale] = (float(weighed) - float(parts[0]) - float(parts[2])) / float(parts[1])
    assert 0.01 <= terms[1e3] < terms[1.0] <= 10.0


def test_segments_grow_from_eight_to_one() -> None:
    for schedule in (FLOW, DDPM()):
        objective = method("hyper-sd", schedule=schedule, grid_points=48)
        for progress, segments in ((0.0, 8), (0.3, 4), (0.6, 2), (0.99, 1)):
            t, s = objective.times(jax.random.key(0), 4096, progress)
            end = objective.end(jax.random.key(1), t, s, progress)
            low = objective.edge(t, progress)
            assert len(np.unique(np.asarray(low))) == segments
            assert bool(jnp.all((low <= end) & (end <= s) & (s < t)))


def test_alpha_flow_goes_from_flow_matching_to_mean_flow() -> None:
    """With a = 1 the target is the velocity; an exact student's loss falls with a as the finest step's square."""
    batch, nets = setting()
    start = method("alphaflow", **PLAIN, velocity="teacher", power=0.0)
    assert [float(start.alpha(p)) for p in (0.0, 1.0)] == [1.0, pytest.approx(0.005)]
    mean = method("meanflow", **PLAIN, velocity="teacher", power=0.0, share=0.5)
    losses = []
    for last in (0.2, 0.02):
        objective = replace(start, last=last)
        now = nets._replace(step=1.0, steps=1.0)
        losses.append(float(jit(lambda o=objective, n=now: o(n, batch, jax.random.key(1))[0])()) / last)
    assert losses[1] < 0.03 * losses[0]  # error O(a), square O(a^2)

    def slope(objective: Any, scale: float, progress: float) -> Array:
        nets_then = nets._replace(step=progress, steps=1.0)
        loss = lambda p: objective(nets_then._replace(student=p), batch, jax.random.key(1))[0] / scale  # noqa: E731
        return jit(jax.grad(loss))(OFF)["m"]

    first = replace(start, share=1.0)
    matching = method("meanflow", **PLAIN, velocity="teacher", power=0.0, share=1.0)
    assert abs(float(slope(first, 1.0, 0.0)) - float(slope(matching, 1.0, 0.0))) > 1e-3
    last, limit = slope(replace(first, last=0.002), 0.002**2, 1.0), slope(replace(mean, share=1.0), 1.0, 1.0)
    np.testing.assert_allclose(last, limit, rtol=0.05)


@pytest.mark.parametrize("windows", [1, 4])
def test_an_exact_student_of_reflow_has_no_loss(windows: int) -> None:
    """On a Gaussian the end of a window is a multiple of its start, so the straight lines between them do not cross."""
    name = {1: "reflow", 4: "perflow"}[windows]
    objective = method(name, **PLAIN, solver_steps=128)
    batch, nets = setting()
    centred = {"m": jnp.float32(0.0), "v": EXACT["v"], "map": jnp.float32(0.0)}

    def straight(params: Params, x: Image, t: Array, cond: Cond) -> Image:
        t = jnp.broadcast_to(jnp.asarray(t) / 1000.0, x.shape[:1])
        end = jnp.ceil(t * windows - 1e-4) / windows - 1.0 / windows
        start = end + 1.0 / windows
        ratio = deviation(params["v"], end) / deviation(params["v"], start)
        here = ((t - end) + (start - t) * ratio) * windows
        return x * ((1.0 - ratio) * windows / here).reshape(-1, 1, 1, 1)

    def apply(params: Params, x: Image, t: Array, cond: Cond) -> Image:
        return straight(params, x, t, cond) if "straight" in params else network(params, x, t, cond)

    centred_batch = {**batch, "x0": batch["x0"] - EXACT["m"]}

    def loss(v: Array) -> Array:
        trees = {"student": {"v": v, "straight": v}, "teacher": centred}
        return objective(nets._replace(apply=apply, **trees), centred_batch, jax.random.key(1))[0]

    assert float(jit(loss)(EXACT["v"])) < 2e-4
    assert float(jit(loss)(jnp.float32(0.4))) > 1e-2


def test_divergences_weigh_the_gradient_of_distribution_matching() -> None:
    """Pictures that look real weigh more in "kl" than in "js", and the mean is 1; with one logit for all it is DMD2."""
    batch, nets = setting(64)
    nets = nets._replace(others={"fake": TEACHER, "heads": jnp.full(3, 2.0)})
    x_t, t = batch["x0"], jnp.linspace(0.1, 0.9, 64)
    weights = {}
    for divergence in ("reverse_kl", "kl", "js", "jeffreys", "hellinger"):
        objective = method("f-distill", **PLAIN, divergence=divergence)
        weights[divergence] = objective.weigh(nets, x_t, t, batch["cond"])[:, 0, 0, 0]
        np.testing.assert_allclose(jnp.mean(weights[divergence]), 1.0, rtol=1e-5)
    np.testing.assert_array_equal(weights["reverse_kl"], jnp.ones(64))
    looks_real = jnp.argmax(jnp.mean(x_t, axis=(1, 2, 3)))
    assert weights["kl"][looks_real] > weights["js"][looks_real] > 1.0
    flat = nets._replace(others={"fake": OFF, "heads": jnp.zeros(3)})
    losses = [method(name, **PLAIN)(flat, batch, jax.random.key(1))[0] for name in ("dmd2", "f-distill")]
    np.testing.assert_allclose(*losses, rtol=1e-5)


def test_the_regularized_consistency_is_both_of_its_parts() -> None:
    """At its student's steps rCM is sCM plus DMD2 by its weight, and the fake score alone at the others."""
    batch, nets = setting(16)
    objective = method("rcm", **PLAIN)
    fakes = {"fake": {**OFF, "map": jnp.float32(0.0)}, "heads": jnp.ones(3)}
    key = jax.random.key(1)

    def losses(step: float) -> dict[str, float]:
        now = nets._replace(student=OFF, others=fakes, step=step)
        return {k: float(v) for k, v in jit(lambda: objective(now, batch, key)[1])().items()}

    learns, rests = losses(0.0), losses(1.0)
    assert learns["consistency"] > 0.0
    assert learns["loss"] == pytest.approx(learns["consistency"] + 0.01 * learns["student"] + learns["fake"], rel=1e-5)
    assert (rests["consistency"], rests["student"]) == (0.0, 0.0)
    assert rests["loss"] == pytest.approx(rests["fake"], rel=1e-6)


def test_half_of_the_pictures_of_sana_sprint_are_drawn_from_noise_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    objective = method("sana-sprint", schedule=FLOW, kind="flow", w_min=0.0, w_max=0.0, embed_w=False)
    times = []

    def record(params: Params, x: Image, t: Array, cond: Cond) -> Image:
        if "learns" in params:
            times.append(np.asarray(t))
        return 0.0 * x

    monkeypatch.setattr(jax.lax, "stop_gradient", lambda x: x)
    monkeypatch.setattr(jax, "jvp", lambda f, primals, tangents: (f(*primals), f(*primals)))
    n = 2000
    batch = {"x0": jnp.zeros((n, 1, 1, 1)), "cond": {"context": jnp.zeros((n, 1))}}
    others = {"heads": jnp.ones(3), "weight": jnp.zeros(9)}
    with jax.disable_jit():
        objective(Nets(record, {"learns": jnp.float32(0.0)}, {}, {}, NULL, others, critic), batch, jax.random.key(1))
    assert abs(np.mean(times[-1] > 999.0) - 0.5) < 0.05
    t = objective.critic_times(jax.random.key(0), jnp.zeros(4000))
    levels = np.log(np.asarray(level(FLOW, t)))
    np.testing.assert_allclose([levels.mean(), levels.std()], [-0.6 + np.log(2.0), 1.0], atol=0.06)


def test_the_twin_is_asked_at_negative_times_alone_and_learns_what_the_network_draws() -> None:
    """A quarter of the batch each; where twin and network agree, no difference of scores moves the student."""
    objective = method("twinflow", **{k: v for k, v in PLAIN.items() if k not in ("w_min", "w_max", "embed_w")})
    for n in (1, 4, 7, 256):
        parts = np.asarray(
            jax.vmap(lambda key, n=n: objective.quarters(key, n))(jax.random.split(jax.random.key(0), 999))
        )
        np.testing.assert_allclose([np.mean(parts == i) for i in range(4)], 0.25, atol=0.05)
    batch, nets = setting()
    even = nets._replace(apply=lambda params, x, t, cond: network(params, x, jnp.abs(t), cond))
    metrics = jit(lambda: objective(even, batch, jax.random.key(1))[1])()
    assert float(metrics["matching"]) < 1e-6
    odd = nets._replace(apply=lambda params, x, t, cond: network(params, x, jnp.abs(t), cond) + 1e-3 * jnp.min(t))
    assert float(jit(lambda: objective(odd, batch, jax.random.key(1))[1])()["matching"]) > 1e-3


def test_the_recursive_aim_of_an_exact_map_is_the_map() -> None:
    objective = method("twinflow", schedule=FLOW, kind="flow")
    batch, nets = setting()
    draw = objective.draw(nets, batch, jax.random.key(1))
    t, s = jnp.linspace(0.1, 1.0, 64), jnp.linspace(0.0, 0.7, 64)
    x = jax.random.normal(jax.random.key(2), batch["x0"].shape)
    x0, eps = bind(network, TEACHER, {}, FLOW, "flow")(x, t)
    mean = objective.u(nets, EXACT, draw, x, t, s)
    np.testing.assert_allclose(objective.recursive(nets, draw, mean, eps - x0, x, t, s), mean, atol=0.1)
    wrong = objective.u(nets, OFF, draw, x, t, s)
    recursive = objective.recursive(nets, draw, wrong, eps - x0, x, t, s)
    assert float(jnp.mean(jnp.sign(recursive - wrong) == jnp.sign(mean - wrong))) > 0.9


def test_the_scale_and_the_interval_of_improved_mean_flow_are_inputs() -> None:
    """The scale is log-uniform; an instant's interval is whole, and the network is told (w, start, end)."""
    objective = method("imf", schedule=FLOW, kind="flow")
    omega = 1.0 + np.asarray(objective.guidance(jax.random.key(0), 4000))
    assert omega.min() > 0.999
    assert omega.max() < 8.001
    np.testing.assert_allclose(np.log(omega).mean(), np.log(8.0) / 2, rtol=0.03)
    t, r = objective.times(jax.random.key(1), 4000)
    start, end = objective.interval(jax.random.key(2), t, r)
    assert bool(jnp.all((start[r == t] == 0.0) & (end[r == t] == 1.0)))
    np.testing.assert_allclose([jnp.mean(start[r < t]), jnp.mean(end[r < t])], [0.25, 0.75], atol=0.01)
    asked = []

    def record(params: Params, x: Image, t: Array, cond: Cond) -> Image:
        asked.append(cond["guidance"].shape)
        return 0.0 * x

    batch = {"x0": jnp.zeros((4, 1, 1, 1)), "cond": {"context": jnp.zeros((4, 1))}}
    with jax.disable_jit():
        objective(Nets(record, {}, {}, {}, NULL), batch, jax.random.key(1))
    assert set(asked) == {(4, 3)}


# -- Forward mode is the difference quotient.


@pytest.mark.parametrize("name", ["scm", "meanflow"])
def test_forward_mode_is_the_difference_in_time(name: str) -> None:
    """Along the trajectory, d/dt of the student: by jvp with the velocity, and by two points on it."""
    objective = method(name, **PLAIN)
    schedule = TrigFlow() if name == "scm" else FLOW
    denoise = on_schedule(bind(network, OFF, {}, FLOW, "flow", spans=objective.spans), FLOW, schedule)
    follow = on_schedule(bind(network, TEACHER, {}, FLOW, "flow"), FLOW, schedule)
    t, r = jnp.linspace(0.4, 0.8, 8), jnp.full(8, 0.2)
    x = jax.random.normal(jax.random.key(0), (8, 1, 1, 2))

    def velocity(x: Image, t: Array) -> Image:
        def along(t: Array) -> Image:
            x0, eps = follow(x, t)
            return x0, eps

        x0, eps = along(t)
        cos = jax.vmap(jax.grad(schedule.alpha))(t).reshape(-1, 1, 1, 1)
        sin = jax.vmap(jax.grad(schedule.sigma))(t).reshape(-1, 1, 1, 1)
        return cos * x0 + sin * eps

    def value(x: Image, t: Array) -> Image:
        return jnp.stack(denoise(x, t, r if objective.spans else None))

    @jit
    def both() -> tuple[Array, Array]:
        v, h = velocity(x, t), 1e-2
        _, forward = jax.jvp(value, (x, t), (v, jnp.ones_like(t)))
        later, earlier = jax.vmap(lambda h: value(x + h * v, t + h))(jnp.asarray([h, -h]))
        return forward, (later - earlier) / (2 * h)

    np.testing.assert_allclose(*both(), atol=2e-2, rtol=2e-2)


# -- One network, seen in any time.


@pytest.mark.parametrize("schedule", [Cosine(), TrigFlow(), TrigFlow(sigma_data=0.5), RectifiedFlow(shift=3.0), DDPM()])
def test_beliefs_do_not_depend_on_the_schedule_that_looks(schedule: Any) -> None:
    denoise = bind(network, TEACHER, {}, FLOW, "flow")
    converted = on_schedule(denoise, FLOW, schedule)
    t = jnp.linspace(0.2, 0.9, 5) * (schedule.t_max - schedule.t_min) + schedule.t_min
    x0, eps = (jax.random.normal(jax.random.key(i), (5, 2, 2, 2)) for i in (0, 1))
    scale = partial(jnp.reshape, shape=(5, 1, 1, 1))
    x = scale(schedule.alpha(t)) * x0 + scale(schedule.sigma(t)) * eps
    u = FLOW.time_at(log_snr(schedule, t))
    ours, theirs = converted(x, t), denoise(scale(FLOW.alpha(u)) * x0 + scale(FLOW.sigma(u)) * eps, u)
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-4)
    back = scale(schedule.alpha(t)) * ours.x0 + scale(schedule.sigma(t)) * ours.eps
    np.testing.assert_allclose(back, x, atol=2e-4)


def test_trigflow_keeps_the_spread() -> None:
    schedule, t = TrigFlow(sigma_data=0.5), jnp.linspace(0.0, jnp.pi / 2, 7)
    np.testing.assert_allclose(jnp.hypot(0.5 * schedule.alpha(t), schedule.sigma(t)), 0.5, atol=1e-6)
    np.testing.assert_allclose(schedule.time_at(log_snr(schedule, t)), t, atol=1e-5)


# -- Sampling.


def test_strategic_stochastic_sampling_reaches_from_ddim_to_lcm() -> None:
    schedule = DDPM()
    denoise = bind(lambda params, x, t, cond: 0.3 * x, {}, {}, schedule, "epsilon")
    x, noise = (jax.random.normal(jax.random.key(i), (4, 2, 2, 1)) for i in (0, 1))

    def step(solver: Any, s: float) -> Image:
        return solver.step(denoise, schedule, x, 799.0, s, (), noise)[0]

    for s in (499.0, 0.0, -1.0):
        np.testing.assert_allclose(step(TCD(gamma=0.0), s), step(DDIM(), s), atol=1e-5)
    np.testing.assert_allclose(step(TCD(gamma=1.0), 499.0), step(LCM(), 499.0), atol=2e-2)  # to timestep 0, not -1
    np.testing.assert_allclose(step(TCD(gamma=0.5), -1.0), step(LCM(), -1.0), atol=1e-5)


def test_the_noise_of_a_step_keeps_the_spread() -> None:
    """x_s of exact data has the variance alpha^2 v^2 + sigma^2 for every gamma."""
    n, t, s = 20_000, 0.8, 0.4
    x = EXACT["m"] * (1 - t) + deviation(EXACT["v"], jnp.float32(t)) * jax.random.normal(
        jax.random.key(0), (n, 1, 1, 1)
    )
    denoise = bind(network, EXACT, {}, FLOW, "flow", spans=True)
    for gamma in (0.0, 0.3, 1.0):
        y, _ = TCD(gamma=gamma).step(denoise, FLOW, x, jnp.float32(t), jnp.float32(s), (), jax.random.key(1))
        np.testing.assert_allclose(jnp.std(y), deviation(EXACT["v"], jnp.float32(s)), rtol=0.02)
        np.testing.assert_allclose(jnp.mean(y), (1 - s) * EXACT["m"], atol=0.02)


def test_an_exact_jump_lands_on_the_trajectory() -> None:
    x, t, s = jax.random.normal(jax.random.key(0), (8, 2, 2, 2)), jnp.linspace(0.3, 1.0, 8), jnp.linspace(0.0, 0.3, 8)
    denoise = bind(network, EXACT, {}, FLOW, "flow", spans=True)
    np.testing.assert_allclose(flow_map(denoise, FLOW, x, t, s), along(EXACT, x, t, s), atol=1e-5)


# -- Pairs of times, and the lengths of a run.


@pytest.mark.parametrize("schedule", [FLOW, DDPM(), Cosine()])
@pytest.mark.parametrize("pairs", [KarrasPairs(), CTPairs(), ICTPairs(), ECTPairs()])
@pytest.mark.parametrize("progress", [0.0, 0.999])
def test_pairs_are_in_order_and_on_the_schedule(schedule: Any, pairs: Any, progress: float) -> None:
    t, s = pairs(schedule, jax.random.key(0), 2000, progress)
    assert bool(jnp.all((schedule.t_min <= s) & (s < t) & (t <= schedule.t_max + 1e-4)))
    assert bool(jnp.any(s == schedule.t_min)) or isinstance(pairs, ECTPairs) or progress > 0.0


@pytest.mark.parametrize("steps", [100, 1800, 400_000])
def test_lengths_come_from_the_run(steps: int) -> None:
    """First and last values at the defaults that the command line builds, whatever the number of steps."""
    ct, ict, ect, scm = (method(name, schedule=FLOW, kind="flow") for name in ("ct", "ict", "ect", "scm"))
    first, last = 0.0, (steps - 1) / steps
    assert float(ct.pairs.points(first)) == ct.pairs.first == 2
    assert float(ct.pairs.points(1.0)) == ct.pairs.last + 1 == 151
    assert float(ct.pairs.target_decay(first)) == pytest.approx(0.9)
    assert float(ict.pairs.points(first)) == 11
    assert float(ict.pairs.points(last)) == ict.pairs.last + 1 == 1281
    assert float(ect.pairs.stage(first)) == 0
    assert float(ect.pairs.stage(last)) == ect.pairs.stages - 1
    assert float(scm.tangent_weight(0, steps)) == pytest.approx(max(4 / steps, 1e-4))
    assert float(scm.tangent_weight(steps - 1, steps)) == 1.0


def test_the_grid_of_ct_is_the_published_function() -> None:
    pairs, steps = CTPairs(), 800
    for k in range(0, steps + 1, 7):
        want = np.ceil(np.sqrt(k / steps * (151**2 - 2**2) + 2**2) - 1) + 1
        assert float(pairs.points(k / steps)) == want
        assert float(pairs.target_decay(k / steps)) == pytest.approx(np.exp(2 * np.log(0.9) / want), rel=1e-6)


def test_the_grid_doubles() -> None:
    pairs = ICTPairs(first=10, last=1280)
    shares = (0.0, 99 / 800, 100 / 800, 250 / 800, 700 / 800, 1.0)
    assert [float(pairs.points(share)) for share in shares] == [11, 11, 21, 41, 1281, 1281]


def test_log_normal_levels_fall_between_neighbours() -> None:
    """The share of pairs at each lower neighbour is the log-normal's mass between the two levels (iCT, sec. 3.5)."""
    from scipy.stats import norm

    pairs = ICTPairs(first=10, last=10, sigma_data=0.5)
    t, _ = pairs(FLOW, jax.random.key(0), 100_000, 0.0)
    upper = np.log(np.asarray(level(FLOW, t)))
    edges, counts = np.unique(np.round(upper, 4), return_counts=True)
    below = np.concatenate([[np.log(pairs.low)], edges[:-1]])
    mass = norm.cdf(edges, pairs.mean, pairs.std) - norm.cdf(below, pairs.mean, pairs.std)
    np.testing.assert_allclose(counts / 100_000, mass / mass.sum(), atol=5e-3)


def test_ect_goes_from_diffusion_to_consistency() -> None:
    gaps = []
    for progress in (0.0, 0.2, 0.5, 0.95):
        t, s = ECTPairs()(FLOW, jax.random.key(0), 1000, progress)
        gaps.append(float(jnp.mean(1.0 - level(FLOW, s) / level(FLOW, t))))
    assert gaps == sorted(gaps, reverse=True)
    assert gaps[0] > 0.9
    assert gaps[-1] < 0.05


@pytest.mark.parametrize("pairs", [KarrasPairs, CTPairs, ICTPairs, ECTPairs])
def test_levels_move_with_the_scale_of_the_data(pairs: Any) -> None:
    """Data twice as large need noise twice as large: the levels of every pair double."""
    drawn = []
    for scale in (0.5, 1.0):
        t, s = pairs(sigma_data=scale, high=40.0)(FLOW, jax.random.key(0), 500, 0.3)
        drawn.append(np.stack([level(FLOW, t), level(FLOW, s)]))
    np.testing.assert_allclose(drawn[1], 2.0 * drawn[0], rtol=2e-3, atol=1e-6)


def test_the_times_of_scm_do_not_depend_on_the_scale_of_the_data() -> None:
    """With data and sigma_data scaled together x is scaled as a whole, so that its time is the same."""
    times = [method("scm", schedule=FLOW, sigma_data=s).times(jax.random.key(0), 2000) for s in (0.5, 1.0, 3.0)]
    for t in times[1:]:
        np.testing.assert_allclose(t, times[0], rtol=1e-5)
    np.testing.assert_allclose(jnp.median(jnp.tan(times[0])), np.exp(-1.0) / 0.5, rtol=0.06)


@pytest.mark.parametrize("name", ["ct", "ect", "ict"])
@pytest.mark.parametrize("schedule", [FLOW, RectifiedFlow(shift=3.0), DDPM()])
def test_every_draw_has_a_gradient(name: str, schedule: Any) -> None:
    """At the first and the last step: the student's map is asked at a time above the clean one, where it learns."""
    objective = method(name, schedule=schedule, kind=schedule.usual_kind)
    for progress in (0.0, 0.999):
        t, s = objective.times(jax.random.key(0), 2000, progress)
        _, c_out = boundary_scalings(schedule, t, sigma_data=objective.sigma_data)
        assert float(c_out.min()) > 1e-3
        assert float((level(schedule, t) - level(schedule, s)).min()) > 0.0


# -- Averages and the clocks of a run.


def test_the_stages_of_progressive_distillation_end_at_the_steps_that_are_drawn() -> None:
    """log2(first / last) + 1 stages over the run, whatever its length; the teacher changes at the end of each."""
    objective = method("progressive", schedule=FLOW).drawn_in(4)
    assert (objective.stages, method("progressive", schedule=FLOW, last_steps=1).drawn_in(4).stages) == (3, 5)
    for steps in (30, 31, 1000):
        stages = [int(objective.stage(k, steps)) for k in range(steps)]
        assert sorted(set(stages)) == [0, 1, 2]
        assert stages == sorted(stages)
        changes = [k for k in range(steps) if float(objective.target_decay(k, steps)) == 0.0]
        assert changes == [k for k in range(steps - 1) if stages[k] != stages[k + 1]]


def test_targets_have_decays_of_their_own() -> None:
    decays = {name: method(name, schedule=FLOW).target_decay for name in METHODS}
    method_options = {name: float(decay(0, 100)) for name, decay in decays.items() if decay is not None}
    assert method_options == pytest.approx({"cd": 0.95, "ct": 0.9, "ctm": 0.999, "twinflow": 0.99, "progressive": 1.0})


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("pcm", {"phases": 0}, "phases=0"),
        ("shortcut", {"finest": 3}, "power of two"),
        ("progressive", {"first_steps": 12}, "power of two"),
        ("progressive", {"last_steps": 0}, "last_steps=0"),
        ("ctm", {"solver_steps": 0}, "solver_steps=0"),
        ("hyper-sd", {"segments": (8, 0)}, "segments"),
        ("cd", {"target_ema": 1.5}, "target_ema=1.5"),
        ("perflow", {"windows": 0}, "windows=0"),
        ("alphaflow", {"last": 0.0}, "last=0.0"),
        ("imf", {"velocity": "teacher"}, "from data alone"),
        ("twinflow", {"velocity": "teacher"}, "from data alone"),
        ("twinflow", {"order": 0}, "order=0"),
        ("f-distill", {"adversarial": 0.0}, "give it a weight"),
        ("dmd2", {"steps": 0}, "steps=0"),
        pytest.param("meanflow", {"velocity": "other"}, "velocity='other' is unknown", marks=pytest.mark.wrong_types),
        ("lcm", {"w_min": 3.0, "w_max": 1.0}, "w_min=3.0 is above"),
        ("tdc", {}, "did you mean tcd"),
    ],
)
def test_bad_values_are_one_line(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        method(name, **{"schedule": FLOW, **options})
    assert "\n" not in str(caught.value)
