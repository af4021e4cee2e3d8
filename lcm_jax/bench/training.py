"""The cases of a training step of latent consistency distillation, of all weights or a LoRA, with the peer's step."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lcm_jax.bench import peers
from lcm_jax.bench.measure import Cost, Row
from lcm_jax.bench.models import GEOMETRIES, PREFIX, at_scale, component
from lcm_jax.bench.networks import Options, Titled
from lcm_jax.bench.torch_training import DECAY, Distillation
from lcm_jax.diffusion.schedules import DDPM
from lcm_jax.inference.loading import load
from lcm_jax.nets import UNet, UNetConfig
from lcm_jax.objectives import LatentConsistencyDistillation
from lcm_jax.runtime.compiler_options import memory_of
from lcm_jax.runtime.flops import flops
from lcm_jax.train.tasks.distillation import Learner
from lcm_jax.train.tasks.lora_config import LoraConfig
from lcm_jax.train.train_step import TrainState, make_train_step
from lcm_jax.typing import Array, Params
from lcm_jax.weights.diffusers_folder import Component
from lcm_jax.weights.registry import FAMILIES

_KIND = "UNet2DConditionModel"
MEMORY = Path("/proc/meminfo")  # of Linux


class Teacher(NamedTuple):
    """The config of the UNet that is distilled, and the number of tokens of its texts."""

    config: UNetConfig
    tokens: int = 77


@cache
def teacher_of(options: Options) -> Teacher:
    """Return the teacher of the options' model: its UNet without an embedding of w, or the UNet of a geometry.

    Raises ValueError for a model without a UNet.
    """
    if options.model.startswith(PREFIX):
        [name] = options.geometries("training")
        return Teacher(at_scale(GEOMETRIES[name].parts["unet"][1], options.scale))
    pipe = load(options.model)
    net = pipe.model.net
    if not isinstance(net, UNet):
        raise ValueError(f"--model {options.model}: bench training distils a UNet, and this has a {type(net).__name__}")
    config = replace(at_scale(net.config, options.scale), time_cond_proj_dim=None)
    return Teacher(config, pipe.component("text_encoder").module.config.max_position_embeddings)


def steps(options: Options) -> Iterator[Titled]:
    """Yield the rows of a step of LCM-LoRA and of LCM, computed in the given precision on float32 parameters, AdamW."""
    for batch in options.batches or ((1,) if jax.default_backend() == "cpu" else (16,)):
        adapters = LoraConfig(rank=64 if options.scale == "full" else 4)
        # Adapters first: if the memory does not suffice for all weights, the bench ends after the adapters' rows.
        for name, lora in ((f"LCM-LoRA, rank {adapters.rank}", adapters), ("LCM", None)):
            title = f"Training step, {options.model}, {name}, batch {batch}"
            setup = Distilled.of(options, batch=batch, lora=lora)
            rows = [step(name, options, setup)]
            if options.peer:  # after ours, which checks first whether the memory suffices for both
                rows.append(peers_step(f"diffusers, {name}", options, setup))
                rows[0] = replace(rows[0], against=rows[1].name)
            yield title, rows


@dataclass(frozen=True, kw_only=True)
class Distilled:
    """The setup of a step: teacher, student, objective and a batch.

    batch: "mean" and "std" of the latents (b, h, w, c), and "context" (b, tokens, d).
    """

    teacher: UNetConfig
    student: UNetConfig
    lora: LoraConfig | None
    objective: LatentConsistencyDistillation
    batch: dict[str, np.ndarray]

    @classmethod
    def of(cls, options: Options, *, batch: int, lora: LoraConfig | None) -> Distilled:
        """Return the setup of the model's UNet, of all its weights or of a LoRA, with a random batch."""
        config, tokens = teacher_of(options)
        side: Any = config.sample_size
        height, width = (side, side) if isinstance(side, int) else side
        latents = (batch, height, width, config.in_channels)
        w_min, w_max = (2.0, 14.0) if lora is None else (7.5, 7.5)
        rng = np.random.default_rng(0)
        return cls(
            teacher=config,
            student=config if lora is not None else replace(config, time_cond_proj_dim=256),
            lora=lora,
            objective=LatentConsistencyDistillation(schedule=DDPM(), embed_w=lora is None, w_min=w_min, w_max=w_max),
            batch={
                "mean": rng.standard_normal(latents, np.float32),
                "std": np.full(latents, 0.1, np.float32),
                "context": rng.standard_normal((batch, tokens, config.level("cross_attention_dim", 0)), np.float32),
            },
        )

    @property
    def null(self) -> dict[str, Array]:
        """The conditioning of the empty prompt: "context" (1, tokens, d) of zeros."""
        return {"context": jnp.zeros((1, *self.batch["context"].shape[1:]))}

    def learner(self, dtype: str, *, remat: bool = False) -> Learner:
        """Return the student, which computes in this precision, and its loss. remat: recompute activations."""
        net = FAMILIES[_KIND].build(self.student, dtype=jnp.dtype(dtype), remat=remat)
        return Learner(net=net, objective=self.objective, lora=self.lora, critic=None)

    def init_params(self, dtype: str, learner: Learner) -> tuple[Params, Params]:
        """Return the trained tree and the frozen ones.

        The teacher is in the precision of the computation, since it is not trained. A LoRA's base is this same tree.
        """
        teacher = component(_KIND, self.teacher, dtype).params
        frozen = {"teacher": teacher, "null": self.null}
        first = component(_KIND, self.teacher, "float32").params if self.lora is None else teacher
        return learner.init_params(jax.random.key(0), first, frozen), frozen


