"""Latent consistency models: distilled from a teacher (LCM, LCM-LoRA) or finetuned without one (LCF)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import jax

from lcm_jax import lora
from lcm_jax.generate import Generator, as_apply
from lcm_jax.objectives import LatentConsistencyDistillation, LatentConsistencyFinetuning
from lcm_jax.schedules import DDPM
from lcm_jax.train.loop import Task
from lcm_jax.train.step import Metrics
from lcm_jax.train.tasks.common import captions
from lcm_jax.train.tasks.diffusion import build_net, check_fit, initial
from lcm_jax.train.tasks.latent import Conditioner, LatentTask, draw_latents, export_folder, preview
from lcm_jax.typing import Array, Key, Nets, Params
from lcm_jax.weights.families import DENOISERS, denoiser_of
from lcm_jax.weights.files import read_json
from lcm_jax.weights.folders import Component, load_component
from lcm_jax.weights.hub import locate
from lcm_jax.weights.lora import save_lora
from lcm_jax.weights.scheduler import read_scheduler


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Train low-rank adapters instead of all weights."""

    rank: int = 64
    alpha: float | None = None  # None: the rank
    targets: str = lora.DEFAULT_TARGETS  # regex on parameter paths


@dataclass(frozen=True, kw_only=True)
class ConsistencyTask(LatentTask):
    """A student of `teacher` (a bundled name, folder or hub id). The schedule and the kind are the teacher's.

    With `lora` only adapters are trained, the student is the teacher with them merged and has no w-embedding: one
    network in memory is teacher and student. Otherwise the student is a copy of the teacher with a zero-initialised
    w-embedding of `guidance_dim`, so that it starts as the teacher.
    """

    teacher: str = "openmoji-teacher"
    start: str | None = None  # a student (name or folder) to go on from; None starts as the teacher. Not for LoRA
    objective: LatentConsistencyDistillation | LatentConsistencyFinetuning = LatentConsistencyDistillation(
        schedule=DDPM()
    )
    lora: LoraConfig | None = None
    guidance_dim: int = 256
    preview_guidance: float = 3.0
    remat: bool = False
    dtype: str = "float32"

    def build(self) -> Task:
        location = locate(self.teacher)
        scheduler = location.at("scheduler") / "scheduler_config.json"
        schedule, kind = read_scheduler(read_json(scheduler), source=str(scheduler))
        objective = replace(self.objective, schedule=schedule, kind=kind, embed_w=self.lora is None)
        conditioner = Conditioner.load(self.vae, self.text)
        part = next((name for name in DENOISERS if location.at(name).is_dir()), "unet")
        teacher: Component = load_component(location.path, location.place(part))
        check_fit(teacher.module.config, conditioner, self.data.sizes)
        sources, prompts = self.data.open_buckets(), self.prompts.open()
        batches = self.batches(conditioner, sources)
        null = conditioner.encode_text([""])
        config = teacher.module.config
        first = teacher.params
        if self.start is not None:
            if self.lora is not None:
                raise ValueError("task.start is for whole students; a LoRA starts from its teacher")
            begun = locate(self.start)
            student_net, first = load_component(begun.path, begun.place(part))
            config = student_net.config
        if self.lora is None and config.time_cond_proj_dim is None:
            config = replace(config, time_cond_proj_dim=self.guidance_dim)
        net = build_net(config, dtype=self.dtype, remat=self.remat)
        adapted = self.lora

        def init(key: Key) -> Params:
            if adapted is not None:
                return lora.init(key, teacher.params, rank=adapted.rank, alpha=adapted.alpha, targets=adapted.targets)
            return graft(initial(net)(key), first)

        def student(params: Params, frozen: Params) -> Params:
            return params if adapted is None else lora.merge(frozen["teacher"], params)

        def loss(
            params: Params, ema: Params, frozen: Params, batch: dict[str, Array], key: Key, step: Array
        ) -> tuple[Array, Metrics]:
            draw, rest = jax.random.split(key)
            target = student(ema, frozen) if objective.target == "ema" else None
            nets = Nets(as_apply(net), student(params, frozen), target, frozen["teacher"], frozen["null"])
            return objective(nets, draw_latents(draw, batch), rest)

        generator = Generator(
            net=net, vae=conditioner.vae.module, schedule=schedule, kind=kind, embeds_guidance=adapted is None
        )
        guidance = self.preview_guidance if adapted is None else 1.0
        show = preview(generator, conditioner, captions(prompts, 16), sampler="lcm", steps=4, guidance=guidance)

        def export(ema: Params, path: Path) -> None:
            if adapted is not None:
                path.mkdir(parents=True, exist_ok=True)
                save_lora(path / "pytorch_lora_weights.safetensors", jax.device_get(ema), denoiser_of(config)[1].rules)
                return
            export_folder(path, Component(net, jax.device_get(ema)), conditioner, schedule, kind, sampler="lcm")

        return Task(
            init=init,
            loss=loss,
            frozen={"teacher": teacher.params, "null": null, "vae": conditioner.vae.params},
            batches=batches,
            preview=lambda ema, frozen: show(student(ema, frozen), frozen["vae"]),
            export=export,
        )


def graft(fresh: Params, trained: Params) -> Params:
    """`fresh` with every leaf that `trained` has; what is new (the w-embedding) keeps its zero initialisation."""
    if not isinstance(fresh, dict):
        return trained
    return {key: graft(value, trained[key]) if key in trained else value for key, value in fresh.items()}
