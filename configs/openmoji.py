"""The configs of the bundled model, from autoencoder to few-step student; see experiments/openmoji/README.md."""

from __future__ import annotations

from lcm_jax.configs.registry import register
from lcm_jax.diffusion.schedules import DDPM
from lcm_jax.nets import UNetConfig
from lcm_jax.objectives import Diffusion, LatentConsistencyDistillation, LatentConsistencyFinetuning
from lcm_jax.train.config import TrainConfig
from lcm_jax.train.loop import LoopConfig
from lcm_jax.train.optimizer import OptimizerConfig
from lcm_jax.train.tasks.autoencoder import AutoencoderTask, TinyAutoencoderTask
from lcm_jax.train.tasks.common import DataConfig
from lcm_jax.train.tasks.contrastive import ContrastiveTask
from lcm_jax.train.tasks.diffusion import DiffusionTask
from lcm_jax.train.tasks.distillation import DistillationTask
from lcm_jax.train.tasks.finetune import FinetuneTask
from lcm_jax.train.tasks.lora_config import LoraConfig
from lcm_jax.train.tasks.textual_inversion import TextualInversionTask
from mmdit.text import CLIPTextConfig, CLIPVisionConfig
from vae16 import AutoencoderConfig, LossConfig, PictureLossConfig, TinyConfig

