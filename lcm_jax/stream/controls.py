"""What a user may turn while a stream runs: plain values, checked in one place, for Python and for the wire."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from typing import Any, Literal, get_args

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from lcm_jax.diffusion.samplers import Sampler, time_grid
from lcm_jax.diffusion.schedules import Schedule
from lcm_jax.diffusion.time_grids import Spacing
from lcm_jax.stream.prompt_cache import CAPACITY, Blend, Weighted

Guidance = Literal["none", "self", "onetime", "full"]
GRID = 50  # times that t_index counts, LCM's own
MOST_STEPS = 16
MOST_TEXT = 2000  # characters of a prompt


@dataclass(frozen=True, kw_only=True)
class Controls:
    """All of a stream's controls; ValueError names the one that is wrong.

    prompt: one text, or (text, weight) pairs that are blended, by "lerp" or "slerp"; a change of prompt is spread over
    `travel` frames. steps and strength place the times on the sampler's grid of 50 as image-to-image does; t_index
    gives their indices instead (0: noise, 49: almost clean).

    guidance: "none"; "full", classifier-free; "self" and "onetime", residual with the frame, or with what the negative
    prompt made of one, as the negative. scale, delta: see `guidance.residual`; with "none" a network that has a
    w-embedding is told the scale.

    seed: of the noise, or (seed, weight) pairs. add_noise: whether later steps get noise. fresh: new noise for every
    frame. feedback: the share of the last picture in a frame. motion: less noise for what moves.
    similarity: the filter's threshold, None for no filter; max_skips in a row.
    batch: the stream batch, or n evaluations for each frame. remember: self-attention sees the last frame too.
    lora: (name, weight) of adapters the stream was made with; 0 for those not named.
    """

    prompt: str | Weighted = ""
    negative_prompt: str = ""
    blend: Blend = "lerp"
    travel: int = 0
    steps: int = 2
    strength: float = 0.6
    t_index: tuple[int, ...] | None = None
    guidance: Guidance = "none"
    scale: float = 1.0
    delta: float = 1.0
    seed: int | Sequence[tuple[int, float]] = 0
    add_noise: bool = True
    fresh: bool = False
    feedback: float = 0.0
    motion: float = 0.0
    similarity: float | None = None
    max_skips: int = 10
    batch: bool = True
    remember: bool = False
    lora: Sequence[tuple[str, float]] = ()

    def __post_init__(self) -> None:
        for name, kind in _KINDS.items():
            value = getattr(self, name)
            if isinstance(value, np.generic):
                object.__setattr__(self, name, value := value.item())
            if kind is float and type(value) is int and abs(value) < 2**53:
                object.__setattr__(self, name, value := float(value))
            if type(value) is not kind and not (value is None and name in _OPTIONAL):
                raise ValueError(f"{name} is {value!r:.80}: it must be {_NAMES[kind]}")
        for name, (low, high) in _RANGES.items():
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise ValueError(f"{name} is {value!r:.80}: it must be from {low:g} to {high:g}")
        for name, known in (("guidance", Guidance), ("blend", Blend)):
            if getattr(self, name) not in get_args(known):
                raise ValueError(
                    f"{name} {getattr(self, name)!r:.80} is unknown: use one of {', '.join(get_args(known))}"
                )
        object.__setattr__(self, "prompt", _pairs("prompt", self.prompt, str))
        object.__setattr__(self, "seed", _pairs("seed", self.seed, int))
        object.__setattr__(self, "lora", _pairs("lora", self.lora, str, empty=True))
        for text in (self.negative_prompt, *(text for text, _ in self.prompts)):
            if len(text) > MOST_TEXT:
                raise ValueError(f"a prompt has {len(text)} characters: at most {MOST_TEXT} are taken")
            if any("\ud800" <= letter <= "\udfff" for letter in text):
                raise ValueError("a prompt has half a character in it, which no tokenizer takes")
        if self.t_index is not None:
            object.__setattr__(self, "t_index", _indices(self.t_index))
            object.__setattr__(self, "steps", len(self.t_index))

    @property
    def prompts(self) -> Weighted:
        """(text, weight) pairs, the weights above 0."""
        pairs: Any = self.prompt
        return pairs

    @property
    def seeds(self) -> Sequence[tuple[int, float]]:
        """(seed, weight) pairs, the weights above 0."""
        pairs: Any = self.seed
        return pairs

    def changed(self, **changes: Any) -> Controls:
        """With other values; ValueError for a name that is none of them. steps or strength replace a t_index."""
        known = {field.name for field in fields(self)}
        for name in changes:
            if name not in known:
                raise ValueError(f"{name!r:.80} is no control: known are {', '.join(sorted(known))}")
        if "t_index" not in changes and {"steps", "strength"} & set(changes):
            changes["t_index"] = None
        return replace(self, **changes)

    def times(self, sampler: Sampler, schedule: Schedule, spacing: Spacing) -> Float[np.ndarray, " n_plus_1"]:
        """t_0 > ... > t_n: entries of the sampler's grid of 50 steps, and its end."""
        grid = time_grid(sampler.at(GRID, spacing), schedule, GRID, spacing=spacing)
        index = self.t_index
        if index is None:
            start = GRID - max(int(GRID * self.strength), self.steps)
            index = tuple(np.floor(np.linspace(start, GRID, self.steps, endpoint=False)).astype(int))
        return np.append(grid[list(index)], grid[-1]).astype(np.float32)


