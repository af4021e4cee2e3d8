"""The CLIP score (Hessel 2021, arXiv:2104.08718, eq. 1): how well pictures match their texts."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

from lcm_jax.metrics.frechet import as_features


def cosines(image_embeds: Float[np.ndarray, "n d"], text_embeds: Float[np.ndarray, "n d"]) -> Float[np.ndarray, " n"]:
    """Return cos = x . y / (|x| |y|) of each pair of rows; ValueError as `clip_scores` raises it.

    >>> import numpy as np
    >>> from lcm_jax.metrics.clip_score import cosines
    >>> cosines(np.array([[0.0, 2.0]]), np.array([[-3.0, -3.0]])).round(4).tolist()
    [-0.7071]
    """
    image, text = as_features(image_embeds, "image_embeds"), as_features(text_embeds, "text_embeds")
    if image.shape != text.shape:
        raise ValueError(f"image_embeds {image.shape} and text_embeds {text.shape} must pair row by row")
    norms = np.linalg.norm(image, axis=1) * np.linalg.norm(text, axis=1)
    if not norms.all():
        raise ValueError(f"pair {int(np.argmin(norms))} holds a zero embedding, whose direction is undefined")
    return (image * text).sum(axis=1) / norms


def clip_scores(
    image_embeds: Float[np.ndarray, "n d"], text_embeds: Float[np.ndarray, "n d"], *, weight: float = 100.0
) -> Float[np.ndarray, " n"]:
    """Return the CLIP score of each pair of a picture and a text, weight * max(cos(image_i, text_i), 0).

    This is eq. 1 of Hessel 2021 (arXiv:2104.08718). The embeddings need not be normalised. A weight of 100 is the
    convention of text-to-image papers (about 25 to 30 in LCM's tables); Hessel's own is w = 2.5.

    Raises ValueError if the two shapes differ, a value is not finite, or an embedding is zero.

    >>> import numpy as np
    >>> from lcm_jax.metrics import clip_scores
    >>> images, texts = np.array([[2.0, 0.0], [0.0, 3.0]]), np.array([[5.0, 0.0], [4.0, 3.0]])
    >>> clip_scores(images, texts).round(1).tolist()
    [100.0, 60.0]
    """
    return weight * np.maximum(cosines(image_embeds, text_embeds), 0.0)


def clip_score(
    image_embeds: Float[np.ndarray, "n d"], text_embeds: Float[np.ndarray, "n d"], *, weight: float = 100.0
) -> float:
    """Return the mean of `clip_scores` over the pairs (Hessel 2021, arXiv:2104.08718, eq. 1).

    Raises ValueError as `clip_scores` does, and if there are no pairs.

    >>> import numpy as np
    >>> from lcm_jax.metrics import clip_score
    >>> images, texts = np.array([[2.0, 0.0], [0.0, 3.0]]), np.array([[5.0, 0.0], [4.0, 3.0]])
    >>> round(clip_score(images, texts), 1), round(clip_score(images, texts, weight=2.5), 1)
    (80.0, 2.0)
    """
    scores = clip_scores(image_embeds, text_embeds, weight=weight)
    if not len(scores):
        raise ValueError("the CLIP score of no pairs is undefined")
    return float(scores.mean())
