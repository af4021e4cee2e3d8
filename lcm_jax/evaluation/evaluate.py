"""Scores of a pipeline on captioned pictures: Frechet distance, CLIP score, precision, recall, seconds per image."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, UInt8
from tqdm import tqdm

from lcm_jax.inference.pipeline import Pipeline
from lcm_jax.metrics import (
    FeatureExtractor,
    Moments,
    NetworkFeatures,
    clip_score,
    frechet_distance,
    psnr,
    report,
    ssim,
)
from lcm_jax.models.latent_diffusion import to_float, to_uint8
from lcm_jax.parallel.sharding import BatchedMap, batch_sharding, make_mesh, parts_of, put_on_mesh, replicated
from lcm_jax.precision.context import precision_context
from lcm_jax.typing import Array, Params
from lcm_jax.weights.diffusers_folder import Component
from lcm_jax.weights.hub import locate
from mmdit.text import Tokenizer, normalize_images

Pictures = UInt8[np.ndarray, "n h w 3"]


@dataclass(frozen=True, kw_only=True, eq=False)
class ClipMetric:
    """Both towers of a CLIP: the image tower's pooled state is the Frechet distance's feature."""

    text: Component
    tokenizer: Tokenizer
    images: NetworkFeatures  # (n, d + p): pooled state and embedding side by side
    width: int  # d

    @classmethod
    def load(cls, name: str | Path = "openmoji") -> ClipMetric:
        """From a model folder with image_encoder, text_encoder (with projection) and tokenizer."""
        at = locate(name)
        vision, text = (at.load(part) for part in ("image_encoder", "text_encoder"))
        side = vision.module.config.image_size

        def apply(params: Params, images: Float[Array, "b h w 3"]) -> Float[Array, "b f"]:
            if images.shape[1:3] != (side, side):
                images = jax.image.resize(images, (len(images), side, side, 3), "bicubic", antialias=True)
            out = vision.module.apply({"params": params}, normalize_images(images))
            return jnp.concatenate([out.pooled, out.image_embeds], axis=-1)

        features = NetworkFeatures(apply=apply, params=vision.params)
        tokenizer = Tokenizer.load(at.at("tokenizer"))
        return cls(text=text, tokenizer=tokenizer, images=features, width=vision.module.config.hidden_size)

    def shard(self, mesh: Mesh) -> ClipMetric:
        """The same, looking at pictures on all devices of a mesh."""
        return replace(self, images=shard(self.images, mesh))

    def features(self, images: Pictures) -> Float[np.ndarray, "n d"]:
        return self.images(images)[:, : self.width]

    def embed_texts(self, texts: Sequence[str]) -> Float[np.ndarray, "n p"]:
        length = self.text.module.config.max_position_embeddings
        ids = jnp.asarray(self.tokenizer(list(texts), length))
        return np.asarray(self._embed_ids(self.text.params, ids))

    @cached_property
    def _embed_ids(self) -> Any:
        module = self.text.module
        return jax.jit(lambda params, ids: module.apply({"params": params}, ids).text_embeds)

    def score(
        self,
        real: Float[np.ndarray, "n d"],
        images: Pictures,
        texts: Sequence[str],
        features: FeatureExtractor | None = None,
    ) -> dict[str, float]:
        """Scores of pictures and their texts against real features; `features` stands in for the CLIP's own."""
        both = self.images(images)
        fake = both[:, : self.width] if features is None else features(images)
        return report(real, fake, both[:, self.width :], self.embed_texts(texts))


def shard(features: NetworkFeatures, mesh: Mesh) -> NetworkFeatures:
    """The same features of pictures that are cut over a mesh; its parameters are on every device."""

    def apply(params: Params, images: Float[Array, "b h w 3"]) -> Float[Array, "b ..."]:
        seen = features.apply(params, jax.lax.with_sharding_constraint(images, batch_sharding(mesh)))
        return jax.lax.with_sharding_constraint(seen, replicated(mesh))

    everywhere = jax.tree.map(lambda _: replicated(mesh), features.params)
    size = features.batch_size + -features.batch_size % parts_of(mesh)
    return replace(features, apply=apply, params=put_on_mesh(features.params, everywhere), batch_size=size)


