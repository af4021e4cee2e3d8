"""The blocks of the MMDiT (Esser et al. 2024, arXiv:2403.03206, section 4 and figure 2).

Two streams of one width, the tokens of the image x (b, n, d) and of the text (b, l, d), have separate weights and meet
in a joint attention. An activated vector c (b, d) modulates both: shift, scale and gate around every layer.
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
"""True recomputes a block's activations in the backward pass, False stores them; the name of a policy of
jax.checkpoint_policies stores only what that policy names."""


def rematerialized(block: Any, remat: Remat, *, scanned: bool = False) -> Any:
    """Return the module class `block` with activations that the backward pass recomputes as `remat` says.

    scanned: the block is the body of a scan. Raises ValueError for an unknown policy.
    """
    if remat is False:
        return block
    if remat is not True and remat not in get_args(Policy):
        raise ValueError(f"remat={remat!r} is unknown; use True, False or one of {', '.join(get_args(Policy))}")
    policy = None if remat is True else getattr(jax.checkpoint_policies, remat)
    return nn.remat(block, prevent_cse=not scanned, policy=policy)


def stacked(block: Any, length: int, remat: Remat, in_axes: Any = nn.broadcast) -> Any:
    """Return a module class of `length` blocks in sequence with stacked parameters, of which one block is compiled.

    The block takes (carry, *inputs) and returns (carry, output). in_axes: the axes along which `nn.scan` divides the
    other inputs among the blocks; by default all blocks get the same inputs.
    """
    return nn.scan(
        rematerialized(block, remat, scanned=True),
        variable_axes={"params": 0, "features": 0},
        split_rngs={"params": True},
        in_axes=in_axes,
        length=length,
    )


def sow(module: nn.Module, name: str, x: Array) -> None:
    """Put a module's output into the collection "features", where that is mutable; `init` makes parameters alone."""
    if not module.is_initializing():
        module.sow("features", name, x)


def flat_dot(x: Array, kernel: Array, *_: Any, **options: Any) -> Array:
    """Return x @ kernel with the leading axes of x as one, as a `dot_general` of `nn.Dense`.

    XLA:CPU copies arrays that it contracts over two axes, which makes the kernel's gradient two to five times as slow
    (4096 tokens, 320 channels in and 2560 out: 88 ms against 16 ms).

    >>> import jax.numpy as jnp
    >>> from mmdit.blocks import flat_dot
    >>> flat_dot(jnp.ones((2, 3, 4)), jnp.ones((4, 5))).shape
    (2, 3, 5)
    """
    y = jax.lax.dot_general(x.reshape(-1, x.shape[-1]), kernel, (((1,), (0,)), ((), ())), **options)
    return y.reshape(*x.shape[:-1], kernel.shape[-1])


def linear(features: int, name: str, dtype: Any, param_dtype: Any, **options: Any) -> nn.Dense:
    """Return a dense layer for tokens under PyTorch's name; options: further fields of `nn.Dense`."""
    types = {"dtype": dtype, "param_dtype": param_dtype}
    return nn.Dense(features, name=name, **types, **({"dot_general": flat_dot} | options))


def dense(features: int, name: str, dtype: Any, param_dtype: Any, *, zero: bool = False) -> nn.Dense:
    """Return a dense layer under PyTorch's name, initialised as in DiT (arXiv:2212.09748).

    The kernel is Xavier uniform, or zero if `zero`; the bias is zero.
    """
    kernel = nn.initializers.zeros_init() if zero else nn.initializers.xavier_uniform()
    return linear(features, name, dtype, param_dtype, kernel_init=kernel)


def standardize(x: Array, axes: int | tuple[int, ...]) -> Array:
    """Return (x - mean(x)) / sqrt(var(x) + EPSILON) over the axes, in float32."""
    x = x.astype(jnp.float32)
    x = x - x.mean(axes, keepdims=True)
    return x * jax.lax.rsqrt(jnp.square(x).mean(axes, keepdims=True) + EPSILON)


