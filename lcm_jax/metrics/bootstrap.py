"""Bootstrap confidence intervals: how far a score would move if other samples had been drawn.

A score is written as a function of how often each sample is in the set; at one each it is the score itself. Copies of a
sample are then never taken for different samples, which would make a set look closer to itself than it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

RESAMPLES = 200
LEVEL = 0.95


class Interval(NamedTuple):
    """A score with the bounds of its confidence interval, in text to the digits that the interval leaves certain.

    >>> from lcm_jax.metrics import Interval
    >>> str(Interval(12.3456, 11.81, 12.93)), str(Interval(0.1234567, 0.1233, 0.1236))
    ('12.3 [11.8, 12.9]', '0.12346 [0.12330, 0.12360]')
    """

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        half = 0.5 * (self.high - self.low)
        digits = min(max(math.ceil(math.log10(3.0 / half)), 0), 8) if 0.0 < half < math.inf else 2
        return f"{self.value:.{digits}f} [{self.low:.{digits}f}, {self.high:.{digits}f}]"


def bootstrap(
    score: Callable[..., Float[np.ndarray, " r"]],
    sizes: Sequence[int],
    *,
    resamples: int = RESAMPLES,
    level: float = LEVEL,
    seed: int = 0,
    paired: bool = False,
) -> Interval:
    """Return a score with its basic bootstrap interval (Davison and Hinkley 1997, Bootstrap Methods, sec. 5.2).

    The bounds are 2 v - q, where q are the quantiles of the resampled scores around the value v: so a bias that
    resampling adds is taken away from the interval rather than added to it.

    score: a function of one array of counts (r, n) for each set of samples, a resampled set in each row, to r scores.
    sizes: n of each set. paired: whether sample i of each set belongs together, so that the sets are drawn again as
    one; their sizes are then equal. level: the probability that the interval holds the true value. ValueError for a
    level outside (0, 1), fewer than two resamples, or paired sets of different sizes.

    >>> import numpy as np
    >>> from lcm_jax.metrics import bootstrap
    >>> x = np.random.default_rng(1).normal(size=400)
    >>> mean = bootstrap(lambda counts: counts @ x / len(x), [400])
    >>> bool(mean.low < x.mean() < mean.high), 0.15 < mean.high - mean.low < 0.25  # 2 * 1.96 / sqrt(400) = 0.196
    (True, True)
    """
    if not 0.0 < level < 1.0 or resamples < 2:
        raise ValueError(f"level={level} must be between 0 and 1, and resamples={resamples} at least 2")
    if paired and len(set(sizes)) != 1:
        raise ValueError(f"paired sets have the same size, got {' and '.join(map(str, sizes))}")
    rng = np.random.default_rng(seed)
    sets = sizes[:1] if paired else sizes
    # The sets themselves come first, so that one call serves the value and all that is drawn again.
    counts = [np.vstack([np.ones((1, n)), rng.multinomial(n, np.full(n, 1.0 / n), size=resamples)]) for n in sets]
    scores = score(*(counts * len(sizes) if paired else counts))
    value = float(scores[0])
    high, low = np.quantile(scores[1:], [0.5 - 0.5 * level, 0.5 + 0.5 * level])
    return Interval(value, float(2.0 * value - low), float(2.0 * value - high))
