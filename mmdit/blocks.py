"""The blocks of the MMDiT (Esser et al. 2024, arXiv:2403.03206, section 4 and figure 2).

Two streams of one width, the tokens of the picture x (b, n, d) and of the text (b, l, d), have their own weights and
meet in one attention. A vector c (b, d), activated, modulates both: shift, scale and gate around every layer.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Bool, Float

from mmdit.attention import Implementation, attention

EPSILON = 1e-6
Policy = Literal["nothing_saveable", "dots_saveable", "dots_with_no_batch_dims_saveable", "everything_saveable"]
Remat = bool | Policy
"""Whether a block's inside is recomputed in the backward pass; a policy of jax.checkpoint_policies says what is not."""


def rematerialized(block: Any, remat: Remat, *, scanned: bool = False) -> Any:
    """The block's class, recomputed as `remat` says."""
    if remat is False:
        return block
    if remat is not True and remat not in get_args(Policy):
        raise ValueError(f"remat={remat!r} is unknown; use True, False or one of {', '.join(get_args(Policy))}")
    policy = None if remat is True else getattr(jax.checkpoint_policies, remat)
    return nn.remat(block, prevent_cse=not scanned, policy=policy)


def stacked(block: Any, length: int, remat: Remat, in_axes: Any = nn.broadcast) -> Any:
    """`length` blocks one after the other as one class, whose parameters are stacked: one of them is compiled.

    The block takes and returns (carry, ...); in_axes: of its other inputs, by default the same for all.
    """
    return nn.scan(
        rematerialized(block, remat, scanned=True),
        variable_axes={"params": 0},
        split_rngs={"params": True},
        in_axes=in_axes,
        length=length,
    )


def flat_dot(x: Array, kernel: Array, *_: Any, **options: Any) -> Array:
    """x @ kernel with the leading axes of x as one: what `nn.Dense` takes as its `dot_general`.

    XLA:CPU copies what it contracts over two axes, which made the kernel's gradient two to five times as long (4096
    tokens, 320 channels in and 2560 out: 88 and 16 ms).
    """
    y = jax.lax.dot_general(x.reshape(-1, x.shape[-1]), kernel, (((1,), (0,)), ((), ())), **options)
    return y.reshape(*x.shape[:-1], kernel.shape[-1])


def linear(features: int, name: str, dtype: Any, param_dtype: Any, **options: Any) -> nn.Dense:
    """A dense layer of tokens under PyTorch's name."""
    types = {"dtype": dtype, "param_dtype": param_dtype}
    return nn.Dense(features, name=name, **types, **({"dot_general": flat_dot} | options))


def dense(features: int, name: str, dtype: Any, param_dtype: Any, *, zero: bool = False) -> nn.Dense:
    """A dense layer under PyTorch's name, begun as in DiT (arXiv:2212.09748): Xavier uniform, or zero; bias zero."""
    kernel = nn.initializers.zeros_init() if zero else nn.initializers.xavier_uniform()
    return linear(features, name, dtype, param_dtype, kernel_init=kernel)


def standardize(x: Array, axes: int | tuple[int, ...]) -> Array:
    """Mean zero and variance one over some axes, in float32."""
    x = x.astype(jnp.float32)
    x = x - x.mean(axes, keepdims=True)
    return x * jax.lax.rsqrt(jnp.square(x).mean(axes, keepdims=True) + EPSILON)


def normalize(x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
    """Layer normalisation without scale and bias, in float32."""
    return standardize(x, -1)


def modulate(
    normal: Float[Array, "b *n d"], shift: Float[Array, "b *#n d"], scale: Float[Array, "b *#n d"]
) -> Float[Array, "b *n d"]:
    """normal (1 + scale) + shift, computed in float32 and given in the precision of the modulation."""
    return (normal * (1 + scale.astype(jnp.float32)) + shift.astype(jnp.float32)).astype(shift.dtype)


class Modulation(nn.Module):
    """`parts` vectors for each token of a stream: one projection of c, zero at first, so that all gates are shut.

    features: of each vector; None: as many as c has.
    """

    parts: int
    features: int | None = None
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, c: Float[Array, "b d"]) -> list[Float[Array, "b 1 d"]]:
        width = self.parts * (self.features or c.shape[-1])
        y = dense(width, "linear", self.dtype, self.param_dtype, zero=True)(c)
        return jnp.split(y[:, None], self.parts, axis=-1)


def project(x: Array, name: str, heads: int, norm: str | None, types: dict[str, Any]) -> Float[Array, "b n h e"]:
    """Queries, keys or values of one stream, per head; norm: the name of their RMS norm."""
    y = rearrange(dense(x.shape[-1], name, **types)(x), "b n (h e) -> b n h e", h=heads)
    return y if norm is None else nn.RMSNorm(epsilon=EPSILON, name=norm, **types)(y)


