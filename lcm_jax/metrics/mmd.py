"""The squared maximum mean discrepancy of two sets of features: KID and CMMD, without bias at any number of samples.

MMD^2 = E k(x, x') + E k(y, y') - 2 E k(x, y). The estimate leaves out the pairs of a sample with itself (Gretton et al.
2012, JMLR 13, eq. 3), so its mean is the true value, and it may be below 0. The Frechet distance of few samples is too
large by an amount that depends on their number; this is not.
"""

from __future__ import annotations

from collections.abc import Callable

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
    base = x @ y.T / x.shape[1] + 1.0
    return base * base * base


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


def mmd(
    real: Float[np.ndarray, "n d"],
    fake: Float[np.ndarray, "m d"],
    kernel: Kernel,
    real_counts: Float[np.ndarray, "r n"] | None = None,
    fake_counts: Float[np.ndarray, "r m"] | None = None,
    *,
    paired: bool = False,
    chunk: int = 1024,
) -> Float[np.ndarray, " r"]:
    """Return the estimate of MMD^2 for r sets, in whose row the counts say how often each sample is in it.

    Without counts r is 1 and each sample is in it once. paired: whether the counts of both sets are the same, because
    real i and fake i belong together; they then weigh the pair of these two as one sample rather than two. Memory is
    chunk * max(n, m) numbers; time O((n + m)^2 (d + r)). ValueError for features that do not fit or fewer than two
    samples of a set.

    >>> import numpy as np
    >>> from lcm_jax.metrics.mmd import cubic_kernel, mmd
    >>> mmd(np.eye(3), np.eye(3), cubic_kernel).round(3).tolist()  # 2 (1 - (2 * 1 + (4 / 3)^3) / 3)
    [-0.914]
    """
    x, y = as_features(real, "real"), as_features(fake, "fake")
    if x.shape[1] != y.shape[1]:
        raise ValueError(f"feature dimensions differ: real {x.shape[1]}, fake {y.shape[1]}")
    if min(len(x), len(y)) < 2:
        raise ValueError(f"an estimate without bias needs 2 samples of each, got {len(x)} real and {len(y)} fake")
    n, m = (np.ones((1, len(z))) if c is None else c for z, c in ((x, real_counts), (y, fake_counts)))
    pairs, of_real = _sums(x, x, kernel, n, n, chunk)
    within = (pairs - (n**2) @ of_real) / (n.sum(axis=1) ** 2 - (n**2).sum(axis=1))
    pairs, of_fake = _sums(y, y, kernel, m, m, chunk)
    within = within + (pairs - (m**2) @ of_fake) / (m.sum(axis=1) ** 2 - (m**2).sum(axis=1))
    pairs, of_both = _sums(x, y, kernel, n, m, chunk)
    if paired:
        apart = (pairs - (n**2) @ of_both) / (n.sum(axis=1) ** 2 - (n**2).sum(axis=1))
        between = apart + (n @ of_both / len(x) - apart) / len(x)  # one pair in n is of these two
    else:
        between = pairs / (n.sum(axis=1) * m.sum(axis=1))
    return within - 2.0 * between


def _sums(
    x: Float[np.ndarray, "n d"],
    y: Float[np.ndarray, "m d"],
    kernel: Kernel,
    a: Float[np.ndarray, "r n"],
    b: Float[np.ndarray, "r m"],
    chunk: int,
) -> tuple[Float[np.ndarray, " r"], Float[np.ndarray, " k"]]:
    """Return sum_ij a_i k(x_i, y_j) b_j for each row of counts, and the kernel's diagonal."""
    total, diagonal = np.zeros(len(a)), []
    for start in range(0, len(x), chunk):
        block = kernel(x[start : start + chunk], y)
        total = total + ((block @ b.T) * a[:, start : start + chunk].T).sum(axis=0)
        diagonal.append(np.diagonal(block, offset=start))
    return total, np.concatenate(diagonal)


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
    return float(mmd(real, fake, cubic_kernel)[0])


def cmmd(real: Float[np.ndarray, "n d"], fake: Float[np.ndarray, "m d"]) -> float:
    """Return CMMD, 1000 MMD^2 with `gaussian_kernel` of CLIP's image embeddings (Jayasumana et al. 2024, 2401.09603).

    ValueError for fewer than two samples of a set.

    >>> import numpy as np
    >>> from lcm_jax.metrics import cmmd
    >>> x = np.random.default_rng(0).normal(size=(100, 4))
    >>> cmmd(x[:50], x[50:]) < 1.0 < cmmd(x[:50], x[50:] + 1.0)
    True
    """
    return 1000.0 * float(mmd(real, fake, gaussian_kernel)[0])
