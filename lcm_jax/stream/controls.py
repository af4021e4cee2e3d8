"""The controls that change while a stream runs: plain values, checked in one place, for Python and the WebSocket."""

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
GRID = 50  # times of the grid that t_index counts in, as many as LCM was distilled with
MOST_STEPS = 16
MOST_TEXT = 2000  # characters of a prompt


@dataclass(frozen=True, kw_only=True)
class Controls:
    """The controls of a stream; a wrong value raises ValueError, which names the control.

    prompt: one text, or (text, weight) pairs, which `blend` mixes by "lerp" or "slerp". travel: frames over which a
    change of prompt is spread. negative_prompt: of guidance "full" and "onetime".

    steps: n, the denoising steps of a frame. strength: in [0.02, 1], how much noise a frame is given. They place the
    times on the sampler's grid of 50 as image-to-image does; t_index gives their indices instead (0: noise, 49: almost
    clean).

    guidance: "none"; "full", classifier-free guidance, two rows of the network for each frame; or residual
    classifier-free guidance (RCFG, StreamDiffusion, 2312.12491 section 3.2), one row: "self", self-negative, has the
    frame itself as the negative, and "onetime", onetime-negative, what the negative prompt made of one frame. scale,
    delta: see `guidance.residual_cfg`; with "none" the scale is an input of networks that have a w-embedding.

    seed: of the noise, or (seed, weight) pairs. add_noise: whether later steps add noise. fresh: draw new noise for
    every frame. feedback: share of the last picture in the next frame's latents, in [0, 0.95]. motion: in [0, 1], how
    much less noise moving frames are given.

    similarity: threshold of the similarity filter, in [0.5, 0.9999]; None for no filter. max_skips: skipped frames in
    a row. batch: evaluate the network once a frame for all frames in flight (the stream batch, section 3.1), or n times
    for each frame. remember: self-attention sees the last frame's tokens too.

    lora: (name, weight) pairs of adapters that the stream was made with; those not named have weight 0.

    >>> controls = Controls(prompt=[("a cat", 0.7), ("a dog", 0.3)], steps=4, guidance="self", scale=1.4)
    >>> controls.prompts
    (('a cat', 0.7), ('a dog', 0.3))
    >>> Controls(strength=2)
    Traceback (most recent call last):
    ValueError: strength is 2.0: it must be from 0.02 to 1
    """

    prompt: str | Sequence[tuple[str, float] | list[str | float]] = ""  # pairs are lists in JSON
    negative_prompt: str = ""
    blend: Blend = "lerp"
    travel: int = 0
    steps: int = 2
    strength: float = 0.6
    t_index: Sequence[int] | None = None
    guidance: Guidance = "none"
    scale: float = 1.0
    delta: float = 1.0
    seed: int | Sequence[tuple[int, float] | list[float]] = 0
    add_noise: bool = True
    fresh: bool = False
    feedback: float = 0.0
    motion: float = 0.0
    similarity: float | None = None
    max_skips: int = 10
    batch: bool = True
    remember: bool = False
    lora: Sequence[tuple[str, float] | list[str | float]] = ()

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
            check_text(text)
        if self.t_index is not None:
            object.__setattr__(self, "t_index", _indices(self.t_index))
            object.__setattr__(self, "steps", len(self.t_index))

    @property
    def prompts(self) -> Weighted:
        """The (text, weight) pairs of `prompt`, with weights above 0."""
        pairs: Any = self.prompt
        return pairs

    @property
    def seeds(self) -> Sequence[tuple[int, float]]:
        """The (seed, weight) pairs of `seed`, with weights above 0."""
        pairs: Any = self.seed
        return pairs

    @property
    def loras(self) -> Sequence[tuple[str, float]]:
        """The (name, weight) pairs of `lora`."""
        pairs: Any = self.lora
        return pairs

    def changed(self, **changes: Any) -> Controls:
        """Return a copy with other values; a change of steps or strength alone discards t_index.

        Raise ValueError for a name that is no control, or a wrong value.

        >>> Controls(t_index=(10, 30)).changed(steps=3).t_index is None
        True
        """
        known = {field.name for field in fields(self)}
        for name in changes:
            if name not in known:
                raise ValueError(f"{name!r:.80} is no control: known are {', '.join(sorted(known))}")
        if "t_index" not in changes and {"steps", "strength"} & set(changes):
            changes["t_index"] = None
        return replace(self, **changes)

    def times(self, sampler: Sampler, schedule: Schedule, spacing: Spacing) -> Float[np.ndarray, " n_plus_1"]:
        """Return t_0 > ... > t_n: n entries of the sampler's grid of 50 steps, and the end of that grid.

        >>> from lcm_jax.diffusion.samplers import SAMPLERS
        >>> from lcm_jax.diffusion.schedules import RectifiedFlow
        >>> from lcm_jax.diffusion.time_grids import Spacing
        >>> times = Controls(t_index=(0, 25)).times(SAMPLERS["euler"], RectifiedFlow(), Spacing())
        >>> [round(t, 2) for t in times.tolist()]
        [1.0, 0.49, 0.0]
        """
        grid = time_grid(sampler, schedule, GRID, spacing=spacing)
        index = self.t_index
        if index is None:
            start = GRID - max(int(GRID * self.strength), self.steps)
            index = tuple(np.floor(np.linspace(start, GRID, self.steps, endpoint=False)).astype(int))
        return np.append(grid[list(index)], grid[-1]).astype(np.float32)


def check_text(text: str) -> None:
    """Raise ValueError for a prompt that is too long, or that no tokenizer takes.

    >>> check_text("two lines,\\nand a family: \U0001f468\u200d\U0001f469\u200d\U0001f467")
    """
    if len(text) > MOST_TEXT:
        raise ValueError(f"a prompt has {len(text)} characters: at most {MOST_TEXT} are taken")
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        raise ValueError("a prompt contains half of a surrogate pair, which no tokenizer takes; remove it")


def blended_noise(draw: Any, seeds: Sequence[tuple[int, float]]) -> Any:
    """Return sum w_i eps_i / |w|, unit noise from several seeds: for two of them it is on the arc between theirs.

    draw: seed -> unit noise eps_i. seeds: (seed, weight) pairs.

    >>> round(float(blended_noise(float, [(10, 3.0), (20, 4.0)])), 4)  # 0.6 x 10 + 0.8 x 20
    22.0
    """
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
    """Return one value, or (value, weight) pairs, as pairs with weights above 0; `empty` allows none, and any sign."""
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
    if not isinstance(value, Sequence | np.ndarray) or not all(_is_whole(i) for i in value):
        raise ValueError(f"t_index is {value!r:.80}: give a list of whole numbers")
    index = tuple(map(int, value))
    is_rising = all(a < b for a, b in pairwise(index))
    if not 1 <= len(index) <= MOST_STEPS or not is_rising or index[0] < 0 or index[-1] >= GRID:
        raise ValueError(f"t_index is {list(index)!s:.80}: give 1 to {MOST_STEPS} rising indices from 0 to {GRID - 1}")
    return index


def _is_whole(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)