class Attention(nn.Module):
    """Attention of the picture's tokens, joint with those of the text if there are any, each stream projected apart.

    qk_norm: RMS norms on queries and keys per head, without which bfloat16 training of large models diverges.
    context_out: project the text's part of the result back; the last block has no use for it (None).
    """

    heads: int
    qk_norm: bool = False
    context_out: bool = True
    implementation: Implementation | None = None
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "b n d"], context: Float[Array, "b l d"] | None = None
    ) -> tuple[Float[Array, "b n d"], Float[Array, "b l d"] | None]:
        width, tokens = x.shape[-1], x.shape[1]
        q, k, v = self._project(x, ("to_q", "to_k", "to_v"), "norm")
        if context is not None:
            added = self._project(context, ("add_q_proj", "add_k_proj", "add_v_proj"), "norm_added")
            q, k, v = (jnp.concatenate(pair, axis=1) for pair in zip((q, k, v), added, strict=True))
        y = rearrange(attention(q, k, v, implementation=self.implementation), "b n h d -> b n (h d)")
        types = (self.dtype, self.param_dtype)
        out = dense(width, "to_out_0", *types)(y[:, :tokens])
        if context is None or not self.context_out:
            return out, None
        return out, dense(width, "to_add_out", *types)(y[:, tokens:])

    def _project(self, x: Array, names: tuple[str, str, str], norm: str) -> list[Array]:
        """Queries, keys and values (b, n, heads, d / heads) of one stream."""
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        norms = (f"{norm}_q", f"{norm}_k", None) if self.qk_norm else (None, None, None)
        return [project(x, name, self.heads, norm, types) for name, norm in zip(names, norms, strict=True)]


class GELU(nn.Module):
    """gelu of a projection, by the tanh formula."""

    features: int
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n f"]:
        return jax.nn.gelu(dense(self.features, "proj", self.dtype, self.param_dtype)(x), approximate=True)


class FeedForward(nn.Module):
    """Four times the width, and back."""

    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        return dense(x.shape[-1], "net_2", **types)(GELU(4 * x.shape[-1], name="net_0", **types)(x))


def gated_mlp(x: Array, modulation: list[Array], name: str, types: dict[str, Any]) -> Float[Array, "b n d"]:
    """x plus its gated MLP under shift, scale and gate."""
    shift, scale, gate = modulation
    return x + gate * FeedForward(name=name, **types)(modulate(normalize(x), shift, scale))


class JointBlock(nn.Module):
    """(x, context) -> (x, context), each plus gated attention, then plus a gated MLP. Shaped as the body of a scan.

    dual: the picture's tokens attend to themselves alone as well (SD3.5-medium), from the same norm under a modulation
    of its own. last: the text is read but not written.
    """

    heads: int
    dual: bool = False
    last: bool = False
    qk_norm: bool = False
    implementation: Implementation | None = None
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self,
        carry: tuple[Float[Array, "b n d"], Float[Array, "b l d"]],
        c: Float[Array, "b d"],
        keep: Bool[Array, ""] | None = None,
    ) -> tuple[tuple[Float[Array, "b n d"], Float[Array, "b l d"]], None]:
        """keep: where false, both streams pass unchanged; None is true."""
        x, context = carry
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        attend = {"heads": self.heads, "qk_norm": self.qk_norm, "implementation": self.implementation} | types
        shift, scale, gate, *mlp = Modulation(9 if self.dual else 6, name="norm1", **types)(c)
        normal = normalize(x)
        if self.last:
            context_scale, context_shift = Modulation(2, name="norm1_context", **types)(c)
        else:
            context_shift, context_scale, context_gate, *context_mlp = Modulation(6, name="norm1_context", **types)(c)
        y, context_y = Attention(context_out=not self.last, name="attn", **attend)(
            modulate(normal, shift, scale), modulate(normalize(context), context_shift, context_scale)
        )
        x = x + gate * y
        if self.dual:
            shift, scale, gate = mlp[3:]
            x = x + gate * Attention(name="attn2", **attend)(modulate(normal, shift, scale))[0]
        x = gated_mlp(x, mlp[:3], "ff", types)
        if context_y is not None:  # all blocks but the last
            context = gated_mlp(context + context_gate * context_y, context_mlp, "ff_context", types)
        if keep is None:
            return (x, context), None
        return (jnp.where(keep, x, carry[0]), jnp.where(keep, context, carry[1])), None
