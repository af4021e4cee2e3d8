"""The configs of CLIP: their fields are the keys of transformers' config.json."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, TypeVar

ACTIVATIONS = ("quick_gelu", "gelu")
T = TypeVar("T", bound="CLIPTextConfig | CLIPVisionConfig")


@dataclass(frozen=True, kw_only=True)
class CLIPTextConfig:
    """The architecture of CLIP's text encoder; the defaults are CLIP ViT-L/14.

    Old checkpoints have eos_token_id 2: see `clip.eos_position`. Raises ValueError unless integer fields are integers,
    hidden_act is "quick_gelu" or "gelu", and num_attention_heads divides hidden_size.

    >>> from mmdit.text import CLIP_BIGG, CLIPTextConfig
    >>> CLIP_BIGG.hidden_size, CLIP_BIGG.num_hidden_layers
    (1280, 32)
    >>> CLIPTextConfig.from_dict(CLIP_BIGG.to_dict()) == CLIP_BIGG
    True
    """

    vocab_size: int = 49408
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    max_position_embeddings: int = 77
    hidden_act: str = "quick_gelu"
    projection_dim: int = 768
    layer_norm_eps: float = 1e-5
    bos_token_id: int = 49406
    eos_token_id: int = 49407
    pad_token_id: int = 1

    def __post_init__(self) -> None:
        _check(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], source: str = "config.json") -> CLIPTextConfig:
        """Read the config.json of a text encoder, or of a full CLIPModel (its `text_config`).

        Raises ValueError that names `source` for another model_type or an unsupported value.
        """
        return _from_dict(cls, values, "text_config", ("clip_text_model", "clip"), source)

    def to_dict(self) -> dict[str, Any]:
        """Return the content of a config.json that transformers loads."""
        return {"model_type": "clip_text_model", **asdict(self)}


@dataclass(frozen=True, kw_only=True)
class CLIPVisionConfig:
    """The architecture of CLIP's image encoder; the defaults are CLIP ViT-L/14.

    It is a ViT on square images of `image_size` pixels, divided into patches of `patch_size` pixels. Raises ValueError
    as `CLIPTextConfig`, and unless patch_size divides image_size.

    >>> from mmdit.text import CLIP_L_VISION
    >>> (CLIP_L_VISION.image_size // CLIP_L_VISION.patch_size) ** 2
    256
    """

    image_size: int = 224
    patch_size: int = 14
    num_channels: int = 3
    hidden_size: int = 1024
    intermediate_size: int = 4096
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    hidden_act: str = "quick_gelu"
    projection_dim: int = 768
    layer_norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        _check(self)
        if self.image_size % self.patch_size:
            raise ValueError(
                f"CLIPVisionConfig: image_size={self.image_size} is not a multiple of patch_size={self.patch_size}"
            )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], source: str = "config.json") -> CLIPVisionConfig:
        """Read the config.json of an image encoder, or of a full CLIPModel (its `vision_config`).

        Raises ValueError that names `source` for another model_type or an unsupported value.
        """
        return _from_dict(cls, values, "vision_config", ("clip_vision_model", "clip"), source)

    def to_dict(self) -> dict[str, Any]:
        """Return the content of a config.json that transformers loads."""
        return {"model_type": "clip_vision_model", **asdict(self)}


@dataclass(frozen=True, kw_only=True)
class CLIPConfig:
    """The architecture of both encoders of CLIP, and the initial log temperature.

    Raises ValueError unless both encoders have the same projection_dim.

    >>> from mmdit.text import CLIPConfig
    >>> CLIPConfig.from_dict(CLIPConfig().to_dict()) == CLIPConfig()
    True
    """

    text: CLIPTextConfig = field(default_factory=CLIPTextConfig)
    vision: CLIPVisionConfig = field(default_factory=CLIPVisionConfig)
    logit_scale_init_value: float = 2.6592

    def __post_init__(self) -> None:
        if self.text.projection_dim != self.vision.projection_dim:
            raise ValueError(
                f"CLIPConfig: the text encoder projects to {self.text.projection_dim} channels and the "
                f"image encoder to {self.vision.projection_dim}; give both the same projection_dim"
            )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], source: str = "config.json") -> CLIPConfig:
        """Read the config.json of a full CLIPModel; raises ValueError that names `source` for unsupported values."""
        return cls(
            text=CLIPTextConfig.from_dict(values, source),
            vision=CLIPVisionConfig.from_dict(values, source),
            logit_scale_init_value=float(values.get("logit_scale_init_value", 2.6592)),
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the content of a config.json that transformers loads."""
        return {
            "architectures": ["CLIPModel"],
            "model_type": "clip",
            "projection_dim": self.text.projection_dim,
            "logit_scale_init_value": self.logit_scale_init_value,
            "text_config": self.text.to_dict(),
            "vision_config": self.vision.to_dict(),
        }


def _check(config: CLIPTextConfig | CLIPVisionConfig) -> None:
    name = type(config).__name__
    for f in fields(config):
        if f.type == "int" and not isinstance(getattr(config, f.name), int):
            raise ValueError(f"{name}: {f.name}={getattr(config, f.name)!r} must be an integer")
    if config.hidden_act not in ACTIVATIONS:
        raise ValueError(
            f"{name}: hidden_act={config.hidden_act!r} is not supported; use one of {', '.join(ACTIVATIONS)}"
        )
    if config.hidden_size % config.num_attention_heads:
        raise ValueError(
            f"{name}: hidden_size={config.hidden_size} is not a multiple of "
            f"num_attention_heads={config.num_attention_heads}"
        )


# The values that transformers assumes for keys that a config.json leaves out; our own defaults are CLIP ViT-L/14.
_TRANSFORMERS_DEFAULTS: dict[str, dict[str, Any]] = {
    "text_config": dict(
        vocab_size=49408,
        hidden_size=512,
        intermediate_size=2048,
        num_hidden_layers=12,
        num_attention_heads=8,
        projection_dim=512,
    ),
    "vision_config": dict(
        image_size=224,
        patch_size=32,
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=12,
        num_attention_heads=12,
        projection_dim=512,
    ),
}


def _from_dict(cls: type[T], values: Mapping[str, Any], tower: str, kinds: tuple[str, ...], source: str) -> T:
    """Build a config from the keys that are its fields.

    Other keys (training dropout, generation options) change nothing in a forward pass.
    """
    if values.get("model_type", kinds[0]) not in kinds:
        raise ValueError(f"{source}: model_type is {values['model_type']!r}, expected {' or '.join(kinds)}")
    merged = dict(_TRANSFORMERS_DEFAULTS[tower])
    if tower in values or values.get("model_type") == "clip":
        # Early exports have the true values under "<tower>_dict", and transformers prefers those.
        merged |= {**(values.get(tower) or {}), **(values.get(tower + "_dict") or {})}
        merged["projection_dim"] = values.get("projection_dim", 512)
    else:
        merged |= values
    names = {f.name for f in fields(cls)}
    try:
        return cls(**{name: value for name, value in merged.items() if name in names and value is not None})
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None


CLIP_L = CLIPTextConfig()  # the text encoder of SD1, the first of SDXL and of SD3
CLIP_H = CLIPTextConfig(  # SD2 stores 23 of the 24 layers, so its last layer is OpenCLIP's penultimate
    hidden_size=1024,
    intermediate_size=4096,
    num_hidden_layers=24,
    num_attention_heads=16,
    hidden_act="gelu",
    projection_dim=1024,
)
CLIP_BIGG = CLIPTextConfig(  # the second text encoder of SDXL and of SD3
    hidden_size=1280,
    intermediate_size=5120,
    num_hidden_layers=32,
    num_attention_heads=20,
    hidden_act="gelu",
    projection_dim=1280,
)
CLIP_L_VISION = CLIPVisionConfig()
CLIP_H_VISION = CLIPVisionConfig(
    hidden_size=1280,
    intermediate_size=5120,
    num_hidden_layers=32,
    num_attention_heads=16,
    hidden_act="gelu",
    projection_dim=1024,
)
