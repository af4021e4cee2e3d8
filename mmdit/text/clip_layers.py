"""The layers of CLIP's two encoders (Radford et al. 2021, arXiv:2103.00020, section 2.4)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Bool, Float, Int

from mmdit.attention import attention
from mmdit.blocks import linear, sow
from mmdit.text.clip_config import CLIPTextConfig, CLIPVisionConfig


def quick_gelu(x: Array) -> Array:
    """Return x sigmoid(1.702 x), OpenAI's approximation of GELU."""
    return x * jax.nn.sigmoid(1.702 * x)


def _gelu(x: Array) -> Array:
    return jax.nn.gelu(x, approximate=False)


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {"quick_gelu": quick_gelu, "gelu": _gelu}


def _linear(block: SelfAttention | MLP, width: int, name: str, std: float) -> nn.Dense:
    return linear(width, name, block.dtype, block.param_dtype, kernel_init=nn.initializers.normal(std))


class SelfAttention(nn.Module):
    """Multi-head self-attention; causal: a token attends only to itself and earlier tokens.

    mask: True where a token may be attended to; None is everywhere.
    """

    config: CLIPTextConfig | CLIPVisionConfig
    causal: bool
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b l d"], mask: Bool[Array, "b l"] | None = None) -> Float[Array, "b l d"]:
        c = self.config
        std_in = (2 * c.num_hidden_layers * c.hidden_size) ** -0.5
        q, k, v = (
            rearrange(_linear(self, c.hidden_size, name, std_in)(x), "b l (h d) -> b l h d", h=c.num_attention_heads)
            for name in ("q_proj", "k_proj", "v_proj")
        )
        keys = None if mask is None else mask[:, None, None]
        out = rearrange(attention(q, k, v, causal=self.causal, mask=keys), "b l h d -> b l (h d)")
        return _linear(self, c.hidden_size, "out_proj", c.hidden_size**-0.5)(out)


class MLP(nn.Module):
    """The MLP of a layer: fc2(act(fc1(x)))."""

    config: CLIPTextConfig | CLIPVisionConfig
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b l d"]) -> Float[Array, "b l d"]:
        c = self.config
        x = ACTIVATIONS[c.hidden_act](_linear(self, c.intermediate_size, "fc1", (2 * c.hidden_size) ** -0.5)(x))
        return _linear(self, c.hidden_size, "fc2", (2 * c.num_hidden_layers * c.hidden_size) ** -0.5)(x)


class EncoderLayer(nn.Module):
    """A pre-norm transformer layer, as the body of `nn.scan`.

    The carry is (x, selected): where `keep` is true the layer's output becomes `selected`, else that is passed on. The
    output is sown as ("features", "tokens").
    """

    config: CLIPTextConfig | CLIPVisionConfig
    causal: bool
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, carry: tuple[Array, Array], keep: Array, mask: Array | None = None
    ) -> tuple[tuple[Array, Array], None]:
        x, selected = carry
        types = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        norm = dict(epsilon=self.config.layer_norm_eps, use_fast_variance=False, **types)
        h = nn.LayerNorm(name="layer_norm1", **norm)(x)
        x = x + SelfAttention(self.config, self.causal, name="self_attn", **types)(h, mask)
        h = nn.LayerNorm(name="layer_norm2", **norm)(x)
        x = x + MLP(self.config, name="mlp", **types)(h)
        sow(self, "tokens", x)
        return (x, jnp.where(keep, x, selected)), None


