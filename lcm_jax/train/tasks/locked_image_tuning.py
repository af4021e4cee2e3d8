"""Training of a text tower for a frozen image tower: a second CLIP text encoder, of another width."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lcm_jax.data import Source
from lcm_jax.metrics import NetworkFeatures
from lcm_jax.objectives.contrastive import contrastive_loss
from lcm_jax.parallel.sharding import BatchedMap
from lcm_jax.train.task import Task
from lcm_jax.train.tasks.common import DataConfig, captions, held_out, loader, open_with_held_out, resolved_config
from lcm_jax.train.train_step import Metrics, Progress
from lcm_jax.typing import Array, Key, Params
from lcm_jax.weights.diffusers_folder import Component, load_component, save_component
from lcm_jax.weights.hub import locate
from mmdit.text import CLIPTextConfig, CLIPTextModel, Tokenizer, normalize_images

INITIAL_LOG_TEMPERATURE = 2.6592  # log(1 / 0.07), CLIP's


@dataclass(frozen=True, kw_only=True)
class LockedImageTask:
    """Locked-image tuning (Zhai et al. 2022, arXiv:2111.07991): a contrastive loss that trains the text tower alone.

    The embeddings of the pictures are computed once, so a step costs one text tower. The model `images` gives the image
    tower and the tokenizer; its own text tower and the new one share that tokenizer, as SD3's do.
    """

    text: CLIPTextConfig = CLIPTextConfig()
    images: str = "openmoji"  # a bundled name, folder or hub id
    data: DataConfig = DataConfig()
    validation: DataConfig = field(default_factory=held_out)

    @property
    def resolved(self) -> Any:
        """This task, with the data that it validates on by name."""
        return replace(self, validation=resolved_config(self.validation, self.data))

    def build(self) -> Task:
        """Return the task; raise ValueError if the two towers differ in their projection's width."""
        path = locate(self.images).path
        tokenizer, tower = Tokenizer.load(path / "tokenizer"), load_component(path, "image_encoder")
        width = tower.module.config.projection_dim
        if self.text.projection_dim != width:
            raise ValueError(f"task.text.projection_dim is {self.text.projection_dim}, the image tower's is {width}")
        special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
        net = CLIPTextModel(replace(self.text, vocab_size=tokenizer.vocab_size, **special), projection=True)
        length = self.text.max_position_embeddings
        source, validation = open_with_held_out(self.data, self.validation)

        def init(key: Key) -> Params:
            params = net.init(key, jnp.zeros((1, 1), jnp.int32))["params"]
            return {"text": params, "logit_scale": jnp.float32(INITIAL_LOG_TEMPERATURE)}

        def compare(params: Params, batch: dict[str, Array]) -> tuple[Array, Metrics]:
            output: Any = net.apply({"params": params["text"]}, batch["ids"])
            return contrastive_loss(batch["image"], output.text_embeds, params["logit_scale"])

        def loss(
            params: Params, ema: Params, frozen: Params, batch: dict[str, Array], key: Key, progress: Progress
        ) -> tuple[Array, Metrics]:
            value, metrics = compare(params, batch)
            return value, {"loss": value, **metrics}

        embed = NetworkFeatures(
            apply=lambda params, x: tower.module.apply({"params": params}, normalize_images(x)).image_embeds,
            params=tower.params,
        )
        encode = cache(lambda caption: tokenizer(caption, length)[0])

        def pairs(source: Source) -> list[dict[str, np.ndarray]]:
            embeds = embed(np.stack([source[i]["image"] for i in range(len(source))]))
            return [{"image": e, "ids": encode(c)} for e, c in zip(embeds, captions(source), strict=True)]

        validation_batch = {name: np.stack([pair[name] for pair in pairs(validation)]) for name in ("image", "ids")}
        validate = jax.jit(compare)

        def preview(ema: Params, frozen: Params, batched_map: BatchedMap) -> dict[str, float | np.ndarray]:
            value, metrics = validate(ema, validation_batch)
            return {"validation_loss": float(value), "validation_accuracy": float(metrics["accuracy"])}

        def export(ema: Params, folder: Path) -> None:
            save_component(folder, "text_encoder_2", Component(net, jax.device_get(ema)["text"]))
            tokenizer.save(folder / "tokenizer_2")

        return Task(
            init=init,
            loss=loss,
            frozen={},
            batches=loader(pairs(source)),
            preview=preview,
            export=export,
            separable=False,
        )
