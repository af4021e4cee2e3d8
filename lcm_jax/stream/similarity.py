"""The stochastic similarity filter (StreamDiffusion, 2312.12491 section 3.4): a still scene is not drawn again.

The paper compares whole frames by the cosine, which a thin stroke on white hardly moves. Here two frames differ as much
as their most different tile: similarity = 1 - max over tiles of the mean |a - b| / 255.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from jaxtyping import UInt8

TILE = 8  # pixels; a line of one pixel through a tile changes an eighth of it


def similarity(a: UInt8[np.ndarray, "*f h w 3"], b: UInt8[np.ndarray, "*f h w 3"]) -> float:
    """1 for equal frames, 0 where some tile goes from black to white."""
    if a.shape != b.shape:
        return 0.0
    change = np.abs(a.astype(np.int16) - b).mean(axis=-1, dtype=np.float32)
    height, width = change.shape[-2:]
    rows, columns = np.arange(0, height, TILE), np.arange(0, width, TILE)
    sums = np.add.reduceat(np.add.reduceat(change, rows, axis=-2), columns, axis=-1)
    areas = np.outer(np.minimum(TILE, height - rows), np.minimum(TILE, width - columns))
    return 1.0 - float((sums / areas).max()) / 255.0


@dataclass(kw_only=True)
class SimilarityFilter:
    """Which frames to leave out: with probability max(0, 1 - (1 - similarity) / (1 - threshold)), at most max_skips in
    a row.

    A frame is compared with the last one that was drawn. After one that differs by more than the threshold from that of
    the last such event, `in_flight` more are drawn: it would wait in the stream batch, and what has moved would stand
    still half way.
    """

    threshold: float = 0.98
    max_skips: int = 10
    seed: int = 0
    drawn: int = 0
    skipped: int = 0
    _last: np.ndarray | None = field(default=None, repr=False)
    _anchor: np.ndarray | None = field(default=None, repr=False)  # the last that differed
    _row: int = 0  # skips in a row
    _owed: int = 0  # calls until what differed has left

    def __post_init__(self) -> None:
        self._random = np.random.default_rng(self.seed)

    def skip(self, frame: UInt8[np.ndarray, "*f h w 3"], in_flight: int = 0) -> bool:
        """Whether to leave this frame out. in_flight: calls between a frame's own and that which gives its picture."""
        alike = 0.0 if self._last is None else similarity(frame, self._last)
        chance = 1.0 - (1.0 - alike) / (1.0 - self.threshold)
        if self._owed == 0 and self._row < self.max_skips and self._random.random() < chance:
            self._row += 1
            self.skipped += 1
            return True
        self._owed = max(self._owed - 1, 0)
        if self._anchor is None or similarity(frame, self._anchor) <= self.threshold:
            self._owed, self._anchor = in_flight, frame
        self._row, self._last = 0, frame
        self.drawn += 1
        return False

    def restart(self) -> None:
        """As new, but for what has been counted."""
        self._random, self._last, self._anchor = np.random.default_rng(self.seed), None, None
        self._row = self._owed = 0

    def forget(self) -> None:
        """The next frame counts as different: something else than the frame has changed."""
        self._last = self._anchor = None

    @property
    def saved(self) -> float:
        """The share of frames that were left out."""
        return self.skipped / max(self.drawn + self.skipped, 1)
