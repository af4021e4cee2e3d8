"""Attention on a TPU without a matrix of logits: JAX's flash kernel (arXiv:2205.14135) on padded tiles."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jax.experimental.pallas.ops.tpu.flash_attention import BlockSizes, SegmentIds, flash_attention
from jaxtyping import Array, Float

LOGITS = 2**20  # logits of a head, from which on the flash kernel is used and they are not stored
TILE, LANES = 512, 128


def fits(query: Float[Array, "b l h d"], key: Float[Array, "b m h d"]) -> bool:
    """Return whether the sequences are long enough for the flash kernel to pay: l m >= LOGITS."""
    return query.shape[1] * key.shape[1] >= LOGITS


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def attend(
    query: Float[Array, "b l h d"], key: Float[Array, "b m h d"], value: Float[Array, "b m h d"], scale: float
) -> Float[Array, "b l h d"]:
    """Return softmax(scale q k^T) v per head; the gradient stores only q, k and v and computes the attention again."""
    return _call(dot_product_attention_tpu_fwd, scale)(query, key, value)


def _forward(query: Array, key: Array, value: Array, scale: float) -> tuple[Array, tuple[Array, Array, Array]]:
    return attend(query, key, value, scale), (query, key, value)


def _backward(scale: float, qkv: tuple[Array, Array, Array], cotangent: Array) -> Any:
    return _call(dot_product_attention_tpu_bwd, scale)(*qkv, cotangent)


attend.defvjp(_forward, _backward)


def _call(function: Callable[..., Any], scale: float) -> Callable[..., Any]:
    """Return `function` of arrays (b, _, h, d) with a vmap that makes the batch larger: the kernel has no vmap."""
    run: Any = custom_vmap(partial(function, scale=scale))

    @run.def_vmap
    def _(copies: int, batched: list[bool], *arrays: Array) -> Any:
        copied = [jax.lax.broadcast(a, () if mapped else (copies,)) for a, mapped in zip(arrays, batched, strict=True)]
        outputs = run(*(a.reshape(-1, *a.shape[2:]) for a in copied))
        outputs = jax.tree.map(lambda a: a.reshape(copies, -1, *a.shape[1:]), outputs)
        return outputs, jax.tree.map(lambda _: True, outputs)

    return run


@partial(jax.jit, static_argnames="scale")
def dot_product_attention_tpu_fwd(query: Array, key: Array, value: Array, *, scale: float) -> Array:
    """Return the values of `attend`; `lcm_jax.runtime.flops` counts the products of this function by its name."""
    length, key_length, width = query.shape[1], key.shape[1], query.shape[-1]
    q, k, v = (_padded(a) for a in (query, key, value))
    segments = None
    if k.shape[2] > key_length:  # tokens and padding are two segments: tokens do not attend to the padding
        is_token = (jnp.arange(a.shape[2]) < n for a, n in ((q, length), (k, key_length)))
        segments = SegmentIds(*[jnp.broadcast_to(ids.astype(jnp.int32), (len(q), ids.size)) for ids in is_token])
    a, b = _tile(q.shape[2]), _tile(k.shape[2])
    sizes = BlockSizes(
        block_b=1, block_q=a, block_k_major=b, block_k=b,
        block_q_major_dkv=a, block_q_dkv=a, block_k_major_dkv=b, block_k_dkv=b,
        block_q_dq=a, block_k_major_dq=b, block_k_dq=b,
    )  # fmt: skip
    y = flash_attention(q, k, v, segment_ids=segments, sm_scale=scale, block_sizes=sizes)
    return y.swapaxes(1, 2)[:, :length, :, :width].astype(query.dtype)


@partial(jax.jit, static_argnames="scale")
def dot_product_attention_tpu_bwd(
    query: Array, key: Array, value: Array, slope: Array, *, scale: float
) -> tuple[Array, Array, Array]:
    """Return the gradients of query, key and value; slope: the gradient of `attend`'s output."""
    vjp = jax.vjp(partial(dot_product_attention_tpu_fwd, scale=scale), query, key, value)[1]
    gradients: tuple[Array, Array, Array] = vjp(slope)
    return gradients


def _padded(x: Array) -> Array:
    """Return x (b, l, h, d) as (b, h, l, d), padded with zeros to complete tiles.

    l becomes a multiple of 128, or of 512 where it is longer than that; d a multiple of 128 where it is wider than 128.
    """
    length, width = x.shape[1], x.shape[-1]
    step = TILE if length > TILE else LANES
    extra = -length % step, -width % LANES if width > LANES else 0
    return jnp.pad(x, ((0, 0), (0, extra[0]), (0, 0), (0, extra[1]))).swapaxes(1, 2)


def _tile(length: int) -> int:
    return min(length, TILE)
