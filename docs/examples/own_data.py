"""A data source in a file of your own: squares and discs of eight colours, drawn as they are asked for.

The file registers the source, so `--import` makes its name known to any command:

    lcm-jax train --import docs/examples/own_data.py --config openmoji_teacher --task.data.name shapes:all
    lcm-jax encode --import docs/examples/own_data.py --data shapes:discs --out encoded
"""

from __future__ import annotations

import numpy as np

from lcm_jax import data

COLOURS = {"red": (220, 40, 40), "green": (40, 160, 60), "blue": (50, 80, 220), "yellow": (240, 210, 40)}
COLOURS |= {"black": (0, 0, 0), "orange": (240, 140, 30), "purple": (140, 60, 180), "grey": (128, 128, 128)}


class Shapes:
    """Random access to records {"image": uint8 (size, size, 3), "caption": text}, which is all that a source is."""

    def __init__(self, forms: tuple[str, ...], size: int) -> None:
        self.size = size
        self.records = [(colour, form) for form in forms for colour in COLOURS]

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int, /) -> data.Record:
        colour, form = self.records[index]
        y, x = np.mgrid[-1 : 1 : self.size * 1j, -1 : 1 : self.size * 1j]
        inside = (np.hypot(x, y) if form == "disc" else np.maximum(abs(x), abs(y))) < 0.7
        image = np.where(inside[..., None], np.uint8(COLOURS[colour]), np.uint8(255))
        return {"image": image.astype(np.uint8), "caption": f"{colour} {form}"}


def open_shapes(text: str, split: str, size: int) -> Shapes:
    """Open "shapes:all", "shapes:discs" or "shapes:squares"; every split is the same."""
    forms = {"all": ("disc", "square"), "discs": ("disc",), "squares": ("square",)}
    if text not in forms:
        raise ValueError(f"shapes:{text}: give shapes:{', shapes:'.join(forms)}")
    return Shapes(forms[text], size)


data.register("shapes", open_shapes)
