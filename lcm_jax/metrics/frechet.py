"""The Frechet distance of Gaussians fitted to features (Heusel 2017, arXiv:1706.08500, eq. 6), in float64 on the host.

Statistics form a monoid: `Moments.of(a).merge(Moments.of(b))` are the moments of `a` and `b` together, so shards,
hosts and batches may be combined in any order.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float


def as_features(features: Float[np.ndarray, "n d"], name: str) -> Float[np.ndarray, "n d"]:
    """Return features as a float64 matrix (n, d).

    Raises ValueError, which names `name`, if they are not two-dimensional or a row contains NaN or infinity.

    >>> import numpy as np
    >>> from lcm_jax.metrics.frechet import as_features
    >>> as_features(np.ones((3, 2), np.float32), "real").dtype.name
    'float64'
    """
    x = np.asarray(features, dtype=np.float64)
    if x.ndim != 2:
        raise ValueError(f"{name} must have shape (n, d), got {x.shape}")
    bad = int(np.count_nonzero(~np.isfinite(x).all(axis=1)))
    if bad:
        raise ValueError(f"{name}: {bad} of {len(x)} rows contain NaN or infinity; drop them or fix their source")
    return x


@dataclass(frozen=True, kw_only=True, eq=False)
class Moments:
    """The count, the mean (d,) and the scatter matrix (d, d) of a set of features, in float64.

    scatter = sum_i (x_i - mean)(x_i - mean)^T, the covariance times count - 1.

    >>> import numpy as np
    >>> from lcm_jax.metrics import Moments
    >>> features = np.array([[0.0, 0.0], [2.0, 0.0], [4.0, 6.0]])
    >>> merged = Moments.of(features[:1]).merge(Moments.of(features[1:]))
    >>> merged.count, merged.mean.tolist()
    (3, [2.0, 2.0])
    >>> bool(np.allclose(merged.covariance, Moments.of(features).covariance))
    True
    """

    count: int
    mean: Float[np.ndarray, " d"]
    scatter: Float[np.ndarray, "d d"]

    @classmethod
    def of(cls, features: Float[np.ndarray, "n d"], *, name: str = "features") -> Moments:
        """Return the moments of n >= 1 features; raise ValueError, which names `name`, for none or for NaN."""
        x = as_features(features, name)
        if not len(x):
            raise ValueError(f"{name}: no rows; at least one is needed")
        mean = x.mean(axis=0)
        centred = x - mean
        return cls(count=len(x), mean=mean, scatter=centred.T @ centred)

    @classmethod
    def weighted(cls, features: Float[np.ndarray, "n d"], counts: Float[np.ndarray, " n"]) -> Moments:
        """Return the moments of a set that holds sample i `counts[i]` times."""
        total = counts.sum()
        mean = counts @ features / total
        centred = (features - mean) * np.sqrt(counts)[:, None]
        return cls(count=int(total), mean=mean, scatter=centred.T @ centred)

    @classmethod
    def of_batches(cls, batches: Iterable[Float[np.ndarray, "_ d"]], *, name: str = "features") -> Moments:
        """Return the moments of a stream of feature batches; memory is O(d^2) whatever the number of samples.

        Raises ValueError, which names `name`, if the stream is empty.
        """
        total: Moments | None = None
        for batch in batches:
            moments = cls.of(batch, name=name)
            total = moments if total is None else total.merge(moments)
        if total is None:
            raise ValueError(f"{name}: the stream of batches is empty")
        return total

    def merge(self, other: Moments) -> Moments:
        """Return the moments of both sets together (Chan, Golub & LeVeque 1979, the pairwise update).

        Raises ValueError if the feature dimensions differ.
        """
        if self.mean.shape != other.mean.shape:
            raise ValueError(f"feature dimensions differ: {self.mean.shape[0]} and {other.mean.shape[0]}")
        count = self.count + other.count
        shift = other.mean - self.mean
        mean = self.mean + shift * (other.count / count)
        between = np.outer(shift, shift) * (self.count * other.count / count)
        return Moments(count=count, mean=mean, scatter=self.scatter + other.scatter + between)

    @property
    def covariance(self) -> Float[np.ndarray, "d d"]:
        """The unbiased covariance (d, d), as in the reference code of FID; ValueError for fewer than 2 samples."""
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 samples, got {self.count}")
        return self.scatter / (self.count - 1)

    def save(self, path: str | Path) -> None:
        """Write `mu`, `sigma` (the names used by published FID statistics) and `count` to an .npz file."""
        with open(path, "wb") as file:
            np.savez(file, mu=self.mean, sigma=self.covariance, count=np.int64(self.count))

    @classmethod
    def load(cls, path: str | Path) -> Moments:
        """Read an .npz file of `mu` and `sigma`.

        Published statistics lack `count`: they can be compared but not merged meaningfully, so they count as 2 samples.
        Raises FileNotFoundError if there is no such file, ValueError if an array is missing or has a wrong shape.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"{path}: no such file of Frechet statistics")
        with np.load(path, allow_pickle=False) as file:
            missing = {"mu", "sigma"} - set(file.files)
            if missing:
                raise ValueError(f"{path}: lacks {sorted(missing)}; expected the arrays mu (d,) and sigma (d, d)")
            mean, cov = np.float64(file["mu"]), np.float64(file["sigma"])
            count = int(file["count"]) if "count" in file.files else 2
        if mean.ndim != 1 or cov.shape != (mean.size, mean.size):
            raise ValueError(f"{path}: mu has shape {mean.shape} and sigma {cov.shape}; expected (d,) and (d, d)")
        return cls(count=count, mean=mean, scatter=cov * (count - 1))


