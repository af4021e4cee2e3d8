"""A training step of LCM on a UNet: our objective and the bench's peer, diffusers' UNet in PyTorch, agree."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lcm_jax
from lcm_jax.bench import Options, peers, training
from lcm_jax.bench.torch_training import Draw
from lcm_jax.models.latent_diffusion import as_apply
from lcm_jax.train.tasks.lora_config import LoraConfig
from lcm_jax.typing import Nets
from lcm_jax.weights.registry import FAMILIES
from lcm_jax.weights.safetensors_files import save_tensors
from lcm_jax.weights.torch_params import from_torch

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")
pytest.importorskip("peft")
pytestmark = pytest.mark.slow  # test_lcm_step.py has the equations on a small network


@pytest.mark.parametrize("lora", [None, LoraConfig(rank=4)], ids=["all weights", "adapters"])
def test_the_peers_loss_and_gradient_are_ours(lora: LoraConfig | None, tmp_path: Path) -> None:
    options = Options(model="random-sd15", scale="tiny", peer="diffusers")
    distilled = training.Distilled.of(options, batch=3, lora=lora)
    theirs = training.torch_distillation(distilled, "float32", "diffusers")
    learner = distilled.learner("float32")
    params, frozen = distilled.init_params("float32", learner)
    batch = {"x0": jnp.asarray(distilled.batch["mean"]), "cond": {"context": jnp.asarray(distilled.batch["context"])}}
    key = jax.random.key(3)

    def loss(params: Any) -> Any:
        student, target = learner.student(params, frozen), learner.student(params, frozen)
        nets = Nets(as_apply(learner.net), student, jax.lax.stop_gradient(target), frozen["teacher"], distilled.null)
        return distilled.objective(nets, batch, key)[0]

    value, gradient = jax.jit(jax.value_and_grad(loss))(params)
    drawn = distilled.objective.draw(Nets(None, None, None, None, distilled.null), batch, key)
    t, s = distilled.objective.times(jax.random.split(key, 4)[0], 3)
    draw = Draw(
        *(peers.channels_first(leaf, "float32") for leaf in (drawn.x0, drawn.eps)),
        *(peers.tensor(leaf) for leaf in (t, s)),
        peers.tensor(drawn.w, "float32"),
    )
    found = theirs.loss(draw)
    np.testing.assert_allclose(value, float(found.detach()), rtol=1e-4)
    found.backward()
    slopes = {name: distilled.grad.numpy() for name, distilled in theirs.trained.items()}
    if lora is None:
        wanted = from_torch(slopes, params, FAMILIES["UNet2DConditionModel"].rules)
    else:
        named = {f"unet.{name.replace('.default_0', '')}": slope for name, slope in slopes.items()}
        save_tensors(tmp_path / "slopes.safetensors", named)
        wanted = lcm_jax.load_lora(tmp_path / "slopes.safetensors")
        for tree in (gradient, wanted):
            for adapter in tree.values():
                del adapter["alpha"]  # is not trained
    largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(wanted))
    assert largest > 0.0
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-4 * largest), gradient, wanted)
