"""The networks that the paper compares the MMDiT with (Esser et al. 2024, arXiv:2403.03206, section 5.2.3, figure 4).

Their inputs, outputs and parts are those of the MMDiT; they differ in how text and image meet:

    DiT       one sequence of text and image, one set of weights ("MMDiT with one shared set")
    CrossDiT  image tokens only, which attend to the text in every block (PixArt-alpha, arXiv:2310.00426)
    UViT      convolutions at the latents' resolution around a transformer on patches (Hoogeboom et al. 2023,
              arXiv:2301.11093, "a hybrid between the widely used UNets and transformer variants")
    MMDiT     one sequence, two sets of weights

Time and pooled text enter all of them by modulation. The paper gives no more details of the UViT; here its transformer
is that of the DiT, text included. At one width and depth the MMDiT has about twice the parameters of a DiT.

>>> import jax
>>> from mmdit import CrossDiT, CrossDiTConfig, DiT, DiTConfig, UViT, UViTConfig, example_inputs
>>> fields = dict(num_layers=1, attention_head_dim=4, num_attention_heads=1, joint_attention_dim=4, sample_size=4)
>>> fields |= dict(caption_projection_dim=4, pooled_projection_dim=4, pos_embed_max_size=2)
>>> fields |= dict(in_channels=4, out_channels=4)
>>> for net in (DiT(DiTConfig(**fields)), CrossDiT(CrossDiTConfig(**fields)), UViT(UViTConfig(**fields))):
...     inputs = example_inputs(net.config, size=(4, 2))
...     jax.eval_shape(net.init_with_output, jax.random.key(0), *inputs)[0].shape
(1, 4, 2, 4)
(1, 4, 2, 4)
(1, 4, 2, 4)
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
    """Cross-attention of x to the context; its output projection is zero at first, as in PixArt-alpha."""

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
    """One block of the baselines: x plus gated self-attention, plus cross-attention, plus a gated MLP.

    The cross-attention is there if a context is given. It returns (x, None), as the body of `nn.scan`.
    """

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
    """The base of all three: the fields, with the meaning that they have in the MMDiT, and the stack of blocks."""

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
        """Return the image's tokens after blocks in which text and image are one sequence."""
        return self._blocks(jnp.concatenate([context, tokens], axis=1), c)[:, context.shape[1] :]

    def _out(self, tokens: Array, c: Array, x: Array) -> Float[Array, "b h w o"]:
        y = project_out(tokens, c, self.config.patch_size**2 * self.config.out_channels, self._types)
        return unpatchify(y, self.config.patch_size, x.shape[1]).astype(x.dtype)


class DiT(_Transformer):
    """The DiT with text and image tokens as one sequence: (noisy latent, time, conditioning) -> raw output."""

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
    """The DiT with cross-attention to the text: (noisy latent, time, conditioning) -> raw output.

    The text's tokens are the same in every block.
    """

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
    """A residual block of two convolutions; the second, zero at first, follows a norm with shift and scale."""

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
    """Return a 3x3 convolution that keeps the size, initialised as `dense`."""
    init = nn.initializers.zeros_init() if zero else nn.initializers.xavier_uniform(in_axis=(0, 1, 2), out_axis=3)
    return nn.Conv(features, (3, 3), padding="SAME", kernel_init=init, name=name, **types)


def group_norm(x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
    """Return the group norm of x with at most 32 groups, without scale and bias, in float32."""
    grouped = rearrange(x, "b h w (g e) -> b h w g e", g=math.gcd(32, x.shape[-1]))
    return rearrange(standardize(grouped, (1, 2, 4)), "b h w g e -> b h w (g e)")


class UViT(_Transformer):
    """The UViT, a UNet of two levels with a transformer below: (noisy latent, time, conditioning) -> raw output.

    The upper level has width / patch_size channels and convolutional residual blocks on both sides of the transformer.
    Each block of the second side takes the output of its counterpart too, as a skip connection.
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
