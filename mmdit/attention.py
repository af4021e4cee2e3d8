"""The one edge of this package to an attention kernel."""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

Implementation = Literal["xla", "cudnn"]


def attention(
    query: Float[Array, "b l h d"],
    key: Float[Array, "b m h d"],
    value: Float[Array, "b m h d"],
    *,
    causal: bool = False,
    mask: Bool[Array, "b #h #l m"] | None = None,
    bias: Float[Array, "#b h l m"] | None = None,
    scale: float | None = None,
    implementation: Implementation | None = None,
) -> Float[Array, "b l h d"]:
    """softmax(scale q k^T + bias) v per head, where scale is 1 / sqrt(d) unless given.

    The softmax runs in float32 whatever the inputs are.

    Without `implementation` half-precision inputs take cuDNN's flash kernel on an NVIDIA device and XLA elsewhere.
    """
    if implementation is None:
        half = query.dtype in (jnp.bfloat16, jnp.float16)
        fits = query.shape[-1] % 8 == 0 and query.shape[-1] <= 128
        implementation = "cudnn" if half and fits and jax.default_backend() == "gpu" else "xla"
    dtype = query.dtype
    if dtype == jnp.float16 and jax.default_backend() != "gpu":
        # jax asks for float16 products summed in float32, which it has on GPUs alone.
        query, key, value = (x.astype(jnp.float32) for x in (query, key, value))
    return jax.nn.dot_product_attention(
        query, key, value, bias, mask, scale=scale, is_causal=causal, implementation=implementation
    ).astype(dtype)
