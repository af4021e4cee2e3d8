"""CLIP (Radford et al. 2021, arXiv:2103.00020): the text and image encoders, in transformers' parameter layout."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from mmdit.text.clip_config import CLIPConfig, CLIPTextConfig, CLIPVisionConfig
from mmdit.text.clip_layers import Encoder, TextEmbeddings, VisionEmbeddings

# Per-channel statistics of CLIP's training images, for pixels in [0, 1].
IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)


class TextOutput(NamedTuple):
    """The output of the text encoder; text_embeds is None for a model without projection."""

    last_hidden: Float[Array, "b l d"]  # the last layer after the final norm
    hidden: Float[Array, "b l d"]  # the layer that hidden_layer chooses, after the final norm if final_norm
    pooled: Float[Array, "b d"]  # last_hidden at the end-of-text token
    text_embeds: Float[Array, "b p"] | None  # pooled, projected


class VisionOutput(NamedTuple):
    """The output of the image encoder; image_embeds is None for a model without projection."""

    last_hidden: Float[Array, "b n d"]  # the last layer without the post norm; token 0 is the class token
    hidden: Float[Array, "b n d"]  # the layer that hidden_layer chooses, without the post norm
    pooled: Float[Array, "b d"]  # the class token after the post norm
    image_embeds: Float[Array, "b p"] | None  # pooled, projected


def eos_position(ids: Int[Array, "b l"], eos_token_id: int) -> Int[Array, " b"]:
    """Return the position of the first `eos_token_id` of each text; 0 if there is none, as in transformers.

    Checkpoints exported before 2023 declare eos_token_id 2 although their tokenizer writes 49407, the largest id;
    for them it is the first position of the largest id.

    >>> import jax.numpy as jnp
    >>> from mmdit.text.clip import eos_position
    >>> eos_position(jnp.array([[8, 1, 9, 9], [8, 2, 3, 9]]), eos_token_id=9).tolist()
    [2, 3]
    """
    return jnp.argmax(ids if eos_token_id == 2 else ids == eos_token_id, axis=-1)


def normalize_images(images: Float[Array, "b h w 3"]) -> Float[Array, "b h w 3"]:
    """Turn images in [-1, 1] into the inputs of CLIP's image encoder: ((images + 1) / 2 - mean) / std per channel."""
    return ((images + 1) / 2 - jnp.asarray(IMAGE_MEAN)) / jnp.asarray(IMAGE_STD)


class TextTower(nn.Module):
    """The text transformer, PyTorch's `text_model`: ids (b, l) -> last hidden, chosen hidden and pooled states."""

    config: CLIPTextConfig
    hidden_layer: int = -1
    final_norm: bool = True
    scan: bool = False
    remat: bool = False
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, ids: Int[Array, "b l"], mask: Bool[Array, "b l"] | None = None) -> tuple[Array, Array, Array]:
        types = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        x = TextEmbeddings(self.config, name="embeddings", **types)(ids)
        last, hidden = Encoder(
            self.config,
            causal=True,
            hidden_layer=self.hidden_layer,
            scan=self.scan,
            remat=self.remat,
            name="encoder",
            **types,
        )(x, mask)
        norm = nn.LayerNorm(
            epsilon=self.config.layer_norm_eps, use_fast_variance=False, name="final_layer_norm", **types
        )
        last = norm(last)
        ends = eos_position(ids, self.config.eos_token_id)
        return last, norm(hidden) if self.final_norm else hidden, last[jnp.arange(len(ids)), ends]


class VisionTower(nn.Module):
    """The image transformer, PyTorch's `vision_model`: images -> last hidden, chosen hidden and pooled states."""

    config: CLIPVisionConfig
    hidden_layer: int = -1
    scan: bool = False
    remat: bool = False
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images: Float[Array, "b h w c"]) -> tuple[Array, Array, Array]:
        types = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        norm = dict(epsilon=self.config.layer_norm_eps, use_fast_variance=False, **types)
        x = VisionEmbeddings(self.config, name="embeddings", **types)(images)
        x = nn.LayerNorm(name="pre_layrnorm", **norm)(x)
        last, hidden = Encoder(
            self.config,
            causal=False,
            hidden_layer=self.hidden_layer,
            scan=self.scan,
            remat=self.remat,
            name="encoder",
            **types,
        )(x)
        return last, hidden, nn.LayerNorm(name="post_layernorm", **norm)(last[:, 0])