def step(name: str, options: Options, setup: Distilled, *, remat: bool = False) -> Row:
    """Return the row of one step: student, guided teacher, target, gradient, AdamW and the moving average.

    The step's state is donated. Its `prepare` raises ValueError if a CPU's memory does not suffice.
    """
    learner = setup.learner(options.dtype, remat=remat)
    data = {key: jnp.asarray(leaf, options.dtype) for key, leaf in setup.batch.items()}
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-5))
    running: dict[str, Any] = {}  # the compiled step, its state and the frozen trees

    def init_params() -> tuple[TrainState, Params]:
        params, frozen = setup.init_params(options.dtype, learner)
        return TrainState.create(params, tx), frozen

    def prepare() -> Cost:
        like = jax.eval_shape(init_params)
        traced: Any = make_train_step(learner.loss, tx, decay=DECAY, seed=0).trace(*like, data)
        running["step"] = traced.lower().compile()
        memory = memory_of(running["step"])
        both = " with the peer's" if options.peer else ""
        check_room(f"{options.model}, {name}, batch {len(data['mean'])}{both}", memory * (2 if both else 1))
        running["state"], running["frozen"] = init_params()
        return Cost(flops(traced.jaxpr), memory)

    def run() -> Any:
        running["state"], metrics = running["step"](running["state"], running["frozen"], data)
        return metrics["loss"]

    return Row(name=name, run=run, prepare=prepare, frames=len(data["mean"]))


def peers_step(name: str, options: Options, setup: Distilled) -> Row:
    """Return the row of the same step in PyTorch, from the same weights."""
    distillation = cache(partial(torch_distillation, setup, options.dtype, str(options.peer)))
    mean, std = (peers.channels_first(setup.batch[leaf], "float32") for leaf in ("mean", "std"))
    return peers.row(name, lambda: distillation()(mean, std), frames=len(setup.batch["mean"]))


def torch_distillation(setup: Distilled, dtype: str, peer: str) -> Distillation:
    """Return the peer's training, with the weights of ours."""
    learner = setup.learner("float32")
    params, frozen = setup.init_params("float32", learner)
    teacher = Component(FAMILIES[_KIND].build(setup.teacher), frozen["teacher"])
    return Distillation(
        teacher,
        Component(learner.net, params) if setup.lora is None else params,
        setup.objective,
        {"context": jnp.asarray(setup.batch["context"])},
        setup.null,
        dtype=dtype,
        peer=peer,
    )


def check_room(what: str, memory: int) -> None:
    """Raise ValueError if a CPU has less free memory than `memory` bytes, where Linux would kill the process silently.

    what: the name of the step, for the message.
    """
    match = re.search(r"MemAvailable:\s*(\d+) kB", MEMORY.read_text()) if MEMORY.exists() else None
    if jax.default_backend() == "cpu" and match and memory > (free := 1024 * int(match[1])):
        raise ValueError(
            f"{what}: a training step takes {memory / 2**30:.1f} GiB, and {free / 2**30:.1f} are free: "
            "give a smaller --batch, or --model openmoji"
        )
