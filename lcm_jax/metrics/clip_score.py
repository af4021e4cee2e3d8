"""CLIP score (Hessel 2021, arXiv:2104.08718, eq. 1): how well pictures match their texts."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

from lcm_jax.metrics.frechet import as_features


def clip_scores(
    image_embeds: Float[np.ndarray, "n d"], text_embeds: Float[np.ndarray, "n d"], *, weight: float = 100.0
) -> Float[np.ndarray, " n"]:
    """weight * max(cos(image_i, text_i), 0) of each pair; the embeddings need not be normalised.

    weight 100 is the convention of text-to-image papers (about 25 to 30 in LCM's tables); Hessel's own is w = 2.5.
    """
    image, text = as_features(image_embeds, "image_embeds"), as_features(text_embeds, "text_embeds")
    if image.shape != text.shape:
        raise ValueError(f"image_embeds {image.shape} and text_embeds {text.shape} must pair row by row")
    norms = np.linalg.norm(image, axis=1) * np.linalg.norm(text, axis=1)
    if not norms.all():
        raise ValueError(f"pair {int(np.argmin(norms))} holds a zero embedding, whose direction is undefined")
    return weight * np.maximum((image * text).sum(axis=1) / norms, 0.0)


def clip_score(
    image_embeds: Float[np.ndarray, "n d"], text_embeds: Float[np.ndarray, "n d"], *, weight: float = 100.0
) -> float:
    """Mean of `clip_scores` over the pairs."""
    scores = clip_scores(image_embeds, text_embeds, weight=weight)
    if not len(scores):
        raise ValueError("the CLIP score of no pairs is undefined")
    return float(scores.mean())
