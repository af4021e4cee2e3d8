"""A training step of LCM on a UNet: our objective and the bench's peer, diffusers' UNet in PyTorch, agree."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lcm_jax.bench import Options, peers, training
from lcm_jax.bench.torch_training import Draw
from lcm_jax.generate import as_apply
from lcm_jax.train.tasks.distillation import LoraConfig
from lcm_jax.typing import Nets

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")
pytest.importorskip("peft")
pytestmark = pytest.mark.slow  # test_lcm_step.py has the equations on a small network


@pytest.mark.parametrize("lora", [None, LoraConfig(rank=4)], ids=["all weights", "adapters"])
def test_the_peers_loss_and_gradient_are_ours(lora: LoraConfig | None) -> None:
    options = Options(model="random-sd15", scale="tiny", peer="diffusers")
    own = training.Distilled.of(options, batch=3, lora=lora)
    theirs = training.torch_distillation(own, "float32", "diffusers")
    learner = own.learner("float32")
    params, frozen = own.begin("float32", learner)
    batch = {"x0": jnp.asarray(own.batch["mean"]), "cond": {"context": jnp.asarray(own.batch["context"])}}
    key = jax.random.key(3)

    def loss(params: Any) -> Any:
        student, target = learner.student(params, frozen), learner.student(params, frozen)
        nets = Nets(as_apply(learner.net), student, jax.lax.stop_gradient(target), frozen["teacher"], own.null)
        return own.objective(nets, batch, key)[0]

    value, gradient = jax.jit(jax.value_and_grad(loss))(params)
    drawn = own.objective.draw(Nets(None, None, None, None, own.null), batch, key)
    t, s = own.objective.times(jax.random.split(key, 4)[0], 3)
    draw = Draw(
        *(peers.channels_first(leaf, "float32") for leaf in (drawn.x0, drawn.eps)),
        *(peers.tensor(leaf) for leaf in (t, s)),
        peers.tensor(drawn.w, "float32"),
    )
    found = theirs.loss(draw)
    np.testing.assert_allclose(value, float(found.detach()), rtol=1e-4)
    found.backward()
    norm = np.sqrt(sum(float(p.grad.square().sum()) for p in theirs.student.parameters() if p.grad is not None))
    ours = float(jnp.sqrt(sum(jnp.square(leaf).sum() for leaf in jax.tree.leaves(gradient))))
    # Adapters begin with up = 0, so that of the two factors up alone has a gradient, and down is drawn by each side.
    if lora is None:
        np.testing.assert_allclose(ours, norm, rtol=1e-3)
    assert norm > 0.0
