"""The residual and transformer blocks, and the down, middle and up blocks made of them. Arrays are (b, h, w, c)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from lcm_jax.nets.layers import Downsample, Upsample, conv, dense, layer_norm
from mmdit.attention import Implementation, attention
from mmdit.blocks import Remat, rematerialized, sow
from vae16.layers import GroupNorm


@dataclass(frozen=True, kw_only=True)
class BlockSettings:
    """The settings that all blocks of a level share; they travel through the modules as one object.

    groups, epsilon: of the group norms. scale_shift: the time embedding is a scale and a shift after the second norm of
    a residual block instead of an addition before it. linear: project to transformers by dense layers instead of 1 x 1
    convolutions. only_cross_attention: a transformer's first attention is to the text too. implementation: of
    `mmdit.attention.attention`. scan: stack transformer blocks on one leading axis, so that one of them is compiled.
    remat: what the backward pass recomputes. dtype: of the computation; param_dtype: of the parameters.
    """

    groups: int = 32
    epsilon: float = 1e-5
    scale_shift: bool = False
    linear: bool = False
    only_cross_attention: bool = False
    implementation: Implementation | None = None
    scan: bool = False
    remat: Remat = False
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @property
    def types(self) -> dict[str, Any]:
        """The dtypes, as the layers take them."""
        return {"dtype": self.dtype, "param_dtype": self.param_dtype}


class ResnetBlock(nn.Module):
    """The residual block x + conv(silu(norm(conv(silu(norm(x))) + time))); x is projected where the width changes."""

    features: int
    settings: BlockSettings = BlockSettings()

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], time: Float[Array, "b d"]) -> Float[Array, "b h w f"]:
        """Return the block's output; time: the activated time embedding, the same for all blocks."""
        settings, types = self.settings, self.settings.types
        y = GroupNorm(settings.groups, settings.epsilon, silu=True, name="norm1", **types)(x)
        y = conv(self.features, "conv1", **types)(y)
        time = dense(self.features * (2 if settings.scale_shift else 1), "time_emb_proj", **types)(time)
        norm = GroupNorm(settings.groups, settings.epsilon, silu=not settings.scale_shift, name="norm2", **types)
        if settings.scale_shift:
            scale, shift = jnp.split(time[:, None, None], 2, axis=-1)
            y = nn.silu(norm(y) * (1 + scale) + shift)
        else:
            y = norm(y, time)
        y = conv(self.features, "conv2", **types)(y)
        if x.shape[-1] != self.features:
            x = conv(self.features, "conv_shortcut", kernel=1, **types)(x)
        return x + y


