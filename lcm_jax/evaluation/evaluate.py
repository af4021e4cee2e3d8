"""Scores of a pipeline on captioned pictures: Frechet distance, CLIP score, precision, recall, seconds per image."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, UInt8

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
from lcm_jax.parallel.sharding import BatchedMap, batch_parts, batch_sharding, make_mesh, put_on_mesh, replicated
from lcm_jax.precision.context import precision_context
from lcm_jax.runtime.progress import progress
from lcm_jax.typing import Array, Params
from lcm_jax.weights.diffusers_folder import Component
from lcm_jax.weights.hub import locate
from mmdit.text import Tokenizer, normalize_images

Pictures = UInt8[np.ndarray, "n h w 3"]


@dataclass(frozen=True, kw_only=True, eq=False)
class ClipMetric:
    """Both towers of a CLIP model, as Frechet distance and CLIP score use them.

    The feature of the Frechet distance is the image tower's pooled state (d numbers); the CLIP score compares the
    embeddings of picture and text (p numbers).
    """

    text: Component
    tokenizer: Tokenizer
    images: NetworkFeatures  # (n, d + p): pooled state and embedding side by side
    width: int  # d

    @classmethod
    def load(cls, name: str | Path = "openmoji") -> ClipMetric:
        """Load both towers of a model: a folder with image_encoder, text_encoder (with projection) and tokenizer.

        name: a bundled name, a folder or a hub id.
        """
        location = locate(name)
        vision, text = (location.load(part) for part in ("image_encoder", "text_encoder"))
        side = vision.module.config.image_size

        def apply(params: Params, images: Float[Array, "b h w 3"]) -> Float[Array, "b f"]:
            if images.shape[1:3] != (side, side):
                images = jax.image.resize(images, (len(images), side, side, 3), "bicubic", antialias=True)
            out = vision.module.apply({"params": params}, normalize_images(images))
            return jnp.concatenate([out.pooled, out.image_embeds], axis=-1)

        features = NetworkFeatures(apply=apply, params=vision.params)
        tokenizer = Tokenizer.load(location.at("tokenizer"))
        return cls(text=text, tokenizer=tokenizer, images=features, width=vision.module.config.hidden_size)

    def shard(self, mesh: Mesh) -> ClipMetric:
        """Return the same metric with the image tower split over a mesh: each device takes a part of the pictures."""
        return replace(self, images=shard(self.images, mesh))

    def features(self, images: Pictures) -> Float[np.ndarray, "n d"]:
        """Return the image tower's pooled state of each picture."""
        return self.images(images)[:, : self.width]

    def embed_texts(self, texts: Sequence[str]) -> Float[np.ndarray, "n p"]:
        """Return the text tower's embedding of each text."""
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
        """Return the scores of `lcm_jax.metrics.report` for pictures and their texts, against the features `real`.

        features: an extractor for the Frechet distance in place of the CLIP's image tower; `real` has to come from it.
        """
        outputs = self.images(images)
        fake = outputs[:, : self.width] if features is None else features(images)
        return report(real, fake, outputs[:, self.width :], self.embed_texts(texts))


def shard(features: NetworkFeatures, mesh: Mesh) -> NetworkFeatures:
    """Return the same extractor for a mesh: each batch is split over the devices, the parameters are on all of them."""

    def apply(params: Params, images: Float[Array, "b h w 3"]) -> Float[Array, "b ..."]:
        extracted = features.apply(params, jax.lax.with_sharding_constraint(images, batch_sharding(mesh)))
        return jax.lax.with_sharding_constraint(extracted, replicated(mesh))

    shardings = jax.tree.map(lambda _: replicated(mesh), features.params)
    size = features.batch_size + -features.batch_size % batch_parts(mesh)
    return replace(features, apply=apply, params=put_on_mesh(features.params, shardings), batch_size=size)


def captioned(source: Any, most: int | None = None) -> tuple[Pictures, list[str]]:
    """Return the pictures and captions of a source (`lcm_jax.data.Source`): the first `most`, or all of them."""
    records = [source[i] for i in range(min(len(source), most or len(source)))]
    return np.stack([record["image"] for record in records]), [record["caption"] for record in records]


def generate(
    pipe: Callable[..., Pictures],
    prompts: Sequence[str],
    *,
    batch_size: int = 32,
    seed: int = 0,
    title: str = "",
    **options: Any,
) -> tuple[Pictures, float]:
    """Return a picture for each prompt, and the seconds per picture without compilation.

    The first batch is drawn twice, the first time only to compile. Batch i has the seed `seed` + i. The last batch is
    filled up with empty prompts, so that one program serves all. pipe: a pipeline, or what draws in its place. title:
    of the progress bar. options: of the pipeline's call.
    """
    pictures: list[np.ndarray] = []
    seconds = 0.0
    batches = [list(prompts[i : i + batch_size]) for i in range(0, len(prompts), batch_size)]
    for i, batch in enumerate(progress(batches, title or "drawing", "batch")):
        padded = batch + [""] * (batch_size - len(batch))
        if i == 0:
            pipe(padded, seed=seed, **options)
        start = time.perf_counter()
        pictures.append(pipe(padded, seed=seed + i, **options)[: len(batch)])
        seconds += time.perf_counter() - start
    return np.concatenate(pictures), seconds / (len(batches) * batch_size)


def evaluate(
    pipe: Callable[..., Pictures],
    clip: ClipMetric,
    images: Pictures,
    captions: Sequence[str],
    *,
    steps: Sequence[int] = (1, 2, 4, 8),
    features: FeatureExtractor | None = None,
    **options: Any,
) -> list[dict[str, float]]:
    """Return one row of scores for each number of steps, drawn from the captions of the real `images`.

    A row holds `steps`, the scores of `ClipMetric.score` and `seconds_per_image`. features: an extractor for the
    Frechet distance in place of the CLIP's image tower. options: of `generate`.
    """
    real = clip.features(images) if features is None else features(images)
    rows = []
    for n in steps:
        generated, seconds = generate(pipe, captions, steps=n, title=f"{n} steps", **options)
        rows.append({"steps": n, **clip.score(real, generated, captions, features), "seconds_per_image": seconds})
    return rows


def reconstruct(vae: Component, images: Pictures, *, batch_size: int = 32, mesh: Mesh | None = None) -> Pictures:
    """Return pictures after an autoencoder: encoded, and the mean of the latent decoded.

    mesh: the mesh that the parameters of `vae` are on; without one they are on the first device.
    """

    @jax.jit
    def run(params: Params, batch: Array) -> Array:
        with precision_context(params) as vae_params:
            mean, _ = vae.module.apply({"params": vae_params}, to_float(batch), method="encode")
            return to_uint8(vae.module.apply({"params": vae_params}, mean, method="decode"))

    mesh = make_mesh(devices=jax.devices()[:1]) if mesh is None else mesh
    decoded: Pictures = BatchedMap(mesh=mesh, most=-(-batch_size // batch_parts(mesh)))(
        partial(run, vae.params), images
    )
    return decoded


def reconstruction(images: Pictures, again: Pictures, clip: ClipMetric | None = None) -> dict[str, float]:
    """Return the mean `psnr` (dB) and `ssim` of reconstructed pictures.

    With a CLIP also `frechet`, on the features of its image tower, and `clip_distance`, the mean of 1 - cos between the
    embeddings of a picture and of its reconstruction.
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
