"""Both encoders of a CLIP, bound to their parameters: pictures and texts in, embeddings out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from lcm_jax.metrics.features import NetworkFeatures, resize_as_pil
from lcm_jax.typing import Params
from lcm_jax.weights.clip_files import clip_weights, read_clip
from lcm_jax.weights.component import Component
from lcm_jax.weights.hub import locate
from mmdit.text import Tokenizer, normalize_images

TEXTS = 256  # in a call of the text encoder
Fit = Literal["stretch", "crop", "pad"]
T = TypeVar("T", bound="ClipTowers")


def stretch(images: Float[Array, "b h w 3"], side: int) -> Float[Array, "b s s 3"]:
    """Return pictures resized to squares, bicubic with antialiasing, (b, h, w, 3) -> (b, side, side, 3)."""
    if images.shape[1:3] == (side, side):
        return images
    return jax.image.resize(images, (len(images), side, side, 3), "bicubic", antialias=True)


def crop(images: Float[Array, "b h w 3"], side: int) -> Float[Array, "b s s 3"]:
    """Return the middle squares of pictures whose shorter side was made `side` pixels, as transformers prepares CLIP's.

    >>> import jax.numpy as jnp
    >>> from lcm_jax.metrics.clip_towers import crop
    >>> crop(jnp.zeros((1, 8, 12, 3)), 4).shape
    (1, 4, 4, 3)
    """
    _, h, w, _ = images.shape
    height, width = (side, side * w // h) if h <= w else (side * h // w, side)
    top, left = (height - side) // 2, (width - side) // 2
    return resize_as_pil(images, height, width)[:, top : top + side, left : left + side]


def pad(images: Float[Array, "b h w 3"], side: int) -> Float[Array, "b s s 3"]:
    """Return squares with pictures in their middle whose longer side was made `side` pixels, on black, as HPSv2's.

    >>> import jax.numpy as jnp
    >>> from lcm_jax.metrics.clip_towers import pad
    >>> pad(jnp.zeros((1, 4, 8, 3)), 4)[0, :, 0, 0].tolist()
    [-1.0, 0.003921627998352051, 0.003921627998352051, -1.0]
    """
    _, h, w, _ = images.shape
    height, width = round(side * h / max(h, w)), round(side * w / max(h, w))
    edges = [((side - n) // 2, side - n - (side - n) // 2) for n in (height, width)]
    return jnp.pad(resize_as_pil(images, height, width), ((0, 0), *edges, (0, 0)), constant_values=-1.0)


FITS: Mapping[str, Callable[[Array, int], Array]] = {"stretch": stretch, "crop": crop, "pad": pad}


def image_features(vision: Component, fit: Fit) -> NetworkFeatures:
    """Return an image encoder as a feature extractor: uint8 (n, h, w, 3) -> (n, d + p), pooled state and embedding.

    fit: how pictures become squares of the network's size.
    """
    side, squared = vision.module.config.image_size, FITS[fit]

    def apply(params: Params, images: Float[Array, "b h w 3"]) -> Float[Array, "b f"]:
        out = vision.module.apply({"params": params}, normalize_images(squared(images, side)))
        return jnp.concatenate([out.pooled, out.image_embeds], axis=-1)

    return NetworkFeatures(apply=apply, params=vision.params, distance="FD-CLIP")


@dataclass(frozen=True, kw_only=True, eq=False)
class ClipTowers:
    """Both encoders of a CLIP: `images` and `embed_texts` are functions from pictures and texts to features.

    images(pictures) -> (n, d + p): the image encoder's pooled state and its embedding side by side.
    """

    text: Component
    vision: Component
    tokenizer: Tokenizer
    images: NetworkFeatures  # of `image_features`
    scale: float | None = None  # of cosines, exp(logit_scale); None where the files have none
    is_open_clip: bool = False  # whether the file had OpenCLIP's names

    @classmethod
    def load(cls: type[T], name: str | Path = "openmoji", *, fit: Fit = "stretch") -> T:
        """Load both encoders from files, with their tokenizer.

        name: a bundled name, a folder or a hub id of a model with image_encoder, text_encoder (with projection) and
        tokenizer; or of a CLIP alone: transformers' CLIPModel or OpenCLIP's safetensors, with the tokenizer's
        tokenizer.json, or vocab.json and merges.txt, in the same folder or in its sub-folder "tokenizer". fit: how
        pictures become squares of the network's size. Raises FileNotFoundError and ValueError, which name the file.
        """
        location = locate(name)
        path = location.path
        scale, is_open_clip = None, False
        if path.is_dir() and location.at("image_encoder").is_dir():
            text, vision = location.load("text_encoder"), location.load("image_encoder")
            folder = location.at("tokenizer")
        elif (file := clip_weights(path)) is not None:
            text, vision, scale, is_open_clip = read_clip(file)
            folder = file.parent / "tokenizer"
            folder = folder if folder.is_dir() else file.parent
        else:
            raise FileNotFoundError(
                f"{path}: has neither the folders image_encoder and text_encoder, nor the model.safetensors and "
                "config.json of a CLIPModel, nor one .safetensors file with OpenCLIP's names"
            )
        try:
            tokenizer = Tokenizer.load(folder)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{error}; put the files of the CLIP's tokenizer there") from None
        return cls(
            text=text,
            vision=vision,
            tokenizer=tokenizer,
            images=image_features(vision, fit),
            scale=scale,
            is_open_clip=is_open_clip,
        )

    @property
    def width(self) -> int:
        """The width d of the image encoder's pooled state."""
        width: int = self.vision.module.config.hidden_size
        return width

    def embed_images(self, images: UInt8[np.ndarray, "n h w 3"]) -> Float[np.ndarray, "n p"]:
        """Return the image encoder's embedding of each picture."""
        return self.images(images)[:, self.width :]

    def embed_texts(self, texts: Sequence[str]) -> Float[np.ndarray, "n p"]:
        """Return the text encoder's embedding of each text."""
        length, size = self.text.module.config.max_position_embeddings, min(len(texts), TEXTS)
        parts = []
        for start in range(0, len(texts), max(size, 1)):
            part = list(texts[start : start + size])
            ids = jnp.asarray(self.tokenizer(part + [""] * (size - len(part)), length))
            parts.append(np.asarray(self._embed_ids(self.text.params, ids))[: len(part)])
        return np.concatenate(parts)

    @cached_property
    def _embed_ids(self) -> Any:
        module = self.text.module
        return jax.jit(lambda params, ids: module.apply({"params": params}, ids).text_embeds)
