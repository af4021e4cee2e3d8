"""Many pictures in one: a plain grid, and a grid with a title over each column and a label beside each row."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from einops import rearrange
from jaxtyping import UInt8
from PIL import Image as PILImage
from PIL import ImageDraw, ImageFont


def labelled_grid(
    titles: Sequence[str], labels: Sequence[str], strips: Sequence[UInt8[np.ndarray, "n h w 3"]], zoom: int = 2
) -> PILImage.Image:
    """Return a table of pictures of one size, one row for each label and one column for each title and strip.

    strips: for each column its pictures from top to bottom. zoom: the factor by which pictures are enlarged.

    >>> import numpy as np
    >>> strip = np.zeros((2, 16, 16, 3), np.uint8)
    >>> labelled_grid(["teacher", "student"], ["red heart", "cat face"], [strip, strip]).size
    (366, 124)
    """
    height, width = (side * zoom for side in strips[0].shape[1:3])
    font = ImageFont.load_default(size=15)
    gap, left, top = 6, 290, 48
    canvas = PILImage.new("RGB", (left + len(strips) * (width + gap), top + len(labels) * (height + gap)), "white")
    draw = ImageDraw.Draw(canvas)
    for j, (title, strip) in enumerate(zip(titles, strips, strict=True)):
        x = left + j * (width + gap)
        draw.multiline_text((x + width / 2, top / 2), title, fill="black", font=font, anchor="mm", align="center")
        for i, picture in enumerate(strip):
            tile = PILImage.fromarray(picture).resize((width, height), PILImage.Resampling.LANCZOS)
            canvas.paste(tile, (x, top + i * (height + gap)))
    for i, label in enumerate(labels):
        y = top + i * (height + gap) + height / 2
        draw.multiline_text((left - 12, y), label, fill="black", font=font, anchor="rm", align="right")
    return canvas


def grid(images: UInt8[np.ndarray, "n h w c"], columns: int) -> UInt8[np.ndarray, "H W c"]:
    """Return pictures as one, in rows of at most `columns`, white where the last row ends early.

    >>> import numpy as np
    >>> grid(np.zeros((3, 8, 8, 3), np.uint8), columns=2).shape
    (16, 16, 3)
    """
    columns = min(columns, len(images))
    missing = -len(images) % columns
    filled = np.pad(images, [(0, missing), (0, 0), (0, 0), (0, 0)], constant_values=255)
    return rearrange(filled, "(r q) h w c -> (r h) (q w) c", q=columns)
