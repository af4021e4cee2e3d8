"""The residual and transformer blocks, and the down, middle and up blocks made of them. Arrays are (b, h, w, c)."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from lcm_jax.nets.layers import Downsample, Upsample, conv, dense, layer_norm
from mmdit.attention import Implementation, attention
from mmdit.blocks import Remat, rematerialized
from vae16.layers import GroupNorm


class ResnetBlock(nn.Module):
    """The residual block x + conv(silu(norm(conv(silu(norm(x))) + time))); x is projected where the width changes.

    scale_shift: the time embedding is a scale and a shift after the second norm instead of an addition before it.
    """

    features: int
    groups: int = 32
    epsilon: float = 1e-5
    scale_shift: bool = False
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], time: Float[Array, "b d"]) -> Float[Array, "b h w f"]:
        """Return the block's output; time: the activated time embedding, the same for all blocks."""
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        y = GroupNorm(self.groups, self.epsilon, silu=True, name="norm1", **types)(x)
        y = conv(self.features, "conv1", **types)(y)
        time = dense(self.features * (2 if self.scale_shift else 1), "time_emb_proj", **types)(time)
        norm = GroupNorm(self.groups, self.epsilon, silu=not self.scale_shift, name="norm2", **types)
        if self.scale_shift:
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
    implementation: Implementation | None = None
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b n c"], context: Float[Array, "b l d"]) -> Float[Array, "b n c"]:
        width = x.shape[-1]

        def heads(name: str, tokens: Array) -> Array:
            tokens = dense(width, name, self.dtype, self.param_dtype, use_bias=False)(tokens)
            return tokens.reshape(*tokens.shape[:2], self.heads, width // self.heads)

        q, k, v = heads("to_q", x), heads("to_k", context), heads("to_v", context)
        y = attention(q, k, v, implementation=self.implementation).reshape(x.shape)
        return dense(width, "to_out_0", self.dtype, self.param_dtype)(y)


class GEGLU(nn.Module):
    """The gated layer a * gelu(b) of one projection [a, b] = W x (arXiv:2002.05202), with the exact GELU."""

    features: int
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b n c"]) -> Float[Array, "b n f"]:
        value, gate = jnp.split(dense(2 * self.features, "proj", self.dtype, self.param_dtype)(x), 2, axis=-1)
        return value * jax.nn.gelu(gate, approximate=False)


class FeedForward(nn.Module):
    """The MLP of a transformer block: GEGLU to four times the width, and a projection back."""

    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b n c"]) -> Float[Array, "b n c"]:
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        return dense(x.shape[-1], "net_2", **types)(GEGLU(4 * x.shape[-1], name="net_0", **types)(x))


class TransformerBlock(nn.Module):
    """One transformer block: self-attention, cross-attention to the text and an MLP, each after a layer norm.

    It returns (tokens, None), as the body of `nn.scan`. only_cross_attention: the first attention is to the text too.
    """

    heads: int
    only_cross_attention: bool = False
    implementation: Implementation | None = None
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b n c"], context: Float[Array, "b l d"]) -> tuple[Float[Array, "b n c"], None]:
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        y = layer_norm("norm1", **types)(x)
        attn1 = Attention(self.heads, self.implementation, name="attn1", **types)
        x = x + attn1(y, context if self.only_cross_attention else y)
        y = layer_norm("norm2", **types)(x)
        x = x + Attention(self.heads, self.implementation, name="attn2", **types)(y, context)
        return x + FeedForward(name="ff", **types)(layer_norm("norm3", **types)(x)), None


class Transformer(nn.Module):
    """A residual branch of `depth` transformer blocks on the pixels of a feature map.

    scan: stack the blocks on one leading axis (path `transformer_blocks/...`), so that one of them is compiled.
    """

    heads: int
    depth: int = 1
    groups: int = 32
    linear: bool = False
    only_cross_attention: bool = False
    implementation: Implementation | None = None
    scan: bool = False
    remat: Remat = False
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], context: Float[Array, "b l d"]) -> Float[Array, "b h w c"]:
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        b, h, w, c = x.shape

        def project(name: str, y: Array) -> Array:
            if self.linear:
                return dense(c, name, **types)(y.reshape(b, h * w, c))
            return conv(c, name, kernel=1, **types)(y.reshape(b, h, w, c))

        y = GroupNorm(self.groups, 1e-6, name="norm", **types)(x)
        y = project("proj_in", y).reshape(b, h * w, c)
        scanned = self.scan and self.depth > 1
        block = rematerialized(TransformerBlock, self.remat, scanned=scanned)
        fields = {"only_cross_attention": self.only_cross_attention, "implementation": self.implementation} | types
        if scanned:
            stack = nn.scan(
                block,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                in_axes=nn.broadcast,
                length=self.depth,
            )
            y, _ = stack(self.heads, name="transformer_blocks", **fields)(y, context)
        else:
            for i in range(self.depth):
                y, _ = block(self.heads, name=f"transformer_blocks_{i}", **fields)(y, context)
        return x + project("proj_out", y).reshape(x.shape)


class Stage(nn.Module):
    """The base of the down, middle and up blocks: residual blocks of one width, and transformers after some of them.

    depths: number of blocks of each transformer. heads: attention heads; None is without transformers.
    """

    features: int
    depths: tuple[int, ...] = ()
    heads: int | None = None
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

    def types(self) -> dict[str, Any]:
        """Return the dtypes that the submodules get."""
        return {"dtype": self.dtype, "param_dtype": self.param_dtype}

    def resnet(self, i: int) -> nn.Module:
        """Return the residual block i."""
        block = rematerialized(ResnetBlock, self.remat)
        fields = (self.features, self.groups, self.epsilon, self.scale_shift)
        return block(*fields, name=f"resnets_{i}", **self.types())

    def attention(self, i: int, x: Array, context: Array) -> Array:
        """Return the output of the transformer i, or x itself in a block without transformers."""
        if self.heads is None:
            return x
        return Transformer(
            self.heads,
            self.depths[i],
            self.groups,
            self.linear,
            self.only_cross_attention,
            self.implementation,
            self.scan,
            self.remat,
            name=f"attentions_{i}",
            **self.types(),
        )(x, context)


class DownBlock(Stage):
    """A down block: one residual block for each depth, then half the size if `downsample`.

    It returns the result and the list of all intermediate outputs, the skip connections.
    """

    downsample: bool = True

    @nn.compact
    def __call__(self, x: Array, time: Array, context: Array) -> tuple[Array, list[Array]]:
        skips = []
        for i in range(len(self.depths)):
            x = self.attention(i, self.resnet(i)(x, time), context)
            skips.append(x)
        if self.downsample:
            x = Downsample(name="downsamplers_0", **self.types())(x)
            skips.append(x)
        return x, skips


class MidBlock(Stage):
    """The middle block: residual block, transformer, residual block; without heads only the first residual block."""

    @nn.compact
    def __call__(self, x: Array, time: Array, context: Array) -> Array:
        x = self.resnet(0)(x, time)
        if self.heads is None:
            return x
        return self.resnet(1)(self.attention(0, x, context), time)


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
        return x if size is None else Upsample(name="upsamplers_0", **self.types())(x, size)
