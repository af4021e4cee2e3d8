"""What training in latent space shares: frozen autoencoder and text encoder, encoded data, previews, export."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lcm_jax.data import LoaderIterator, Source
from lcm_jax.diffusion.samplers import SAMPLERS, time_grid
from lcm_jax.diffusion.time_grids import Spacing, pad
from lcm_jax.models.latent_diffusion import LatentDiffusion
from lcm_jax.parallel.sharding import BatchedMap
from lcm_jax.runtime.image_grid import grid
from lcm_jax.runtime.image_io import Size
from lcm_jax.train.tasks.common import DataConfig, loader
from lcm_jax.train.tasks.conditioner import Conditioner, Learned, at_once
from lcm_jax.typing import Array, Cond, Image, Key, Kind, Params, Schedule
from lcm_jax.weights.diffusers_folder import Component, Folder, save_folder
from lcm_jax.weights.registry import denoiser_of
from lcm_jax.weights.scheduler_config import scheduler_config


@dataclass(frozen=True, kw_only=True)
class LatentTask:
    """Fields of every task that trains a network between these frozen ones."""

    vae: str = "openmoji"  # a bundled name, folder or hub id; its vae is used
    text: str = "openmoji"  # likewise its text encoders and tokenizers
    data: DataConfig = DataConfig()
    prompts: DataConfig = field(default_factory=lambda: DataConfig(split="validation"))  # captions of the previews

    def batches(self, conditioner: Conditioner, sources: Mapping[Size, Source]) -> Callable[[int, int], LoaderIterator]:
        """The training data, encoded, as the loop takes it: a cache for each bucket, whose latents have one shape."""
        mix = self.data.mix(next(iter(sources.values())))
        described = {"data": self.data.name, "split": self.data.split, "size": self.data.size}

        def encoded(size: Size, source: Source) -> Source:
            bucket = {"bucket": size, "buckets": self.data.sizes} if self.data.buckets else {}
            return conditioner.encode_source(source, described | bucket, synthetic=mix is not None)

        return loader(*(encoded(size, source) for size, source in sources.items()), augment=mix)


def draw_latents(key: Key, batch: dict[str, Array]) -> dict[str, Any]:
    """A batch of encoded records to what objectives take: x0 drawn from the posterior, and cond."""
    mean, std = batch["mean"].astype(jnp.float32), batch["std"].astype(jnp.float32)
    x0 = mean + std * jax.random.normal(key, mean.shape)
    rest = {name: leaf.astype(jnp.float32) for name, leaf in batch.items() if name not in ("mean", "std")}
    return {"x0": x0, "cond": rest}


def preview(
    model: LatentDiffusion, conditioner: Conditioner, captions: list[str], *, sampler: str, steps: int, guidance: float
) -> Any:
    """`(net params, vae params, rowwise) -> {title: grid}`: the captions' pictures, the same noise every time.

    A fourth argument are the text encoders' parameters, where they learn.
    """
    n, spec = len(captions), SAMPLERS[sampler]

    def encode(learned: Learned | None = None) -> tuple[Cond, Cond]:
        return conditioner.encode_text(captions, learned=learned), conditioner.empty(n, learned)

    still = encode()
    times = time_grid(spec, model.schedule, steps, spacing=Spacing(timestep_spacing="trailing"))
    vae = conditioner.vae.module.config
    side = vae.sample_size // vae.downsample_factor
    noise = jax.random.normal(jax.random.key(0), (n, side, side, vae.latent_channels))
    most = at_once((vae.sample_size, vae.sample_size))

    @jax.jit
    def run(params: Params, vae_params: Params, rows: tuple[Cond, Cond, Image]) -> Array:
        options: dict[str, Any] = {"sampler": spec, "guided": guidance != 1.0}
        x = model.latents(params, *rows, pad(times), guidance, jax.random.key(1), **options)
        return model.decode(vae_params, x)

    def show(
        params: Params, vae_params: Params, batched_map: BatchedMap, texts: Mapping[str, Params] | None = None
    ) -> dict[str, float | np.ndarray]:
        cond, null = still if texts is None else encode((texts, batched_map))
        pictures = batched_map(partial(run, params, vae_params), (cond, null, noise), most=most)
        return {f"{sampler}, {steps} steps": grid(pictures, 8)}

    return show


def export_folder(
    path: Path, net: Component, conditioner: Conditioner, schedule: Schedule, kind: Kind, *, sampler: str
) -> None:
    """The trained network with all it needs, as a diffusers folder."""
    name, _ = denoiser_of(net.module.config)
    components = {name: net, "vae": conditioner.vae, **conditioner.texts}
    scheduler = scheduler_config(schedule, kind, sampler)
    save_folder(path, Folder(components=components, tokenizers=conditioner.prompts.tokenizers, scheduler=scheduler))
