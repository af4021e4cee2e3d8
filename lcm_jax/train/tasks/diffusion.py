"""Training a latent diffusion model: the teacher."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp

from lcm_jax.generate import Generator, as_apply
from lcm_jax.nets import UNet, UNetConfig, example_inputs
from lcm_jax.objectives import Diffusion
from lcm_jax.schedules import DDPM
from lcm_jax.train.loop import Task
from lcm_jax.train.step import Metrics
from lcm_jax.train.tasks.common import captions, loader
from lcm_jax.train.tasks.latent import Conditioner, LatentTask, draw_latents, export_folder, preview
from lcm_jax.typing import Array, Key, Nets, Params
from lcm_jax.weights.folders import Component


@dataclass(frozen=True, kw_only=True)
class DiffusionTask(LatentTask):
    """A UNet trained to undo noise, with caption dropout for guidance. Starts at random, or from `start`'s UNet."""

    net: UNetConfig = UNetConfig()
    objective: Diffusion = Diffusion(schedule=DDPM())
    preview_steps: int = 25
    preview_guidance: float = 3.0
    remat: bool = False
    dtype: str = "float32"  # of the computation; parameters, norms and losses are float32

    def build(self) -> Task:
        conditioner = Conditioner.load(self.vae, self.text)
        check_fit(self.net, conditioner)
        records = self.records(conditioner)
        net = UNet(self.net, dtype=jnp.dtype(self.dtype), remat=self.remat)
        null = conditioner.encode_text([""])

        def init(key: Key) -> Params:
            return net.init(key, *example_inputs(self.net))["params"]

        def loss(
            params: Params, ema: Params, frozen: Params, batch: dict[str, Array], key: Key, step: Array
        ) -> tuple[Array, Metrics]:
            draw, rest = jax.random.split(key)
            return self.objective(Nets(as_apply(net), params, null=frozen["null"]), draw_latents(draw, batch), rest)

        generator = Generator(
            net=net, vae=conditioner.vae.module, schedule=self.objective.schedule, kind=self.objective.kind
        )
        show = preview(
            generator,
            conditioner,
            captions(self.prompts.open(), 16),
            sampler="ddim",
            steps=self.preview_steps,
            guidance=self.preview_guidance,
        )

        def export(ema: Params, path: Path) -> None:
            component = Component(net, jax.device_get(ema))
            export_folder(path, component, conditioner, self.objective.schedule, self.objective.kind, sampler="ddim")

        return Task(
            init=init,
            loss=loss,
            frozen={"null": null, "vae": conditioner.vae.params},
            batches=loader(records),
            preview=lambda ema, frozen: show(ema, frozen["vae"]),
            export=export,
        )


def check_fit(net: UNetConfig, conditioner: Conditioner) -> None:
    """The UNet's channels and context width must be those of the networks around it."""
    channels, width = conditioner.vae.module.config.latent_channels, conditioner.text.module.config.hidden_size
    if net.in_channels != channels:
        raise ValueError(f"task.net.in_channels is {net.in_channels}, but the VAE has {channels} latent channels")
    if net.level("cross_attention_dim", 0) != width:
        raise ValueError(
            f"task.net.cross_attention_dim is {net.cross_attention_dim}, but the text encoder's width is {width}"
        )
