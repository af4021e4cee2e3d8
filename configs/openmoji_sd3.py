"""The bundled mini SD3, from captions to four-step pictures; experiments/openmoji_sd3/README.md has the commands."""

from __future__ import annotations

from lcm_jax.configs.openmoji import TOKENS
from lcm_jax.configs.registry import register
from lcm_jax.train.config import TrainConfig
from lcm_jax.train.loop import LoopConfig
from lcm_jax.train.optimizer import OptimizerConfig
from lcm_jax.train.tasks.locked import LockedImageTask
from lcm_jax.train.tasks.masked import MaskedTask
from mmdit.text import CLIPTextConfig, T5Config

WIDTH = 320  # of T5 and so of the context: the two CLIPs' 192 + 128


@register
def openmoji_clip2() -> TrainConfig:
    """A second, narrower CLIP text tower for the image tower of "openmoji"; quick_gelu, as the first has gelu."""
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
        loop=LoopConfig(steps=1000, batch_size=128, ema=0.99, save_every=250, preview_every=100),
        optimizer=OptimizerConfig(learning_rate=1e-3, warmup=50, decay="cosine", weight_decay=0.1, b2=0.98),
    )


@register
def openmoji_t5() -> TrainConfig:
    """A T5 1.1 encoder of three layers, on captions alone."""
    net = T5Config(d_model=WIDTH, d_kv=64, d_ff=640, num_layers=3, num_heads=4, feed_forward_proj="gated-gelu")
    return TrainConfig(
        task=MaskedTask(net=net, tokens=TOKENS),
        loop=LoopConfig(steps=1500, batch_size=128, ema=0.99, save_every=250, preview_every=100),
        optimizer=OptimizerConfig(learning_rate=1e-3, warmup=100, decay="cosine", weight_decay=0.01, b2=0.98),
    )
