"""A training step of latent consistency distillation, all weights or a LoRA."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lcm_jax.bench.measure import Cost, Row, flops_of
from lcm_jax.bench.models import GEOMETRIES, at_scale, component
from lcm_jax.bench.networks import Options, Titled
from lcm_jax.objectives import LatentConsistencyDistillation
from lcm_jax.schedules import DDPM
from lcm_jax.train.step import TrainState, make_train_step
from lcm_jax.train.tasks.distillation import Learner, LoraConfig
from lcm_jax.weights.families import FAMILIES


def steps(options: Options) -> Iterator[Titled]:
    """SD1.5 at 512 pixels: LCM and LCM-LoRA, computing in the given precision on float32 parameters, AdamW."""
    for batch in options.batches or ((1,) if jax.default_backend() == "cpu" else (16,)):
        adapters = LoraConfig(rank=64 if options.scale == "full" else 4)
        yield f"Training step, sd15, batch {batch}, LCM", [step("LCM", options, batch=batch, lora=None)]
        yield (
            f"Training step, sd15, batch {batch}, LCM-LoRA",
            [step(f"LCM-LoRA, rank {adapters.rank}", options, batch=batch, lora=adapters)],
        )


def step(name: str, options: Options, *, batch: int, lora: LoraConfig | None, remat: bool = False) -> Row:
    """One step: student, guided teacher, target, gradient, AdamW and the moving average. Its state is donated."""
    kind, config = GEOMETRIES["sd15"].parts["unet"]
    config = at_scale(config, options.scale)
    side = config.sample_size
    objective = LatentConsistencyDistillation(schedule=DDPM(), embed_w=lora is None, w_min=2.0, w_max=14.0)
    if lora is not None:
        objective = replace(objective, w_min=7.5, w_max=7.5)
    own = config if lora is not None else replace(config, time_cond_proj_dim=256)
    net = FAMILIES[kind].build(own, dtype=jnp.dtype(options.dtype), remat=remat)
    learner = Learner(net=net, objective=objective, lora=lora, critic=None)
    rng = np.random.default_rng(0)
    tokens = config.level("cross_attention_dim", 0)
    rows = {
        "mean": rng.standard_normal((batch, side, side, 4), np.float32),
        "std": np.full((batch, side, side, 4), 0.1, np.float32),
        "context": rng.standard_normal((batch, 77, tokens), np.float32),
    }
    data = {key: jnp.asarray(leaf, options.dtype) for key, leaf in rows.items()}
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-5))
    held: dict[str, Any] = {}

    def prepare() -> Cost:
        # A teacher in the precision of the computation, as it learns nothing; a LoRA's is its student's base too.
        teacher = component(kind, config, options.dtype).params
        held["frozen"] = {"teacher": teacher, "null": {"context": jnp.zeros((1, 77, tokens))}}
        first = component(kind, config, "float32").params if lora is None else teacher
        own = learner.begin(jax.random.key(0), first, held["frozen"])
        held["state"] = TrainState.create(own, tx)

        def make() -> Any:
            return make_train_step(learner.loss, tx, decay=0.95, seed=0)

        lowered: Any = make().lower(held["state"], held["frozen"], data)
        held["step"] = lowered.compile()
        flops = flops_of(make(), held["state"], held["frozen"], data)
        found = held["step"].memory_analysis()
        memory = found.argument_size_in_bytes + found.output_size_in_bytes + found.temp_size_in_bytes
        return Cost(flops, int(memory - found.alias_size_in_bytes))

    def run() -> Any:
        held["state"], metrics = held["step"](held["state"], held["frozen"], data)
        return metrics["loss"]

    return Row(name=name, run=run, prepare=prepare, frames=batch)