class CLIPTextModel(nn.Module):
    """CLIP's text encoder; with `projection` it is transformers' CLIPTextModelWithProjection.

    `hidden_layer` chooses TextOutput.hidden (-1 is the last layer, -2 the penultimate), and `final_norm` applies the
    final norm to it. mask: True where a token may be attended to; None is everywhere. `scan` stacks the layers'
    parameters under encoder/layers; else they are encoder/layers_i. `remat` recomputes the layers in the backward pass.

    >>> import jax, jax.numpy as jnp
    >>> from mmdit.text import CLIPTextConfig, CLIPTextModel
    >>> sizes = dict(vocab_size=10, hidden_size=4, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2)
    >>> clip = CLIPTextModel(CLIPTextConfig(**sizes, projection_dim=6, eos_token_id=9), projection=True)
    >>> ids = jax.ShapeDtypeStruct((1, 5), jnp.int32)
    >>> out, _ = jax.eval_shape(clip.init_with_output, jax.random.key(0), ids)
    >>> out.last_hidden.shape, out.pooled.shape, out.text_embeds.shape
    ((1, 5, 4), (1, 4), (1, 6))
    """

    config: CLIPTextConfig
    projection: bool = False
    hidden_layer: int = -1
    final_norm: bool = True
    scan: bool = False
    remat: bool = False
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, ids: Int[Array, "b l"], mask: Bool[Array, "b l"] | None = None) -> TextOutput:
        if mask is not None and mask.shape != ids.shape:
            raise ValueError(f"mask has shape {mask.shape}, the ids {ids.shape}: give one entry for each token")
        types = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        last, hidden, pooled = TextTower(
            self.config,
            hidden_layer=self.hidden_layer,
            final_norm=self.final_norm,
            scan=self.scan,
            remat=self.remat,
            name="text_model",
            **types,
        )(ids, mask)
        embeds = None
        if self.projection:
            embeds = nn.Dense(
                self.config.projection_dim,
                use_bias=False,
                name="text_projection",
                kernel_init=nn.initializers.normal(self.config.hidden_size**-0.5),
                **types,
            )(pooled)
        return TextOutput(last, hidden, pooled, embeds)


class CLIPVisionModel(nn.Module):
    """CLIP's image encoder; with `projection` it is transformers' CLIPVisionModelWithProjection.

    Its images are those of `normalize_images`. The other fields are as in `CLIPTextModel`.

    >>> import jax, jax.numpy as jnp
    >>> from mmdit.text import CLIPVisionConfig, CLIPVisionModel
    >>> sizes = dict(hidden_size=4, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, projection_dim=6)
    >>> clip = CLIPVisionModel(CLIPVisionConfig(**sizes, image_size=8, patch_size=4))
    >>> images = jax.ShapeDtypeStruct((1, 8, 8, 3), jnp.float32)
    >>> out, _ = jax.eval_shape(clip.init_with_output, jax.random.key(0), images)
    >>> out.last_hidden.shape, out.image_embeds.shape
    ((1, 5, 4), (1, 6))
    """

    config: CLIPVisionConfig
    projection: bool = True
    hidden_layer: int = -1
    scan: bool = False
    remat: bool = False
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images: Float[Array, "b h w c"]) -> VisionOutput:
        types = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        last, hidden, pooled = VisionTower(
            self.config, hidden_layer=self.hidden_layer, scan=self.scan, remat=self.remat, name="vision_model", **types
        )(images)
        embeds = None
        if self.projection:
            embeds = nn.Dense(
                self.config.projection_dim,
                use_bias=False,
                name="visual_projection",
                kernel_init=nn.initializers.normal(self.config.hidden_size**-0.5),
                **types,
            )(pooled)
        return VisionOutput(last, hidden, pooled, embeds)


@dataclass(frozen=True, kw_only=True)
class CLIPModel:
    """CLIP's text and image encoders over one parameter tree in the layout of transformers' CLIPModel.

    The tree is {"text_model", "text_projection", "vision_model", "visual_projection", "logit_scale"}.
    """

    config: CLIPConfig
    scan: bool = False
    remat: bool = False
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @property
    def text(self) -> CLIPTextModel:
        """The text encoder, which takes the same parameter tree."""
        return CLIPTextModel(
            self.config.text,
            projection=True,
            scan=self.scan,
            remat=self.remat,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
        )

    @property
    def vision(self) -> CLIPVisionModel:
        """The image encoder, which takes the same parameter tree."""
        return CLIPVisionModel(
            self.config.vision,
            projection=True,
            scan=self.scan,
            remat=self.remat,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
        )

    def init(self, key: Array) -> dict[str, Any]:
        """Return random parameters of both encoders and the initial log temperature."""
        text_key, image_key = jax.random.split(key)
        size = self.config.vision.image_size
        images = jnp.zeros((1, size, size, self.config.vision.num_channels))
        return {
            **self.text.init(text_key, jnp.zeros((1, 1), jnp.int32))["params"],
            **self.vision.init(image_key, images)["params"],
            "logit_scale": jnp.asarray(self.config.logit_scale_init_value, self.param_dtype),
        }

    def text_features(self, params: Any, ids: Int[Array, "b l"]) -> Float[Array, "b p"]:
        """Return the projected text embeddings, not normalised to unit length."""
        return cast(Array, cast(TextOutput, self.text.apply({"params": params}, ids)).text_embeds)

    def image_features(self, params: Any, images: Float[Array, "b h w c"]) -> Float[Array, "b p"]:
        """Return the projected image embeddings, not normalised; images are those of `normalize_images`."""
        return cast(Array, cast(VisionOutput, self.vision.apply({"params": params}, images)).image_embeds)
