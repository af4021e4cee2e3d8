"""Training the autoencoder: L1 + perceptual + KL + hinge PatchGAN (see vae16.losses)."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lcm_jax.generate import to_float, to_uint8
from lcm_jax.metrics import psnr
from lcm_jax.train.loop import Task
from lcm_jax.train.sharding import Rowwise
from lcm_jax.train.step import Metrics
from lcm_jax.train.tasks.common import DataConfig, grid, loader
from lcm_jax.typing import Array, Key, Params
from lcm_jax.weights.folders import Component, save_component
from lcm_jax.weights.perceptual import load_lpips
from vae16 import (
    LPIPS,
    AutoencoderConfig,
    AutoencoderKL,
    DiscriminatorConfig,
    LossConfig,
    PatchDiscriminator,
    autoencoder_loss,
)


@dataclass(frozen=True, kw_only=True)
class AutoencoderTask:
    """An autoencoder on pictures alone. The exported scaling_factor is measured, so that latents have unit variance."""

    model: AutoencoderConfig = AutoencoderConfig()
    data: DataConfig = DataConfig()
    loss: LossConfig = LossConfig(perceptual_weight=0.0)
    lpips: str | None = None  # a .safetensors file of LPIPS weights, where loss.perceptual_weight is not zero
    discriminator: DiscriminatorConfig = DiscriminatorConfig()
    validation: DataConfig = field(default_factory=lambda: DataConfig(split="validation"))

    def build(self) -> Task:
        factor = self.model.downsample_factor
        if self.data.size % factor:
            raise ValueError(f"task.data.size is {self.data.size}; it must be a multiple of the VAE's factor {factor}")
        if (self.lpips is None) != (self.loss.perceptual_weight == 0.0):
            raise ValueError(
                f"task.loss.perceptual_weight is {self.loss.perceptual_weight} and task.lpips is {self.lpips}: "
                "the perceptual term needs both a weight and a file of LPIPS weights"
            )
        lpips: Any = LPIPS()
        frozen = {} if self.lpips is None else {"lpips": load_lpips(self.lpips, lpips)}
        vae, source, held_out = AutoencoderKL(self.model), self.data.open(), self.validation.open()
        critic = PatchDiscriminator(self.discriminator) if self.loss.gan_weight else None
        size = self.data.size

        def init(key: Key) -> Params:
            image = jnp.zeros((1, size, size, 3))
            params = {"vae": vae.init(key, image)["params"]}
            if critic is not None:
                params["discriminator"] = critic.init(jax.random.fold_in(key, 1), image)["params"]
            return params

        def loss(
            params: Params, ema: Params, frozen: Params, batch: dict[str, Array], key: Key, step: Array
        ) -> tuple[Array, Metrics]:
            distance = partial(lpips.apply, {"params": frozen["lpips"]}) if "lpips" in frozen else None
            return autoencoder_loss(vae, critic, distance, params, to_float(batch["image"]), key, step, self.loss)

        @jax.jit
        def reconstruct(params: Params, pictures: Array) -> Array:
            made: Any = vae.apply({"params": params["vae"]}, to_float(pictures))
            return to_uint8(made)

        shown = np.stack([held_out[i]["image"] for i in range(min(16, len(held_out)))])

        def preview(ema: Params, frozen: Params, rowwise: Rowwise) -> dict[str, float | np.ndarray]:
            made = rowwise(partial(reconstruct, ema), shown)
            quality = float(jnp.mean(psnr(jnp.asarray(shown), jnp.asarray(made), data_range=255.0)))
            return {"validation": grid(np.concatenate([shown, made]), 8), "validation_psnr": quality}

        def export(ema: Params, folder: Path) -> None:
            encode = jax.jit(lambda params, x: vae.apply({"params": params["vae"]}, x, method="encode"))
            pictures = np.stack([source[i]["image"] for i in range(min(512, len(source)))])
            means = np.concatenate(
                [encode(ema, to_float(pictures[i : i + 64]))[0] for i in range(0, len(pictures), 64)]
            )
            config = replace(
                self.model, shift_factor=float(means.mean()), scaling_factor=float(1.0 / means.std()), sample_size=size
            )
            save_component(folder, "vae", Component(AutoencoderKL(config), jax.device_get(ema["vae"])))

        return Task(
            init=init,
            loss=loss,
            frozen=frozen,
            batches=loader(source, transform=lambda record: {"image": record["image"]}),
            preview=preview,
            export=export,
            separable=critic is None,  # the critic is weighed by gradients of the whole batch
        )
