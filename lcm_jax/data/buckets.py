"""Buckets: sizes for pictures of different shapes, all with about the same number of pixels.

Every batch has one size H x W with H W ~ S^2 (SD3, arXiv:2403.03206, section 5.3.2); the idea is NovelAI's, and SDXL's
(2307.01952, section 2.3). The areas are nearly equal, so one schedule serves all buckets:
`diffusion.schedules.at_resolution` of side^2 pixels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from lcm_jax.runtime.image_io import Size


def bucket_sizes(side: int, multiple: int = 16, aspect: float = 2.0) -> tuple[Size, ...]:
    """Return the bucket sizes (height, width) in pixels, from the widest to the tallest, of at most side^2 pixels.

    Both sides are multiples of `multiple`. There is one size for every shorter side s <= `side`: its longer side is the
    longest l with s l <= side^2, and the size is left out if l > aspect s. So side x side is always included, every
    size comes with its transpose, and no area is below side^2 - multiple s, since one more step of the longer side
    would exceed side^2.

    multiple: 16 for SD3 (the VAE's factor 8 times patches of 2). Each bucket that has pictures is one compilation of
    the training step: a side of 1024 has 37 buckets up to an aspect of 2, but only 9 with multiple = 64, SDXL's.
    aspect: the largest ratio of the longer side to the shorter.

    Raises ValueError if `side` is not a multiple of `multiple`, or if the aspect is below 1.

    >>> from lcm_jax.data import bucket_sizes
    >>> bucket_sizes(64, multiple=16)
    ((48, 80), (64, 64), (80, 48))
    >>> len(bucket_sizes(1024)), len(bucket_sizes(1024, multiple=64))
    (37, 9)
    """
    if side < 1 or multiple < 1 or side % multiple:
        raise ValueError(
            f"buckets: size={side} must be a positive multiple of multiple={multiple}; change one of the two"
        )
    if not 1.0 <= aspect < math.inf:
        raise ValueError(f"buckets: aspect={aspect} is the longer side over the shorter; give a number of at least 1")
    units = side // multiple
    pairs = [(short, units**2 // short) for short in range(1, units + 1)]
    wide = [(short * multiple, long * multiple) for short, long in pairs if long <= aspect * short]
    return (*wide, *((width, height) for height, width in reversed(wide) if height != width))


def nearest_bucket(sizes: Sequence[Size], picture: Size) -> Size:
    """Return the size whose log(height / width) is nearest to the picture's, the first of two equally near ones.

    A picture longer than all buckets gets the longest, and the crop cuts off its ends.

    >>> from lcm_jax.data.buckets import bucket_sizes, nearest_bucket
    >>> nearest_bucket(bucket_sizes(64), (600, 1000))
    (48, 80)
    """
    shape = _log_aspect(picture)
    return min(sizes, key=lambda size: abs(_log_aspect(size) - shape))


def _log_aspect(size: Size) -> float:
    return math.log(size[0] / size[1])
