"""The parts that all trainings in latent space share: config fields, encoded data, previews and export."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lcm_jax.data import Source
from lcm_jax.diffusion.samplers import get_sampler, walk
from lcm_jax.diffusion.time_grids import Spacing, pad
from lcm_jax.models.latent_diffusion import LatentDiffusion
from lcm_jax.parallel.sharding import BatchedMap
from lcm_jax.runtime.image_grid import grid
from lcm_jax.runtime.image_io import Size
from lcm_jax.train.tasks.common import DataConfig, StartBatches, held_out, loader, resolved_config
from lcm_jax.train.tasks.conditioner import Conditioner, Learned, decode_batch
from lcm_jax.typing import Array, Cond, Image, Key, Kind, Params, Schedule
from lcm_jax.weights.diffusers_folder import Component, Folder, save_folder
from lcm_jax.weights.registry import denoiser_of
from lcm_jax.weights.scheduler_config import scheduler_config


@dataclass(frozen=True, kw_only=True)
class LatentTask:
    """The fields of every task that trains a denoiser between a frozen autoencoder and frozen text encoders."""

    vae: str = "openmoji"  # a bundled name, folder or hub id; its vae is used
    text: str = "openmoji"  # a model as for `vae`; its text encoders and tokenizers are used
    data: DataConfig = DataConfig()
    prompts: DataConfig = field(default_factory=held_out)  # captions of the previews; of `data` by default

    @property
    def resolved(self) -> Any:
        """This task, with the data of the previews by name."""
        return replace(self, prompts=resolved_config(self.prompts, self.data))

    def encode(self, conditioner: Conditioner, sources: Mapping[Size, Source]) -> dict[Size, Source]:
        """Return the encoded sources, each of which has a cache of its own.

        sources: (height, width) -> source, since latents of one cache have one shape.
        """
        is_mixed = self.data.mix(next(iter(sources.values()))) is not None
        described = {"data": self.data.name, "split": self.data.split, "size": self.data.size}

        def encoded(size: Size, source: Source) -> Source:
            bucket = {"bucket": size, "buckets": self.data.sizes} if self.data.buckets else {}
            return conditioner.encode_source(source, described | bucket, synthetic=is_mixed)

        return {size: encoded(size, source) for size, source in sources.items()}

    def batches(self, sources: Mapping[Size, Source], encoded: Mapping[Size, Source]) -> StartBatches:
        """Return the loop's function that iterates over batches of encoded sources."""
        return loader(*encoded.values(), augment=self.data.mix(next(iter(sources.values()))))


def draw_latents(key: Key, batch: dict[str, Array]) -> dict[str, Any]:
    """Return an objective's batch {"x0", "cond"} from encoded records: x0 = mean + std eps, drawn from the posterior.

    batch: "mean" and "std" (b, h, w, c), and the conditioning under all other names; the result is float32.
    """
    mean, std = batch["mean"].astype(jnp.float32), batch["std"].astype(jnp.float32)
    x0 = mean + std * jax.random.normal(key, mean.shape)
    cond = {name: leaf.astype(jnp.float32) for name, leaf in batch.items() if name not in ("mean", "std")}
    return {"x0": x0, "cond": cond}


def preview(
    model: LatentDiffusion, conditioner: Conditioner, captions: list[str], *, sampler: str, steps: int, guidance: float
) -> Any:
    """Return a function (params, vae_params, batched_map, texts) -> {title: grid of the captions' pictures}.

    The noise is the same every time. texts: parameters of the text encoders, if these are trained; None: the
    conditioner's own.
    """
    n, spec = len(captions), get_sampler(sampler).configured(Spacing(), model.kind)

    def encode(learned: Learned | None = None) -> tuple[Mapping[str, np.ndarray], Cond]:
        return conditioner.encode_text(captions, learned=learned), conditioner.empty(n, learned)

    frozen_cond = encode()
    spacing = Spacing(timestep_spacing="trailing")
    walked = walk(spec, model.schedule, steps, spacing=spacing)
    vae = conditioner.vae.module.config
    side = vae.sample_size // vae.downsample_factor
    noise_sigma = spec.init_noise_sigma(model.schedule, walked.times, spacing)
    noise = noise_sigma * jax.random.normal(jax.random.key(0), (n, side, side, vae.latent_channels))
    most = decode_batch((vae.sample_size, vae.sample_size))

    @jax.jit
    def run(params: Params, vae_params: Params, inputs: tuple[Cond, Cond, Image]) -> Array:
        options: dict[str, Any] = {"sampler": spec, "guided": guidance != 1.0}
        x = model.latents(params, *inputs, pad(walked), guidance, jax.random.key(1), **options)
        return model.decode(vae_params, x)

    def show(
        params: Params, vae_params: Params, batched_map: BatchedMap, texts: Mapping[str, Params] | None = None
    ) -> dict[str, float | np.ndarray]:
        cond, null = frozen_cond if texts is None else encode((texts, batched_map))
        pictures = batched_map(partial(run, params, vae_params), (cond, null, noise), most=most, title="drawing")
        return {f"{sampler}, {steps} steps": grid(pictures, 8)}

    return show


def export_folder(
    path: Path, net: Component, conditioner: Conditioner, schedule: Schedule, kind: Kind, *, sampler: str
) -> None:
    """Write a diffusers folder of the trained network and the frozen networks around it.

    sampler: the name of the sampler that the folder's scheduler config asks for.
    """
    name, _ = denoiser_of(net.module.config)
    components = {name: net, "vae": conditioner.vae, **conditioner.texts}
    scheduler = scheduler_config(schedule, kind, sampler)
    save_folder(path, Folder(components=components, tokenizers=conditioner.prompts.tokenizers, scheduler=scheduler))
