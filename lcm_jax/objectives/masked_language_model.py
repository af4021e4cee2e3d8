"""Masked language modelling (Devlin et al. 2018, arXiv:1810.04805): hidden tokens are predicted from their context."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from lcm_jax.typing import Key


def hide(key: Key, ids: Int[Array, "b l"], *, rate: float, pad_id: int) -> Bool[Array, "b l"]:
    """Draw the tokens to hide: each but the padding with probability `rate`, and at least one of each row.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> from lcm_jax.objectives.masked_language_model import hide
    >>> hidden = hide(jax.random.key(0), jnp.array([[5, 6, 7, 0]]), rate=0.15, pad_id=0)
    >>> bool(hidden.any()), bool(hidden[0, 3])
    (True, False)
    """
    scores = jnp.where(ids == pad_id, 2.0, jax.random.uniform(key, ids.shape))
    return (scores < rate) | ((scores == scores.min(axis=1, keepdims=True)) & (ids != pad_id))


def masked_loss(
    logits: Float[Array, "b l v"], ids: Int[Array, "b l"], hidden: Bool[Array, "b l"]
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Return the cross-entropy in nats and the accuracy, over the hidden tokens.

    >>> import jax.numpy as jnp
    >>> from lcm_jax.objectives.masked_language_model import masked_loss
    >>> loss, metrics = masked_loss(jnp.zeros((1, 2, 4)), jnp.array([[0, 3]]), jnp.array([[True, False]]))
    >>> round(float(loss), 4), float(metrics["accuracy"])  # log 4
    (1.3863, 1.0)
    """
    logits = logits.astype(jnp.float32)
    per_example = -jnp.take_along_axis(jax.nn.log_softmax(logits), ids[..., None], axis=-1)[..., 0]
    weight = hidden / jnp.maximum(hidden.sum(), 1)
    return jnp.sum(weight * per_example), {"accuracy": jnp.sum(weight * (logits.argmax(-1) == ids))}
