"""T5's encoder (Raffel et al. 2020, arXiv:1910.10683; Shazeer 2020 for version 1.1), in transformers' parameter layout.

The residual stream is float32 in every precision: its values grow over the layers, and in T5-XXL they exceed 65504, the
largest number of float16. The matrix products run in `dtype`.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Bool, Float, Int

from mmdit.attention import attention
from mmdit.blocks import flat_dot, linear
from mmdit.text.t5_config import T5Config


def relative_buckets(length: int, num_buckets: int, max_distance: int) -> Int[np.ndarray, "l l"]:
    """Return the bucket of each pair (query i, key j), which depends only on j - i in tokens (section 2.1).

    The lower half of the buckets is for keys not after the query, the upper half for keys after it. Within a half, the
    first half of the buckets has one distance each; the others grow geometrically, and the last one has all distances
    beyond `max_distance`.

    >>> from mmdit.text.t5 import relative_buckets
    >>> relative_buckets(3, num_buckets=8, max_distance=4).tolist()
    [[0, 5, 6], [1, 0, 5], [2, 1, 0]]
    """
    half = num_buckets // 2
    exact = half // 2
    offset = np.arange(length) - np.arange(length)[:, None]
    distance = np.abs(offset)
    # In float32, as in the training of the published weights: at the edge of a bucket the rounding decides.
    growth = np.log(np.maximum(distance, 1).astype(np.float32) / exact) / np.float32(math.log(max_distance / exact))
    far = np.minimum(exact + (growth * (half - exact)).astype(np.int32), half - 1)
    return np.where(distance < exact, distance, far) + half * (offset > 0)


def _linear(block: SelfAttention | DenseReluDense, width: int, name: str, std: float, **options: Any) -> nn.Dense:
    fields = {"kernel_init": nn.initializers.normal(std), "use_bias": False}
    return linear(width, name, block.dtype, block.param_dtype, **fields, **options)


class SelfAttention(nn.Module):
    """Self-attention softmax(q k^T + bias) v per head, without a scale: 1 / sqrt(d_kv) is in q's initial weights."""

    config: T5Config
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "b l d"], bias: Float[Array, "1 h l l"], mask: Bool[Array, "b 1 1 l"] | None
    ) -> Float[Array, "b l d"]:
        c = self.config
        inner = c.num_heads * c.d_kv
        std = c.d_model**-0.5
        q, k, v = (
            rearrange(_linear(self, inner, name, s)(x), "b l (h d) -> b l h d", h=c.num_heads)
            for name, s in (("q", std * c.d_kv**-0.5), ("k", std), ("v", std))
        )
        # Not cuDNN's kernel: it would take the bias in half precision.
        out = attention(q, k, v, bias=bias, mask=mask, scale=1.0, implementation="xla")
        return _linear(self, c.d_model, "o", inner**-0.5)(rearrange(out, "b l h d -> b l (h d)"))


class DenseReluDense(nn.Module):
    """The MLP wo(gelu(wi_0 x) * wi_1 x) with the tanh form of GELU, or in T5 1.0 wo(relu(wi x)).

    It has no biases, and its output is float32.
    """

    config: T5Config
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b l d"]) -> Float[Array, "b l d"]:
        c = self.config
        wi = partial(_linear, self, c.d_ff, std=c.d_model**-0.5)
        if c.feed_forward_proj == "relu":
            h = jax.nn.relu(wi("wi")(x))
        else:
            h = jax.nn.gelu(wi("wi_0")(x), approximate=True) * wi("wi_1")(x)
        # The sums of wo overflow float16. transformers therefore keeps its kernel in float32, which makes the product
        # and the residual stream float32. Only the sums need it: this way the product still runs on the fast units.
        sum_in_float32 = partial(flat_dot, preferred_element_type=jnp.float32)
        return _linear(self, c.d_model, "wo", c.d_ff**-0.5, dot_general=sum_in_float32)(h)


