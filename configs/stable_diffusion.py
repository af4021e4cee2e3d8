"""The configs of LCM and LCM-LoRA of Stable Diffusion 1.5 and XL, with the papers' numbers (2310.04378, 2311.05556).

The batches are for 64 chips. The pictures are set by flags, and so may be a teacher of the same family:

    lcm-jax distill --config sdxl_lcm --task.data.name folder:my-pictures
"""

from __future__ import annotations

from typing import Any

from lcm_jax.configs.registry import register
from lcm_jax.diffusion.schedules import DDPM
from lcm_jax.objectives import LatentConsistencyDistillation
from lcm_jax.train.config import TrainConfig
from lcm_jax.train.loop import LoopConfig
from lcm_jax.train.optimizer import OptimizerConfig
from lcm_jax.train.tasks.common import DataConfig
from lcm_jax.train.tasks.distillation import DistillationTask
from lcm_jax.train.tasks.lora_config import LoraConfig

SD15 = "stable-diffusion-v1-5/stable-diffusion-v1-5"
SDXL = "stabilityai/stable-diffusion-xl-base-1.0"
TEACHERS = DDPM()  # a placeholder: the task reads the teacher's schedule


def task(model: str, size: int, **options: Any) -> DistillationTask:
    """Return the distillation of `model` on squares of `size` pixels in bfloat16.

    model: also gives the autoencoder and the text encoders. options: other fields of the task.
    """
    pictures = DataConfig(name="folder:my-pictures", size=size)
    return DistillationTask(
        vae=model, text=model, teacher=model, data=pictures, remat=True, dtype="bfloat16", **options
    )


def lcm(model: str, size: int, *, batch_size: int) -> TrainConfig:
    """Return LCM of all weights with w as an input: the LCM paper's Table 5, with the pseudo-Huber loss of its code."""
    objective = LatentConsistencyDistillation(schedule=TEACHERS, w_min=2.0, w_max=14.0, loss="huber", huber_c=1e-3)
    return TrainConfig(
        task=task(model, size, objective=objective, scan=True),
        loop=LoopConfig(steps=100_000, batch_size=batch_size, ema=0.999943, save_every=1000, preview_every=2000),
        optimizer=OptimizerConfig(learning_rate=8e-6, warmup=1000),
    )


def lcm_lora(model: str, size: int, *, batch_size: int, lora: LoraConfig | None = None) -> TrainConfig:
    """Return LCM-LoRA at a fixed guidance scale of 8.5 (w = 7.5); the target is the student itself, without EMA."""
    objective = LatentConsistencyDistillation(
        schedule=TEACHERS, w_min=7.5, w_max=7.5, loss="huber", huber_c=1e-3, target="online"
    )
    return TrainConfig(
        task=task(model, size, objective=objective, lora=lora or LoraConfig(rank=64)),
        loop=LoopConfig(steps=4000, batch_size=batch_size, ema=0.0, save_every=500, preview_every=500),
        optimizer=OptimizerConfig(learning_rate=1e-4, warmup=100),
    )


@register
def sd15_lcm() -> TrainConfig:
    """LCM of Stable Diffusion 1.5 at 512 pixels."""
    return lcm(SD15, 512, batch_size=128)


@register
def sd15_lcm_lora() -> TrainConfig:
    """LCM-LoRA of Stable Diffusion 1.5 at 512 pixels."""
    return lcm_lora(SD15, 512, batch_size=128)


@register
def sdxl_lcm() -> TrainConfig:
    """LCM of SDXL at 1024 pixels."""
    return lcm(SDXL, 1024, batch_size=64)


@register
def sdxl_lcm_lora() -> TrainConfig:
    """LCM-LoRA of SDXL at 1024 pixels."""
    return lcm_lora(SDXL, 1024, batch_size=64)
