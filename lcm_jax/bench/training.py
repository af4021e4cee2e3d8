"""A training step of latent consistency distillation, all weights or a LoRA."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lcm_jax.bench.measure import Cost, Row
from lcm_jax.bench.models import GEOMETRIES, PREFIX, at_scale, component
from lcm_jax.bench.networks import Options, Titled
from lcm_jax.compiling import memory_of
from lcm_jax.flops import flops
from lcm_jax.nets import UNet, UNetConfig
from lcm_jax.objectives import LatentConsistencyDistillation
from lcm_jax.pipeline import load
from lcm_jax.schedules import DDPM
from lcm_jax.train.step import TrainState, make_train_step
from lcm_jax.train.tasks.distillation import Learner, LoraConfig
from lcm_jax.weights.families import FAMILIES

_KIND = "UNet2DConditionModel"
MEMORY = Path("/proc/meminfo")  # of Linux


class Teacher(NamedTuple):
    """The UNet that is distilled, and the length of its texts."""

    config: UNetConfig
    tokens: int = 77


@cache
def teacher_of(options: Options) -> Teacher:
    """The model's, less what tells a student its guidance; or that of a geometry."""
    if options.model.startswith(PREFIX):
        [name] = options.geometries("training")
        return Teacher(at_scale(GEOMETRIES[name].parts["unet"][1], options.scale))
    pipe = load(options.model)
    net = pipe.generator.net
    if not isinstance(net, UNet):
        raise ValueError(f"--model {options.model}: bench training distils a UNet, and this has a {type(net).__name__}")
    config = replace(at_scale(net.config, options.scale), time_cond_proj_dim=None)
    return Teacher(config, pipe.component("text_encoder").module.config.max_position_embeddings)


def steps(options: Options) -> Iterator[Titled]:
    """LCM and LCM-LoRA of the model, computing in the given precision on float32 parameters, AdamW."""
    for batch in options.batches or ((1,) if jax.default_backend() == "cpu" else (16,)):
        adapters = LoraConfig(rank=64 if options.scale == "full" else 4)
        for name, lora in (("LCM", None), (f"LCM-LoRA, rank {adapters.rank}", adapters)):
            title = f"Training step, {options.model}, {name}, batch {batch}"
            yield title, [step(name, options, batch=batch, lora=lora)]


def step(name: str, options: Options, *, batch: int, lora: LoraConfig | None, remat: bool = False) -> Row:
    """One step: student, guided teacher, target, gradient, AdamW and the moving average. Its state is donated."""
    config, tokens = teacher_of(options)
    side: Any = config.sample_size
    height, width = (side, side) if isinstance(side, int) else side
    latents = (batch, height, width, config.in_channels)
    objective = LatentConsistencyDistillation(schedule=DDPM(), embed_w=lora is None, w_min=2.0, w_max=14.0)
    if lora is not None:
        objective = replace(objective, w_min=7.5, w_max=7.5)
    own = config if lora is not None else replace(config, time_cond_proj_dim=256)
    net = FAMILIES[_KIND].build(own, dtype=jnp.dtype(options.dtype), remat=remat)
    learner = Learner(net=net, objective=objective, lora=lora, critic=None)
    rng = np.random.default_rng(0)
    texts = (tokens, config.level("cross_attention_dim", 0))
    rows = {
        "mean": rng.standard_normal(latents, np.float32),
        "std": np.full(latents, 0.1, np.float32),
        "context": rng.standard_normal((batch, *texts), np.float32),
    }
    data = {key: jnp.asarray(leaf, options.dtype) for key, leaf in rows.items()}
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-5))
    held: dict[str, Any] = {}

    def begin() -> tuple[TrainState, dict[str, Any]]:
        # A teacher in the precision of the computation, as it learns nothing; a LoRA's is its student's base too.
        teacher = component(_KIND, config, options.dtype).params
        frozen = {"teacher": teacher, "null": {"context": jnp.zeros((1, *texts))}}
        first = component(_KIND, config, "float32").params if lora is None else teacher
        return TrainState.create(learner.begin(jax.random.key(0), first, frozen), tx), frozen

    def prepare() -> Cost:
        like = jax.eval_shape(begin)
        traced: Any = make_train_step(learner.loss, tx, decay=0.95, seed=0).trace(*like, data)
        held["step"] = traced.lower().compile()
        memory = memory_of(held["step"])
        check_room(f"{options.model}, {name}, batch {batch}", memory)
        held["state"], held["frozen"] = begin()
        return Cost(flops(traced.jaxpr), memory)

    def run() -> Any:
        held["state"], metrics = held["step"](held["state"], held["frozen"], data)
        return metrics["loss"]

    return Row(name=name, run=run, prepare=prepare, frames=batch)


def check_room(what: str, memory: int) -> None:
    """ValueError for what a CPU's memory does not hold, where the system would end the process without a word."""
    told = re.search(r"MemAvailable:\s*(\d+) kB", MEMORY.read_text()) if MEMORY.exists() else None
    if jax.default_backend() == "cpu" and told and memory > (room := 1024 * int(told[1])):
        raise ValueError(
            f"{what}: a training step takes {memory / 2**30:.1f} GiB, and {room / 2**30:.1f} are free: "
            "give a smaller --batch, or --model openmoji"
        )
