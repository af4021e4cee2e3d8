"""Quality and coverage as two numbers, from nearest neighbours.

Improved precision and recall (Kynkaanniemi 2019, arXiv:1904.06991), density and coverage (Naeem 2020, 2002.09797).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from lcm_jax.metrics.frechet import as_features

# The rounding error of |a|^2 + |b|^2 - 2 a.b in float64 for two equal points, relative to |a|^2 + |b|^2.
ROUNDING = 1e-12


class PrecisionRecall(NamedTuple):
    """The result of `precision_recall`, a pair of fractions in [0, 1] (Kynkaanniemi 2019, arXiv:1904.06991, eq. 2).

    >>> from lcm_jax.metrics import PrecisionRecall
    >>> PrecisionRecall(precision=1.0, recall=0.6).recall
    0.6
    """

    precision: float  # fraction of fakes inside the manifold of the real set
    recall: float  # fraction of reals inside the manifold of the fake set


def _squared_distances(
    a: Float[np.ndarray, "n d"], b: Float[np.ndarray, "m d"], chunk: int
) -> Iterator[Float[np.ndarray, "chunk m"]]:
    """Yield squared distances from the rows of `a`, `chunk` rows at a time, to all rows of `b`.

    Distances no larger than the rounding error are 0.
    """
    b2 = np.square(b).sum(axis=1)
    for start in range(0, len(a), chunk):
        block = a[start : start + chunk]
        scale = np.square(block).sum(axis=1)[:, None] + b2
        d2 = scale - 2.0 * (block @ b.T)
        yield np.where(d2 > ROUNDING * scale, d2, 0.0)


def _radii2(x: Float[np.ndarray, "n d"], k: int, chunk: int) -> Float[np.ndarray, " n"]:
    """Return the squared distance from each point to its k-th nearest neighbour in the set, itself not counted."""
    return np.concatenate([np.partition(d2, k, axis=1)[:, k] for d2 in _squared_distances(x, x, chunk)])


class DensityCoverage(NamedTuple):
    """The result of `density_coverage` (Naeem 2020, arXiv:2002.09797, eq. 5 and 6).

    >>> from lcm_jax.metrics import DensityCoverage
    >>> DensityCoverage(density=1.2, coverage=0.9).coverage
    0.9
    """

    density: float  # mean number of real balls around a fake, over k: 1 on average for two equal distributions
    coverage: float  # fraction of reals that have a fake in their ball, in [0, 1]


class Neighbours(NamedTuple):
    """The neighbours of each sample: the four scores are means over these fields.

    >>> import numpy as np
    >>> from lcm_jax.metrics.precision_recall import Neighbours
    >>> real, fake = np.arange(10.0)[:, None], np.arange(5.0)[:, None] + 0.25
    >>> Neighbours.of(real, fake, k=1).recalled.mean()
    np.float64(0.6)
    """

    precise: Bool[np.ndarray, " m"]  # a fake is in the ball of a real
    dense: Float[np.ndarray, " m"]  # the number of real balls around a fake, over k
    recalled: Bool[np.ndarray, " n"]  # a real is in the ball of a fake
    covered: Bool[np.ndarray, " n"]  # a real has a fake in its own ball

    @classmethod
    def of(
        cls, real: Float[np.ndarray, "n d"], fake: Float[np.ndarray, "m d"], *, k: int, chunk: int = 1024
    ) -> Neighbours:
        """Compare two sets; ValueError as `precision_recall` says."""
        a, b = as_features(real, "real"), as_features(fake, "fake")
        if a.shape[1] != b.shape[1]:
            raise ValueError(f"feature dimensions differ: real {a.shape[1]}, fake {b.shape[1]}")
        if k < 1 or min(len(a), len(b)) <= k:
            raise ValueError(f"k={k} neighbours need k >= 1 and more than k samples; got {len(a)} real, {len(b)} fake")
        centre = a.mean(axis=0)
        a, b = a - centre, b - centre
        of_real, of_fake = _radii2(a, k, chunk), _radii2(b, k, chunk)
        around, covered = [], np.zeros(len(a), bool)
        for d2 in _squared_distances(b, a, chunk):  # from each fake to all reals
            inside = d2 <= of_real
            around.append(inside.sum(axis=1))
            covered |= inside.any(axis=0)
        number = np.concatenate(around)
        recalled = [(d2 <= of_fake).any(axis=1) for d2 in _squared_distances(a, b, chunk)]
        return cls(number > 0, number / k, np.concatenate(recalled), covered)


def precision_recall(
    real: Float[np.ndarray, "n d"], fake: Float[np.ndarray, "m d"], *, k: int = 3, chunk: int = 1024
) -> PrecisionRecall:
    """Return the precision and the recall of fakes against reals, both in [0, 1].

    Kynkaanniemi 2019 (arXiv:1904.06991), eq. 1 and 2: the manifold of a set is the union of the balls around its
    points that reach to the k-th nearest neighbour (the paper: k = 3, 50,000 VGG features), and

        precision = mean over fakes of [fake is in the manifold of the reals],
        recall = mean over reals of [real is in the manifold of the fakes].

    `chunk` bounds memory to chunk * max(n, m) distances; the result does not depend on it. Time is O((n + m)^2 d).

    Raises ValueError if the feature dimensions differ, k < 1, or a set has no more than k samples.

    >>> import numpy as np
    >>> from lcm_jax.metrics import precision_recall
    >>> real = np.arange(10.0)[:, None]
    >>> fake = np.arange(5.0)[:, None] + 0.25  # near the lower half of the reals
    >>> precision_recall(real, fake, k=1)
    PrecisionRecall(precision=1.0, recall=0.6)
    """
    found = Neighbours.of(real, fake, k=k, chunk=chunk)
    return PrecisionRecall(float(found.precise.mean()), float(found.recalled.mean()))


def density_coverage(
    real: Float[np.ndarray, "n d"], fake: Float[np.ndarray, "m d"], *, k: int = 5, chunk: int = 1024
) -> DensityCoverage:
    """Return the density and the coverage of fakes against reals (Naeem 2020, arXiv:2002.09797, eq. 5 and 6).

        density = mean over fakes of the number of real balls that hold it, over k,
        coverage = mean over reals of [a fake is in its ball],

    where the ball of a real reaches to its k-th nearest real. Unlike recall, coverage does not grow with an outlier
    among the fakes. `chunk` bounds memory as in `precision_recall`; ValueError as there.

    >>> import numpy as np
    >>> from lcm_jax.metrics import density_coverage
    >>> real = np.arange(10.0)[:, None]
    >>> density_coverage(real, real, k=1)
    DensityCoverage(density=2.8, coverage=1.0)
    """
    found = Neighbours.of(real, fake, k=k, chunk=chunk)
    return DensityCoverage(float(found.dense.mean()), float(found.covered.mean()))
