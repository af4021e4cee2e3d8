"""What the tasks share: the pictures they read and the grids they show."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from einops import rearrange
from jaxtyping import UInt8

from lcm_jax.data import Loader, LoaderIterator, Source, load_source
from lcm_jax.data.loader import Transform


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Captioned pictures: "openmoji", "folder:PATH" or "tfds:NAME"."""

    name: str = "openmoji"
    split: str = "train"
    size: int = 64  # pixels

    def open(self) -> Source:
        return load_source(self.name, self.split, self.size)


def captions(source: Source, most: int | None = None) -> list[str]:
    """The first captions of a source, or all."""
    count = len(source) if most is None else min(most, len(source))
    return [source[i]["caption"] for i in range(count)]


def loader(source: Any, transform: Transform | None = None) -> Callable[[int, int], LoaderIterator]:
    """(batch size, seed) -> resumable iterator over random-access records, each passed through `transform`."""
    return lambda batch_size, seed: iter(Loader(source, batch_size, seed, transform=transform))


def grid(images: UInt8[np.ndarray, "n h w c"], columns: int) -> UInt8[np.ndarray, "H W c"]:
    """Rows of at most `columns` pictures as one picture, white where the last row ends early."""
    columns = min(columns, len(images))
    missing = -len(images) % columns
    filled = np.pad(images, [(0, missing), (0, 0), (0, 0), (0, 0)], constant_values=255)
    return rearrange(filled, "(r q) h w c -> (r h) (q w) c", q=columns)
