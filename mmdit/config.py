"""The architecture of an MMDiT: the keys of a diffusers SD3Transformer2DModel config.json."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping
from typing import Any, ClassVar


@dataclasses.dataclass(frozen=True, kw_only=True)
class MMDiTConfig:
    """The architecture of an MMDiT, with the names, meanings and defaults of diffusers' config.json.

    pos_embed_max_size: patches on a side of the position grid in the weights, and so of the largest image.
    sample_size: side of the latents in training, which sets the scale of that grid. The last two fields are no keys of
    diffusers: time_cond_proj_dim is the width of the w-embedding (the classifier-free guidance embedding) of a student
    that takes the guidance scale as an input, and span_embedding adds the length of the step as an input. Raises
    ValueError that names a value which is not supported.

    >>> from mmdit import SD3_MEDIUM, MMDiTConfig
    >>> SD3_MEDIUM.width, SD3_MEDIUM.num_layers
    (1536, 24)
    >>> MMDiTConfig.from_dict(SD3_MEDIUM.to_dict()) == SD3_MEDIUM
    True
    """

    class_name: ClassVar[str] = "SD3Transformer2DModel"

    sample_size: int = 128
    patch_size: int = 2
    in_channels: int = 16
    num_layers: int = 18
    attention_head_dim: int = 64
    num_attention_heads: int = 18
    joint_attention_dim: int = 4096
    caption_projection_dim: int = 1152
    pooled_projection_dim: int = 2048
    out_channels: int = 16
    pos_embed_max_size: int = 96
    dual_attention_layers: tuple[int, ...] = ()
    qk_norm: str | None = None
    time_cond_proj_dim: int | None = None
    span_embedding: bool = False

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type == "int" and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise ValueError(f"MMDiT config: {field.name}={value!r} is not supported; use a whole number >= 1")
        self._check_values()

    def _check_values(self) -> None:
        layers = self.dual_attention_layers
        if not isinstance(layers, (list, tuple)) or any(i not in range(self.num_layers) for i in layers):
            raise ValueError(
                f"MMDiT config: dual_attention_layers={layers!r} must list layers 0 to {self.num_layers - 1}"
            )
        object.__setattr__(self, "dual_attention_layers", tuple(layers))  # hashable, as a flax module's field must be
        if self.qk_norm not in (None, "rms_norm"):
            raise ValueError(f"MMDiT config: qk_norm={self.qk_norm!r} is not supported; use null or 'rms_norm'")
        if self.caption_projection_dim != self.width:
            raise ValueError(
                f"MMDiT config: caption_projection_dim={self.caption_projection_dim} must be num_attention_heads * "
                f"attention_head_dim = {self.width}: image and text tokens have one width"
            )
        if self.sample_size < self.patch_size:
            raise ValueError(f"MMDiT config: sample_size={self.sample_size} is less than patch_size={self.patch_size}")
        if self.width % 4:
            raise ValueError(
                f"MMDiT config: num_attention_heads * attention_head_dim = {self.width} must be a multiple of 4 "
                "for the sines and cosines of two axes"
            )
        w = self.time_cond_proj_dim
        if w is not None and (not isinstance(w, int) or w < 4 or w % 2):
            raise ValueError(f"MMDiT config: time_cond_proj_dim={w!r} must be null or an even number >= 4, such as 256")

    @property
    def width(self) -> int:
        """The number of channels of a token."""
        return self.num_attention_heads * self.attention_head_dim

    def is_dual(self, layer: int) -> bool:
        """Return whether the image tokens of this block also attend to the image tokens alone."""
        return layer in self.dual_attention_layers

    def is_last(self, layer: int) -> bool:
        """Return whether the text tokens are only an input of this block's attention and have no output."""
        return layer == self.num_layers - 1

    @property
    def runs(self) -> tuple[tuple[int, int], ...]:
        """The pairs (first block, number of blocks) of every run of equal blocks, in order.

        >>> from mmdit import SD35_MEDIUM
        >>> SD35_MEDIUM.runs
        ((0, 13), (13, 10), (23, 1))
        """
        kinds = itertools.groupby(range(self.num_layers), lambda i: (self.is_dual(i), self.is_last(i)))
        blocks = [list(run) for _, run in kinds]
        return tuple((run[0], len(run)) for run in blocks)

    @classmethod
    def from_dict(cls, d: Mapping[str, Any], source: str = "MMDiT config") -> MMDiTConfig:
        """Read the content of a config.json.

        Raises ValueError that names `source` and the key, for an unknown key or a value that is not supported.
        """
        fields = {field.name for field in dataclasses.fields(cls)}
        for key, value in d.items():
            if key not in fields and not key.startswith("_"):
                raise ValueError(f"{source}: unknown key {key!r} (value {value!r}); remove it if it changes nothing")
        values: dict[str, Any] = {
            key: tuple(d[key]) if isinstance(d[key], list) else d[key] for key in d if key in fields
        }
        if "out_channels" in values and values["out_channels"] is None:  # in diffusers' files that means in_channels
            values["out_channels"] = values.get("in_channels", cls.in_channels)
        try:
            return cls(**values)
        except ValueError as error:
            raise ValueError(str(error).replace("MMDiT config", source, 1)) from None

    def to_dict(self) -> dict[str, Any]:
        """Return the content of a config.json; diffusers loads that of an MMDiT."""
        values = dataclasses.asdict(self) | {"dual_attention_layers": list(self.dual_attention_layers)}
        for key in ("time_cond_proj_dim", "span_embedding"):
            if not values[key]:
                del values[key]
        return {"_class_name": self.class_name, **values}


class _OneSet(MMDiTConfig):
    """The config of a network whose blocks are all equal, without dual attention."""

    def _check_values(self) -> None:
        super()._check_values()
        if self.dual_attention_layers:
            raise ValueError(
                f"MMDiT config: dual_attention_layers={self.dual_attention_layers} is for the MMDiT alone; leave it out"
            )

    def is_last(self, layer: int) -> bool:
        return False


class DiTConfig(_OneSet):
    """The config of a DiT, with the fields of an MMDiTConfig."""

    class_name = "DiT"


class CrossDiTConfig(_OneSet):
    """The config of a CrossDiT, with the fields of an MMDiTConfig."""

    class_name = "CrossDiT"


class UViTConfig(_OneSet):
    """The config of a UViT, with the fields of an MMDiTConfig; num_layers is that of its transformer."""

    class_name = "UViT"
