"""What training in latent space shares: frozen autoencoder and text encoder, encoded data, previews, export."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from lcm_jax.data import Cache, Source, cached
from lcm_jax.data.sources import cache_dir
from lcm_jax.generate import Generator, to_float
from lcm_jax.sampling import SAMPLERS, Spacing, pad, time_grid
from lcm_jax.train.tasks.common import DataConfig, grid
from lcm_jax.typing import Array, Key, Kind, Params, Schedule
from lcm_jax.weights.families import denoiser_of
from lcm_jax.weights.folders import Component, Folder, load_component, save_folder
from lcm_jax.weights.hub import Location, locate
from lcm_jax.weights.scheduler import scheduler_config
from mmdit.text import Encoding, Tokenizer, sd3, stable_diffusion
from vae16 import scale

ENCODE_BATCH = 32
T5_TOKENS = 77  # of a caption in SD3's training, unless the tokenizer has fewer


class Text(NamedTuple):
    """A frozen text encoder with its tokenizer; tokens: of a caption."""

    encoder: Component
    tokenizer: Tokenizer
    tokens: int


@dataclass(frozen=True, kw_only=True)
class Conditioner:
    """The frozen networks around the one that learns, and how captions become its conditioning.

    One text encoder conditions as in Stable Diffusion 1 and 2, two CLIPs and a T5 as in Stable Diffusion 3.
    """

    vae: Component
    texts: tuple[Text, ...]
    digest: str  # of the weights, to name what was encoded with them

    @classmethod
    def load(cls, vae: str, text: str) -> Conditioner:
        """From two models (names or folders): one gives the autoencoder, one the text encoders and tokenizers."""
        vae_at, text_at = locate(vae), locate(text)
        many = (text_at.at("text_encoder_3")).is_dir()
        suffixes = ("", "_2", "_3") if many else ("",)
        texts = tuple(_load_text(text_at, suffix) for suffix in suffixes)
        digest = hashlib.sha256()
        folders = [text_at.at(f"text_encoder{suffix}") for suffix in suffixes]
        for path in (vae_at.at("vae"), *folders):
            for file in sorted(path.glob("*.safetensors")):
                digest.update(file.read_bytes())
        return cls(vae=load_component(vae_at.path, vae_at.place("vae")), texts=texts, digest=digest.hexdigest())

    @property
    def params(self) -> tuple[Params, ...]:
        """Of the text encoders."""
        return tuple(text.encoder.params for text in self.texts)

    @cached_property
    def widths(self) -> dict[str, int]:
        """Channels of each leaf of the conditioning."""
        shapes = jax.eval_shape(self._encode_ids, self.params, self.tokenize([""]))
        return {name: leaf.shape[-1] for name, leaf in shapes.items()}

    def tokenize(self, captions: list[str]) -> tuple[Int[Array, "n l"], ...]:
        """Ids for each text encoder."""
        return tuple(jnp.asarray(text.tokenizer(captions, text.tokens)) for text in self.texts)

    def encode_text(self, captions: list[str]) -> dict[str, Array]:
        """Captions to conditioning: {"context": (n, l, d)}, of three encoders "pooled" (n, p) too."""
        return self._encode_ids(self.params, self.tokenize(captions))

    @cached_property
    def _encode_ids(self) -> Any:
        modules = [text.encoder.module for text in self.texts]

        def encode(params: Sequence[Params], ids: Sequence[Array]) -> dict[str, Array]:
            encodings = [Encoding(*parts) for parts in zip(modules, params, ids, strict=True)]
            if len(encodings) == 1:
                return stable_diffusion(encodings[0])
            t5 = encodings[2]
            return sd3(encodings[:2], t5, width=modules[2].config.d_model, t5_tokens=t5.ids.shape[1])

        return jax.jit(encode)

    def encode_source(self, source: Source, described: dict[str, Any]) -> Cache:
        """Posterior mean and deviation of each picture's latent (scaled) and its caption's conditioning, made once."""
        vae = self.vae.module

        @jax.jit
        def encode(params: Params, images: Array) -> tuple[Array, Array]:
            mean, logvar = vae.apply({"params": params}, to_float(images), method="encode")
            return scale(mean, vae.config), jnp.exp(0.5 * logvar) * vae.config.scaling_factor

        def produce() -> Iterator[dict[str, Any]]:
            for start in range(0, len(source), ENCODE_BATCH):
                records = [source[i] for i in range(start, min(start + ENCODE_BATCH, len(source)))]
                fill = ENCODE_BATCH - len(records)  # one shape, one compilation
                images = np.stack([r["image"] for r in records] + [records[-1]["image"]] * fill)
                captions = [r["caption"] for r in records] + [""] * fill
                mean, std = encode(self.vae.params, images)
                cond = self.encode_text(captions)
                columns = {"mean": mean, "std": std, **cond}
                arrays = {name: np.asarray(column, np.float16) for name, column in columns.items()}
                for i in range(len(records)):
                    yield {name: array[i] for name, array in arrays.items()}

        produced_by = {"kind": "latents", "version": 1, "weights": self.digest, **described}
        return cached(cache_dir() / "latents", produced_by, produce, total=len(source))


def _load_text(location: Location, suffix: str) -> Text:
    encoder = load_component(location.path, location.place(f"text_encoder{suffix}"))
    tokenizer = Tokenizer.load(location.at(f"tokenizer{suffix}"))
    most = getattr(encoder.module.config, "max_position_embeddings", T5_TOKENS)
    return Text(encoder, tokenizer, min(most, tokenizer.max_length))


@dataclass(frozen=True, kw_only=True)
class LatentTask:
    """Fields of every task that trains a network between these frozen ones."""

    vae: str = "openmoji"  # a bundled name, folder or hub id; its vae is used
    text: str = "openmoji"  # likewise its text encoders and tokenizers
    data: DataConfig = DataConfig()
    prompts: DataConfig = field(default_factory=lambda: DataConfig(split="validation"))  # captions of the previews

    def records(self, conditioner: Conditioner) -> Cache:
        """The encoded training data."""
        described = {"data": self.data.name, "split": self.data.split, "size": self.data.size}
        return conditioner.encode_source(self.data.open(), described)


def draw_latents(key: Key, batch: dict[str, Array]) -> dict[str, Any]:
    """A batch of encoded records to what objectives take: x0 drawn from the posterior, and cond."""
    mean, std = batch["mean"].astype(jnp.float32), batch["std"].astype(jnp.float32)
    x0 = mean + std * jax.random.normal(key, mean.shape)
    rest = {name: leaf.astype(jnp.float32) for name, leaf in batch.items() if name not in ("mean", "std")}
    return {"x0": x0, "cond": rest}


def preview(
    generator: Generator, conditioner: Conditioner, captions: list[str], *, sampler: str, steps: int, guidance: float
) -> Any:
    """`(net params, frozen) -> {title: grid}`: the captions' pictures, the same noise every time."""
    n, spec = len(captions), SAMPLERS[sampler]
    cond, null = conditioner.encode_text(captions), conditioner.encode_text([""] * n)
    times = time_grid(spec, generator.schedule, steps, spacing=Spacing(timestep_spacing="trailing"))
    vae = conditioner.vae.module.config
    side = vae.sample_size // vae.downsample_factor
    noise = jax.random.normal(jax.random.key(0), (n, side, side, vae.latent_channels))

    @jax.jit
    def run(params: Params, vae_params: Params) -> Array:
        x = generator.latents(
            params, cond, null, noise, pad(times), guidance, jax.random.key(1), sampler=spec, guided=guidance != 1.0
        )
        return generator.decode(vae_params, x)

    def show(params: Params, vae_params: Params) -> dict[str, float | np.ndarray]:
        return {f"{sampler}, {steps} steps": grid(np.asarray(run(params, vae_params)), 8)}

    return show


def export_folder(
    path: Path, net: Component, conditioner: Conditioner, schedule: Schedule, kind: Kind, *, sampler: str
) -> None:
    """The trained network with all it needs, as a diffusers folder."""
    name, _ = denoiser_of(net.module.config)
    components = {name: net, "vae": conditioner.vae}
    tokenizers: dict[str, Any] = {}
    for suffix, text in zip(("", "_2", "_3"), conditioner.texts, strict=False):
        components[f"text_encoder{suffix}"], tokenizers[f"tokenizer{suffix}"] = text.encoder, text.tokenizer
    scheduler = scheduler_config(schedule, kind, sampler)
    save_folder(path, Folder(components=components, scheduler=scheduler, **tokenizers))