def blended_noise(draw: Any, seeds: Sequence[tuple[int, float]]) -> Any:
    """sum w_i eps_i / |w|: unit noise again, and for two seeds the arc between them. draw: of a seed."""
    weights = np.array([weight for _, weight in seeds], np.float64)
    weights /= np.linalg.norm(weights)
    return sum(jnp.float32(weight) * draw(seed) for weight, (seed, _) in zip(weights, seeds, strict=True))


_KINDS: Mapping[str, type] = {
    "negative_prompt": str, "blend": str, "guidance": str, "travel": int, "steps": int, "max_skips": int,
    "strength": float, "scale": float, "delta": float, "feedback": float, "motion": float, "similarity": float,
    "add_noise": bool, "fresh": bool, "batch": bool, "remember": bool,
}  # fmt: skip
_OPTIONAL = ("similarity",)
_NAMES = {str: "a text", int: "a whole number", float: "a number", bool: "true or false"}
_RANGES: Mapping[str, tuple[float, float]] = {
    "travel": (0, 1000), "steps": (1, MOST_STEPS), "strength": (0.02, 1.0), "scale": (0.0, 30.0), "delta": (0.0, 10.0),
    "feedback": (0.0, 0.95), "motion": (0.0, 1.0), "similarity": (0.5, 0.9999), "max_skips": (0, 1000),
}  # fmt: skip


def _pairs(name: str, value: Any, kind: type, *, empty: bool = False) -> tuple[tuple[Any, float], ...]:
    """One value, or (value, weight) pairs, as pairs with weights above 0; those of adapters may be of any sign."""
    if type(value) is kind:
        value = [(value, 1.0)]
    try:
        pairs = tuple((key, float(weight)) for key, weight in value)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"{name} is {value!r:.80}: give {_NAMES[kind]}, or a list of pairs with weights") from None
    if any(type(key) is not kind or not math.isfinite(weight) for key, weight in pairs):
        raise ValueError(f"{name} is {value!r:.80}: give {_NAMES[kind]}, or a list of pairs with weights")
    if empty:
        return pairs
    pairs = tuple((key, weight) for key, weight in pairs if weight != 0.0)
    if not 1 <= len(pairs) <= CAPACITY or any(weight < 0.0 for _, weight in pairs):
        raise ValueError(f"{name} has {len(pairs)} weights other than 0: give 1 to {CAPACITY}, all of them above 0")
    if kind is int and any(not 0 <= key < 2**32 for key, _ in pairs):
        raise ValueError(f"{name} is {value!r:.80}: a seed is from 0 to 4294967295")
    return pairs


def _indices(value: Any) -> tuple[int, ...]:
    try:
        index = tuple(int(i) for i in value)
    except (TypeError, ValueError):
        raise ValueError(f"t_index is {value!r:.80}: give whole numbers") from None
    rising = all(a < b for a, b in pairwise(index))
    if not 1 <= len(index) <= MOST_STEPS or not rising or index[0] < 0 or index[-1] >= GRID:
        raise ValueError(f"t_index is {list(index)}: give 1 to {MOST_STEPS} rising indices from 0 to {GRID - 1}")
    return index
