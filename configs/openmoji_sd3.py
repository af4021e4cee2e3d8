"""The configs of the bundled mini SD3, from text encoders to student; see experiments/openmoji_sd3/README.md."""

from __future__ import annotations

from lcm_jax.configs.openmoji import TOKENS
from lcm_jax.configs.registry import register
from lcm_jax.diffusion.schedules import RectifiedFlow
from lcm_jax.lora import MMDIT_TARGETS
from lcm_jax.objectives import Diffusion, LatentConsistencyDistillation, LogitNormal, TextEncoders
from lcm_jax.train.config import TrainConfig
from lcm_jax.train.loop import LoopConfig
from lcm_jax.train.optimizer import OptimizerConfig
from lcm_jax.train.tasks.diffusion import DiffusionTask
from lcm_jax.train.tasks.distillation import DistillationTask
from lcm_jax.train.tasks.locked_image_tuning import LockedImageTask
from lcm_jax.train.tasks.lora_config import LoraConfig
from lcm_jax.train.tasks.masked_language_model import MaskedTask
from mmdit import MMDiTConfig
from mmdit.text import CLIPTextConfig, T5Config

WIDTH = 320  # of T5 and so of the context: the two CLIPs' 192 + 128


@register
def openmoji_clip2() -> TrainConfig:
    """A second, narrower CLIP text tower for the image tower of "openmoji", with quick_gelu; the first has gelu."""
    text = CLIPTextConfig(
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=2,
        max_position_embeddings=TOKENS,
        projection_dim=128,
        hidden_act="quick_gelu",
    )
    return TrainConfig(
        task=LockedImageTask(text=text),
        loop=LoopConfig(steps=1000, batch_size=128, ema=0.99, ema_warmup=True, save_every=250, preview_every=100),
        optimizer=OptimizerConfig(learning_rate=1e-3, warmup=50, decay="cosine", weight_decay=0.1, b2=0.98),
    )


@register
def openmoji_t5() -> TrainConfig:
    """A T5 1.1 encoder of three layers, trained on captions alone."""
    net = T5Config(d_model=WIDTH, d_kv=64, d_ff=640, num_layers=3, num_heads=4, feed_forward_proj="gated-gelu")
    return TrainConfig(
        task=MaskedTask(net=net, tokens=TOKENS),
        loop=LoopConfig(steps=1500, batch_size=128, ema=0.99, ema_warmup=True, save_every=250, preview_every=100),
        optimizer=OptimizerConfig(learning_rate=1e-3, warmup=100, decay="cosine", weight_decay=0.01, b2=0.98),
    )


@register
def openmoji_sd3() -> TrainConfig:
    """An MMDiT of six blocks on 8x8x16 latents, one token for each position: rectified flow, logit-normal times."""
    net = MMDiTConfig(
        sample_size=8,
        patch_size=1,
        num_layers=6,
        num_attention_heads=3,
        joint_attention_dim=WIDTH,
        caption_projection_dim=192,
        pooled_projection_dim=256,
        pos_embed_max_size=16,
        qk_norm="rms_norm",
    )
    objective = Diffusion(
        schedule=RectifiedFlow(),
        kind="flow",
        times=LogitNormal(),
        caption_dropout=0.1,  # to the empty prompt, which guidance uses
        encoders=TextEncoders(clip_tokens=TOKENS, clip_widths=(192, 128), pooled_widths=(128, 128)),
        encoder_dropout=0.2,  # so that it also works without T5; the paper's 46.4 % would leave it little to learn from
    )
    return TrainConfig(
        task=DiffusionTask(text="openmoji-sd3", net=net, objective=objective, preview_steps=28),
        loop=LoopConfig(steps=4000, batch_size=64, ema=0.998, ema_warmup=True, save_every=100, preview_every=500),
        optimizer=OptimizerConfig(learning_rate=1e-3, warmup=200, decay="cosine", weight_decay=0.01, b2=0.99),
    )


# An eighth of the time from 1 to 0, as for the UNet; see configs/openmoji.py.
SKIP = 0.125


def consistency(w_min: float, w_max: float) -> LatentConsistencyDistillation:
    """Return consistency distillation with Euler steps of the guided teacher, for w from w_min to w_max."""
    return LatentConsistencyDistillation(
        schedule=RectifiedFlow(),
        kind="flow",
        grid_points=1000,
        skip=SKIP,
        w_min=w_min,
        w_max=w_max,
        loss="huber",
        huber_c=0.05,
    )


@register
def openmoji_sd3_lcm() -> TrainConfig:
    """Latent consistency distillation of the mini SD3, with a w-embedding."""
    return TrainConfig(
        task=DistillationTask(text="openmoji-sd3", teacher="openmoji-sd3-teacher", objective=consistency(0.0, 5.0)),
        loop=LoopConfig(steps=1500, batch_size=32, ema=0.98, ema_warmup=True, save_every=100, preview_every=300),
        optimizer=OptimizerConfig(learning_rate=2e-4, warmup=100, decay="cosine", b2=0.99),
    )


@register
def openmoji_sd3_lcm_lora() -> TrainConfig:
    """LCM-LoRA of the same teacher: fixed w, and adapters of the attentions only."""
    return TrainConfig(
        task=DistillationTask(
            text="openmoji-sd3",
            teacher="openmoji-sd3-teacher",
            objective=consistency(3.0, 3.0),
            lora=LoraConfig(rank=16, targets=MMDIT_TARGETS),
        ),
        loop=LoopConfig(steps=600, batch_size=32, ema=0.98, ema_warmup=True, save_every=100, preview_every=200),
        optimizer=OptimizerConfig(learning_rate=5e-4, warmup=50, decay="cosine", b2=0.99),
    )
