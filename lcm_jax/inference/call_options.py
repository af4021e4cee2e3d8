"""The options of a call of a pipeline: checks of numbers, the model's own values, and diffusers' names for them."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from lcm_jax.diffusion.samplers import Sampler
from lcm_jax.runtime.messages import did_you_mean

GUIDANCE = 4.0
"""The guidance scale of a model that has one, where none is given."""

# diffusers' names -> this library's
DIFFUSERS_OPTIONS = {
    "num_inference_steps": "steps",
    "guidance_scale": "guidance",
    "num_images_per_prompt": "num_images",
    "scheduler": "sampler",
    "generator": "seed",
    "mask_image": "mask",
    "height": "size=(height, width)",
    "width": "size=(height, width)",
    "max_sequence_length": "t5_tokens",
    "skip_guidance_layers": "skip_layers",
    "skip_layer_guidance_scale": "skip_scale",
    "crops_coords_top_left": "crop",
    "torch_dtype": "dtype",
    "lora_weights": "lora",
}


class Settings(NamedTuple):
    """The settings that a model has of its own: solver steps, guidance scale and sampler.

    >>> import lcm_jax
    >>> lcm_jax.load("openmoji").settings()
    Settings(steps=4, guidance=4.0, sampler='lcm')
    >>> lcm_jax.load("openmoji-teacher").settings(guidance=2.0)
    Settings(steps=50, guidance=2.0, sampler='ddim')
    """

    steps: int
    guidance: float
    sampler: str | Sampler


def whole_number(name: str, value: Any, least: int | None = None, most: int | None = None) -> int:
    """Return a whole number as an int; ValueError, which names it, for another kind or one that is out of range.

    >>> whole_number("seed", 7, 0)
    7
    >>> whole_number("steps", "4", 1)
    Traceback (most recent call last):
    ValueError: steps is '4': give a whole number
    """
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    if number is None or isinstance(value, (bool, np.bool_)):
        raise ValueError(f"{name} is {value!r:.80}: give a whole number")
    if (least is not None and number < least) or (most is not None and number > most):
        span = f"at least {least}" if most is None else f"between {least} and {most}"
        raise ValueError(f"{name} is {number}: it must be {span}")
    return number


def real_number(name: str, value: Any) -> float:
    """Return a number as a float; ValueError, which names it, for another kind, for infinity and for NaN.

    >>> real_number("guidance", 4)
    4.0
    >>> real_number("strength", "0.5")
    Traceback (most recent call last):
    ValueError: strength is '0.5': give a number
    """
    try:
        number = math.nan if isinstance(value, (str, bytes, bool, np.bool_)) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"{name} is {value!r:.80}: give a number")
    return number


def two_numbers(name: str, value: Any) -> tuple[Any, Any]:
    """Return a pair of numbers, such as (height, width); ValueError, which names it, for anything else.

    >>> two_numbers("crop", [0, 8])
    (0, 8)
    """
    try:
        first, second = value
    except (TypeError, ValueError):
        raise ValueError(f"{name} is {value!r:.80}: give two numbers") from None
    real_number(name, first), real_number(name, second)
    return first, second


def refuse(function: str, unknown: Mapping[str, Any], known: Iterable[str]) -> None:
    """Raise TypeError for options that a function does not have, with the name that was meant where it is known.

    >>> refuse("pipe", {"num_inference_steps": 4}, ["steps"])
    Traceback (most recent call last):
    TypeError: pipe() has no option num_inference_steps; it is called steps here
    """
    for name in unknown:
        other = DIFFUSERS_OPTIONS.get(name)
        hint = did_you_mean(name, known) if other is None else f"; it is called {other} here"
        raise TypeError(f"{function}() has no option {name}{hint or '; known are ' + ', '.join(known)}")
