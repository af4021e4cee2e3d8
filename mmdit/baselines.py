"""What the paper compares the MMDiT with (Esser et al. 2024, arXiv:2403.03206, section 5.2.3 and figure 4).

They take what it takes, give what it gives and are built of its parts; only how text and picture meet is another:

    DiT       one sequence of text and picture, one set of weights ("MMDiT with one shared set")
    CrossDiT  the picture's tokens alone, which attend to the text in every block (PixArt-alpha, arXiv:2310.00426)
    UViT      convolutions at the latents' resolution around a transformer on patches (Hoogeboom et al. 2023,
              arXiv:2301.11093, "a hybrid between the widely used UNets and transformer variants")
    MMDiT     one sequence, two sets of weights

All of them are told time and pooled text by modulation. The paper says no more of the UViT; here its transformer is the
DiT's, text included. At one width and depth the MMDiT has about twice the parameters of a DiT.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float, Shaped

from mmdit.attention import Implementation, attention
from mmdit.blocks import (
    Attention,
    Modulation,
    Remat,
    dense,
    gated_mlp,
    modulate,
    normalize,
    project,
    rematerialized,
    stacked,
    standardize,
)
from mmdit.config import CrossDiTConfig, DiTConfig, MMDiTConfig, UViTConfig
from mmdit.embed import PatchEmbed, unpatchify
from mmdit.model import check_inputs, embed_condition, project_out

UVIT_RESBLOCKS = 2  # on each side of the UViT's transformer


class CrossAttention(nn.Module):
    """Attention of x to the context, projected back by zeros at first, as in PixArt-alpha."""

    heads: int
    qk_norm: bool = False
    implementation: Implementation | None = None
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b n d"], context: Float[Array, "b l d"]) -> Float[Array, "b n d"]:
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        norms = ("norm_q", "norm_k") if self.qk_norm else (None, None)
        q = project(x, "to_q", self.heads, norms[0], types)
        k, v = (
            project(context, f"to_{name}", self.heads, norm, types) for name, norm in (("k", norms[1]), ("v", None))
        )
        y = rearrange(attention(q, k, v, implementation=self.implementation), "b n h e -> b n (h e)")
        return dense(x.shape[-1], "to_out_0", zero=True, **types)(y)


class DiTBlock(nn.Module):
    """x plus gated attention, with `context` plus attention to it, plus a gated MLP. Shaped as the body of a scan."""

    heads: int
    qk_norm: bool = False
    implementation: Implementation | None = None
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "b n d"], c: Float[Array, "b d"], context: Float[Array, "b l d"] | None = None
    ) -> tuple[Float[Array, "b n d"], None]:
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        attend = {"heads": self.heads, "qk_norm": self.qk_norm, "implementation": self.implementation} | types
        shift, scale, gate, *mlp = Modulation(6, name="norm1", **types)(c)
        x = x + gate * Attention(name="attn", **attend)(modulate(normalize(x), shift, scale))[0]
        if context is not None:
            x = x + CrossAttention(name="attn2", **attend)(x, context)
        return gated_mlp(x, mlp, "ff", types), None


class _Transformer(nn.Module):
    """The fields of all three, which mean what the MMDiT's mean, and their stack of blocks."""

    config: MMDiTConfig
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    scan: bool = False
    remat: Remat = False
    attention: Implementation | None = None

    @property
    def _types(self) -> dict[str, Any]:
        return {"dtype": self.dtype, "param_dtype": self.param_dtype}

    def _blocks(self, x: Array, c: Array, context: Array | None = None) -> Float[Array, "b n d"]:
        config = self.config
        fields = {"heads": config.num_attention_heads, "qk_norm": config.qk_norm is not None} | self._types
        fields["implementation"] = self.attention
        if self.scan and config.num_layers > 1:
            return stacked(DiTBlock, config.num_layers, self.remat)(name="transformer_blocks", **fields)(x, c, context)[
                0
            ]
        for i in range(config.num_layers):
            x, _ = rematerialized(DiTBlock, self.remat)(name=f"transformer_blocks_{i}", **fields)(x, c, context)
        return x

    def _joined(self, tokens: Array, context: Array, c: Array) -> Float[Array, "b n d"]:
        """The picture's tokens after blocks in which text and picture are one sequence."""
        return self._blocks(jnp.concatenate([context, tokens], axis=1), c)[:, context.shape[1] :]

    def _out(self, tokens: Array, c: Array, x: Array) -> Float[Array, "b h w o"]:
        y = project_out(tokens, c, self.config.patch_size**2 * self.config.out_channels, self._types)
        return unpatchify(y, self.config.patch_size, x.shape[1]).astype(x.dtype)


