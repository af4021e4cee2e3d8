"""The networks whose features a distance can be taken on, by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from lcm_jax.metrics.fd_dinov2 import dinov2_features
from lcm_jax.metrics.features import NetworkFeatures
from lcm_jax.metrics.inception import inception_features
from lcm_jax.runtime.messages import did_you_mean

FEATURES: Mapping[str, Callable[[str], NetworkFeatures]] = {
    "dinov2": dinov2_features,
    "inception": inception_features,
}


def load_features(text: str, *, option: str = "features") -> NetworkFeatures:
    """Return the feature extractor that "KIND:PATH" names, such as dinov2:FOLDER or inception:FILE.

    option: named in errors. Raises ValueError for another kind or no path, and as the extractors do.

    >>> from lcm_jax.metrics import load_features
    >>> load_features("dino2:folder")
    Traceback (most recent call last):
    ValueError: features dino2:folder: give KIND:PATH with a KIND of dinov2, inception; did you mean dinov2?
    """
    kind, _, path = text.partition(":")
    if kind not in FEATURES or not path:
        hint = "" if kind in FEATURES else did_you_mean(kind, FEATURES)
        raise ValueError(f"{option} {text}: give KIND:PATH with a KIND of {', '.join(FEATURES)}{hint}")
    return FEATURES[kind](path)
