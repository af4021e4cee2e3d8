"""Rankings of several variants: ranks by one number, by several at once, and the agreement of two rankings."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float


def ranks(costs: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """Return ranks from 1 for the smallest cost; equal costs share the mean of their ranks.

    rank_i = #{j: x_j < x_i} + (#{j: x_j = x_i} + 1) / 2, as Spearman's correlation needs them.

    >>> import numpy as np
    >>> from lcm_jax.metrics import ranks
    >>> ranks(np.array([3.0, 1.0, 3.0, 7.0])).tolist()
    [2.5, 1.0, 2.5, 4.0]
    """
    x = np.asarray(costs, np.float64)
    below, level = (x < x[:, None]).sum(axis=1), (x == x[:, None]).sum(axis=1)
    return below + (level + 1) / 2


def spearman(a: Float[np.ndarray, " n"], b: Float[np.ndarray, " n"]) -> float:
    """Return the correlation of the ranks, from -1 (reversed) to 1 (the same order); NaN if either has one rank only.

    Spearman 1904: rho = sum_i x_i y_i / sqrt(sum_i x_i^2 sum_i y_i^2), where x and y are the centred ranks.

    >>> import numpy as np
    >>> from lcm_jax.metrics import spearman
    >>> spearman(np.array([1.0, 2.0, 3.0, 4.0]), np.array([10.0, 30.0, 20.0, 40.0]))
    0.8
    """
    x, y = ranks(a) - (len(a) + 1) / 2, ranks(b) - (len(b) + 1) / 2
    scale = np.sqrt((x @ x) * (y @ y))
    return float(x @ y / scale) if scale > 0 else float("nan")


def pareto_ranks(costs: Float[np.ndarray, "n k"]) -> Float[np.ndarray, " n"]:
    """Return the rank of each row of costs by non-dominated sorting, 1 for the best.

    Esser et al. 2024 (arXiv:2403.03206), section 5.1. Row i beats row j if it is worse in no cost and better in one:
    all_k x_ik <= x_jk and any_k x_ik < x_jk. The rows that no row beats have rank 1; of the remaining rows, those that
    no remaining row beats have rank 2, and so on.

    Raises ValueError unless the costs are finite and of shape (n, k).

    >>> import numpy as np
    >>> from lcm_jax.metrics import pareto_ranks
    >>> pareto_ranks(np.array([[1.0, 2.0], [2.0, 1.0], [2.0, 2.0], [3.0, 3.0]])).tolist()
    [1.0, 1.0, 2.0, 3.0]
    """
    x = np.asarray(costs, np.float64)
    if x.ndim != 2 or not np.isfinite(x).all():
        raise ValueError(f"costs must be finite and of shape (n, k), got {x.shape}")
    never_worse, once_better = (x[:, None] <= x).all(axis=2), (x[:, None] < x).any(axis=2)
    beats = np.logical_and(never_worse, once_better)  # [i, j]: i beats j
    result, remaining, rank = np.zeros(len(x)), np.ones(len(x), bool), 0
    while remaining.any():
        rank += 1
        front = remaining & ~beats[remaining].any(axis=0)
        result[front], remaining = rank, remaining & ~front
    return result