def _factor(cov: Float[np.ndarray, "d d"]) -> Float[np.ndarray, "d r"]:
    """Return F (d, r) with F F^T = cov, where r is the numerical rank."""
    values, vectors = np.linalg.eigh(cov)
    keep = values > max(values[-1], 0.0) * len(values) * np.finfo(np.float64).eps
    return vectors[:, keep] * np.sqrt(values[keep])


def gaussian_distance(
    mean1: Float[np.ndarray, " d"],
    cov1: Float[np.ndarray, "d d"],
    mean2: Float[np.ndarray, " d"],
    cov2: Float[np.ndarray, "d d"],
) -> float:
    """Return the squared 2-Wasserstein distance of two Gaussians, |m1 - m2|^2 + Tr(S1 + S2 - 2 (S1 S2)^(1/2)).

    This is eq. 6 of Heusel 2017 (arXiv:1706.08500). With S = F F^T from a symmetric eigendecomposition,
    Tr (S1 S2)^(1/2) is the sum of the singular values of F1^T F2. No root of a non-symmetric matrix is taken, so
    covariances of fewer samples than dimensions need no jitter.

    Raises ValueError if the feature dimensions differ.

    >>> import numpy as np
    >>> from lcm_jax.metrics import gaussian_distance
    >>> distance = gaussian_distance(np.zeros(1), np.eye(1), np.full(1, 3.0), 4.0 * np.eye(1))
    >>> round(distance, 6)  # 3^2 + 1 + 4 - 2 * 2
    10.0
    """
    if mean1.shape != mean2.shape:
        raise ValueError(f"feature dimensions differ: {mean1.shape[0]} and {mean2.shape[0]}")
    cross = _factor(cov1).T @ _factor(cov2)
    overlap = np.linalg.svd(cross, compute_uv=False).sum() if cross.size else 0.0
    shift = mean1 - mean2
    return max(float(shift @ shift + np.trace(cov1) + np.trace(cov2) - 2.0 * overlap), 0.0)


def frechet_distance(real: Moments, fake: Moments) -> float:
    """Return the Frechet distance of the Gaussians fitted to two sets (Heusel 2017, arXiv:1706.08500, eq. 6).

    It is FID if the features are those of `inception_features`. See `gaussian_distance` for the equation.

    Raises ValueError if the feature dimensions differ or a set has fewer than 2 samples.

    >>> import numpy as np
    >>> from lcm_jax.metrics import Moments, frechet_distance
    >>> features = np.random.default_rng(0).normal(size=(100, 4))
    >>> round(frechet_distance(Moments.of(features), Moments.of(features + 3.0)), 6)  # a shift: 4 dimensions * 3^2
    36.0
    """
    return gaussian_distance(real.mean, real.covariance, fake.mean, fake.covariance)


def frechet_infinity(
    real: Float[np.ndarray, "n d"], fake: Float[np.ndarray, "m d"], *, points: int = 15, seed: int = 0
) -> float:
    """Return the Frechet distance that infinitely many fakes would have, by extrapolation.

    The distance of N samples is too large by about c / N (Chong and Forsyth 2020, 1911.07023, sec. 4), so it is
    measured for `points` numbers N of the fakes, from a fifth of them to all, and the line in 1 / N is taken at 0. The
    reals stay as they are. ValueError for fewer than 20 fakes.

    >>> import numpy as np
    >>> from lcm_jax.metrics import Moments, frechet_distance, frechet_infinity
    >>> x = np.random.default_rng(0).normal(size=(6000, 8))
    >>> plain = frechet_distance(Moments.of(x[:5000]), Moments.of(x[5000:5200]))
    >>> abs(frechet_infinity(x[:5000], x[5000:5200])) < 0.3 * plain  # both sets are of one distribution
    True
    """
    x, y = as_features(real, "real"), as_features(fake, "fake")
    if len(y) < 20:
        raise ValueError(f"an extrapolation needs at least 20 fakes, got {len(y)}")
    rng, target = np.random.default_rng(seed), Moments.of(x)
    numbers = np.unique(np.linspace(len(y) // 5, len(y), points).astype(int))
    distances = [frechet_distance(target, Moments.of(rng.permutation(y)[:n])) for n in numbers]
    return float(np.polyfit(1.0 / numbers, distances, 1)[1])
