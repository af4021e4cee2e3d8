"""Sizes for pictures of different shapes, all of about the same number of pixels (SD3, arXiv:2403.03206, section 5.3.2:
every batch is of one size H x W with H W ~ S^2; the idea is NovelAI's, and SDXL's, 2307.01952, section 2.3).

The areas are nearly equal, so one schedule serves all buckets: `diffusion.schedules.at_resolution` of side^2 pixels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from lcm_jax.runtime.image_io import Size


def bucket_sizes(side: int, multiple: int = 16, aspect: float = 2.0) -> tuple[Size, ...]:
    """Sizes (height, width) in pixels, from the widest to the tallest: multiples of `multiple`, at most side^2 pixels.

    There is one for every shorter side s <= `side`: its longer side is the longest l with s l <= side^2, and the bucket
    is left out where l > aspect s. So side x side is always there, with every size its transpose, and no area is below
    side^2 - multiple s: another row along the shorter side would be too much.

    multiple: 16 for SD3 (the VAE's factor 8 times patches of 2). Each bucket that has pictures is one compilation of
    the training step: 1024 pixels have 37 buckets up to an aspect of 2, but 9 of multiple = 64, which is SDXL's.
    Raises ValueError where side is no multiple of it, as where it exceeds the side, or where the aspect is below 1.
    """
    if side < 1 or multiple < 1 or side % multiple:
        raise ValueError(f"buckets: size={side} must be a positive multiple of multiple={multiple}; change one of them")
    if not 1.0 <= aspect < math.inf:
        raise ValueError(f"buckets: aspect={aspect} is the longer side over the shorter: give a number of at least 1")
    units = side // multiple
    pairs = [(short, units**2 // short) for short in range(1, units + 1)]
    wide = [(short * multiple, long * multiple) for short, long in pairs if long <= aspect * short]
    return (*wide, *((width, height) for height, width in reversed(wide) if height != width))


def nearest_bucket(sizes: Sequence[Size], picture: Size) -> Size:
    """The size whose log(height / width) is nearest the picture's, the first of two equally near.

    A picture more extreme than all buckets goes to the most extreme, and loses its ends to the crop.
    """
    shape = _shape(picture)
    return min(sizes, key=lambda size: abs(_shape(size) - shape))


def _shape(size: Size) -> float:
    return math.log(size[0] / size[1])
