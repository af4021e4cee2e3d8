"""Features of pictures: any network as a `FeatureExtractor`, compiled once for batches of one size."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from lcm_jax.typing import Params


@runtime_checkable
class FeatureExtractor(Protocol):
    """A function from n pictures to n features: uint8 (n, h, w, 3) -> float32 (n, d).

    >>> import numpy as np
    >>> from lcm_jax.metrics import FeatureExtractor
    >>> mean_colour: FeatureExtractor = lambda images: images.mean(axis=(1, 2), dtype=np.float32)
    >>> mean_colour(np.full((2, 4, 4, 3), 255, np.uint8)).tolist()
    [[255.0, 255.0, 255.0], [255.0, 255.0, 255.0]]
    """

    def __call__(self, images: UInt8[np.ndarray, "n h w 3"]) -> Float[np.ndarray, "n d"]:
        """Return one feature for each picture, in the same order."""
        ...


@dataclass(frozen=True, kw_only=True, eq=False)
class NetworkFeatures:
    """A network as a `FeatureExtractor`: features = apply(params, images / 127.5 - 1).

    apply: (params, images (batch_size, h, w, 3) in [-1, 1]) -> features (batch_size, ...), which are then flattened to
    (batch_size, d). It has to resize and normalise the pictures itself. It is compiled once for each picture size; the
    last batch is padded with black pictures. distance: the name of the Frechet distance on these features, such as FID.

    Raises ValueError if `batch_size` is below 1.

    >>> import numpy as np
    >>> from lcm_jax.metrics import NetworkFeatures
    >>> def double_mean_colour(params, images):
    ...     return params * images.mean(axis=(1, 2))
    >>> extract = NetworkFeatures(apply=double_mean_colour, params=np.array(2.0), batch_size=4)
    >>> features = extract(np.full((5, 8, 8, 3), 255, np.uint8))
    >>> features.shape, features[0].round(3).tolist()
    ((5, 3), [2.0, 2.0, 2.0])
    """

    apply: Callable[[Params, Float[Array, "b h w 3"]], Float[Array, "b ..."]]
    params: Params
    batch_size: int = 32
    distance: str = "FD"
    _run: Callable[[Params, UInt8[np.ndarray, "b h w 3"]], Array] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        """Check `batch_size` and prepare the compiled call."""
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {self.batch_size}")

        def run(params: Params, images: UInt8[Array, "b h w 3"]) -> Float[Array, "b d"]:
            features = self.apply(params, images.astype(jnp.float32) / 127.5 - 1.0)
            return features.reshape(images.shape[0], -1).astype(jnp.float32)

        object.__setattr__(self, "_run", jax.jit(run))

    def __call__(self, images: UInt8[np.ndarray, "n h w 3"]) -> Float[np.ndarray, "n d"]:
        """Return the features of n >= 1 pictures; raise ValueError unless they are uint8 of shape (n, h, w, 3)."""
        images = np.asarray(images)
        if images.ndim != 4 or images.shape[-1] != 3 or images.dtype != np.uint8:
            raise ValueError(f"expected pictures (n, h, w, 3) of uint8, got {images.shape} of {images.dtype}")
        if not len(images):
            raise ValueError("no pictures to take features of")
        features = []
        for start in range(0, len(images), self.batch_size):
            batch = images[start : start + self.batch_size]
            padding = [(0, self.batch_size - len(batch)), (0, 0), (0, 0), (0, 0)]
            features.append(np.asarray(self._run(self.params, np.pad(batch, padding)))[: len(batch)])
        return np.concatenate(features)


def resize_as_pil(images: Float[Array, "b h w 3"], height: int, width: int) -> Float[Array, "b i j 3"]:
    """Return pictures in [-1, 1] resized as PIL does it: bicubic, antialiased where smaller, in 256 levels again.

    First the width is changed and then the height, each with Keys' kernel (a = -1/2) and rounded to the levels. (Pillow
    13 may take the height first, which is another picture only where the first pass leaves the 256 levels.)

    >>> import jax.numpy as jnp
    >>> from lcm_jax.metrics.features import resize_as_pil
    >>> resize_as_pil(jnp.ones((1, 4, 4, 3)), 2, 2)[0, 0, 0].tolist()
    [1.0, 1.0, 1.0]
    """
    b, h, _, c = images.shape
    for shape in ((b, h, width, c), (b, height, width, c)):
        if images.shape != shape:
            resized = jax.image.resize(images, shape, "bicubic", antialias=True)
            images = jnp.clip(jnp.round((resized + 1.0) * 127.5), 0.0, 255.0) / 127.5 - 1.0
    return images
