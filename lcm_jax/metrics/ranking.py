"""Which of several variants is better: ranks by one number, by several at once, and the agreement of two rankings."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float


def ranks(costs: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """1 for the smallest; equal costs share the mean of their places."""
    x = np.asarray(costs, np.float64)
    below, level = (x < x[:, None]).sum(axis=1), (x == x[:, None]).sum(axis=1)
    return below + (level + 1) / 2


def spearman(a: Float[np.ndarray, " n"], b: Float[np.ndarray, " n"]) -> float:
    """Correlation of the ranks, from -1 (reversed) to 1 (the same order); NaN if either has one rank only."""
    x, y = ranks(a) - (len(a) + 1) / 2, ranks(b) - (len(b) + 1) / 2
    scale = np.sqrt((x @ x) * (y @ y))
    return float(x @ y / scale) if scale > 0 else float("nan")


def pareto_ranks(costs: Float[np.ndarray, "n k"]) -> Float[np.ndarray, " n"]:
    """Non-dominated sorting (Esser et al. 2024, arXiv:2403.03206, section 5.1): the rows that no other row beats, in
    no cost worse and in one better, have rank 1; without them, the rows that none of the rest beats have rank 2 ...
    """
    x = np.asarray(costs, np.float64)
    if x.ndim != 2 or not np.isfinite(x).all():
        raise ValueError(f"costs must be finite and of shape (n, k), got {x.shape}")
    never_worse, once_better = (x[:, None] <= x).all(axis=2), (x[:, None] < x).any(axis=2)
    beats = np.logical_and(never_worse, once_better)  # [i, j]: i beats j
    found, left, rank = np.zeros(len(x)), np.ones(len(x), bool), 0
    while left.any():
        rank += 1
        front = left & ~beats[left].any(axis=0)
        found[front], left = rank, left & ~front
    return found
