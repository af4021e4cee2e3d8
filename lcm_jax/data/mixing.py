"""Two captions to a picture: the one it came with, and a synthetic one (SD3, arXiv:2403.03206, section 5.2.2)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

SYNTHETIC = "synthetic_"
"""What a field is called that stands in for another: synthetic_caption for caption, synthetic_context for context."""


@dataclass(frozen=True, kw_only=True)
class CaptionMix:
    """Takes the synthetic fields of a record in place of their namesakes, all together, with probability `rate`.

    A `Loader`'s augment. The fields may be texts or what was encoded of them, so a cache that holds both encodings is
    mixed at loading as a source of texts is, and only the chosen one is batched.
    """

    rate: float = 0.5

    def __post_init__(self) -> None:
        if not 0.0 <= self.rate <= 1.0:
            raise ValueError(f"rate is {self.rate}: the share of synthetic captions lies between 0 and 1")

    def __call__(self, record: Mapping[str, Any], random: np.random.Generator) -> dict[str, Any]:
        plain = {name: value for name, value in record.items() if not name.startswith(SYNTHETIC)}
        other = {name.removeprefix(SYNTHETIC): record[name] for name in record if name.startswith(SYNTHETIC)}
        if not other or not other.keys() <= plain.keys():
            raise ValueError(
                f"record with the fields {', '.join(record)}: no synthetic captions to mix in; give it both"
            )
        return plain | other if random.random() < self.rate else plain