class Attention(nn.Module):
    """Multi-head attention of tokens x to a context of any width."""

    heads: int
    settings: BlockSettings = BlockSettings()

    @nn.compact
    def __call__(self, x: Float[Array, "b n c"], context: Float[Array, "b l d"]) -> Float[Array, "b n c"]:
        width, types = x.shape[-1], self.settings.types

        def heads(name: str, tokens: Array) -> Array:
            tokens = dense(width, name, use_bias=False, **types)(tokens)
            return tokens.reshape(*tokens.shape[:2], self.heads, width // self.heads)

        q, k, v = heads("to_q", x), heads("to_k", context), heads("to_v", context)
        y = attention(q, k, v, implementation=self.settings.implementation).reshape(x.shape)
        return dense(width, "to_out_0", **types)(y)


class GEGLU(nn.Module):
    """The gated layer a * gelu(b) of one projection [a, b] = W x (arXiv:2002.05202), with the exact GELU."""

    features: int
    settings: BlockSettings = BlockSettings()

    @nn.compact
    def __call__(self, x: Float[Array, "b n c"]) -> Float[Array, "b n f"]:
        value, gate = jnp.split(dense(2 * self.features, "proj", **self.settings.types)(x), 2, axis=-1)
        return value * jax.nn.gelu(gate, approximate=False)


class FeedForward(nn.Module):
    """The MLP of a transformer block: GEGLU to four times the width, and a projection back."""

    settings: BlockSettings = BlockSettings()

    @nn.compact
    def __call__(self, x: Float[Array, "b n c"]) -> Float[Array, "b n c"]:
        gated = GEGLU(4 * x.shape[-1], self.settings, name="net_0")(x)
        return dense(x.shape[-1], "net_2", **self.settings.types)(gated)


class TransformerBlock(nn.Module):
    """One transformer block: self-attention, cross-attention to the text and an MLP, each after a layer norm.

    It returns (tokens, None), as the body of `nn.scan`.
    """

    heads: int
    settings: BlockSettings = BlockSettings()

    @nn.compact
    def __call__(self, x: Float[Array, "b n c"], context: Float[Array, "b l d"]) -> tuple[Float[Array, "b n c"], None]:
        settings, types = self.settings, self.settings.types
        y = layer_norm("norm1", **types)(x)
        attn1 = Attention(self.heads, settings, name="attn1")
        x = x + attn1(y, context if settings.only_cross_attention else y)
        y = layer_norm("norm2", **types)(x)
        x = x + Attention(self.heads, settings, name="attn2")(y, context)
        return x + FeedForward(settings, name="ff")(layer_norm("norm3", **types)(x)), None


class Transformer(nn.Module):
    """A residual branch of `depth` transformer blocks on the pixels of a feature map.

    With settings.scan the blocks are stacked on one leading axis, under the path `transformer_blocks/...`.
    """

    heads: int
    depth: int = 1
    settings: BlockSettings = BlockSettings()

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], context: Float[Array, "b l d"]) -> Float[Array, "b h w c"]:
        settings, types = self.settings, self.settings.types
        b, h, w, c = x.shape

        def project(name: str, y: Array) -> Array:
            if settings.linear:
                return dense(c, name, **types)(y.reshape(b, h * w, c))
            return conv(c, name, kernel=1, **types)(y.reshape(b, h, w, c))

        y = GroupNorm(settings.groups, 1e-6, name="norm", **types)(x)
        y = project("proj_in", y).reshape(b, h * w, c)
        scanned = settings.scan and self.depth > 1
        block = rematerialized(TransformerBlock, settings.remat, scanned=scanned)
        if scanned:
            stack = nn.scan(
                block,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                in_axes=nn.broadcast,
                length=self.depth,
            )
            y, _ = stack(self.heads, settings, name="transformer_blocks")(y, context)
        else:
            for i in range(self.depth):
                y, _ = block(self.heads, settings, name=f"transformer_blocks_{i}")(y, context)
        return x + project("proj_out", y).reshape(x.shape)


class Stage(nn.Module):
    """The base of the down, middle and up blocks: residual blocks of one width, and transformers after some of them.

    depths: number of blocks of each transformer. heads: attention heads; None is without transformers.
    """

    features: int
    depths: tuple[int, ...] = ()
    heads: int | None = None
    settings: BlockSettings = BlockSettings()

    def resnet(self, i: int) -> nn.Module:
        """Return the residual block i."""
        return rematerialized(ResnetBlock, self.settings.remat)(self.features, self.settings, name=f"resnets_{i}")

    def attention(self, i: int, x: Array, context: Array) -> Array:
        """Return the output of the transformer i, or x itself in a block without transformers."""
        if self.heads is None:
            return x
        return Transformer(self.heads, self.depths[i], self.settings, name=f"attentions_{i}")(x, context)


class DownBlock(Stage):
    """A down block: one residual block for each depth, then half the size if `downsample`.

    It returns the result and the list of all intermediate outputs, the skip connections. The result is sown as
    ("features", "map").
    """

    downsample: bool = True

    @nn.compact
    def __call__(self, x: Array, time: Array, context: Array) -> tuple[Array, list[Array]]:
        skips = []
        for i in range(len(self.depths)):
            x = self.attention(i, self.resnet(i)(x, time), context)
            skips.append(x)
        if self.downsample:
            x = Downsample(name="downsamplers_0", **self.settings.types)(x)
            skips.append(x)
        sow(self, "map", x)
        return x, skips


class MidBlock(Stage):
    """The middle block: residual block, transformer, residual block; without heads only the first residual block.

    The result is sown as ("features", "map").
    """

    @nn.compact
    def __call__(self, x: Array, time: Array, context: Array) -> Array:
        x = self.resnet(0)(x, time)
        if self.heads is not None:
            x = self.resnet(1)(self.attention(0, x, context), time)
        sow(self, "map", x)
        return x


class UpBlock(Stage):
    """An up block: one residual block for each depth on [x, skip], then a resize to `size`, about twice the size.

    size: height and width of the output; None does not resize.
    """

    @nn.compact
    def __call__(
        self, x: Array, skips: list[Array], time: Array, context: Array, size: tuple[int, int] | None
    ) -> Array:
        for i in range(len(self.depths)):
            x = self.resnet(i)(jnp.concatenate([x, skips.pop()], axis=-1), time)
            x = self.attention(i, x, context)
        return x if size is None else Upsample(name="upsamplers_0", **self.settings.types)(x, size)
