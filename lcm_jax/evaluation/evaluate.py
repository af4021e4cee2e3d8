"""Scores of a pipeline on captioned pictures, with their confidence intervals, and seconds per image."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, UInt8

from lcm_jax.metrics import (
    ClipTowers,
    FeatureExtractor,
    Interval,
    NetworkFeatures,
    Preference,
    clip_scores,
    psnr,
    report,
    ssim,
)
from lcm_jax.metrics.bootstrap import RESAMPLES
from lcm_jax.metrics.frechet import frechet_influence
from lcm_jax.metrics.preference import TITLES
from lcm_jax.metrics.report import bounded, mean_bounded
from lcm_jax.models.latent_diffusion import to_float, to_uint8
from lcm_jax.parallel.sharding import BatchedMap, batch_parts, batch_sharding, make_mesh, put_on_mesh, replicated
from lcm_jax.precision.context import precision_context
from lcm_jax.runtime.progress import phase, progress
from lcm_jax.typing import Array, Params
from lcm_jax.weights.diffusers_folder import Component

Pictures = UInt8[np.ndarray, "n h w 3"]


class ClipMetric(ClipTowers):
    """Both towers of a CLIP model, as Frechet distance, CMMD and CLIP score use them.

    The feature of the Frechet distance is the image tower's pooled state (d numbers); CMMD compares the embeddings of
    pictures, the CLIP score those of picture and text (p numbers).
    """

    def shard(self, mesh: Mesh) -> ClipMetric:
        """Return the same metric with the image tower split over a mesh: each device takes a part of the pictures."""
        return replace(self, images=shard(self.images, mesh))

    def features(self, images: Pictures) -> Float[np.ndarray, "n d"]:
        """Return the image tower's pooled state of each picture."""
        return self.images(images)[:, : self.width]

    def score(
        self,
        real: Float[np.ndarray, "n d"],
        images: Pictures,
        texts: Sequence[str],
        features: FeatureExtractor | None = None,
        *,
        real_embeds: Float[np.ndarray, "n p"] | None = None,
        preferences: Sequence[Preference] = (),
        resamples: int = 0,
    ) -> dict[str, float]:
        """Return the scores of `lcm_jax.metrics.report` for pictures and their texts, against the features `real`.

        features: an extractor for the distances in place of the CLIP's image tower; `real` has to come from it.
        real_embeds: the reals' embeddings, for CMMD. preferences: scores to add, by their kind. resamples: of
        `report`, over captions where each has a real picture and a drawn one.
        """
        outputs = self.images(images)
        fake = outputs[:, : self.width] if features is None else features(images)
        means = {preference.kind: preference(images, texts) for preference in preferences}
        embeds = outputs[:, self.width :], self.embed_texts(texts)
        return report(
            real,
            fake,
            *embeds,
            real_embeds=real_embeds,
            means=means,
            resamples=resamples,
            paired=len(real) == len(fake),
        )


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
    seconds, batch_size = 0.0, min(batch_size, len(prompts))
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
    preferences: Sequence[Preference] = (),
    resamples: int = RESAMPLES,
    **options: Any,
) -> list[dict[str, Any]]:
    """Return one row of scores for each number of steps, drawn from the captions of the real `images`.

    A row holds `steps`, `distance` (the name of its Frechet distance, such as FD-DINOv2), the scores of
    `ClipMetric.score` with the bounds of their 95 % intervals, and `seconds_per_image`. features: an extractor for the
    distances in place of the CLIP's image tower. preferences: scores to add. resamples: of the intervals; 0 for none.
    options: of `generate`.
    """
    outputs = clip.images(images)
    real, real_embeds = outputs[:, : clip.width], outputs[:, clip.width :]
    real = real if features is None else features(images)
    distance = getattr(clip.images if features is None else features, "distance", "FD")
    scoring: dict[str, Any] = {"real_embeds": real_embeds, "preferences": preferences, "resamples": resamples}
    rows = []
    for n in steps:
        generated, seconds = generate(pipe, captions, steps=n, title=f"{n} step{'s' * (n > 1)}", **options)
        with phase("scoring"):
            scores = clip.score(real, generated, captions, features, **scoring)
        rows.append({"steps": n, "distance": distance, **scores, "seconds_per_image": seconds})
    return rows


def score_table(title: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """Return rows of `evaluate` as text: a column for each number of steps, a line for each score with its interval.

    >>> from lcm_jax.evaluation.evaluate import score_table
    >>> row = {"steps": 4, "distance": "FID", "frechet": 12.34, "frechet_low": 11.81, "frechet_high": 12.93}
    >>> print(score_table("openmoji", [row | {"kid": 0.5, "seconds_per_image": 0.25}]))
    openmoji         4 steps
    FID              12.3 [11.8, 12.9]
    KID x 1000       500
    s/image          0.25
    """
    distance = rows[0]["distance"]
    kernel = "KID" if distance == "FID" else distance.replace("FD", "KD")
    names = {
        "frechet": (distance, 1.0),
        "frechet_infinity": (f"{distance} at infinity", 1.0),
        "kid": (f"{kernel} x 1000", 1000.0),
        "cmmd": ("CMMD", 1.0),
        "clip_score": ("CLIP score", 1.0),
        **{kind: (name, 1.0) for kind, name in TITLES.items()},
        **{name: (name, 1.0) for name in ("precision", "recall", "density", "coverage")},
        "seconds_per_image": ("s/image", 1.0),
    }
    lines = [[title, *(f"{row['steps']} step{'s' * (row['steps'] > 1)}" for row in rows)]]
    lines += [
        [text, *(row_score(row, name, by) for row in rows)] for name, (text, by) in names.items() if name in rows[0]
    ]
    widths = [max(map(len, column)) + 3 for column in zip(*lines, strict=True)]
    widths[0] = max(widths[0], 17)
    return "\n".join("".join(cell.ljust(n) for cell, n in zip(line, widths, strict=True)).rstrip() for line in lines)


def row_score(row: Mapping[str, Any], name: str, by: float = 1.0) -> str:
    """Return a score of a row times `by`, with its interval if the row has one."""
    if f"{name}_low" not in row:
        return f"{by * row[name]:.4g}"
    return str(Interval(*(by * row[key] for key in (name, f"{name}_low", f"{name}_high"))))


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


def reconstruction(
    images: Pictures, again: Pictures, clip: ClipMetric | None = None, *, resamples: int = 0
) -> dict[str, float]:
    """Return the mean `psnr` (dB) and `ssim` of reconstructed pictures.

    With a CLIP also `frechet`, on the features of its image tower, and `clip_distance`, the mean of 1 - cos between the
    embeddings of a picture and of its reconstruction. resamples: as for `lcm_jax.metrics.report`.
    """
    pair = jnp.asarray(images), jnp.asarray(again)
    scores: dict[str, float] = {}
    for name, score in (("psnr", psnr), ("ssim", ssim)):
        scores |= mean_bounded(name, np.asarray(score(*pair, data_range=255.0)), resamples)
    if clip is not None:
        real, fake = clip.images(images), clip.images(again)
        distance = frechet_influence(real[:, : clip.width], fake[:, : clip.width])
        scores |= bounded("frechet", distance, [len(real), len(fake)], resamples, paired=True)
        away = 1.0 - clip_scores(real[:, clip.width :], fake[:, clip.width :], weight=1.0)
        scores |= mean_bounded("clip_distance", away, resamples)
    return scores
