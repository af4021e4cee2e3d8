"""The architecture of a UNet: the keys of a diffusers UNet2DConditionModel config.json."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from lcm_jax.runtime.messages import shown

Depth = int | tuple[int, ...]  # transformer blocks of one level: one number for all attention layers, or one for each

_CROSS_DOWN, _CROSS_UP, _CROSS_MID = "CrossAttnDownBlock2D", "CrossAttnUpBlock2D", "UNetMidBlock2DCrossAttn"

# Keys that are no fields here, with the values that do not change the result. A missing key is allowed.
_FIXED: dict[str, tuple[Any, ...]] = {
    "act_fn": ("silu", "swish"),
    "attention_type": ("default",),
    "class_embed_type": (None,),
    "class_embeddings_concat": (False, None),
    "cross_attention_norm": (None,),
    "downsample_padding": (1,),
    "dropout": (0, None),
    "dual_cross_attention": (False, None),
    "encoder_hid_dim": (None,),
    "encoder_hid_dim_type": (None,),
    "mid_block_scale_factor": (1,),
    "num_attention_heads": (None,),
    "num_class_embeds": (None,),
    "resnet_out_scale_factor": (1,),
    "resnet_skip_time_act": (False, None),
    "time_embedding_act_fn": (None,),
    "time_embedding_type": ("positional", None),
    "timestep_post_act": (None,),
}
# Keys that the supported block types never read.
_IRRELEVANT = frozenset({"addition_embed_type_num_heads", "mid_block_only_cross_attention", "upcast_attention"})


def _tuples(value: Any) -> Any:
    return tuple(_tuples(v) for v in value) if isinstance(value, (list, tuple)) else value


def _lists(value: Any) -> Any:
    return [_lists(v) for v in value] if isinstance(value, tuple) else value


@dataclasses.dataclass(frozen=True, kw_only=True)
class UNetConfig:
    """The architecture of a UNet, with the names, meanings and defaults of diffusers' config.json.

    attention_head_dim is the NUMBER of heads of each level (diffusers keeps the wrong name for old files). Logits and
    softmax are always float32, so `upcast_attention` needs no field. time_cond_proj_dim: width of the w-embedding (the
    classifier-free guidance embedding, arXiv:2310.04378), None for a network without. Raises ValueError that names a
    value which is not supported.

    >>> from lcm_jax.nets import SD15, SDXL, UNetConfig
    >>> SD15.heads, SDXL.down_depths(2)
    ((8, 8, 8, 8), (10, 10))
    >>> UNetConfig.from_dict(SDXL.to_dict()) == SDXL
    True
    """

    sample_size: int | tuple[int, int] | None = None
    in_channels: int = 4
    out_channels: int = 4
    center_input_sample: bool = False
    flip_sin_to_cos: bool = True
    freq_shift: int = 0
    down_block_types: tuple[str, ...] = (_CROSS_DOWN, _CROSS_DOWN, _CROSS_DOWN, "DownBlock2D")
    mid_block_type: str | None = _CROSS_MID
    up_block_types: tuple[str, ...] = ("UpBlock2D", _CROSS_UP, _CROSS_UP, _CROSS_UP)
    only_cross_attention: bool | tuple[bool, ...] = False
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    layers_per_block: int | tuple[int, ...] = 2
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    cross_attention_dim: int | tuple[int, ...] = 1280
    transformer_layers_per_block: int | tuple[Depth, ...] = 1
    reverse_transformer_layers_per_block: tuple[Depth, ...] | None = None
    attention_head_dim: int | tuple[int, ...] = 8
    use_linear_projection: bool = False
    addition_embed_type: str | None = None
    addition_time_embed_dim: int | None = None
    projection_class_embeddings_input_dim: int | None = None
    resnet_time_scale_shift: str = "default"
    time_embedding_dim: int | None = None
    time_cond_proj_dim: int | None = None
    span_embedding: bool = False  # not a key of diffusers: the length of the step is an input
    conv_in_kernel: int = 3
    conv_out_kernel: int = 3

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):  # hashable, as a flax module's field must be
            object.__setattr__(self, field.name, _tuples(getattr(self, field.name)))
        self._check_values()
        self._check_lengths()

    def _check_values(self) -> None:
        allowed = {
            "mid_block_type": (_CROSS_MID, "UNetMidBlock2D", None),
            "resnet_time_scale_shift": ("default", "scale_shift"),
            "addition_embed_type": (None, "text_time"),
        }
        for key, values in allowed.items():
            if getattr(self, key) not in values:
                raise ValueError(f"UNet config: {key}={getattr(self, key)!r} is not supported; use one of {values}")
        for key, values in (
            ("down_block_types", (_CROSS_DOWN, "DownBlock2D")),
            ("up_block_types", (_CROSS_UP, "UpBlock2D")),
        ):
            for value in getattr(self, key):
                if value not in values:
                    raise ValueError(f"UNet config: {key} has {value!r}, which is not supported; use one of {values}")
        for key in ("conv_in_kernel", "conv_out_kernel"):
            if getattr(self, key) % 2 == 0:
                raise ValueError(f"UNet config: {key}={getattr(self, key)} changes the image size; use an odd kernel")
        if not isinstance(self.norm_num_groups, int) or self.norm_num_groups < 1:
            raise ValueError(
                f"UNet config: norm_num_groups={self.norm_num_groups!r} is not supported; use a whole number >= 1"
            )
        if self.addition_embed_type and not (
            self.addition_time_embed_dim and self.projection_class_embeddings_input_dim
        ):
            raise ValueError(
                "UNet config: addition_embed_type='text_time' needs addition_time_embed_dim and "
                "projection_class_embeddings_input_dim"
            )

    def _check_lengths(self) -> None:
        levels = len(self.block_out_channels)
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name != "sample_size" and isinstance(value, tuple) and len(value) != levels:
                raise ValueError(
                    f"UNet config: {field.name}={value!r} has {len(value)} entries for {levels} levels; give {levels}"
                )
        nested = isinstance(self.transformer_layers_per_block, tuple) and any(
            isinstance(depth, tuple) for depth in self.transformer_layers_per_block
        )
        if nested and self.reverse_transformer_layers_per_block is None:
            raise ValueError(
                "UNet config: nested transformer_layers_per_block needs reverse_transformer_layers_per_block as well"
            )
        for level, (channels, heads) in enumerate(zip(self.block_out_channels, self.heads, strict=True)):
            if channels % self.norm_num_groups:
                raise ValueError(
                    f"UNet config: block_out_channels[{level}]={channels} does not divide into "
                    f"norm_num_groups={self.norm_num_groups}"
                )
            if channels % heads:
                raise ValueError(
                    f"UNet config: block_out_channels[{level}]={channels} does not divide into {heads} heads "
                    "(attention_head_dim is the number of heads)"
                )
            for depths in (self.down_depths(level), self.up_depths(levels - 1 - level)):
                if any(depth < 1 for depth in depths):
                    raise ValueError(
                        f"UNet config: transformer_layers_per_block of level {level} is {depths}; use >= 1"
                    )

    def level(self, key: str, level: int) -> Any:
        """Return the value at this level of a field that has one value, or one for each level."""
        value = getattr(self, key)
        return value[level] if isinstance(value, tuple) else value

    @property
    def heads(self) -> tuple[int, ...]:
        """The number of attention heads of each level, finest first."""
        return tuple(self.level("attention_head_dim", i) for i in range(len(self.block_out_channels)))

    @property
    def text_time(self) -> tuple[int, int] | None:
        """The width of the embedding of each size in time_ids, and that of pooled text and sizes together.

        None for a network without these inputs.
        """
        if self.addition_embed_type is None:
            return None
        return self.addition_time_embed_dim or 0, self.projection_class_embeddings_input_dim or 0

    def down_depths(self, level: int) -> tuple[int, ...]:
        """Return the number of transformer blocks after each residual block of a down level."""
        return self._depths(self.level("transformer_layers_per_block", level), self.level("layers_per_block", level))

    def mid_depth(self) -> int:
        """Return the number of transformer blocks of the middle block."""
        return self._depths(self.level("transformer_layers_per_block", -1), 1)[0]

    def up_depths(self, index: int) -> tuple[int, ...]:
        """Return the number of transformer blocks after each residual block of an up block; index 0 is the coarsest."""
        level = len(self.block_out_channels) - 1 - index
        layers = self.level("layers_per_block", level) + 1
        if self.reverse_transformer_layers_per_block is not None:
            return self._depths(self.reverse_transformer_layers_per_block[index], layers)
        return self._depths(self.level("transformer_layers_per_block", level), layers)

    def _depths(self, depth: Depth, layers: int) -> tuple[int, ...]:
        if isinstance(depth, int):
            return (depth,) * layers
        if len(depth) < layers:
            raise ValueError(
                f"UNet config: transformer_layers_per_block has {depth!r} for {layers} layers; give one for each"
            )
        return depth[:layers]

    @classmethod
    def from_dict(cls, d: Mapping[str, Any], source: str = "UNet config") -> UNetConfig:
        """Read the content of a config.json.

        Raises ValueError that names `source` and the key, for an unknown key or a value that is not supported.
        """
        fields = {field.name for field in dataclasses.fields(cls)}
        values: dict[str, Any] = {}
        for key, value in d.items():
            if key in fields:
                values[key] = value
            elif key in _FIXED:
                if value not in _FIXED[key]:
                    raise ValueError(f"{source}: {key}={shown(value)} is not supported; use {_FIXED[key][0]!r}")
            elif key not in _IRRELEVANT and not key.startswith("_"):
                raise ValueError(
                    f"{source}: unknown key {shown(key)} (value {shown(value)}); remove it if it changes nothing"
                )
        for key in ("only_cross_attention", "use_linear_projection", "center_input_sample"):
            if values.get(key, False) is None:  # older files write null for false
                values[key] = False
        try:
            return cls(**{key: _tuples(value) for key, value in values.items()})
        except ValueError as error:
            raise ValueError(str(error).replace("UNet config", source, 1)) from None

    def to_dict(self) -> dict[str, Any]:
        """Return the content of a config.json that diffusers loads."""
        values = {field.name: _lists(getattr(self, field.name)) for field in dataclasses.fields(self)}
        if not self.span_embedding:
            del values["span_embedding"]
        return {"_class_name": "UNet2DConditionModel", **values}