def normalize(x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
    """Return the layer normalisation of x without scale and bias, in float32."""
    return standardize(x, -1)


def modulate(
    normal: Float[Array, "b *n d"], shift: Float[Array, "b *#n d"], scale: Float[Array, "b *#n d"]
) -> Float[Array, "b *n d"]:
    """Return normal * (1 + scale) + shift (adaLN, arXiv:2212.09748), computed in float32, in the dtype of `shift`."""
    return (normal * (1 + scale.astype(jnp.float32)) + shift.astype(jnp.float32)).astype(shift.dtype)


class Modulation(nn.Module):
    """The `parts` modulation vectors of a stream, such as shift, scale and gate: one projection of c.

    The projection is zero at first (adaLN-Zero, arXiv:2212.09748), so all gates are closed. features: width of each
    vector; None is that of c.
    """

    parts: int
    features: int | None = None
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, c: Float[Array, "b d"]) -> list[Float[Array, "b 1 e"]]:
        width = self.parts * (self.features or c.shape[-1])
        y = dense(width, "linear", self.dtype, self.param_dtype, zero=True)(c)
        return jnp.split(y[:, None], self.parts, axis=-1)


def project(x: Array, name: str, heads: int, norm: str | None, types: dict[str, Any]) -> Float[Array, "b n h e"]:
    """Return queries, keys or values of one stream per head; norm: the name of their RMS norm, None for no norm."""
    y = rearrange(dense(x.shape[-1], name, **types)(x), "b n (h e) -> b n h e", h=heads)
    return y if norm is None else nn.RMSNorm(epsilon=EPSILON, name=norm, **types)(y)


class Attention(nn.Module):
    """The joint attention of the MMDiT (Esser et al. 2024, section 4): one attention over image and text tokens.

    Each stream has its own projections to queries, keys and values; these are concatenated over the tokens, and the
    result is split again. Without a context it is the image tokens' self-attention. Returns (image, text), with None
    for a text without output.

    qk_norm: RMS norms on queries and keys per head, without which bfloat16 training of large models diverges (section
    5.3.2). context_out: project the text's part of the result back; the last block does not need it.
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
            context_qkv = self._project(context, ("add_q_proj", "add_k_proj", "add_v_proj"), "norm_added")
            # Joint attention: the tokens of both streams are one sequence.
            q, k, v = (jnp.concatenate(pair, axis=1) for pair in zip((q, k, v), context_qkv, strict=True))
        y = rearrange(attention(q, k, v, implementation=self.implementation), "b n h d -> b n (h d)")
        types = (self.dtype, self.param_dtype)
        out = dense(width, "to_out_0", *types)(y[:, :tokens])
        if context is None or not self.context_out:
            return out, None
        return out, dense(width, "to_add_out", *types)(y[:, tokens:])

    def _project(self, x: Array, names: tuple[str, str, str], norm: str) -> list[Array]:
        """Return queries, keys and values (b, n, heads, d / heads) of one stream."""
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        norms = (f"{norm}_q", f"{norm}_k", None) if self.qk_norm else (None, None, None)
        return [project(x, name, self.heads, norm, types) for name, norm in zip(names, norms, strict=True)]


class GELU(nn.Module):
    """The GELU of a projection, in its tanh approximation."""

    features: int
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n f"]:
        return jax.nn.gelu(dense(self.features, "proj", self.dtype, self.param_dtype)(x), approximate=True)


class FeedForward(nn.Module):
    """The MLP of a block: a projection to four times the width, GELU, and a projection back."""

    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        return dense(x.shape[-1], "net_2", **types)(GELU(4 * x.shape[-1], name="net_0", **types)(x))


def gated_mlp(x: Array, modulation: list[Array], name: str, types: dict[str, Any]) -> Float[Array, "b n d"]:
    """Return x + gate * MLP(norm(x) (1 + scale) + shift); modulation: [shift, scale, gate]."""
    shift, scale, gate = modulation
    return x + gate * FeedForward(name=name, **types)(modulate(normalize(x), shift, scale))


class JointBlock(nn.Module):
    """One block of the MMDiT: x and context each plus gated joint attention, then plus a gated MLP (figure 2b).

    It takes ((x, context), c) and returns ((x, context), None), as the body of `nn.scan`. dual: the image tokens also
    attend to the image tokens alone (SD3.5-medium), from the same norm with a modulation of its own. last: the text is
    an input of the attention, but gets no output. The image tokens are sown as ("features", "tokens"), which costs
    nothing unless that collection is mutable.
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
        """Return the block's output, or where `keep` is false both streams unchanged; None counts as true."""
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
        if keep is not None:
            x, context = jnp.where(keep, x, carry[0]), jnp.where(keep, context, carry[1])
        sow(self, "tokens", x)
        return (x, context), None
