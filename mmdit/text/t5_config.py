"""The config of T5: its fields are the keys of transformers' config.json."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

# feed_forward_proj -> (transformers' name for the activation, whether its output gates a second projection)
FEED_FORWARDS = {"relu": ("relu", False), "gated-gelu": ("gelu_new", True)}


@dataclass(frozen=True, kw_only=True)
class T5Config:
    """The architecture of T5's encoder; the defaults are those of transformers for keys that a config.json leaves out.

    d_kv: the width of one head; num_heads * d_kv need not be d_model. feed_forward_proj: "relu" is T5 1.0,
    "gated-gelu" is T5 1.1. relative_attention_max_distance: in tokens, the start of the last bucket of distances.
    Raises ValueError that names a value which is not supported.

    >>> from mmdit.text import T5_XXL, T5Config
    >>> T5_XXL.d_model, T5_XXL.num_layers
    (4096, 24)
    >>> T5Config.from_dict(T5_XXL.to_dict()) == T5_XXL
    True
    """

    vocab_size: int = 32128
    d_model: int = 512
    d_kv: int = 64
    d_ff: int = 2048
    num_layers: int = 6
    num_heads: int = 8
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    layer_norm_epsilon: float = 1e-6
    feed_forward_proj: str = "relu"

    def __post_init__(self) -> None:
        for f in fields(self):
            value = getattr(self, f.name)
            if f.type == "int" and (not isinstance(value, int) or value < 1):
                raise ValueError(f"T5Config: {f.name}={value!r} must be a positive integer")
        if self.feed_forward_proj not in FEED_FORWARDS:
            raise ValueError(
                f"T5Config: feed_forward_proj={self.feed_forward_proj!r} is not supported; "
                f"use one of {', '.join(FEED_FORWARDS)}"
            )
        if not 1 <= self.relative_attention_num_buckets // 4 < self.relative_attention_max_distance:
            raise ValueError(
                f"T5Config: relative_attention_num_buckets={self.relative_attention_num_buckets} must be at least 4, "
                f"and a quarter of it below relative_attention_max_distance={self.relative_attention_max_distance}"
            )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], source: str = "config.json") -> T5Config:
        """Read the content of a config.json; raises ValueError that names `source` and the key it cannot support.

        Keys that are no fields (the decoder's, dropout, generation options) change nothing in the encoder.
        """
        if values.get("model_type", "t5") != "t5":
            raise ValueError(f"{source}: model_type is {values['model_type']!r}, expected 't5'")
        names = {f.name for f in fields(cls)}
        try:
            config = cls(**{name: value for name, value in values.items() if name in names and value is not None})
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from None
        activation, gated = FEED_FORWARDS[config.feed_forward_proj]
        # transformers derives the first two from feed_forward_proj, but lets a file override them.
        for key, expected in {"dense_act_fn": activation, "is_gated_act": gated, "is_decoder": False}.items():
            if values.get(key) not in (None, expected):
                raise ValueError(
                    f"{source}: {key}={values[key]!r} is not supported with "
                    f"feed_forward_proj={config.feed_forward_proj!r}; only {expected!r} is"
                )
        return config

    def to_dict(self) -> dict[str, Any]:
        """Return the content of a config.json that transformers loads."""
        return {"model_type": "t5", **asdict(self)}


# T5 1.1 XXL, the third text encoder of SD3.
T5_XXL = T5Config(d_model=4096, d_ff=10240, num_layers=24, num_heads=64, feed_forward_proj="gated-gelu")
