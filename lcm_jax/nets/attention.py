"""The one place where this package computes attention."""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

Implementation = Literal["auto", "xla", "cudnn"]


def _choose(q: Array) -> Literal["xla", "cudnn"]:
    """cuDNN's flash attention takes half precision and head widths that are multiples of 8 up to 128."""
    half = q.dtype in (jnp.bfloat16, jnp.float16)
    fits = half and q.shape[-1] % 8 == 0 and q.shape[-1] <= 128
    return "cudnn" if fits and jax.default_backend() == "gpu" else "xla"


def attend(
    q: Float[Array, "b n h d"],
    k: Float[Array, "b l h d"],
    v: Float[Array, "b l h d"],
    *,
    implementation: Implementation = "auto",
) -> Float[Array, "b n h d"]:
    """softmax(q k^T / sqrt(d)) v for each head, logits and softmax in float32. "auto" chooses by platform and shape."""
    if implementation not in ("auto", "xla", "cudnn"):
        raise ValueError(f"attention implementation {implementation!r} is unknown; use 'auto', 'xla' or 'cudnn'")
    return jax.nn.dot_product_attention(
        q, k, v, implementation=_choose(q) if implementation == "auto" else implementation
    )