class DiT(_Transformer):
    """(noisy latent, time, conditioning) -> raw output, as MMDiT: text and picture as one sequence."""

    config: DiTConfig

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"], t: Shaped[Array, "*b"], cond: Mapping[str, Array]
    ) -> Float[Array, "b h w o"]:
        check_inputs(self.config, x, cond)
        context, c = embed_condition(self.config, x.shape[0], t, cond, self._types)
        tokens = PatchEmbed(self.config, name="pos_embed", **self._types)(x)
        return self._out(self._joined(tokens, context, c), c, x)


class CrossDiT(_Transformer):
    """(noisy latent, time, conditioning) -> raw output, as MMDiT: cross-attention to the text, which stays as it is."""

    config: CrossDiTConfig

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"], t: Shaped[Array, "*b"], cond: Mapping[str, Array]
    ) -> Float[Array, "b h w o"]:
        check_inputs(self.config, x, cond)
        context, c = embed_condition(self.config, x.shape[0], t, cond, self._types)
        tokens = PatchEmbed(self.config, name="pos_embed", **self._types)(x)
        return self._out(self._blocks(tokens, c, context), c, x)


class ResBlock(nn.Module):
    """Two convolutions, the second under shift and scale and zero at first, beside a shortcut."""

    features: int
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w i"], c: Float[Array, "b d"]) -> Float[Array, "b h w o"]:
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        y = conv(self.features, "conv1", types)(nn.silu(group_norm(x)).astype(self.dtype))
        shift, scale = Modulation(2, self.features, name="norm2", **types)(c)
        y = nn.silu(modulate(group_norm(y), shift[:, None], scale[:, None]))
        y = conv(self.features, "conv2", types, zero=True)(y)
        if x.shape[-1] != self.features:
            x = dense(self.features, "conv_shortcut", **types)(x)
        return x + y


def conv(features: int, name: str, types: dict[str, Any], *, zero: bool = False) -> nn.Conv:
    """3x3, begun as `dense`."""
    init = nn.initializers.zeros_init() if zero else nn.initializers.xavier_uniform(in_axis=(0, 1, 2), out_axis=3)
    return nn.Conv(features, (3, 3), padding="SAME", kernel_init=init, name=name, **types)


def group_norm(x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
    """Over the picture and the channels of at most 32 groups, without scale and bias, in float32."""
    grouped = rearrange(x, "b h w (g e) -> b h w g e", g=math.gcd(32, x.shape[-1]))
    return rearrange(standardize(grouped, (1, 2, 4)), "b h w g e -> b h w (g e)")


class UViT(_Transformer):
    """(noisy latent, time, conditioning) -> raw output, as MMDiT: a UNet of two levels, the lower one a transformer.

    The upper level has width / patch_size channels and residual blocks of convolutions on either side, each one of the
    second side joined with what its counterpart gave.
    """

    config: UViTConfig

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"], t: Shaped[Array, "*b"], cond: Mapping[str, Array]
    ) -> Float[Array, "b h w o"]:
        config, types, patch = self.config, self._types, self.config.patch_size
        check_inputs(config, x, cond)
        context, c = embed_condition(config, x.shape[0], t, cond, types)
        channels = config.width // patch
        block = rematerialized(ResBlock, self.remat)
        y = conv(channels, "conv_in", types)(x.astype(self.dtype))
        skips = []
        for i in range(UVIT_RESBLOCKS):
            y = block(channels, name=f"down_blocks_{i}", **types)(y, c)
            skips.append(y)
        tokens = self._joined(PatchEmbed(config, name="pos_embed", **types)(y), context, c)
        y = unpatchify(dense(patch**2 * channels, "upsample", **types)(tokens), patch, x.shape[1])
        for i in range(UVIT_RESBLOCKS):
            y = jnp.concatenate([y, skips.pop()], axis=-1)
            y = block(channels, name=f"up_blocks_{i}", **types)(y, c)
        shift, scale = Modulation(2, channels, name="norm_out", **types)(c)
        y = nn.silu(modulate(group_norm(y), shift[:, None], scale[:, None]))
        return conv(config.out_channels, "conv_out", types, zero=True)(y).astype(x.dtype)
