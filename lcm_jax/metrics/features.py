"""From pictures to features: any network as a `FeatureExtractor`, in batches of one size and one compilation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from lcm_jax.typing import Params


class FeatureExtractor(Protocol):
    """Pictures (n, h, w, 3) of uint8 -> features (n, d) of float32, row by row."""

    def __call__(self, images: UInt8[np.ndarray, "n h w 3"]) -> Float[np.ndarray, "n d"]: ...


@dataclass(frozen=True, kw_only=True, eq=False)
class NetworkFeatures:
    """A network as a `FeatureExtractor`.

    apply: (params, images (batch_size, h, w, 3) in [-1, 1]) -> features (batch_size, ...), then flattened to
    (batch_size, d). It does its own resizing and normalisation, and is compiled once for each picture size; the last
    batch is padded.
    """

    apply: Callable[[Params, Float[Array, "b h w 3"]], Float[Array, "b ..."]]
    params: Params
    batch_size: int = 32
    _run: Callable[[Params, UInt8[np.ndarray, "b h w 3"]], Array] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {self.batch_size}")

        def run(params: Params, images: UInt8[Array, "b h w 3"]) -> Float[Array, "b d"]:
            features = self.apply(params, images.astype(jnp.float32) / 127.5 - 1.0)
            return features.reshape(images.shape[0], -1).astype(jnp.float32)

        object.__setattr__(self, "_run", jax.jit(run))

    def __call__(self, images: UInt8[np.ndarray, "n h w 3"]) -> Float[np.ndarray, "n d"]:
        images = np.asarray(images)
        if images.ndim != 4 or images.shape[-1] != 3 or images.dtype != np.uint8:
            raise ValueError(f"expected pictures (n, h, w, 3) of uint8, got {images.shape} of {images.dtype}")
        if not len(images):
            raise ValueError("no pictures to take features of")
        parts = []
        for start in range(0, len(images), self.batch_size):
            batch = images[start : start + self.batch_size]
            padding = [(0, self.batch_size - len(batch)), (0, 0), (0, 0), (0, 0)]
            parts.append(np.asarray(self._run(self.params, np.pad(batch, padding)))[: len(batch)])
        return np.concatenate(parts)
