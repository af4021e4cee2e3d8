"""The configs of LCM and LCM-LoRA of Stable Diffusion 3 and 3.5, and of the MMDiTs of the SD3 paper (2403.03206).

The pictures, and the model that encodes them, are set by flags, as for configs/stable_diffusion.py.
"""

from __future__ import annotations

from lcm_jax.configs.registry import register
from lcm_jax.configs.stable_diffusion import lcm, lcm_lora
from lcm_jax.diffusion.schedules import RectifiedFlow
from lcm_jax.lora import MMDIT_TARGETS
from lcm_jax.objectives import Diffusion, LogitNormal, TextEncoders
from lcm_jax.train.config import TrainConfig
from lcm_jax.train.loop import LoopConfig
from lcm_jax.train.optimizer import OptimizerConfig
from lcm_jax.train.tasks.common import DataConfig
from lcm_jax.train.tasks.diffusion import DiffusionTask
from lcm_jax.train.tasks.lora_config import LoraConfig
from mmdit import family

SD3_MEDIUM = "stabilityai/stable-diffusion-3-medium-diffusers"
SD35_LARGE = "stabilityai/stable-diffusion-3.5-large"
ATTENTIONS = LoraConfig(rank=64, targets=MMDIT_TARGETS)


@register
def sd3_medium_lcm() -> TrainConfig:
    """LCM of SD3-medium at 1024 pixels: an Euler step of the guided teacher, over a fiftieth of the flow's time."""
    return lcm(SD3_MEDIUM, 1024, batch_size=64)


@register
def sd3_medium_lcm_lora() -> TrainConfig:
    """LCM-LoRA of SD3-medium at 1024 pixels."""
    return lcm_lora(SD3_MEDIUM, 1024, batch_size=64, lora=ATTENTIONS)


@register
def sd35_large_lcm() -> TrainConfig:
    """LCM of SD3.5-large at 1024 pixels."""
    return lcm(SD35_LARGE, 1024, batch_size=64)


@register
def sd35_large_lcm_lora() -> TrainConfig:
    """LCM-LoRA of SD3.5-large at 1024 pixels."""
    return lcm_lora(SD35_LARGE, 1024, batch_size=64, lora=ATTENTIONS)


def study(depth: int) -> TrainConfig:
    """Return the training of an MMDiT of `depth` blocks as in section 5 of the paper (2403.03206).

    256 pixels, batches of 1024, learning rate 1e-4, logit-normal times, and a moving average with a decay of 0.99 every
    100 steps. Each text encoder is dropped for 46.4 % of the captions. Autoencoder and text encoders are SD3's.
    """
    pictures = DataConfig(name="folder:my-pictures", size=256)
    objective = Diffusion(
        schedule=RectifiedFlow(), kind="flow", times=LogitNormal(), caption_dropout=0.0, encoders=TextEncoders()
    )
    task = DiffusionTask(
        vae=SD3_MEDIUM, text=SD3_MEDIUM, net=family(depth), data=pictures, objective=objective,
        preview_steps=28, scan=True, remat=True, dtype="bfloat16",
    )  # fmt: skip
    return TrainConfig(
        task=task,
        loop=LoopConfig(steps=500_000, batch_size=1024, ema=0.99, ema_every=100, save_every=2000, preview_every=10_000),
        optimizer=OptimizerConfig(learning_rate=1e-4, warmup=1000),
    )


@register
def mmdit_d15() -> TrainConfig:
    """An MMDiT of depth 15, with 0.50 billion parameters."""
    return study(15)


@register
def mmdit_d18() -> TrainConfig:
    """An MMDiT of depth 18, with 0.86 billion parameters."""
    return study(18)


@register
def mmdit_d24() -> TrainConfig:
    """An MMDiT of depth 24, like SD3-medium, with 2.0 billion parameters."""
    return study(24)


@register
def mmdit_d30() -> TrainConfig:
    """An MMDiT of depth 30, with 4.0 billion parameters."""
    return study(30)


@register
def mmdit_d38() -> TrainConfig:
    """An MMDiT of depth 38, with 8.1 billion parameters, the largest of the study."""
    return study(38)
