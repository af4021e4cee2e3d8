"""All scores of a generator from features taken beforehand."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

from lcm_jax.metrics.clip_score import clip_score
from lcm_jax.metrics.frechet import Moments, frechet_distance
from lcm_jax.metrics.precision_recall import precision_recall


def report(
    real_features: Float[np.ndarray, "n d"],
    fake_features: Float[np.ndarray, "m d"],
    image_embeds: Float[np.ndarray, "m e"] | None = None,
    text_embeds: Float[np.ndarray, "m e"] | None = None,
) -> dict[str, float]:
    """`frechet`, `precision`, `recall` of the fakes against the reals, and `clip_score` if embeddings are given."""
    if (image_embeds is None) != (text_embeds is None):
        raise ValueError("a CLIP score needs both image_embeds and text_embeds; only one was given")
    real = Moments.of(real_features, name="real_features")
    fake = Moments.of(fake_features, name="fake_features")
    scores = {"frechet": frechet_distance(real, fake), **precision_recall(real_features, fake_features)._asdict()}
    if image_embeds is not None and text_embeds is not None:
        scores["clip_score"] = clip_score(image_embeds, text_embeds)
    return scores
