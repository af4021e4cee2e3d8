"""The image-text contrastive loss of CLIP (Radford et al. 2021, arXiv:2103.00020, figure 3)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

MAX_TEMPERATURE = 100.0


def contrastive_loss(
    image_features: Float[Array, "b d"],
    text_features: Float[Array, "b d"],
    logit_scale: Float[Array, ""] | float,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """The symmetric InfoNCE loss in nats; row i of each argument is a pair. With cosines c and temperature s,

        loss = 1/2 mean_i [ -log softmax_j(s c_ij)_i ] + 1/2 mean_j [ -log softmax_i(s c_ij)_j ],
        s = min(exp(logit_scale), 100)   (section 2.5: the clamp keeps training stable).

    Features need not be normalised. The metrics are the accuracy of finding the pair, averaged over both directions,
    and s. ValueError where the shapes differ.

    >>> import jax.numpy as jnp
    >>> from lcm_jax.objectives import contrastive_loss
    >>> loss, metrics = contrastive_loss(jnp.eye(4), jnp.eye(4), jnp.log(100.0))
    >>> bool(loss < 1e-6), float(metrics["accuracy"])
    (True, 1.0)
    """
    if image_features.shape != text_features.shape:
        raise ValueError(
            f"contrastive_loss: image features {image_features.shape} and text features {text_features.shape} differ; "
            "give one text per image, projected to the same width"
        )
    images, texts = _unit(image_features), _unit(text_features)
    # The log is clamped, not its exponential, which overflows first. Beyond the bound the gradient is zero.
    temperature = jnp.exp(jnp.minimum(jnp.asarray(logit_scale, jnp.float32), jnp.log(MAX_TEMPERATURE)))
    logits = temperature * jnp.einsum("id,jd->ij", images, texts)
    losses, hits = [], []
    for scores in (logits, logits.T):
        losses.append(-jnp.mean(jnp.diagonal(jax.nn.log_softmax(scores, axis=1))))
        hits.append(jnp.mean(jnp.argmax(scores, axis=1) == jnp.arange(len(scores))))
    metrics = {"accuracy": (hits[0] + hits[1]) / 2, "temperature": temperature}
    return (losses[0] + losses[1]) / 2, metrics


def _unit(x: Float[Array, "b d"]) -> Float[Array, "b d"]:
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.sum(jnp.square(x), axis=-1, keepdims=True) + 1e-12)
