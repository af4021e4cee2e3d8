"""Training of autoencoders (see vae16.losses): one that learns its latents, and a tiny one for another's latents."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lcm_jax.data import Source
from lcm_jax.metrics import psnr
from lcm_jax.models.latent_diffusion import to_float, to_uint8
from lcm_jax.parallel.sharding import BatchedMap, param_sharding
from lcm_jax.runtime.image_grid import grid
from lcm_jax.train.optimizer import MakeOptimizer, partitioned
from lcm_jax.train.task import Task
from lcm_jax.train.tasks.common import DataConfig, held_out, loader, open_with_held_out, resolved_config
from lcm_jax.train.tasks.conditioner import decode_batch, local_mesh
from lcm_jax.train.train_step import Metrics, Progress
from lcm_jax.typing import Array, Key, Params
from lcm_jax.weights.diffusers_folder import Component, save_component
from lcm_jax.weights.hub import locate
from lcm_jax.weights.lpips import load_lpips
from vae16 import (
    LPIPS,
    AutoencoderConfig,
    AutoencoderKL,
    AutoencoderTiny,
    DiscriminatorConfig,
    LossConfig,
    PatchDiscriminator,
    PictureLossConfig,
    TinyConfig,
    autoencoder_loss,
    tiny_loss,
)

Vae = AutoencoderKL | AutoencoderTiny
# (critic, perceptual distance, params, frozen, pictures in [-1, 1], key, step) -> (loss, metrics)
PictureLoss = Callable[..., tuple[Array, Metrics]]
Export = Callable[
    [Params, Path, Source], None
]  # (average of the parameters, folder, training pictures): writes the result


@dataclass(frozen=True, kw_only=True)
class PictureTask:
    """The base of the autoencoder tasks: pictures alone, an optional discriminator and an optional perceptual term."""

    data: DataConfig = DataConfig()
    loss: PictureLossConfig = PictureLossConfig(perceptual_weight=0.0)
    lpips: str | None = None  # a .safetensors file of LPIPS weights, needed if loss.perceptual_weight is not zero
    discriminator: DiscriminatorConfig = DiscriminatorConfig()
    validation: DataConfig = field(default_factory=held_out)

    @property
    def resolved(self) -> Any:
        """This task, with the data that it validates on by name."""
        return replace(self, validation=resolved_config(self.validation, self.data))

    def task(self, vae: Vae, loss: PictureLoss, frozen: Params, export: Export) -> Task:
        """Return the task that trains `vae`.

        Raises ValueError if the pictures' size does not fit the autoencoder, or if only one is given of the perceptual
        weight and the LPIPS file.
        """
        factor = vae.config.downsample_factor
        if self.data.size % factor:
            raise ValueError(f"task.data.size is {self.data.size}; it must be a multiple of the VAE's factor {factor}")
        if (self.lpips is None) != (self.loss.perceptual_weight == 0.0):
            raise ValueError(
                f"task.loss.perceptual_weight is {self.loss.perceptual_weight} and task.lpips is {self.lpips}: "
                "the perceptual term needs both a weight and a file of LPIPS weights"
            )
        lpips: Any = LPIPS()
        if self.lpips is not None:
            frozen = {**frozen, "lpips": load_lpips(self.lpips, lpips)}
        source, validation = open_with_held_out(self.data, self.validation)
        critic = PatchDiscriminator(self.discriminator) if self.loss.gan_weight else None
        size = self.data.size

        def init(key: Key) -> Params:
            image = jnp.zeros((1, size, size, 3))
            params = {"vae": vae.init(key, image)["params"]}
            if critic is not None:
                params["discriminator"] = critic.init(jax.random.fold_in(key, 1), image)["params"]
            return params

        def batch_loss(
            params: Params, ema: Params, frozen: Params, batch: dict[str, Array], key: Key, progress: Progress
        ) -> tuple[Array, Metrics]:
            distance = partial(lpips.apply, {"params": frozen["lpips"]}) if "lpips" in frozen else None
            return loss(critic, distance, params, frozen, to_float(batch["image"]), key, progress.step)

        @jax.jit
        def reconstruct(params: Params, pictures: Array) -> Array:
            reconstruction: Any = vae.apply({"params": params["vae"]}, to_float(pictures))
            return to_uint8(reconstruction)

        pictures = np.stack([validation[i]["image"] for i in range(min(16, len(validation)))])

        def preview(ema: Params, frozen: Params, batched_map: BatchedMap) -> dict[str, float | np.ndarray]:
            decoded = batched_map(partial(reconstruct, ema), pictures)
            quality = float(jnp.mean(psnr(jnp.asarray(pictures), jnp.asarray(decoded), data_range=255.0)))
            return {"validation": grid(np.concatenate([pictures, decoded]), 8), "validation_psnr": quality}

        def optimizer(make: MakeOptimizer) -> optax.GradientTransformation:
            return make() if critic is None else partitioned(make, ("vae", "discriminator"))

        return Task(
            init=init,
            loss=batch_loss,
            frozen=frozen,
            batches=loader(source, transform=lambda record: {"image": record["image"]}),
            preview=preview,
            export=lambda ema, folder: export(ema, folder, source),
            optimizer=optimizer,
            separable=critic is None,  # the discriminator's weight depends on gradients of the full batch
        )


@dataclass(frozen=True, kw_only=True)
class AutoencoderTask(PictureTask):
    """An autoencoder on pictures alone. The exported scaling_factor is measured, so that latents have unit variance."""

    model: AutoencoderConfig = AutoencoderConfig()
    loss: LossConfig = LossConfig(perceptual_weight=0.0)

    def build(self) -> Task:
        """Return the task; its errors are those of `PictureTask.task`."""
        vae = AutoencoderKL(self.model)

        def loss(
            critic: Any, distance: Any, params: Params, frozen: Params, x: Array, key: Key, step: Array
        ) -> tuple[Array, Metrics]:
            return autoencoder_loss(vae, critic, distance, params, x, key, step, self.loss)

        def export(ema: Params, folder: Path, source: Source) -> None:
            encode = jax.jit(lambda params, x: vae.apply({"params": params["vae"]}, x, method="encode"))
            size = self.data.size
            pictures = np.stack([source[i]["image"] for i in range(min(512, len(source)))])
            chunk = decode_batch((size, size))
            means = np.concatenate(
                [encode(ema, to_float(pictures[i : i + chunk]))[0] for i in range(0, len(pictures), chunk)]
            )
            config = replace(
                self.model, shift_factor=float(means.mean()), scaling_factor=float(1.0 / means.std()), sample_size=size
            )
            save_component(folder, "vae", Component(AutoencoderKL(config), jax.device_get(ema["vae"])))

        return self.task(vae, loss, {}, export)


@dataclass(frozen=True, kw_only=True)
class TinyAutoencoderTask(PictureTask):
    """A tiny autoencoder (TAESD) for the latents of `vae`, given as `tiny_vae` to any model with these latents."""

    model: TinyConfig = TinyConfig()
    vae: str = "openmoji"  # a bundled name, folder or hub id; its vae is used

    def build(self) -> Task:
        """Return the task; raise ValueError if the tiny autoencoder's latents have another shape than `vae`'s."""
        location = locate(self.vae)
        teacher = location.load("vae", shardings=param_sharding(local_mesh()))
        for name in ("latent_channels", "downsample_factor"):
            value, expected = getattr(self.model, name), getattr(teacher.module.config, name)
            if value != expected:
                raise ValueError(f"task.model has {name} {value}, that of {self.vae} {expected}: make them equal")
        tiny = AutoencoderTiny(self.model)

        def loss(
            critic: Any, distance: Any, params: Params, frozen: Params, x: Array, key: Key, step: Array
        ) -> tuple[Array, Metrics]:
            networks = critic, distance, params, frozen["teacher"]
            return tiny_loss(tiny, teacher.module, *networks, x, key, step, self.loss)

        def export(ema: Params, folder: Path, source: Source) -> None:
            save_component(folder, "", Component(tiny, jax.device_get(ema["vae"])))

        return self.task(tiny, loss, {"teacher": teacher.params}, export)
