"""One check of the values of a config from a file: their types, that numbers are finite, and their bounds.

The types are those of the dataclass that the config becomes. The bounds are far beyond every published model: a number
outside them is a mistake or an attempt to fill the memory, and is refused before anything is built from it.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from typing import Any, NamedTuple

from lcm_jax.runtime.messages import shown

MOST_ENTRIES = 64  # of a list
MOST_LETTERS = 256  # of a text


class Bounds(NamedTuple):
    """The least and the greatest value of a number, both allowed."""

    least: float
    most: float


_WHOLE = Bounds(1, 1 << 20)
_REAL = Bounds(-1e6, 1e6)
_SMALL, _FACTOR, _PIXELS = Bounds(1e-12, 1.0), Bounds(1e-6, 1e6), Bounds(1, 8192)
# By the names of the fields; other whole numbers have _WHOLE, and other numbers _REAL.
_BOUNDS: Mapping[str, Bounds] = {
    **dict.fromkeys(("norm_eps", "layer_norm_eps", "layer_norm_epsilon"), _SMALL),
    **dict.fromkeys(("scaling_factor", "latent_magnitude", "shift", "flow_shift"), _FACTOR),
    **dict.fromkeys(("beta_start", "beta_end"), Bounds(0.0, 1.0)),
    **dict.fromkeys(("sample_size", "image_size", "size"), _PIXELS),
    **dict.fromkeys(("conv_in_kernel", "conv_out_kernel", "patch_size", "upsampling_scaling_factor"), Bounds(1, 256)),
    **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), Bounds(-1, 1 << 20)),
    **dict.fromkeys(("freq_shift", "dual_attention_layers", "steps_offset"), Bounds(0, 100_000)),
    **dict.fromkeys(("num_encoder_blocks", "num_decoder_blocks"), Bounds(0, 64)),
    **dict.fromkeys(("num_train_timesteps", "original_inference_steps"), Bounds(1, 100_000)),
    **dict.fromkeys(("num_layers", "num_hidden_layers"), Bounds(1, 4096)),
    **dict.fromkeys(("layers_per_block", "transformer_layers_per_block"), Bounds(1, 64)),
    "reverse_transformer_layers_per_block": Bounds(1, 64),
    "pos_embed_max_size": Bounds(1, 4096),
}


def check_values(cls: type[Any], values: Mapping[str, Any], source: str) -> None:
    """Raise ValueError, which names `source` and the key, for a value that no field of the dataclass `cls` can have.

    values: by the names of the fields, as JSON has them or as the fields do; other keys are passed over. A null passes:
    what it means is for the config to say, whose own fields are checked when it is made.

    >>> from lcm_jax.nets import UNetConfig
    >>> from lcm_jax.runtime.config_values import check_values
    >>> check_values(UNetConfig, {"norm_eps": float("nan")}, "config.json")
    Traceback (most recent call last):
    ValueError: config.json: norm_eps=nan is not supported; give a finite number from 1e-12 to 1
    """
    for name, hint in _hints(cls).items():
        if values.get(name) is not None:
            _check(name, values[name], hint, source)


def check_config(config: Any, source: str) -> None:
    """Raise ValueError as `check_values` does for the fields of a config that is made, where null must be allowed."""
    for name, hint in _hints(type(config)).items():
        _check(name, getattr(config, name), hint, source)


def _hints(cls: Any) -> dict[str, Any]:
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def _check(name: str, value: Any, hint: Any, source: str) -> None:
    if not _fits(value, hint, name):
        raise ValueError(f"{source}: {name}={shown(value)} is not supported; give {_wanted(hint, name)}")


def _fits(value: Any, hint: Any, name: str) -> bool:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, option, name) for option in arguments)
    if origin is typing.Literal:
        return any(type(value) is type(option) and value == option for option in arguments)
    if origin is tuple:
        if not isinstance(value, (list, tuple)) or len(value) > MOST_ENTRIES:
            return False
        kinds = arguments[:1] * len(value) if arguments[1:] == (...,) else arguments
        return len(value) == len(kinds) and all(
            _fits(item, kind, name) for item, kind in zip(value, kinds, strict=True)
        )
    if hint is int or hint is float:
        bounds = _BOUNDS.get(name, _WHOLE if hint is int else _REAL)
        right = type(value) is int or (hint is float and type(value) is float and math.isfinite(value))
        return right and bounds.least <= value <= bounds.most
    if hint is str:
        return isinstance(value, str) and len(value) <= MOST_LETTERS
    return type(value) is hint


def _wanted(hint: Any, name: str) -> str:
    """Return what a field takes, in words."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys(_wanted(option, name) for option in arguments))
    if origin is typing.Literal:
        return " or ".join(repr(option) for option in arguments)
    if origin is tuple:
        if arguments[1:] == (...,):
            return f"a list of {_wanted(arguments[0], name)}"
        return f"a list of {len(arguments)} times {_wanted(arguments[0], name)}"
    if hint is int or hint is float:
        bounds = _BOUNDS.get(name, _WHOLE if hint is int else _REAL)
        kind = "a whole number" if hint is int else "a finite number"
        return f"{kind} from {bounds.least:.9g} to {bounds.most:.9g}"
    words = {str: f"a text of at most {MOST_LETTERS} letters", bool: "true or false", type(None): "null"}
    return words.get(hint, getattr(hint, "__name__", str(hint)))
