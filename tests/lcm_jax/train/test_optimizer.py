"""Several trees, each with an optimizer of its own: its moments, its clipping, its learning rate and its clock."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lcm_jax.diffusion.schedules import DDPM
from lcm_jax.objectives import method
from lcm_jax.train.optimizer import OptimizerConfig, learning_rate, make_optimizer, partitioned
from lcm_jax.train.tasks.distillation import student_optimizer

STEPS = 40
CONFIG = OptimizerConfig(learning_rate=0.1, warmup=0, decay="cosine", clip=1.0, eps=1e-30)
MAKE = partial(make_optimizer, CONFIG, STEPS)


def test_no_tree_s_gradient_changes_the_step_of_another() -> None:
    """A reconstruction a million times larger leaves the critic's updates as they were, to the last bit."""
    params = {"vae": jnp.ones(3), "discriminator": jnp.ones(3)}
    tx = partitioned(MAKE, ("vae", "discriminator"))
    updates = []
    for scale in (1.0, 1e6):
        gradients = {"vae": scale * jnp.arange(1.0, 4.0), "discriminator": jnp.array([0.1, -0.3, 0.2])}
        updates.append(tx.update(gradients, tx.init(params), params, steps=jnp.int32(STEPS))[0])
    np.testing.assert_array_equal(updates[0]["discriminator"], updates[1]["discriminator"])


def test_a_student_that_learns_in_some_steps_has_a_clock_of_its_own() -> None:
    """Its learning rate falls to zero over the updates that it has, and rests in between."""
    objective = method("dmd2", schedule=DDPM(), every=5)
    params = {"student": jnp.zeros(2), "others": {"fake": jnp.zeros(2), "heads": jnp.zeros(2)}}
    tx = student_optimizer(objective, 1.0, params)(MAKE)
    state, moves = tx.init(params), {"student": [], "fake": []}
    update = jax.jit(
        lambda state: tx.update(jax.tree.map(jnp.ones_like, params), state, params, steps=jnp.int32(STEPS))
    )
    for _ in range(STEPS):
        updates, state = update(state)
        moves["student"].append(-float(updates["student"][0]))
        moves["fake"].append(-float(updates["others"]["fake"][0]))
    student, fake = np.asarray(moves["student"]), np.asarray(moves["fake"])
    np.testing.assert_array_equal(student[np.arange(STEPS) % 5 != 0], 0.0)
    rates = jax.vmap(learning_rate(CONFIG, STEPS // 5))(jnp.arange(STEPS // 5))
    np.testing.assert_allclose(student[::5], rates, rtol=1e-5)
    np.testing.assert_allclose(fake, jax.vmap(learning_rate(CONFIG, STEPS))(jnp.arange(STEPS)), rtol=1e-5)
    assert float(learning_rate(CONFIG, STEPS // 5)(STEPS // 5)) == pytest.approx(0.0, abs=1e-8)


def test_the_critic_of_phased_consistency_has_no_momentum() -> None:
    objective = method("pcm", schedule=DDPM(), adversarial=0.1)
    params = {"student": jnp.zeros(1), "others": {"heads": jnp.zeros(1)}}
    tx = student_optimizer(objective, 1.0, params)(MAKE)
    state = tx.init(params)
    up, down = (jax.tree.map(lambda x, sign=sign: sign * jnp.ones_like(x), params) for sign in (1.0, -1e-2))
    _, state = tx.update(up, state, params)
    updates, _ = tx.update(down, state, params)
    assert float(updates["others"]["heads"][0]) > 0.0  # against the last gradient alone
    assert float(updates["student"][0]) < 0.0  # which has not turned the student's mean yet
