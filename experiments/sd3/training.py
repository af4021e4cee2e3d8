"""The training and the sampling that the studies of formulations and of architectures share.

All cells of a study are trained on the same pictures in the same order with the same noise. The network is SD3's: 2x2
patches of 16-channel latents, captions through two CLIPs and a T5.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import UInt8

import lcm_jax
from lcm_jax.configs.sd3_formulations import Formulation
from lcm_jax.diffusion.samplers import SAMPLERS
from lcm_jax.diffusion.time_grids import Grid, pad
from lcm_jax.evaluation.evaluate import ClipMetric, captioned, evaluate
from lcm_jax.evaluation.study import with_bounds
from lcm_jax.objectives import Diffusion, TextEncoders
from lcm_jax.train.config import TrainConfig
from lcm_jax.train.loop import LoopConfig
from lcm_jax.train.optimizer import OptimizerConfig
from lcm_jax.train.tasks.common import DataConfig
from lcm_jax.train.tasks.diffusion import DiffusionTask
from lcm_jax.typing import Array, Cond, Image, Params
from mmdit import MMDiTConfig

PUBLISHED = "stabilityai/stable-diffusion-3-medium-diffusers"


def network(kind: type[MMDiTConfig], depth: int, heads: int, **fields: Any) -> MMDiTConfig:
    """Return a network for the latents and text encoders of "openmoji-sd3"; each of its heads has 64 channels."""
    defaults = {"sample_size": 8, "joint_attention_dim": 320, "pooled_projection_dim": 256, "pos_embed_max_size": 8}
    shape = {"num_layers": depth, "num_attention_heads": heads, "caption_projection_dim": 64 * heads}
    return kind(**(defaults | shape | {"qk_norm": "rms_norm"} | fields))


def tiny(kind: type[MMDiTConfig], objective: Diffusion) -> TrainConfig:
    """Return the training of the scale "tiny", which takes minutes on two CPU cores."""
    return TrainConfig(
        task=DiffusionTask(text="openmoji-sd3", net=network(kind, 4, 2), objective=objective),
        loop=LoopConfig(
            steps=600, batch_size=32, ema=0.99, ema_warmup=True, log_every=50, save_every=300, preview_every=150
        ),
        optimizer=OptimizerConfig(learning_rate=1e-3, warmup=60, decay="cosine", weight_decay=0.01, b2=0.99),
    )


def gpu(kind: type[MMDiTConfig], objective: Diffusion) -> TrainConfig:
    """Return the training of the scale "gpu": the same pictures, hours on one GPU."""
    return TrainConfig(
        task=DiffusionTask(text="openmoji-sd3", net=network(kind, 12, 8), objective=objective),
        loop=LoopConfig(steps=20_000, batch_size=256, ema=0.999, log_every=100, save_every=1000, preview_every=2000),
        optimizer=OptimizerConfig(learning_rate=3e-4, warmup=500, weight_decay=0.01),
    )


def paper(kind: type[MMDiTConfig], objective: Diffusion) -> TrainConfig:
    """Return the paper's training (appendix B.3); it needs --task.data.name.

    The paper gives no depth for this study, so it is 15, that of its study of captions.
    """
    big = {"sample_size": 32, "joint_attention_dim": 4096, "pooled_projection_dim": 2048, "pos_embed_max_size": 32}
    task = DiffusionTask(
        vae=PUBLISHED,
        text=PUBLISHED,
        data=DataConfig(name="folder:cc12m", size=256),
        prompts=DataConfig(name="folder:coco", split="validation", size=256),
        net=network(kind, 15, 15, qk_norm=None, **big),
        objective=replace(objective, caption_dropout=0.0, encoders=TextEncoders(), encoder_dropout=0.464),
        remat=True,
        dtype="bfloat16",
    )
    return TrainConfig(
        task=task,
        loop=LoopConfig(steps=500_000, batch_size=1024, ema=0.99, ema_every=100, save_every=5000, preview_every=25_000),
        optimizer=OptimizerConfig(learning_rate=1e-4, warmup=1000),
    )


TRAININGS = {"tiny": tiny, "gpu": gpu, "paper": paper}


class Drawer:
    """A function that draws pictures of a trained cell, by Euler's rule on the formulation's grid.

    The unconditional input is what replaced a caption in training: zeros for all encoders, or the empty caption.
    """

    def __init__(self, export: Path, formulation: Formulation) -> None:
        """Load the exported model of a cell."""
        self.pipe, self.formulation = lcm_jax.load(export), formulation

    def __call__(
        self, captions: Sequence[str], *, steps: int, guidance: float, seed: int
    ) -> UInt8[np.ndarray, "n h w 3"]:
        """Return a picture for each caption. guidance: the scale of classifier-free guidance, 1 for none."""
        pipe, schedule = self.pipe, self.formulation.objective.schedule
        times, vae = self.formulation.grid(steps, schedule), pipe.model.vae.config
        sides = [side // vae.downsample_factor for side in pipe.size]
        noise = jax.random.normal(jax.random.key(seed), (len(captions), *sides, vae.latent_channels))
        cond = pipe.encode_prompt(captions)
        drops_encoders = self.formulation.objective.encoders is not None
        null = jax.tree.map(jnp.zeros_like, cond) if drops_encoders else pipe.encode_prompt([""] * len(captions))
        params = (pipe.params["transformer"], pipe.params["vae"])
        x = schedule.sigma(times[0]) * noise
        return np.asarray(self._draw(*params, cond, null, x, pad(times), guidance, guided=guidance != 1.0))

    @cached_property
    def _draw(self) -> Any:
        model, euler = self.pipe.model, SAMPLERS["euler"]

        @partial(jax.jit, static_argnames="guided")
        def draw(
            net: Params, vae: Params, cond: Cond, null: Cond, x: Image, grid: Grid, guidance: Array, *, guided: bool
        ) -> Array:
            key = jax.random.key(0)  # Euler's rule draws no noise
            z = model.latents(net, cond, null, x, grid, guidance, key, sampler=euler, guided=guided)
            return model.decode(vae, z)

        return draw


def score(
    config: TrainConfig, workdir: Path, formulation: Formulation, settings: Sequence[tuple[int, float]]
) -> dict[str, float]:
    """Return `frechet/STEPS/GUIDANCE` and `clip_score/...` for each (steps, guidance), on the validation captions."""
    images, captions = captioned(config.task.resolved.prompts.open())
    clip: ClipMetric = ClipMetric.load("openmoji")
    drawer: Any = Drawer(workdir / "export", replace(formulation, objective=config.task.objective))
    scores: dict[str, float] = {}
    for steps, guidance in settings:
        (row,) = evaluate(drawer, clip, images, captions, steps=[steps], guidance=guidance, seed=config.loop.seed)
        for name in ("frechet", "clip_score"):
            scores |= with_bounds(row, name, f"{name}/{steps}/{guidance:g}")
    return scores