def captioned(source: Any, most: int | None = None) -> tuple[Pictures, list[str]]:
    """The first pictures of a source (lcm_jax.data.Source), or all, with their captions."""
    records = [source[i] for i in range(min(len(source), most or len(source)))]
    return np.stack([record["image"] for record in records]), [record["caption"] for record in records]


def generate(
    pipe: Pipeline, prompts: Sequence[str], *, batch_size: int = 32, seed: int = 0, title: str = "", **options: Any
) -> tuple[Pictures, float]:
    """A picture for each prompt, and the seconds per picture without compilation (the first batch is drawn twice).

    Batch i has seed + i; the last one is filled up with empty prompts, so that one program serves all.
    """
    parts: list[np.ndarray] = []
    seconds = 0.0
    batches = [list(prompts[i : i + batch_size]) for i in range(0, len(prompts), batch_size)]
    for i, batch in enumerate(tqdm(batches, title, unit="batch", leave=False, disable=None)):
        filled = batch + [""] * (batch_size - len(batch))
        if i == 0:
            pipe(filled, seed=seed, **options)
        start = time.perf_counter()
        parts.append(pipe(filled, seed=seed + i, **options)[: len(batch)])
        seconds += time.perf_counter() - start
    return np.concatenate(parts), seconds / (len(batches) * batch_size)


def evaluate(
    pipe: Pipeline,
    clip: ClipMetric,
    images: Pictures,
    captions: Sequence[str],
    *,
    steps: Sequence[int] = (1, 2, 4, 8),
    features: FeatureExtractor | None = None,
    **options: Any,
) -> list[dict[str, float]]:
    """One row of scores for each number of steps, on the captions of the real `images`."""
    real = clip.features(images) if features is None else features(images)
    rows = []
    for n in steps:
        made, seconds = generate(pipe, captions, steps=n, title=f"{n} steps", **options)
        rows.append({"steps": n, **clip.score(real, made, captions, features), "seconds_per_image": seconds})
    return rows


def reconstruct(vae: Component, images: Pictures, *, batch_size: int = 32, mesh: Mesh | None = None) -> Pictures:
    """Pictures through an autoencoder: the latent's mean, decoded. mesh: on which its parameters lie."""

    @jax.jit
    def run(params: Params, batch: Array) -> Array:
        with precision_context(params) as own:
            mean, _ = vae.module.apply({"params": own}, to_float(batch), method="encode")
            return to_uint8(vae.module.apply({"params": own}, mean, method="decode"))

    mesh = make_mesh(devices=jax.devices()[:1]) if mesh is None else mesh
    made: Pictures = BatchedMap(mesh=mesh, most=-(-batch_size // parts_of(mesh)))(partial(run, vae.params), images)
    return made


def reconstruction(images: Pictures, again: Pictures, clip: ClipMetric | None = None) -> dict[str, float]:
    """Mean PSNR (dB) and SSIM of reconstructed pictures. With a CLIP also `frechet`, on its image tower's features, and
    `clip_distance`, the mean of 1 - cos between the embeddings of a picture and of its reconstruction.
    """
    pair = jnp.asarray(images), jnp.asarray(again)
    scores = {name: float(np.mean(f(*pair, data_range=255.0))) for name, f in (("psnr", psnr), ("ssim", ssim))}
    if clip is not None:
        real, fake = clip.images(images), clip.images(again)
        scores |= {
            "frechet": frechet_distance(Moments.of(real[:, : clip.width]), Moments.of(fake[:, : clip.width])),
            "clip_distance": 1.0 - clip_score(real[:, clip.width :], fake[:, clip.width :], weight=1.0),
        }
    return scores
