"""All scores of a generator, computed from features and embeddings, with their confidence intervals."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Float

from lcm_jax.metrics.bootstrap import bootstrap
from lcm_jax.metrics.clip_score import clip_scores
from lcm_jax.metrics.frechet import Moments, as_features, frechet_distance
from lcm_jax.metrics.mmd import Kernels
from lcm_jax.metrics.precision_recall import Neighbours

Counts = Float[np.ndarray, " n"]


def report(
    real_features: Float[np.ndarray, "n d"],
    fake_features: Float[np.ndarray, "m d"],
    image_embeds: Float[np.ndarray, "m e"] | None = None,
    text_embeds: Float[np.ndarray, "m e"] | None = None,
    *,
    resamples: int = 0,
) -> dict[str, float]:
    """Return the scores of the fakes against the reals, and with embeddings their `clip_score`.

    They are `frechet`, `kid`, `precision` and `recall` (k = 3), `density` and `coverage` (k = 5). The equations and
    papers are those of the functions of these names in `lcm_jax.metrics`; the CLIP score has a weight of 100.

    resamples: of `bootstrap`; above 0 each score s comes with `s_low` and `s_high`, the bounds of its 95 % confidence
    interval. Of precision and density the fakes are drawn again, of recall and coverage the reals, of the others both.

    Raises ValueError if only one of the two embeddings is given, and as these functions do.

    >>> import numpy as np
    >>> from lcm_jax.metrics import report
    >>> features, embeds = np.random.default_rng(0).normal(size=(20, 4)), np.ones((20, 6))
    >>> scores = report(features, features, embeds, embeds)
    >>> {name: round(scores[name], 6) for name in ("frechet", "precision", "recall", "coverage", "clip_score")}
    {'frechet': 0.0, 'precision': 1.0, 'recall': 1.0, 'coverage': 1.0, 'clip_score': 100.0}
    >>> bounded = report(features, features + 1.0, resamples=10)
    >>> bounded["kid_low"] < bounded["kid"] < bounded["kid_high"]
    True
    """
    if (image_embeds is None) != (text_embeds is None):
        raise ValueError("a CLIP score needs both image_embeds and text_embeds; only one was given")
    real, fake = as_features(real_features, "real_features"), as_features(fake_features, "fake_features")
    near, far = Neighbours.of(real, fake, k=3), Neighbours.of(real, fake, k=5)
    kernels, n, m = Kernels.of(real, fake), len(real), len(fake)
    means: dict[str, Any] = {
        "precision": near.precise, "recall": near.recalled, "density": far.dense, "coverage": far.covered
    }  # fmt: skip
    if image_embeds is not None and text_embeds is not None:
        means["clip_score"] = clip_scores(image_embeds, text_embeds)
        if not len(means["clip_score"]):
            raise ValueError("the CLIP score of no pairs is undefined")
    scores = {"frechet": frechet_distance(Moments.of(real), Moments.of(fake)), "kid": kernels.mmd()}
    scores |= {name: float(values.mean()) for name, values in means.items()}
    if not resamples:
        return scores
    weighted: dict[str, tuple[Callable[..., float], list[int]]] = {
        "frechet": (lambda a, b: frechet_distance(Moments.weighted(real, a), Moments.weighted(fake, b)), [n, m]),
        "kid": (kernels.mmd, [n, m]),
        **{name: (_mean_of(values), [len(values)]) for name, values in means.items()},
    }
    for name, (score, sizes) in weighted.items():
        _, scores[f"{name}_low"], scores[f"{name}_high"] = bootstrap(score, sizes, resamples=resamples)
    return scores


def _mean_of(values: Any) -> Callable[[Counts], float]:
    return lambda counts: float(counts @ values / counts.sum())
