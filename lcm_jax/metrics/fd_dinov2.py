"""The features of FD-DINOv2 (Stein et al. 2023, 2306.04675): the class token of DINOv2, in place of FID's Inception."""

from __future__ import annotations

from pathlib import Path

import jax.numpy as jnp
from jaxtyping import Array, Float

from lcm_jax.metrics.features import NetworkFeatures, resize_as_pil
from lcm_jax.typing import Params
from lcm_jax.weights.component import read_part, to_component
from lcm_jax.weights.hub import locate

SIDE = 224  # pixels
# Per-channel statistics of ImageNet, for pixels in [0, 1].
IMAGE_MEAN = (0.485, 0.456, 0.406)
IMAGE_STD = (0.229, 0.224, 0.225)
KINDS = ("Dinov2Model", "Dinov2WithRegistersModel")


def prepare_images(images: Float[Array, "b h w 3"], side: int = SIDE) -> Float[Array, "b s s 3"]:
    """Turn pictures in [-1, 1] into DINOv2's inputs: resized to a square as PIL does it, then (x - mean) / std.

    Neither side's proportion is kept, as in the code of Stein et al.

    >>> import jax.numpy as jnp
    >>> from lcm_jax.metrics.fd_dinov2 import prepare_images
    >>> [round(float(x), 3) for x in prepare_images(jnp.full((1, 8, 12, 3), -1.0), 4)[0, 0, 0]]  # - mean / std
    [-2.118, -2.036, -1.804]
    """
    pixels = (resize_as_pil(images, side, side) + 1.0) / 2.0
    return (pixels - jnp.asarray(IMAGE_MEAN)) / jnp.asarray(IMAGE_STD)


def dinov2_features(path: str | Path, *, batch_size: int = 32) -> NetworkFeatures:
    """Return the feature extractor of FD-DINOv2 with a DINOv2 of transformers: the class token after the final norm.

    path: a folder with config.json and model.safetensors, or a repository of the hub; Stein et al. take ViT-L/14,
    facebook/dinov2-large. dinov2_features(path): uint8 pictures (n, h, w, 3) -> float32 features (n, d). Pictures are
    those of `prepare_images`. The positions are interpolated as in transformers; the code of Stein et al. runs the
    network of torch.hub, which adds 0.1 to the number of patches before it scales: its features differ a little.

    Raises ValueError, which names the file, for another network or weights that do not fit the config.
    """
    folder = locate(path, what="DINOv2").path
    if folder.is_file():
        raise ValueError(f"{path}: a file; give the folder of a DINOv2, with config.json and model.safetensors")
    part = read_part(folder)
    if part.kind not in KINDS:
        raise ValueError(f"{folder}: a {part.kind}, and features need a DINOv2 ({' or '.join(KINDS)})")
    net, params = to_component(part)
    side = SIDE - SIDE % net.config.patch_size  # all published networks have patches of 14, which divide it

    def apply(params: Params, images: Float[Array, "b h w 3"]) -> Float[Array, "b d"]:
        return jnp.asarray(net.apply({"params": params}, prepare_images(images, side))[:, 0])

    return NetworkFeatures(apply=apply, params=params, batch_size=batch_size, distance="FD-DINOv2")
