"""Pictures with two captions, their own and a synthetic one, mixed in training (SD3, 2403.03206, section 5.2.2)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

SYNTHETIC = "synthetic_"
"""The prefix of a field that can replace another: synthetic_caption for caption, synthetic_context for context."""


@dataclass(frozen=True, kw_only=True)
class CaptionMix:
    """An augmentation of a `Loader` that replaces a record's fields by its synthetic ones with probability `rate`.

    All synthetic fields are taken together, or none. They may be texts or their encodings, so a cache that holds both
    encodings is mixed at loading just as a source of texts is, and only the chosen one is batched.

    rate: from 0 to 1, else ValueError.

    >>> import numpy as np
    >>> from lcm_jax.data import CaptionMix
    >>> record = {"caption": "a cat", "synthetic_caption": "a grey cat on a chair"}
    >>> CaptionMix(rate=1.0)(record, np.random.default_rng(0))
    {'caption': 'a grey cat on a chair'}
    >>> CaptionMix(rate=0.0)(record, np.random.default_rng(0))
    {'caption': 'a cat'}
    """

    rate: float = 0.5

    def __post_init__(self) -> None:
        if not 0.0 <= self.rate <= 1.0:
            raise ValueError(f"rate is {self.rate}: give the share of synthetic captions, from 0 to 1")

    def __call__(self, record: Mapping[str, Any], random: np.random.Generator) -> dict[str, Any]:
        """Return the record with one caption; raise ValueError if it has no synthetic fields or only those."""
        plain = {name: value for name, value in record.items() if not name.startswith(SYNTHETIC)}
        synthetic = {name.removeprefix(SYNTHETIC): record[name] for name in record if name.startswith(SYNTHETIC)}
        if not synthetic or not synthetic.keys() <= plain.keys():
            raise ValueError(
                f"record with the fields {', '.join(record)}: no synthetic captions to mix in; give it both captions"
            )
        return plain | synthetic if random.random() < self.rate else plain
