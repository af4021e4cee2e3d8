"""All scores of a generator, computed from features and embeddings, with their confidence intervals."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from jaxtyping import Float

from lcm_jax.metrics.bootstrap import bootstrap
from lcm_jax.metrics.clip_score import clip_scores
from lcm_jax.metrics.frechet import FEWEST, as_features, frechet_influence, infinity_influence
from lcm_jax.metrics.mmd import cubic_kernel, gaussian_kernel, mmd
from lcm_jax.metrics.precision_recall import Neighbours

BOUNDS = ("low", "high")


def report(
    real_features: Float[np.ndarray, "n d"],
    fake_features: Float[np.ndarray, "m d"],
    image_embeds: Float[np.ndarray, "m e"] | None = None,
    text_embeds: Float[np.ndarray, "m e"] | None = None,
    *,
    real_embeds: Float[np.ndarray, "n e"] | None = None,
    means: Mapping[str, Float[np.ndarray, " m"]] | None = None,
    resamples: int = 0,
    paired: bool = False,
) -> dict[str, float]:
    """Return the scores of the fakes against the reals, and with embeddings their `clip_score`.

    They are `frechet`, `frechet_infinity` (for 20 fakes or more), `kid`, `precision` and `recall` (k = 3), `density`
    and `coverage` (k = 5). The equations and papers are those of the functions of these names in `lcm_jax.metrics`; the
    CLIP score has a weight of 100. real_embeds: with the reals' embeddings there is also `cmmd`. means: further scores,
    a number for each fake, of which the mean is reported.

    resamples: of `bootstrap`; above 0 each score s comes with `s_low` and `s_high`, the bounds of its 95 % confidence
    interval. Of precision and density the fakes are drawn again, of recall and coverage the reals, of the others both.
    paired: whether fake i was drawn from the caption of real i; then captions are drawn again, each with both of its
    pictures, and else the sets each by itself.
    The interval of the Frechet distances is that of their first-order change (`lcm_jax.metrics.frechet.Influence`).

    Raises ValueError if only one of the two embeddings is given, for paired sets of different sizes, and as these
    functions do.

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
    n, m = len(real), len(fake)
    plain = frechet_influence(real, fake)
    weighted: dict[str, tuple[Callable[..., Any], list[int]]] = {"frechet": (plain, [n, m])}
    if m >= FEWEST:
        weighted["frechet_infinity"] = infinity_influence(real, fake, plain), [n, m]
    weighted["kid"] = lambda a, b: mmd(real, fake, cubic_kernel, a, b, paired=paired), [n, m]
    if real_embeds is not None and image_embeds is not None:
        embeds = real_embeds, image_embeds
        weighted["cmmd"] = (
            lambda a, b: 1000.0 * mmd(*embeds, gaussian_kernel, a, b, paired=paired),
            [len(real_embeds), m],
        )
    of_samples: dict[str, Any] = {
        "precision": near.precise, "recall": near.recalled, "density": far.dense, "coverage": far.covered
    }  # fmt: skip
    if image_embeds is not None and text_embeds is not None:
        of_samples["clip_score"] = clip_scores(image_embeds, text_embeds)
        if not len(of_samples["clip_score"]):
            raise ValueError("the CLIP score of no pairs is undefined")
    for name, values in (of_samples | dict(means or {})).items():
        weighted[name] = _mean_of(values), [len(values)]
    scores: dict[str, float] = {}
    for name, (score, sizes) in weighted.items():
        scores |= bounded(name, score, sizes, resamples, paired)
    for name in ("precision", "recall", "coverage") if resamples else ():  # fractions, and so are their bounds
        for end in BOUNDS:
            scores[f"{name}_{end}"] = min(max(scores[f"{name}_{end}"], 0.0), 1.0)
    return scores


def bounded(
    name: str, score: Callable[..., Any], sizes: list[int], resamples: int, paired: bool = False
) -> dict[str, float]:
    """Return {name: value}, and with resamples the bounds of its interval, name_low and name_high.

    >>> import numpy as np
    >>> from lcm_jax.metrics.report import bounded
    >>> bounded("mean", lambda counts: counts @ np.array([1.0, 2.0]) / 2, [2], 0)
    {'mean': 1.5}
    """
    if not resamples:
        return {name: float(score(*(np.ones((1, n)) for n in sizes))[0])}
    return dict(
        zip(
            (name, *(f"{name}_{end}" for end in BOUNDS)),
            bootstrap(score, sizes, resamples=resamples, paired=paired),
            strict=True,
        )
    )


def mean_bounded(name: str, values: Float[np.ndarray, " n"], resamples: int) -> dict[str, float]:
    """Return `bounded` of the mean of values, mean = sum_i c_i v_i / n.

    >>> import numpy as np
    >>> from lcm_jax.metrics.report import mean_bounded
    >>> sorted(mean_bounded("psnr", np.array([20.0, 30.0]), 10))
    ['psnr', 'psnr_high', 'psnr_low']
    """
    return bounded(name, _mean_of(values), [len(values)], resamples)


def _mean_of(values: Any) -> Callable[[Float[np.ndarray, "r n"]], Float[np.ndarray, " r"]]:
    column = np.asarray(values, np.float64)
    return lambda counts: counts @ column / len(column)
