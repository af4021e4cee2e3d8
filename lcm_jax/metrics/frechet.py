"""The Frechet distance of Gaussians fitted to features (Heusel 2017, arXiv:1706.08500, eq. 6), in float64 on the host.

Statistics form a monoid: `Moments.of(a).merge(Moments.of(b))` are the moments of `a` and `b` together, so shards,
hosts and batches may be combined in any order.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

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


@dataclass(frozen=True, eq=False)
class Influence:
    """A score of two sets, and how much each sample moves it: the first-order change as its weight grows.

    With counts c and d of a resampled set the score is about value + c . real / n + d . fake / m, so its bootstrap is
    that of two means. The counts of a bootstrap would themselves make a Frechet distance larger: a resampled set has
    fewer different samples. This does not, and costs one decomposition rather than one for each resampled set.

    >>> import numpy as np
    >>> from lcm_jax.metrics.frechet import Influence
    >>> Influence(2.0, np.array([1.0, -1.0]), np.zeros(1))(np.array([[1.0, 1.0], [2.0, 0.0]]), np.ones((2, 1))).tolist()
    [2.0, 3.0]
    """

    value: float
    real: Float[np.ndarray, " n"]
    fake: Float[np.ndarray, " m"]

    def __call__(
        self, real_counts: Float[np.ndarray, "r n"], fake_counts: Float[np.ndarray, "r m"]
    ) -> Float[np.ndarray, " r"]:
        """Return the score of r resampled pairs of sets, to first order."""
        return self.value + real_counts @ self.real / len(self.real) + fake_counts @ self.fake / len(self.fake)


def frechet_influence(real: Float[np.ndarray, "n d"], fake: Float[np.ndarray, "m d"]) -> Influence:
    """Return the Frechet distance of two sets with the influence of each sample on it.

    The gradient of the distance is 2 (m1 - m2) in m1 and I - T in S1, where T = S1^(-1/2) (S1^(1/2) S2 S1^(1/2))^(1/2)
    S1^(-1/2) carries one Gaussian to the other; so a real x with y = x - m1 has the influence 2 y . (m1 - m2) + y . y -
    y . T y, less the mean over the reals, and a fake the same with the sets exchanged. Where there are fewer samples
    than dimensions, T is taken on the span of the samples. ValueError as `frechet_distance` raises it.

    >>> import numpy as np
    >>> from lcm_jax.metrics import Moments, frechet_distance
    >>> from lcm_jax.metrics.frechet import frechet_influence
    >>> x, y = np.random.default_rng(0).normal(size=(2, 50, 3)) * np.array([[[1.0]], [[2.0]]])
    >>> found, plain = frechet_influence(x, y), frechet_distance(Moments.of(x), Moments.of(y))
    >>> bool(np.isclose(found.value, plain)), found.fake.shape
    (True, (50,))
    """
    x, y = _pair(real, fake)
    shift = x.mean(axis=0) - y.mean(axis=0)
    x, y = x - x.mean(axis=0), y - y.mean(axis=0)
    of_x, of_y = _root(x), _root(y)
    u, values, vt = np.linalg.svd(of_x.factor.T @ of_y.factor, full_matrices=False)
    scatter = sum(np.square(z).sum() / (len(z) - 1) for z in (x, y))
    value = max(float(shift @ shift + scatter - 2.0 * values.sum()), 0.0)

    def influence(
        z: Float[np.ndarray, "k d"], away: Float[np.ndarray, " d"], other: np.ndarray, inverse: np.ndarray
    ) -> Float[np.ndarray, " k"]:
        carried = ((z @ other) * (z @ inverse)).sum(axis=1)  # z . T z = (F2 V)^T z . (G1 U)^T z
        moved = 2.0 * z @ away + np.square(z).sum(axis=1) - carried
        return moved - moved.mean()

    return Influence(
        value,
        influence(x, shift, of_y.factor @ vt.T, of_x.inverse @ u),
        influence(y, -shift, of_x.factor @ u, of_y.inverse @ vt.T),
    )


class _Root(NamedTuple):
    factor: Float[np.ndarray, "d r"]  # F with F F^T = S
    inverse: Float[np.ndarray, "d r"]  # F^(-T) on the span of F


def _root(centred: Float[np.ndarray, "n d"]) -> _Root:
    """Return the factors of the covariance of centred features; time is n d min(n, d)."""
    n, d = centred.shape
    if n < d:
        _, sizes, rows = np.linalg.svd(centred / np.sqrt(n - 1), full_matrices=False)
        variances, axes = np.square(sizes), rows.T
    else:
        variances, axes = np.linalg.eigh(centred.T @ centred / (n - 1))
    keep = variances > variances.max(initial=0.0) * d * np.finfo(np.float64).eps
    scale = np.sqrt(variances[keep])
    return _Root(axes[:, keep] * scale, axes[:, keep] / scale)


def _pair(real: Float[np.ndarray, "n d"], fake: Float[np.ndarray, "m d"]) -> tuple[np.ndarray, np.ndarray]:
    x, y = as_features(real, "real"), as_features(fake, "fake")
    if x.shape[1] != y.shape[1]:
        raise ValueError(f"feature dimensions differ: real {x.shape[1]}, fake {y.shape[1]}")
    if min(len(x), len(y)) < 2:
        raise ValueError(f"a covariance needs at least 2 samples, got {len(x)} real and {len(y)} fake")
    return x, y


FEWEST = 20  # fakes of which the distance is extrapolated


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
    return _extrapolate(real, fake, points=points, seed=seed)[0]


def infinity_influence(
    real: Float[np.ndarray, "n d"], fake: Float[np.ndarray, "m d"], plain: Influence, *, points: int = 15, seed: int = 0
) -> Influence:
    """Return `frechet_infinity` with the influence of each sample. plain: that of the distance itself.

    The value at 1 / N = 0 is sum_j w_j FD_j with weights w of the least squares, so a fake has sum_j w_j m / N_j of its
    influence, over the subsets j that hold it. ValueError for fewer than 20 fakes.

    >>> import numpy as np
    >>> from lcm_jax.metrics.frechet import frechet_infinity, frechet_influence, infinity_influence
    >>> x, y = np.random.default_rng(0).normal(size=(2, 200, 3))
    >>> found = infinity_influence(x, y, frechet_influence(x, y))
    >>> found.value == frechet_infinity(x, y), found.real.shape
    (True, (200,))
    """
    value, shares = _extrapolate(real, fake, points=points, seed=seed)
    moved = plain.fake * shares
    return Influence(value, plain.real, moved - moved.mean())


def _extrapolate(
    real: Float[np.ndarray, "n d"], fake: Float[np.ndarray, "m d"], *, points: int, seed: int
) -> tuple[float, Float[np.ndarray, " m"]]:
    """Return the distance at 1 / N = 0 and the share that each fake has in it, m in all."""
    x, y = _pair(real, fake)
    if len(y) < FEWEST:
        raise ValueError(f"an extrapolation needs at least {FEWEST} fakes, got {len(y)}")
    centre, rng = x.mean(axis=0), np.random.default_rng(seed)
    x, y = x - centre, y - centre
    mapped = y @ _root(x).factor  # the overlap Tr (S1 S2)^(1/2) is the sum of its centred singular values
    scatter = np.square(x).sum() / (len(x) - 1)
    numbers = np.unique(np.linspace(len(y) // 5, len(y), points).astype(int))
    subsets = [rng.permutation(len(y))[:n] for n in numbers]
    distances = []
    for chosen in subsets:
        mean, n = y[chosen].mean(axis=0), len(chosen)
        within = np.square(y[chosen] - mean).sum() / (n - 1)
        overlap = _nuclear_norm(mapped[chosen] - mapped[chosen].mean(axis=0)) / np.sqrt(n - 1)
        distances.append(mean @ mean + scatter + within - 2.0 * overlap)
    line = np.stack([np.ones(len(numbers)), 1.0 / numbers], axis=1)
    weights = np.linalg.pinv(line)[0]
    shares = np.zeros(len(y))
    for weight, chosen in zip(weights, subsets, strict=True):
        shares[chosen] += weight * len(y) / len(chosen)
    return float(weights @ distances), shares


def _nuclear_norm(x: Float[np.ndarray, "n r"]) -> float:
    """Return the sum of the singular values, from the smaller Gram matrix: to about 1e-7 of the largest one."""
    gram = x @ x.T if len(x) < x.shape[1] else x.T @ x
    return float(np.sqrt(np.maximum(np.linalg.eigvalsh(gram), 0.0)).sum())
