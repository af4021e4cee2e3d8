"""Attention on a TPU without a matrix of logits: jax's flash kernel (2205.14135) on tiles that are filled up."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jax.experimental.pallas.ops.tpu.flash_attention import BlockSizes, SegmentIds, flash_attention
from jaxtyping import Array, Float

LOGITS = 2**20  # of a head, from which on they are not kept
TILE, LANES = 512, 128


def fits(query: Float[Array, "b l h d"], key: Float[Array, "b m h d"]) -> bool:
    """Whether there are logits enough to be spared."""
    return query.shape[1] * key.shape[1] >= LOGITS


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def attend(
    query: Float[Array, "b l h d"], key: Float[Array, "b m h d"], value: Float[Array, "b m h d"], scale: float
) -> Float[Array, "b l h d"]:
    """softmax(scale q k^T) v per head. Its gradient computes the attention again, and keeps q, k and v alone."""
    return _call(dot_product_attention_tpu_fwd, scale)(query, key, value)


def _forward(query: Array, key: Array, value: Array, scale: float) -> tuple[Array, tuple[Array, Array, Array]]:
    return attend(query, key, value, scale), (query, key, value)


def _backward(scale: float, kept: tuple[Array, Array, Array], slope: Array) -> Any:
    return _call(dot_product_attention_tpu_bwd, scale)(*kept, slope)


attend.defvjp(_forward, _backward)


def _call(function: Callable[..., Any], scale: float) -> Callable[..., Any]:
    """A function of arrays (b, _, h, d), which vmap takes as one of more pictures: the kernel has no vmap."""
    run: Any = custom_vmap(partial(function, scale=scale))

    @run.def_vmap
    def _(copies: int, batched: list[bool], *arrays: Array) -> Any:
        wide = [jax.lax.broadcast(a, () if own else (copies,)) for a, own in zip(arrays, batched, strict=True)]
        made = run(*(a.reshape(-1, *a.shape[2:]) for a in wide))
        made = jax.tree.map(lambda a: a.reshape(copies, -1, *a.shape[1:]), made)
        return made, jax.tree.map(lambda _: True, made)

    return run


@partial(jax.jit, static_argnames="scale")
def dot_product_attention_tpu_fwd(query: Array, key: Array, value: Array, *, scale: float) -> Array:
    """`attend`, under the name by which FLOPs are counted."""
    length, others, width = query.shape[1], key.shape[1], query.shape[-1]
    q, k, v = (_filled(a) for a in (query, key, value))
    seen = None
    if k.shape[2] > others:
        of_query, of_key = (jnp.arange(a.shape[2]) < n for a, n in ((q, length), (k, others)))
        rows = [jnp.broadcast_to(own.astype(jnp.int32), (len(q), own.size)) for own in (of_query, of_key)]
        seen = SegmentIds(*rows)
    a, b = _tile(q.shape[2]), _tile(k.shape[2])
    sizes = BlockSizes(
        block_b=1, block_q=a, block_k_major=b, block_k=b,
        block_q_major_dkv=a, block_q_dkv=a, block_k_major_dkv=b, block_k_dkv=b,
        block_q_dq=a, block_k_major_dq=b, block_k_dq=b,
    )  # fmt: skip
    y = flash_attention(q, k, v, segment_ids=seen, sm_scale=scale, block_sizes=sizes)
    return y.swapaxes(1, 2)[:, :length, :, :width].astype(query.dtype)


@partial(jax.jit, static_argnames="scale")
def dot_product_attention_tpu_bwd(
    query: Array, key: Array, value: Array, slope: Array, *, scale: float
) -> tuple[Array, Array, Array]:
    """The gradients of query, key and value."""
    back = jax.vjp(partial(dot_product_attention_tpu_fwd, scale=scale), query, key, value)[1]
    gradients: tuple[Array, Array, Array] = back(slope)
    return gradients


def _filled(x: Array) -> Array:
    """(b, l, h, d) as (b, h, l, d) of whole tiles: l of 128, or 512 where it is longer, d of 128 where it is wider."""
    length, width = x.shape[1], x.shape[-1]
    step = TILE if length > TILE else LANES
    more = -length % step, -width % LANES if width > LANES else 0
    return jnp.pad(x, ((0, 0), (0, more[0]), (0, 0), (0, more[1]))).swapaxes(1, 2)


def _tile(length: int) -> int:
    return min(length, TILE)
