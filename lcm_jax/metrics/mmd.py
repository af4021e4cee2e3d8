"""The squared maximum mean discrepancy of two sets of features: KID and CMMD, without bias at any number of samples.

MMD^2 = E k(x, x') + E k(y, y') - 2 E k(x, y). The estimate leaves out the pairs of a sample with itself (Gretton et al.
2012, JMLR 13, eq. 3), so its mean is the true value, and it may be below 0. The Frechet distance of few samples is too
large by an amount that depends on their number; this is not.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from lcm_jax.metrics.frechet import as_features

Kernel = Callable[[Float[np.ndarray, "n d"], Float[np.ndarray, "m d"]], Float[np.ndarray, "n m"]]
"""A function of all pairs of features."""


def cubic_kernel(x: Float[np.ndarray, "n d"], y: Float[np.ndarray, "m d"]) -> Float[np.ndarray, "n m"]:
    """Return (x . y / d + 1)^3, the kernel of KID (Binkowski et al. 2018, 1801.01401, sec. 4).

    >>> import numpy as np
    >>> from lcm_jax.metrics.mmd import cubic_kernel
    >>> cubic_kernel(np.ones((1, 2)), np.ones((1, 2))).tolist()
    [[8.0]]
    """
    return (x @ y.T / x.shape[1] + 1.0) ** 3


def gaussian_kernel(x: Float[np.ndarray, "n d"], y: Float[np.ndarray, "m d"]) -> Float[np.ndarray, "n m"]:
    """Return exp(-|x - y|^2 / (2 10^2)) of features that are scaled to unit length, CMMD's (Jayasumana et al. 2024).

    This is the kernel of 2401.09603 as its code computes it: on normalised CLIP embeddings with a bandwidth of 10.

    >>> import numpy as np
    >>> from lcm_jax.metrics.mmd import gaussian_kernel
    >>> gaussian_kernel(np.array([[2.0, 0.0]]), np.array([[1.0, 0.0], [-1.0, 0.0]])).round(4).tolist()
    [[1.0, 0.9802]]
    """
    x, y = (v / np.linalg.norm(v, axis=1, keepdims=True) for v in (x, y))
    return np.exp((x @ y.T - 1.0) / 100.0)


@dataclass(frozen=True, kw_only=True, eq=False)
class Kernels:
    """The kernel of all pairs among the reals, among the fakes and between them, from which `mmd` is a few sums.

    >>> import numpy as np
    >>> from lcm_jax.metrics.mmd import Kernels
    >>> kernels = Kernels.of(np.eye(3), np.eye(3)[:2])
    >>> kernels.between.shape
    (3, 2)
    """

    real: Float[np.ndarray, "n n"]
    fake: Float[np.ndarray, "m m"]
    between: Float[np.ndarray, "n m"]

    @classmethod
    def of(
        cls, real: Float[np.ndarray, "n d"], fake: Float[np.ndarray, "m d"], kernel: Kernel = cubic_kernel
    ) -> Kernels:
        """Evaluate the kernel; memory is (n + m)^2 numbers. ValueError for features that do not fit or are too few."""
        x, y = as_features(real, "real"), as_features(fake, "fake")
        if x.shape[1] != y.shape[1]:
            raise ValueError(f"feature dimensions differ: real {x.shape[1]}, fake {y.shape[1]}")
        if min(len(x), len(y)) < 2:
            raise ValueError(f"an estimate without bias needs 2 samples of each, got {len(x)} real and {len(y)} fake")
        return cls(real=kernel(x, x), fake=kernel(y, y), between=kernel(x, y))

    def mmd(self, real: Float[np.ndarray, " n"] | None = None, fake: Float[np.ndarray, " m"] | None = None) -> float:
        """Return the estimate of MMD^2; the counts say how often each sample is in the set (None: once)."""
        n, m = (np.ones(len(k)) if c is None else c for k, c in ((self.real, real), (self.fake, fake)))
        return _mean_of_pairs(self.real, n) + _mean_of_pairs(self.fake, m) - 2.0 * _mean(self.between, n, m)


def _mean_of_pairs(kernel: Float[np.ndarray, "n n"], counts: Float[np.ndarray, " n"]) -> float:
    """Return the mean over the pairs of two different samples."""
    pairs = counts.sum() ** 2 - (counts**2).sum()
    return float((counts @ kernel @ counts - (counts**2) @ np.diagonal(kernel)) / pairs)


def _mean(kernel: Float[np.ndarray, "n m"], n: Float[np.ndarray, " n"], m: Float[np.ndarray, " m"]) -> float:
    return float(n @ kernel @ m / (n.sum() * m.sum()))


def kid(real: Float[np.ndarray, "n d"], fake: Float[np.ndarray, "m d"]) -> float:
    """Return the kernel inception distance, MMD^2 with `cubic_kernel` (Binkowski et al. 2018, 1801.01401).

    It is KID if the features are those of `inception_features`; published values are often times 1000. ValueError for
    fewer than two samples of a set.

    >>> import numpy as np
    >>> from lcm_jax.metrics import kid
    >>> x = np.random.default_rng(0).normal(size=(100, 4))
    >>> kid(x[:50], x[50:]) < 0.1 < kid(x[:50], x[50:] + 1.0)
    True
    """
    return Kernels.of(real, fake).mmd()


def cmmd(real: Float[np.ndarray, "n d"], fake: Float[np.ndarray, "m d"]) -> float:
    """Return CMMD, 1000 MMD^2 with `gaussian_kernel` of CLIP's image embeddings (Jayasumana et al. 2024, 2401.09603).

    ValueError for fewer than two samples of a set.

    >>> import numpy as np
    >>> from lcm_jax.metrics import cmmd
    >>> x = np.random.default_rng(0).normal(size=(100, 4))
    >>> cmmd(x[:50], x[50:]) < 1.0 < cmmd(x[:50], x[50:] + 1.0)
    True
    """
    return 1000.0 * Kernels.of(real, fake, gaussian_kernel).mmd()
