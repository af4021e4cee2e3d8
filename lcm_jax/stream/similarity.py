"""The stochastic similarity filter (StreamDiffusion, 2312.12491 section 3.4): a still scene is not drawn again.

The paper compares entire frames by their cosine similarity, which a thin stroke on white hardly changes. Here two
frames differ as much as their most different tile: similarity = 1 - max over tiles of the mean |a - b| / 255.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from jaxtyping import UInt8

TILE = 8  # pixels; a line of one pixel through a tile changes an eighth of it


def similarity(a: UInt8[np.ndarray, "*f h w 3"], b: UInt8[np.ndarray, "*g i j 3"]) -> float:
    """Return 1 - max over tiles of 8 x 8 pixels of the mean |a - b| / 255.

    It is 1 for equal frames, and 0 if a tile goes from black to white or the frames have different shapes.

    >>> import numpy as np
    >>> black = np.zeros((16, 16, 3), np.uint8)
    >>> dot, tile = black.copy(), black.copy()
    >>> dot[0, 0], tile[:8, :8] = 255, 255
    >>> similarity(black, black), similarity(black, dot), similarity(black, tile)
    (1.0, 0.984375, 0.0)
    """
    if a.shape != b.shape:
        return 0.0
    change = np.abs(a.astype(np.int16) - b).mean(axis=-1, dtype=np.float32)
    height, width = change.shape[-2:]
    tops, lefts = np.arange(0, height, TILE), np.arange(0, width, TILE)
    sums = np.add.reduceat(np.add.reduceat(change, tops, axis=-2), lefts, axis=-1)
    areas = np.outer(np.minimum(TILE, height - tops), np.minimum(TILE, width - lefts))
    return 1.0 - float((sums / areas).max()) / 255.0


@dataclass(kw_only=True)
class SimilarityFilter:
    """A similarity filter: it skips frames at random if they are like the last drawn one, at most max_skips in a row.

    P(skip) = max(0, 1 - (1 - similarity) / (1 - threshold)), with the similarity to the last frame that was drawn.

    A frame whose similarity to the last changed frame is at most the threshold is a changed frame itself. The next
    `in_flight` frames are then drawn in any case: otherwise the changed frame would stay in the stream batch, and
    movement would stop half way on the output.

    drawn, skipped: counts of frames. seed: of the random skips.

    >>> import numpy as np
    >>> still = np.zeros((16, 16, 3), np.uint8)
    >>> filter = SimilarityFilter(threshold=0.98, max_skips=2)
    >>> [filter.skip(still) for _ in range(5)]
    [False, True, True, False, True]
    >>> filter.saved
    0.6
    """

    threshold: float = 0.98
    max_skips: int = 10
    seed: int = 0
    drawn: int = 0
    skipped: int = 0
    _last: np.ndarray | None = field(default=None, repr=False)
    _changed: np.ndarray | None = field(default=None, repr=False)  # the last changed frame
    _skips_in_row: int = 0
    _forced_draws: int = 0  # calls until the changed frame has left the stream batch

    def __post_init__(self) -> None:
        self._random = np.random.default_rng(self.seed)

    def skip(self, frame: UInt8[np.ndarray, "*f h w 3"], in_flight: int = 0) -> bool:
        """Return whether to skip this frame, and count it.

        in_flight: calls between the one that takes a frame and the one that returns its picture.
        """
        alike = 0.0 if self._last is None else similarity(frame, self._last)
        probability = 1.0 - (1.0 - alike) / (1.0 - self.threshold)
        may_skip = self._forced_draws == 0 and self._skips_in_row < self.max_skips
        if may_skip and self._random.random() < probability:
            self._skips_in_row += 1
            self.skipped += 1
            return True
        self._forced_draws = max(self._forced_draws - 1, 0)
        if self._changed is None or similarity(frame, self._changed) <= self.threshold:
            self._forced_draws, self._changed = in_flight, frame
        self._skips_in_row, self._last = 0, frame
        self.drawn += 1
        return False

    def restart(self) -> None:
        """Return to the initial state, but keep the counts."""
        self._random, self._last, self._changed = np.random.default_rng(self.seed), None, None
        self._skips_in_row = self._forced_draws = 0

    def forget(self) -> None:
        """Draw the next frame in any case, as something other than the frame has changed."""
        self._last = self._changed = None

    @property
    def saved(self) -> float:
        """The share of frames that were skipped."""
        return self.skipped / max(self.drawn + self.skipped, 1)
