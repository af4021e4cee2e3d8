"""Masked language modelling (Devlin et al. 2018, arXiv:1810.04805): hidden tokens are guessed from those around."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from lcm_jax.typing import Key


def hide(key: Key, ids: Int[Array, "b l"], *, rate: float, pad_id: int) -> Bool[Array, "b l"]:
    """Which tokens to hide: each but the padding with probability `rate`, and at least one of each row."""
    scores = jnp.where(ids == pad_id, 2.0, jax.random.uniform(key, ids.shape))
    return (scores < rate) | ((scores == scores.min(axis=1, keepdims=True)) & (ids != pad_id))


def masked_loss(
    logits: Float[Array, "b l v"], ids: Int[Array, "b l"], hidden: Bool[Array, "b l"]
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Cross-entropy in nats, and the share guessed rightly, over the hidden tokens."""
    logits = logits.astype(jnp.float32)
    per_example = -jnp.take_along_axis(jax.nn.log_softmax(logits), ids[..., None], axis=-1)[..., 0]
    weight = hidden / jnp.maximum(hidden.sum(), 1)
    return jnp.sum(weight * per_example), {"accuracy": jnp.sum(weight * (logits.argmax(-1) == ids))}