TOKENS = 24
SCHEDULE = DDPM(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")  # Stable Diffusion's


@register
def openmoji_vae() -> TrainConfig:
    """An autoencoder of 16 channels and factor 8, narrow at full resolution, where most of the time is spent."""
    model = AutoencoderConfig(
        latent_channels=16,
        block_out_channels=(16, 24, 64, 128),
        layers_per_block=1,
        norm_num_groups=8,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    return TrainConfig(
        task=AutoencoderTask(
            model=model,
            loss=LossConfig(reduction="mean", perceptual_weight=0.0, kl_weight=1e-3, gan_weight=0.0, gan_start=0),
        ),
        loop=LoopConfig(steps=5000, batch_size=16, ema=0.998, ema_warmup=True, save_every=500, preview_every=1000),
        optimizer=OptimizerConfig(learning_rate=2e-3, warmup=50, decay="cosine", b2=0.99),
    )


@register
def openmoji_tiny_vae() -> TrainConfig:
    """A tiny autoencoder for the latents of openmoji_vae, in half the time: no block at full or half resolution."""
    model = TinyConfig(
        latent_channels=16,
        encoder_block_out_channels=(32, 32, 32, 32),
        decoder_block_out_channels=(64, 64, 64, 64),
        num_encoder_blocks=(0, 0, 2, 3),
        num_decoder_blocks=(3, 2, 0, 0),
    )
    loss = PictureLossConfig(reconstruction="l2", reduction="mean", perceptual_weight=0.0, gan_weight=0.0)
    return TrainConfig(
        task=TinyAutoencoderTask(model=model, loss=loss),
        loop=LoopConfig(steps=9000, batch_size=16, ema=0.998, ema_warmup=True, save_every=500, preview_every=1000),
        optimizer=OptimizerConfig(learning_rate=2e-3, warmup=50, decay="cosine", b2=0.99),
    )


@register
def openmoji_clip() -> TrainConfig:
    """A CLIP with text and image towers of four layers, for pictures of 64 pixels in patches of eight."""
    text = CLIPTextConfig(
        hidden_size=192,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=TOKENS,
        projection_dim=128,
        hidden_act="gelu",
    )
    vision = CLIPVisionConfig(
        image_size=64,
        patch_size=8,
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        projection_dim=128,
        hidden_act="gelu",
    )
    return TrainConfig(
        task=ContrastiveTask(text=text, vision=vision),
        loop=LoopConfig(steps=500, batch_size=128, ema=0.99, ema_warmup=True, save_every=100, preview_every=100),
        optimizer=OptimizerConfig(learning_rate=1e-3, warmup=50, decay="cosine", weight_decay=0.1, b2=0.98),
    )


@register
def openmoji_teacher() -> TrainConfig:
    """A UNet of two levels on 8x8x16 latents, with v-prediction: x0 is well conditioned at every time, even t_max."""
    net = UNetConfig(
        sample_size=8,
        in_channels=16,
        out_channels=16,
        block_out_channels=(96, 160),
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        attention_head_dim=4,
        cross_attention_dim=192,
        norm_num_groups=16,
        use_linear_projection=True,
    )
    return TrainConfig(
        task=DiffusionTask(
            net=net,
            objective=Diffusion(schedule=SCHEDULE, kind="v_prediction", caption_dropout=0.1, min_snr_gamma=5.0),
        ),
        loop=LoopConfig(steps=5000, batch_size=64, ema=0.998, ema_warmup=True, save_every=100, preview_every=500),
        optimizer=OptimizerConfig(learning_rate=1e-3, warmup=100, decay="cosine", weight_decay=0.01, b2=0.99),
    )


# The teacher's DDIM draws as well in eight steps as in fifty, so a step of it may be an eighth of the way: the student
# then has eight skips to learn instead of fifty, and each of them changes more than noise.
SKIP = 125.0


@register
def openmoji_lcm() -> TrainConfig:
    """LCM of the teacher, with a w-embedding; at a higher learning rate the student forgets the teacher."""
    objective = LatentConsistencyDistillation(
        schedule=SCHEDULE, skip=SKIP, w_min=0.0, w_max=5.0, loss="huber", huber_c=0.05
    )
    return TrainConfig(
        task=DistillationTask(objective=objective),
        loop=LoopConfig(steps=1800, batch_size=32, ema=0.98, ema_warmup=True, save_every=100, preview_every=300),
        optimizer=OptimizerConfig(learning_rate=2e-4, warmup=100, decay="cosine", b2=0.99),
    )


@register
def openmoji_lcm_lora() -> TrainConfig:
    """LCM-LoRA of the teacher: fixed w, no w-embedding, adapters only."""
    objective = LatentConsistencyDistillation(
        schedule=SCHEDULE, skip=SKIP, w_min=3.0, w_max=3.0, loss="huber", huber_c=0.05
    )
    return TrainConfig(
        task=DistillationTask(objective=objective, lora=LoraConfig(rank=32)),
        loop=LoopConfig(steps=1000, batch_size=32, ema=0.98, ema_warmup=True, save_every=100, preview_every=250),
        optimizer=OptimizerConfig(learning_rate=5e-4, warmup=50, decay="cosine", b2=0.99),
    )


@register
def openmoji_lcf() -> TrainConfig:
    """Latent consistency finetuning: the student starts as the teacher and trains on pictures, without the teacher."""
    objective = LatentConsistencyFinetuning(schedule=SCHEDULE, w_min=0.0, w_max=5.0, loss="huber", huber_c=1e-2)
    return TrainConfig(
        task=DistillationTask(objective=objective),
        loop=LoopConfig(steps=1000, batch_size=32, ema=0.99, ema_warmup=True, save_every=100, preview_every=250),
        optimizer=OptimizerConfig(learning_rate=3e-4, warmup=50, decay="cosine", b2=0.99),
    )


@register
def openmoji_outline() -> TrainConfig:
    """The teacher finetuned to another style, black lines alone; see experiments/few_step/universality.py."""
    objective = Diffusion(schedule=SCHEDULE, caption_dropout=0.1, min_snr_gamma=5.0)
    return TrainConfig(
        task=FinetuneTask(data=DataConfig(name="openmoji-outline"), objective=objective),
        loop=LoopConfig(steps=400, batch_size=32, ema=0.98, ema_warmup=True, save_every=100, preview_every=100),
        optimizer=OptimizerConfig(learning_rate=3e-4, warmup=20, decay="cosine", b2=0.99),
    )


@register
def openmoji_dreambooth() -> TrainConfig:
    """DreamBooth with adapters: a few pictures with "sks cat face" in each caption, and cat faces as the prior."""
    objective = Diffusion(schedule=SCHEDULE, caption_dropout=0.0, min_snr_gamma=5.0)
    task = FinetuneTask(
        data=DataConfig(name="folder:my-cat"),
        objective=objective,
        class_prompt="cat face",
        class_pictures=64,
        train_text=True,
        lora=LoraConfig(rank=8),
        preview_prompts=("sks cat face", "cat face", "dog face", "red heart"),
    )
    return TrainConfig(
        task=task,
        loop=LoopConfig(steps=200, batch_size=4, ema=0.98, ema_warmup=True, save_every=100, preview_every=100),
        optimizer=OptimizerConfig(learning_rate=5e-4, warmup=20, b2=0.99),
    )


@register
def openmoji_textual_inversion() -> TrainConfig:
    """A word for a style: "cat face <outline>" asks the teacher for black lines alone.

    The word stands behind the caption, whose tokens it leaves as they are: CLIP reads from left to right.
    """
    objective = Diffusion(schedule=SCHEDULE, caption_dropout=0.0, min_snr_gamma=5.0)
    task = TextualInversionTask(
        data=DataConfig(name="openmoji-outline"),
        objective=objective,
        word="<outline>",
        initializer="black",
        templates=("{caption} {word}",),
        preview_prompts=tuple(f"{text} <outline>" for text in ("cat face", "dog face", "red heart", "pizza")),
    )
    return TrainConfig(
        task=task,
        loop=LoopConfig(steps=400, batch_size=32, ema=0.98, ema_warmup=True, save_every=100, preview_every=100),
        optimizer=OptimizerConfig(learning_rate=1e-3, warmup=20, decay="cosine", b2=0.99),
    )
