"""Training of a CLIP from scratch: a text tower and an image tower, with the symmetric contrastive loss."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from lcm_jax.data import Record
from lcm_jax.models.latent_diffusion import to_float
from lcm_jax.objectives.contrastive import contrastive_loss
from lcm_jax.parallel.sharding import BatchedMap
from lcm_jax.train.task import Task
from lcm_jax.train.tasks.common import DataConfig, captions, held_out, loader, open_with_held_out, resolved_config
from lcm_jax.train.train_step import Metrics, Progress
from lcm_jax.typing import Array, Key, Params
from lcm_jax.weights.diffusers_folder import Component, save_component
from mmdit.text import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPVisionConfig,
    normalize_images,
    train_tokenizer,
)


@dataclass(frozen=True, kw_only=True)
class ContrastiveTask:
    """A CLIP and its tokenizer, trained on `data`; the vocabulary size of `text` is replaced by the tokenizer's."""

    text: CLIPTextConfig = CLIPTextConfig()
    vision: CLIPVisionConfig = CLIPVisionConfig()
    vocabulary: int = 2000  # tokens of the byte-pair tokenizer, at most
    data: DataConfig = DataConfig()
    validation: DataConfig = field(default_factory=held_out)
    shift: int = 4  # pixels: pictures are shifted at random by up to this many, with white at the edges

    @property
    def resolved(self) -> Any:
        """This task, with the data that it validates on by name."""
        return replace(self, validation=resolved_config(self.validation, self.data))

    def build(self) -> Task:
        """Return the task; the tokenizer is trained first."""
        source, validation = open_with_held_out(self.data, self.validation)
        length = self.text.max_position_embeddings
        texts = captions(source)
        with tempfile.TemporaryDirectory() as folder:
            tokenizer = train_tokenizer(texts, self.vocabulary, folder, length)
        special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
        text = replace(self.text, vocab_size=tokenizer.vocab_size, **special)
        clip = CLIPModel(config=CLIPConfig(text=text, vision=self.vision))

        @cache
        def ids(caption: str) -> np.ndarray:
            return tokenizer(caption, length)[0]

        def transform(record: Record) -> dict[str, np.ndarray]:
            return {"image": record["image"], "ids": ids(record["caption"])}

        def compare(params: Params, batch: dict[str, Array], key: Key | None) -> tuple[Array, Metrics]:
            images = to_float(batch["image"])
            images = images if key is None else move(key, images, self.shift)
            image_features = clip.image_features(params, normalize_images(images))
            return contrastive_loss(image_features, clip.text_features(params, batch["ids"]), params["logit_scale"])

        def loss(
            params: Params, ema: Params, frozen: Params, batch: dict[str, Array], key: Key, progress: Progress
        ) -> tuple[Array, Metrics]:
            value, metrics = compare(params, batch, key)
            return value, {"loss": value, **metrics}

        records = [transform(validation[i]) for i in range(len(validation))]
        validation_batch = {name: np.stack([record[name] for record in records]) for name in ("image", "ids")}
        validate = jax.jit(lambda params, batch: compare(params, batch, None))

        def preview(ema: Params, frozen: Params, batched_map: BatchedMap) -> dict[str, float | np.ndarray]:
            value, metrics = validate(ema, validation_batch)
            return {"validation_loss": float(value), "validation_accuracy": float(metrics["accuracy"])}

        def export(ema: Params, folder: Path) -> None:
            tree = jax.device_get(ema)
            text_tree = {key: tree[key] for key in ("text_model", "text_projection")}
            vision_tree = {key: tree[key] for key in ("vision_model", "visual_projection")}
            save_component(folder, "text_encoder", Component(clip.text, text_tree))
            save_component(folder, "image_encoder", Component(clip.vision, vision_tree))
            train_tokenizer(texts, self.vocabulary, folder / "tokenizer", length)

        return Task(
            init=clip.init,
            loss=loss,
            frozen={},
            batches=loader(source, transform=transform),
            preview=preview,
            export=export,
            separable=False,
        )


def move(key: Key, images: Float[Array, "b h w 3"], most: int) -> Float[Array, "b h w 3"]:
    """Return each picture shifted at random by up to `most` pixels along both axes, with white at the edges."""
    offsets = jax.random.randint(key, (len(images), 2), 0, 2 * most + 1)
    padded = jnp.pad(images, ((0, 0), (most, most), (most, most), (0, 0)), constant_values=1.0)
    return jax.vmap(lambda image, o: jax.lax.dynamic_slice(image, (o[0], o[1], 0), images.shape[1:]))(padded, offsets)
