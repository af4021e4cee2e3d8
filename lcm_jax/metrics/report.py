"""All scores of a generator, computed from features and embeddings."""

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
    """Return `frechet`, `precision` and `recall` of the fakes against the reals, and `clip_score` with embeddings.

    The equations and papers are those of `frechet_distance`, `precision_recall` (k = 3) and `clip_score` (weight 100).

    Raises ValueError if only one of the two embeddings is given, and as these functions do.

    >>> import numpy as np
    >>> from lcm_jax.metrics import report
    >>> features, embeds = np.random.default_rng(0).normal(size=(20, 4)), np.ones((20, 6))
    >>> {name: round(score, 6) for name, score in report(features, features, embeds, embeds).items()}
    {'frechet': 0.0, 'precision': 1.0, 'recall': 1.0, 'clip_score': 100.0}
    """
    if (image_embeds is None) != (text_embeds is None):
        raise ValueError("a CLIP score needs both image_embeds and text_embeds; only one was given")
    real = Moments.of(real_features, name="real_features")
    fake = Moments.of(fake_features, name="fake_features")
    scores = {"frechet": frechet_distance(real, fake), **precision_recall(real_features, fake_features)._asdict()}
    if image_embeds is not None and text_embeds is not None:
        scores["clip_score"] = clip_score(image_embeds, text_embeds)
    return scores
