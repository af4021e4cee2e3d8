"""Improved precision and recall (Kynkaanniemi 2019, arXiv:1904.06991): quality and coverage told apart."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from lcm_jax.metrics.frechet import as_features

# Relative to |a|^2 + |b|^2: what |a|^2 + |b|^2 - 2 a.b of two equal points can be off by in float64.
ROUNDING = 1e-12


class PrecisionRecall(NamedTuple):
    precision: float  # fraction of fakes inside the manifold of the real set
    recall: float  # fraction of reals inside the manifold of the fake set


def _squared_distances(
    a: Float[np.ndarray, "n d"], b: Float[np.ndarray, "m d"], chunk: int
) -> Iterator[Float[np.ndarray, "chunk m"]]:
    """Squared distances of the rows of `a`, `chunk` rows at a time, to all of `b`; differences at rounding are 0."""
    b2 = np.square(b).sum(axis=1)
    for start in range(0, len(a), chunk):
        rows = a[start : start + chunk]
        scale = np.square(rows).sum(axis=1)[:, None] + b2
        d2 = scale - 2.0 * (rows @ b.T)
        yield np.where(d2 > ROUNDING * scale, d2, 0.0)


def _radii2(x: Float[np.ndarray, "n d"], k: int, chunk: int) -> Float[np.ndarray, " n"]:
    """Squared distance of each point to its k-th nearest neighbour in the set, itself not counted."""
    return np.concatenate([np.partition(d2, k, axis=1)[:, k] for d2 in _squared_distances(x, x, chunk)])


def _covered(
    x: Float[np.ndarray, "n d"], centres: Float[np.ndarray, "m d"], radii2: Float[np.ndarray, " m"], chunk: int
) -> Bool[np.ndarray, " n"]:
    """Which points lie in at least one of the balls (eq. 1)."""
    return np.concatenate([(d2 <= radii2).any(axis=1) for d2 in _squared_distances(x, centres, chunk)])


def precision_recall(
    real: Float[np.ndarray, "n d"], fake: Float[np.ndarray, "m d"], *, k: int = 3, chunk: int = 1024
) -> PrecisionRecall:
    """Precision and recall in [0, 1] with balls reaching the k-th neighbour (the paper: k = 3, 50,000 VGG features).

    `chunk` bounds memory to chunk * max(n, m) distances; the result does not depend on it. Time is O((n + m)^2 d).
    """
    a, b = as_features(real, "real"), as_features(fake, "fake")
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"feature dimensions differ: real {a.shape[1]}, fake {b.shape[1]}")
    if k < 1 or min(len(a), len(b)) <= k:
        raise ValueError(f"k={k} neighbours need k >= 1 and more than k samples; got {len(a)} real, {len(b)} fake")
    centre = a.mean(axis=0)
    a, b = a - centre, b - centre
    precision = _covered(b, a, _radii2(a, k, chunk), chunk).mean()
    recall = _covered(a, b, _radii2(b, k, chunk), chunk).mean()
    return PrecisionRecall(float(precision), float(recall))
