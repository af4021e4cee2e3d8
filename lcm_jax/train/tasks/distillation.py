"""Training of few-step students: distilled from a teacher by any method of `lcm_jax.objectives`, or on data alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lcm_jax import lora
from lcm_jax.diffusion.schedules import DDPM
from lcm_jax.models.latent_diffusion import LatentDiffusion, as_apply
from lcm_jax.nets.discriminator_heads import features
from lcm_jax.objectives import FewStep, LatentConsistencyDistillation
from lcm_jax.parallel.sharding import param_sharding
from lcm_jax.train.optimizer import MakeOptimizer, partitioned
from lcm_jax.train.task import Task
from lcm_jax.train.tasks.abstract_step import (
    abstract_task,
    cast,
    frozen_and_batch_shapes,
    model_shapes,
    required_shape_of,
)
from lcm_jax.train.tasks.common import Dtype, captions, check_dtype, check_preview_steps, held_out_config
from lcm_jax.train.tasks.conditioner import Conditioner, local_mesh
from lcm_jax.train.tasks.diffusion import build_net, check_fit, initial
from lcm_jax.train.tasks.discriminator import Discriminator
from lcm_jax.train.tasks.latent import LatentTask, draw_latents, export_folder, preview
from lcm_jax.train.tasks.lora_config import LoraConfig
from lcm_jax.train.train_step import Metrics, Progress
from lcm_jax.typing import Array, Cond, Image, Key, Kind, Nets, Params, Schedule, Shapes
from lcm_jax.weights.diffusers_folder import Component
from lcm_jax.weights.hub import locate
from lcm_jax.weights.lora.files import save_lora
from lcm_jax.weights.registry import DENOISERS, denoiser_of
from lcm_jax.weights.safetensors_files import read_json
from lcm_jax.weights.scheduler_config import read_scheduler
from mmdit.attention import Implementation
from mmdit.blocks import Remat
from mmdit.text import normalize_images
from vae16 import AutoencoderKL, unscale


@dataclass(frozen=True, kw_only=True)
class DistillationTask(LatentTask):
    """A few-step student of `teacher`, with the teacher's schedule and kind.

    With `lora` only adapters are trained: the student is the teacher with the adapters merged, without a w-embedding,
    so teacher and student share one network in memory. Otherwise the student is a copy of the teacher. If the objective
    uses them, it has a w-embedding of `guidance_dim` and an embedding of the step's length; both are initialised to
    zero, so that it starts as the teacher.
    """

    teacher: str = "openmoji-teacher"  # a bundled name, folder or hub id
    start: str | None = None  # a student (name or folder) to start from; None: the teacher. Not for LoRA
    objective: FewStep = LatentConsistencyDistillation(schedule=DDPM())
    lora: LoraConfig | None = None
    guidance_dim: int = 256  # width of the w-embedding
    rate_of_others: float = 1.0  # the learning rate of a fake score or discriminator, divided by the student's
    image_encoder: str = "openmoji"  # a model whose image tower gives the features of a discriminator of pictures
    preview_guidance: float = 3.0
    preview_steps: int = 4  # sampling steps of a preview
    scan: bool = False  # compile blocks of one shape once, as a scan; see the network
    remat: Remat = False  # what the backward pass recomputes: nothing, all of a block, or what a policy does not keep
    attention: Implementation | None = None  # the student's attention kernel; None chooses by platform and precision
    dtype: Dtype = "float32"  # of the computation; parameters, norms and losses are float32
    teacher_dtype: Dtype = "float32"  # of the teacher's parameters

    def __post_init__(self) -> None:
        if self.lora is not None and self.scan:
            raise ValueError("task.scan with task.lora: adapters are for each layer, so leave scan out")
        check_dtype("task.dtype", self.dtype)
        check_dtype("task.teacher_dtype", self.teacher_dtype)
        check_preview_steps(self.preview_steps)

    def build(self) -> Task:
        """Return the task; raise ValueError, before pictures are encoded, if objective, models and data do not fit."""
        location = locate(self.teacher)
        scheduler = location.at("scheduler") / "scheduler_config.json"
        schedule, kind = read_scheduler(read_json(scheduler), source=str(scheduler))
        objective = self._objective(schedule, kind)
        conditioner = Conditioner.load(self.vae, self.text)
        part = next((name for name in DENOISERS if location.at(name).is_dir()), "unet")
        dtype = jnp.dtype(self.teacher_dtype)
        shardings = param_sharding(local_mesh())
        teacher = location.load(part, dtype=dtype, scan=self.scan, shardings=shardings)
        config = teacher.module.config
        check_fit(config, conditioner, self.data.sizes)
        sources, apart = self.data.open_buckets(), held_out_config(self.prompts, self.data)
        # Nothing is validated, so that data without a split for it are trained on as a whole.
        shown = captions(next(iter(sources.values())) if apart is None else apart.open(encoded=True), 16)
        first = teacher.params
        if self.start is not None:
            start = locate(self.start)
            student_net, first = start.load(part, scan=self.scan, shardings=shardings)
            config = student_net.config
        net = self._student(config, objective)
        config = net.config
        embeds_guidance = config.time_cond_proj_dim is not None
        critic = self.critic(objective, net, conditioner.vae) if objective.adversarial else None
        learner = Learner(net=net, objective=objective, lora=self.lora, critic=critic)
        frozen = {"teacher": teacher.params, "null": conditioner.null, "vae": conditioner.vae.params, **learner.frozen}

        def init(key: Key) -> Params:
            return learner.init_params(key, first, frozen)

        shapes = jax.eval_shape(init, jax.random.key(0))  # raises what does not fit before the pictures are encoded
        batches = self.batches(sources, self.encode(conditioner, sources))
        model = LatentDiffusion(
            net=net,
            vae=conditioner.vae.module,
            schedule=schedule,
            kind=kind,
            embeds_guidance=embeds_guidance,
            embeds_span=config.span_embedding,
        )
        # A student without w as an input has the guidance of its training built in, if any.
        guidance = self.preview_guidance if embeds_guidance or not objective.builds_in_guidance else 1.0
        show = preview(
            model,
            conditioner,
            shown,
            sampler=objective.sampler,
            steps=self.preview_steps,
            guidance=guidance,
        )

        conditioner.release()

        def export(ema: Params, path: Path) -> None:
            params = jax.device_get(split(ema)[0])
            if self.lora is not None:
                path.mkdir(parents=True, exist_ok=True)
                save_lora(path / "pytorch_lora_weights.safetensors", params, denoiser_of(config)[1].rules)
                return
            export_folder(path, Component(net, params), conditioner, schedule, kind, sampler=objective.sampler)

        return Task(
            init=init,
            loss=learner.loss,
            frozen=frozen,
            batches=batches,
            preview=lambda ema, frozen, batched_map: show(learner.student(ema, frozen), frozen["vae"], batched_map),
            export=export,
            optimizer=student_optimizer(objective, self.rate_of_others, shapes),
            target_decay=learner.target_decay,
            captions=shown,
        )

    def abstract(self) -> Task:
        """Return the task in shapes alone: no weights or data are read, and only its step can be compiled."""
        teacher = model_shapes(self.teacher)
        objective = self._objective(
            required_shape_of(self.teacher, "schedule"), required_shape_of(self.teacher, "kind")
        )
        net = self._student(teacher.net if self.start is None else required_shape_of(self.start, "net"), objective)
        frozen, batch = frozen_and_batch_shapes(
            required_shape_of(self.teacher, "net"), self.vae, self.text, self.data.sizes[0]
        )
        vae = Component(AutoencoderKL(required_shape_of(self.vae, "vae")), frozen["vae"])
        critic = self.critic(objective, net, vae) if objective.adversarial else None
        learner = Learner(net=net, objective=objective, lora=self.lora, critic=critic)
        base = build_net(teacher.net, dtype=self.dtype, remat=self.remat, scan=self.scan)
        first = jax.eval_shape(initial(base), jax.random.key(0))
        frozen |= {"teacher": cast(first, jnp.dtype(self.teacher_dtype)), **learner.frozen}

        def init(key: Key) -> Params:
            shapes = jax.eval_shape(learner.init_params, key, first, frozen)
            return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)

        optimizer = student_optimizer(objective, self.rate_of_others, jax.eval_shape(init, jax.random.key(0)))
        return replace(abstract_task(init, learner.loss, frozen, batch, optimizer), target_decay=learner.target_decay)

    def _objective(self, schedule: Schedule, kind: Kind) -> FewStep:
        """Return the objective on the teacher's schedule; raise ValueError if it does not fit teacher or LoRA."""
        embed_w = self.objective.embed_w and self.lora is None
        objective = replace(self.objective, schedule=schedule, kind=kind, embed_w=embed_w).drawn_in(self.preview_steps)
        if kind == "epsilon" and float(schedule.alpha(schedule.t_max)) == 0.0:
            raise ValueError(
                f"{self.teacher} predicts epsilon, which at the end of a schedule of zero terminal SNR does not "
                "determine the picture: few-step students need a teacher with v_prediction or flow"
            )
        if self.lora is not None and objective.spans:
            raise ValueError(
                "the objective tells the student how far a step reaches, which a LoRA's network cannot take: leave "
                "task.lora out"
            )
        if objective.needs_w and not embed_w and objective.w_min < objective.w_max:
            raise ValueError(
                f"the objective tells the student its guidance, w from {objective.w_min} to {objective.w_max}, which a "
                "network without a w-embedding, such as a LoRA's, cannot take: set w_min and w_max to one value"
            )
        if self.lora is not None and self.start is not None:
            raise ValueError("task.start is not for a LoRA, which starts from its teacher: leave task.start out")
        return objective

    def _student(self, config: Any, objective: FewStep) -> Any:
        """Return the student's network. config: that of the network whose parameters it starts from."""
        if objective.embed_w and config.time_cond_proj_dim is None:
            config = replace(config, time_cond_proj_dim=self.guidance_dim)
        config = replace(config, span_embedding=config.span_embedding or objective.spans)
        return build_net(config, dtype=self.dtype, remat=self.remat, scan=self.scan, attention=self.attention)

    def critic(self, objective: FewStep, net: Any, around: Component) -> Discriminator:
        """Return the discriminator: heads on the teacher's blocks, or on an image tower if it judges pictures.

        net: the student's network. around: the autoencoder.
        """
        if not objective.judges_pictures:
            return Discriminator(features=partial(features, net), net=net, frozen={})
        tower, vae = locate(self.image_encoder).load("image_encoder"), around.module

        def image_features(params: Params, x: Image, t: Array, cond: Cond) -> list[Array]:
            latents = unscale(x, vae.config)
            pictures = vae.apply({"params": params["vae"]}, latents, method="decode")
            maps = features(tower.module, params["tower"], normalize_images(pictures))
            return [maps[len(maps) * i // 4 - 1] for i in range(1, 5)]  # ADD's: the ends of four quarters of the tower

        frozen = {"vae": around.params, "tower": tower.params}
        return Discriminator(features=image_features, net=net, frozen={"eyes": frozen})


def split(params: Params | Shapes) -> tuple[Any, Any]:
    """Return the student's parameters, and the trees that are trained beside it, or None."""
    pair = isinstance(params, dict) and params.keys() == {"student", "others"}
    return (params["student"], params["others"]) if pair else (params, None)


@dataclass(frozen=True, kw_only=True)
class Learner:
    """The pure functions of a distillation: the initial parameters, and the loss.

    net: the student's network. critic: the discriminator, if the objective is adversarial.
    """

    net: Any
    objective: FewStep
    lora: LoraConfig | None
    critic: Discriminator | None

    @property
    def frozen(self) -> dict[str, Params]:
        """The frozen trees that the loss needs besides "teacher" and "null"."""
        return {} if self.critic is None else self.critic.frozen

    @property
    def target_decay(self) -> Callable[[Progress], Array] | None:
        """The decay of the objective's own average, or None where the product's serves."""
        decay = self.objective.target_decay
        return None if decay is None else lambda progress: decay(progress.step, jnp.asarray(progress.steps))

    def init_params(self, key: Key, first: Params, frozen: Params) -> Params:
        """Return the trained trees before the first step: the student, or {"student", "others"}.

        first: the parameters that a student without LoRA starts from. frozen: has "teacher" and "null".
        """
        teacher = frozen["teacher"]
        if self.lora is not None:
            student = lora.init(key, teacher, rank=self.lora.rank, alpha=self.lora.alpha, targets=self.lora.targets)
        else:
            student = merge_pretrained(initial(self.net)(key), first)
        others = dict(self.objective.others(key, jax.tree.map(jnp.copy, teacher)))
        if self.critic is not None:
            others["heads"] = self.critic.init(key, teacher, frozen["null"])
        return {"student": student, "others": others} if others else student

    def student(self, params: Params, frozen: Params, key: Key | None = None) -> Params:
        """Return the student's parameters; those of a LoRA are the teacher's with adapters.

        key: of the adapters' dropout, in training; None: no dropout.
        """
        student = split(params)[0]
        if self.lora is None:
            return student
        dropout = None if key is None or self.lora.dropout == 0.0 else lora.Dropout(key=key, rate=self.lora.dropout)
        return lora.Adapted(frozen["teacher"], student, dropout)

    def loss(
        self, params: Params, average: Params, frozen: Params, batch: dict[str, Array], key: Key, progress: Progress
    ) -> tuple[Array, Metrics]:
        """Return (loss, metrics) of a batch of encoded records; a `Loss` of the training step."""
        draw, rest = jax.random.split(key)
        nets = Nets(
            as_apply(self.net),
            self.student(params, frozen, jax.random.fold_in(key, 2)),
            self.student(average, frozen) if self.objective.needs_target else None,
            frozen["teacher"],
            frozen["null"],
            others=split(params)[1],
            critic=None if self.critic is None else self.critic.bind(frozen),
            step=progress.step,
            steps=jnp.asarray(progress.steps),
        )
        return self.objective(nets, draw_latents(draw, batch), rest)


def student_optimizer(
    objective: FewStep, rate: float, params: Params | Shapes
) -> Callable[[MakeOptimizer], optax.GradientTransformation]:
    """Return what makes the optimizer of a student and of the trees beside it, each with its own; see `partitioned`.

    rate: the learning rate of the others, divided by the student's. params: the trained trees, or their shapes.
    """
    others = split(params)[1]
    if others is None:
        return lambda make: make()
    names = ("student", *others)
    rates = {} if rate == 1.0 else dict.fromkeys(others, rate)
    return partial(partitioned, names=names, periods=objective.updates, changes=objective.optimizers, rates=rates)


def merge_pretrained(fresh: Params, trained: Params) -> Params:
    """Return `fresh` with the leaves that `trained` has too taken from it; a new embedding keeps its initialisation."""
    if not isinstance(fresh, dict):
        return trained.astype(fresh.dtype)
    return {key: merge_pretrained(value, trained[key]) if key in trained else value for key, value in fresh.items()}
