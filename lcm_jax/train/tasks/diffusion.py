"""Training of a latent diffusion model, such as the teacher of a distillation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lcm_jax.data import Source
from lcm_jax.data.mixing import SYNTHETIC
from lcm_jax.diffusion.schedules import DDPM
from lcm_jax.models.image_inputs import check_size
from lcm_jax.models.latent_diffusion import LatentDiffusion, as_apply
from lcm_jax.nets import UNetConfig
from lcm_jax.objectives import Diffusion, validation_losses
from lcm_jax.parallel.sharding import BatchedMap
from lcm_jax.runtime.image_io import Size
from lcm_jax.train.task import Task
from lcm_jax.train.tasks.abstract_step import abstract_task, frozen_and_batch_shapes
from lcm_jax.train.tasks.common import (
    HELD_OUT,
    Dtype,
    Subset,
    captions,
    check_dtype,
    check_preview_steps,
    held_out_config,
    share,
)
from lcm_jax.train.tasks.conditioner import Conditioner
from lcm_jax.train.tasks.latent import LatentTask, draw_latents, export_folder, preview
from lcm_jax.train.train_step import Loss, Metrics, Progress
from lcm_jax.typing import Array, Key, Nets, Params
from lcm_jax.weights.diffusers_folder import Component
from lcm_jax.weights.registry import denoiser_of
from mmdit import MMDiTConfig
from mmdit.attention import Implementation
from mmdit.blocks import Remat

Denoiser = UNetConfig | MMDiTConfig


@dataclass(frozen=True, kw_only=True)
class DiffusionTask(LatentTask):
    """A UNet or an MMDiT trained to remove noise, with caption dropout for classifier-free guidance.

    A preview shows pictures for the first captions of `prompts`, and the `validation_loss`: the mean over the first
    HELD_OUT pictures of `prompts` at eight evenly spaced times. By default they are the split "validation" of `data`;
    of data without one a share is held out of the training (of buckets, from the one with the most pictures).
    """

    net: Denoiser = UNetConfig()
    objective: Diffusion = Diffusion(schedule=DDPM())
    preview_steps: int = 25  # sampling steps of a preview
    preview_guidance: float = 3.0
    scan: bool = False  # compile blocks of one shape once, as a scan; see the network
    remat: Remat = False  # what the backward pass recomputes: nothing, all of a block, or what a policy does not keep
    dtype: Dtype = "float32"  # of the computation; parameters, norms and losses are float32

    def __post_init__(self) -> None:
        check_dtype("task.dtype", self.dtype)
        check_preview_steps(self.preview_steps)

    def build(self) -> Task:
        """Return the task; raise ValueError, before any picture is encoded, if network, models and data do not fit."""
        conditioner = Conditioner.load(self.vae, self.text)
        check_fit(self.net, conditioner, self.data.sizes)
        sources, apart = self.data.open_buckets(), held_out_config(self.prompts, self.data)
        net = self._net()
        if apart is None:
            largest = max(sources, key=lambda size: len(sources[size]))
            rest, held = share(sources[largest], self.data.name)
            encoded = self.encode(conditioner, sources)
            texts = [*captions(held, 16), *captions(rest, 16)][:16]
            held_out: Source = Subset(encoded[largest], held.indices)
            encoded[largest] = Subset(encoded[largest], rest.indices)
        else:
            prompts = apart.open(encoded=True)
            encoded = self.encode(conditioner, sources)
            texts = captions(prompts, 16)
            described = {"data": apart.name, "split": apart.split, "size": apart.size}
            held_out = conditioner.encode_source(prompts, described, first=HELD_OUT)

        sampler = self.objective.schedule.usual_sampler
        model = LatentDiffusion(
            net=net, vae=conditioner.vae.module, schedule=self.objective.schedule, kind=self.objective.kind
        )
        show = preview(
            model,
            conditioner,
            texts,
            sampler=sampler,
            steps=self.preview_steps,
            guidance=self.preview_guidance,
        )
        names = [name for name in held_out[0] if not name.startswith(SYNTHETIC)]
        records = {name: np.stack([held_out[i][name] for i in range(len(held_out))]) for name in names}

        conditioner.release()

        @jax.jit
        def held_out_losses(params: Params, inputs: tuple[Array, dict[str, Array]]) -> Array:
            numbers, batch = inputs
            draw, noise = (jax.vmap(partial(jax.random.fold_in, jax.random.key(i)))(numbers) for i in (0, 1))
            latents = jax.vmap(draw_latents)(draw, batch)
            return validation_losses(self.objective, Nets(as_apply(net), params), latents, noise)

        def full_preview(ema: Params, frozen: Params, batched_map: BatchedMap) -> dict[str, float | np.ndarray]:
            rows = (np.arange(len(held_out)), records)
            losses = batched_map(partial(held_out_losses, ema), rows, title="validating")
            return {"validation_loss": float(losses.mean()), **show(ema, frozen["vae"], batched_map)}

        def export(ema: Params, path: Path) -> None:
            component = Component(net, jax.device_get(ema))
            export_folder(path, component, conditioner, self.objective.schedule, self.objective.kind, sampler=sampler)

        return Task(
            init=initial(net),
            loss=self._loss(net),
            frozen={"null": conditioner.null, "vae": conditioner.vae.params},
            batches=self.batches(sources, encoded),
            preview=full_preview,
            export=export,
            captions=texts,
        )

    def abstract(self) -> Task:
        """Return the task in shapes alone: no weights or data are read, and only its step can be compiled."""
        net = self._net()
        frozen, batch = frozen_and_batch_shapes(self.net, self.vae, self.text, self.data.sizes[0])
        return abstract_task(initial(net), self._loss(net), frozen, batch)

    def _net(self) -> Any:
        return build_net(self.net, dtype=self.dtype, remat=self.remat, scan=self.scan)

    def _loss(self, net: Any) -> Loss:
        def loss(
            params: Params, ema: Params, frozen: Params, batch: dict[str, Array], key: Key, progress: Progress
        ) -> tuple[Array, Metrics]:
            draw, rest = jax.random.split(key)
            return self.objective(Nets(as_apply(net), params, null=frozen["null"]), draw_latents(draw, batch), rest)

        return loss


def check_fit(net: Denoiser, conditioner: Conditioner, sizes: Sequence[Size]) -> None:
    """Raise ValueError unless the network fits the autoencoder's channels, the text encoders' widths and the sizes.

    sizes: (height, width) of the pictures in pixels.
    """
    channels, cond = conditioner.vae.module.config.latent_channels, conditioner.widths
    if net.in_channels != channels:
        raise ValueError(f"task.net.in_channels is {net.in_channels}, but the VAE has {channels} latent channels")
    if isinstance(net, UNetConfig):
        keys = {"cross_attention_dim": (net.level("cross_attention_dim", 0), cond["context"])}
    else:
        keys = {
            "joint_attention_dim": (net.joint_attention_dim, cond["context"]),
            "pooled_projection_dim": (net.pooled_projection_dim, cond.get("pooled", 0)),
        }
    for key, (value, width) in keys.items():
        if value != width:
            raise ValueError(f"task.net.{key} is {value}, but the text encoders' width is {width}")
    factor = conditioner.vae.module.config.downsample_factor * getattr(net, "patch_size", 1)
    for size in sizes:
        try:
            check_size(size, factor, getattr(net, "pos_embed_max_size", None))
        except ValueError as error:
            raise ValueError(f"task.data.size (and the aspect and multiple of its buckets): {error}") from None


def initial(net: Any) -> Callable[[Key], Params]:
    """Return a function key -> random parameters of a denoiser."""
    family = denoiser_of(net.config)[1]
    return lambda key: net.init(key, *family.example(net.config))["params"]


def build_net(
    config: Denoiser, *, dtype: str, remat: Remat, scan: bool = False, attention: Implementation | None = None
) -> Any:
    """Return the module of a denoiser's config.

    dtype: of the computation. attention: the kernel; None chooses by platform and precision.
    """
    options = {"dtype": jnp.dtype(dtype), "remat": remat, "scan": scan, "attention": attention}
    return denoiser_of(config)[1].build(config, **options)