class Encoder(nn.Module):
    """The stack of layers; it returns the last layer's output and the output that `hidden_layer` chooses.

    hidden_layer counts as transformers' hidden_states: 0 is the input, -1 the last layer, -2 the one before. Raises
    ValueError for a layer that does not exist.
    """

    config: CLIPTextConfig | CLIPVisionConfig
    causal: bool
    hidden_layer: int = -1
    scan: bool = False
    remat: bool = False
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "b l d"], mask: Bool[Array, "b l"] | None = None
    ) -> tuple[Float[Array, "b l d"], Float[Array, "b l d"]]:
        n = self.config.num_hidden_layers
        if not -n - 1 <= self.hidden_layer <= n:
            raise ValueError(f"hidden_layer={self.hidden_layer} is outside [{-n - 1}, {n}] for {n} layers")
        chosen = self.hidden_layer % (n + 1)
        keep = jnp.arange(1, n + 1) == chosen
        options = dict(config=self.config, causal=self.causal, dtype=self.dtype, param_dtype=self.param_dtype)
        layer = nn.remat(EncoderLayer, prevent_cse=not self.scan) if self.remat else EncoderLayer
        carry = (x, x)
        if self.scan:
            stack = nn.scan(
                layer,
                variable_axes={"params": 0, "features": 0},
                split_rngs={"params": True},
                in_axes=(0, nn.broadcast),
                length=n,
            )
            carry, _ = stack(name="layers", **options)(carry, keep, mask)
        else:
            for i in range(n):
                carry, _ = layer(name=f"layers_{i}", **options)(carry, keep[i], mask)
        return carry


class TextEmbeddings(nn.Module):
    """The token embeddings plus the position embeddings; raises ValueError for a text with too many tokens."""

    config: CLIPTextConfig
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, ids: Int[Array, "b l"]) -> Float[Array, "b l d"]:
        c = self.config
        if ids.shape[-1] > c.max_position_embeddings:
            raise ValueError(
                f"the text has {ids.shape[-1]} tokens, this CLIP takes {c.max_position_embeddings}: "
                "truncate it in the tokenizer"
            )
        table = dict(
            features=c.hidden_size,
            embedding_init=nn.initializers.normal(0.02),
            dtype=self.dtype,
            param_dtype=self.param_dtype,
        )
        tokens = nn.Embed(c.vocab_size, name="token_embedding", **table)(ids)
        return tokens + nn.Embed(c.max_position_embeddings, name="position_embedding", **table)(
            jnp.arange(ids.shape[-1])
        )


class PatchEmbedding(nn.Module):
    """The projection of patches, PyTorch's patch_embedding with a kernel (p, p, c, d), as one matrix product."""

    config: CLIPVisionConfig
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images: Float[Array, "b h w c"]) -> Float[Array, "b n d"]:
        c, p = self.config, self.config.patch_size
        kernel = self.param(
            "kernel", nn.initializers.normal(0.02), (p, p, c.num_channels, c.hidden_size), self.param_dtype
        )
        patches = rearrange(images, "b (h p) (w q) c -> b (h w) (p q c)", p=p, q=p)
        return patches.astype(self.dtype) @ rearrange(kernel, "p q c d -> (p q c) d").astype(self.dtype)


class VisionEmbeddings(nn.Module):
    """The class token and the projected patches, plus position embeddings; raises ValueError for another image size."""

    config: CLIPVisionConfig
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images: Float[Array, "b h w c"]) -> Float[Array, "b n d"]:
        c = self.config
        if images.shape[1:] != (c.image_size, c.image_size, c.num_channels):
            raise ValueError(
                f"images are {images.shape[1:]} (height, width, channels), this CLIP takes "
                f"{(c.image_size, c.image_size, c.num_channels)}: resize them first"
            )
        types = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        patches = PatchEmbedding(c, name="patch_embedding", **types)(images)
        class_token = self.param(
            "class_embedding", nn.initializers.normal(c.hidden_size**-0.5), (c.hidden_size,), self.param_dtype
        ).astype(self.dtype)
        x = jnp.concatenate([jnp.broadcast_to(class_token, (len(patches), 1, c.hidden_size)), patches], axis=1)
        return x + nn.Embed(
            x.shape[1], c.hidden_size, embedding_init=nn.initializers.normal(0.02), name="position_embedding", **types
        )(jnp.arange(x.shape[1]))