class Residual(nn.Module):
    """The residual layer x + f(norm(x)) with x in float32: PyTorch's `layer.i`, where f has the name of its class."""

    config: T5Config
    inner: type[nn.Module]
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b l d"], *inputs: Array | None) -> Float[Array, "b l d"]:
        types = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        h = nn.RMSNorm(epsilon=self.config.layer_norm_epsilon, name="layer_norm", **types)(x)
        return x + self.inner(self.config, name=self.inner.__name__, **types)(h, *inputs)


class Block(nn.Module):
    """One block of the encoder: self-attention, then the MLP; it returns (x, None), as the body of `nn.scan`."""

    config: T5Config
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array, bias: Array, mask: Array | None) -> tuple[Array, None]:
        types = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        x = Residual(self.config, SelfAttention, name="layer_0", **types)(x, bias, mask)
        return Residual(self.config, DenseReluDense, name="layer_1", **types)(x), None


class Stack(nn.Module):
    """PyTorch's `encoder`: the blocks, the table of position biases that they share, and the final norm."""

    config: T5Config
    scan: bool = False
    remat: bool = False
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b l d"], mask: Bool[Array, "b l"] | None) -> Float[Array, "b l d"]:
        c = self.config
        types = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        table = nn.Embed(
            c.relative_attention_num_buckets,
            c.num_heads,
            embedding_init=nn.initializers.normal(c.d_model**-0.5),
            dtype=jnp.float32,
            param_dtype=self.param_dtype,
            name="relative_attention_bias",
        )
        buckets = relative_buckets(x.shape[1], c.relative_attention_num_buckets, c.relative_attention_max_distance)
        bias = rearrange(table(jnp.asarray(buckets)), "l m h -> 1 h l m")
        keys = None if mask is None else mask[:, None, None]
        block = nn.remat(Block, prevent_cse=not self.scan) if self.remat else Block
        if self.scan:
            stack = nn.scan(
                block,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                in_axes=nn.broadcast,
                length=c.num_layers,
            )
            x, _ = stack(c, name="block", **types)(x, bias, keys)
        else:
            for i in range(c.num_layers):
                x, _ = block(c, name=f"block_{i}", **types)(x, bias, keys)
        return nn.RMSNorm(epsilon=c.layer_norm_epsilon, name="final_layer_norm", **types)(x)


class T5Encoder(nn.Module):
    """T5's encoder, transformers' T5EncoderModel: token ids (b, l) -> states (b, l, d_model) after the final norm.

    mask: True where a token may be attended to; None is everywhere, as in SD3, which attends to its padding too. Raises
    ValueError unless the mask has the shape of the ids. `scan` stacks the blocks' parameters under encoder/block; else
    they are encoder/block_i. `remat` recomputes the blocks in the backward pass.

    >>> import jax, jax.numpy as jnp
    >>> from mmdit.text import T5Config, T5Encoder
    >>> t5 = T5Encoder(T5Config(vocab_size=10, d_model=4, d_kv=2, d_ff=8, num_layers=1, num_heads=2))
    >>> ids = jax.ShapeDtypeStruct((1, 5), jnp.int32)
    >>> states, _ = jax.eval_shape(t5.init_with_output, jax.random.key(0), ids)
    >>> states.shape
    (1, 5, 4)
    """

    config: T5Config
    scan: bool = False
    remat: bool = False
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, ids: Int[Array, "b l"], mask: Bool[Array, "b l"] | None = None) -> Float[Array, "b l d"]:
        if mask is not None and mask.shape != ids.shape:
            raise ValueError(f"mask has shape {mask.shape}, the ids {ids.shape}: give one entry for each token")
        c = self.config
        table = nn.Embed(
            c.vocab_size,
            c.d_model,
            embedding_init=nn.initializers.normal(1.0),
            param_dtype=self.param_dtype,  # no dtype: the rows of these ids are cast below, not the full table
            name="shared",
        )
        x = table(ids).astype(jnp.float32)
        stack = Stack(c, self.scan, self.remat, dtype=self.dtype, param_dtype=self.param_dtype, name="encoder")
        return stack(x, mask)
