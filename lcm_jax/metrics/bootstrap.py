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
    ('12.3 [11.8, 12.9]', '0.1235 [0.1233, 0.1236]')
    """

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        half = 0.5 * (self.high - self.low)
        digits = min(max(-math.floor(math.log10(half)), 0), 8) if 0.0 < half < math.inf else 2
        return f"{self.value:.{digits}f} [{self.low:.{digits}f}, {self.high:.{digits}f}]"


def bootstrap(
    score: Callable[..., Float[np.ndarray, " r"]],
    sizes: Sequence[int],
    *,
    resamples: int = RESAMPLES,
    level: float = LEVEL,
    seed: int = 0,
) -> Interval:
    """Return a score with its basic bootstrap interval (Davison and Hinkley 1997, Bootstrap Methods, sec. 5.2).

    The bounds are 2 v - q, where q are the quantiles of the resampled scores around the value v: so a bias that
    resampling adds is taken away from the interval rather than added to it.

    score: a function of one array of counts (r, n) for each set of samples, a resampled set in each row, to r scores.
    sizes: n of each set. level: the probability that the interval holds the true value. ValueError for a level outside
    (0, 1) or fewer than two resamples.

    >>> import numpy as np
    >>> from lcm_jax.metrics import bootstrap
    >>> x = np.random.default_rng(1).normal(size=400)
    >>> mean = bootstrap(lambda counts: counts @ x / len(x), [400])
    >>> bool(mean.low < x.mean() < mean.high), 0.15 < mean.high - mean.low < 0.25  # 2 * 1.96 / sqrt(400) = 0.196
    (True, True)
    """
    if not 0.0 < level < 1.0 or resamples < 2:
        raise ValueError(f"level={level} must be between 0 and 1, and resamples={resamples} at least 2")
    rng = np.random.default_rng(seed)
    value = float(score(*(np.ones((1, n)) for n in sizes))[0])
    drawn = score(*(rng.multinomial(n, np.full(n, 1.0 / n), size=resamples).astype(float) for n in sizes))
    high, low = np.quantile(drawn, [0.5 - 0.5 * level, 0.5 + 0.5 * level])
    return Interval(value, float(2.0 * value - low), float(2.0 * value - high))
