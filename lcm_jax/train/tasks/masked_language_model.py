"""Training of a T5 encoder on captions alone: it predicts hidden tokens from the others."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lcm_jax.data.records import Texts
from lcm_jax.objectives.masked_language_model import hide, masked_loss
from lcm_jax.parallel.sharding import BatchedMap
from lcm_jax.train.task import Task
from lcm_jax.train.tasks.common import DataConfig, captions, held_out, loader, open_with_held_out, resolved_config
from lcm_jax.train.train_step import Metrics, Progress
from lcm_jax.typing import Array, Key, Params
from lcm_jax.weights.diffusers_folder import Component, save_component
from mmdit.text import T5Config, T5Encoder, train_unigram


@dataclass(frozen=True, kw_only=True)
class MaskedTask:
    """A T5 encoder and its tokenizer, trained on the captions of `data`; `net` gets the tokenizer's vocabulary size.

    T5's own objective writes the hidden spans with a decoder, which SD3 does not use. Here the logits of a hidden token
    are its state times the embedding table. Padding counts, since SD3's T5 is given no mask.
    """

    net: T5Config = T5Config()
    vocabulary: int = 1000  # pieces of the tokenizer, at most
    tokens: int = 24  # length of a caption
    rate: float = 0.3  # share of hidden tokens
    data: DataConfig = DataConfig()
    validation: DataConfig = field(default_factory=held_out)

    @property
    def resolved(self) -> Any:
        """This task, with the data that it validates on by name."""
        return replace(self, validation=resolved_config(self.validation, self.data))

    def build(self) -> Task:
        """Return the task; the tokenizer is trained first."""
        source, validation = open_with_held_out(self.data, self.validation)
        texts = captions(source)
        with tempfile.TemporaryDirectory() as folder:
            tokenizer = train_unigram(texts, self.vocabulary, folder, self.tokens)
        config = replace(self.net, vocab_size=tokenizer.vocab_size)
        net = T5Encoder(config)

        @cache
        def ids(caption: str) -> np.ndarray:
            return tokenizer(caption, self.tokens)[0]

        def masked_prediction_loss(params: Params, ids: Array, key: Key) -> tuple[Array, Metrics]:
            hidden = hide(key, ids, rate=self.rate, pad_id=tokenizer.pad_token_id)
            states = net.apply({"params": params}, jnp.where(hidden, tokenizer.mask_token_id, ids))
            # Scaled as in T5 1.0, whose output layer is its embedding table too.
            logits = states @ params["shared"]["embedding"].T * config.d_model**-0.5
            return masked_loss(logits, ids, hidden)

        def loss(
            params: Params, ema: Params, frozen: Params, batch: dict[str, Array], key: Key, progress: Progress
        ) -> tuple[Array, Metrics]:
            value, metrics = masked_prediction_loss(params, batch["ids"], key)
            return value, {"loss": value, **metrics}

        held_out_ids = np.stack([ids(caption) for caption in captions(validation)])
        validate = jax.jit(lambda params: masked_prediction_loss(params, jnp.asarray(held_out_ids), jax.random.key(0)))

        def preview(ema: Params, frozen: Params, batched_map: BatchedMap) -> dict[str, float | np.ndarray]:
            value, metrics = validate(ema)
            return {"validation_loss": float(value), "validation_accuracy": float(metrics["accuracy"])}

        def export(ema: Params, folder: Path) -> None:
            save_component(folder, "text_encoder_3", Component(net, jax.device_get(ema)))
            tokenizer.save(folder / "tokenizer_3")

        def transform(record: Texts) -> dict[str, np.ndarray]:
            return {"ids": ids(record["caption"])}

        return Task(
            init=lambda key: net.init(key, jnp.zeros((1, 1), jnp.int32))["params"],
            loss=loss,
            frozen={},
            batches=loader([{"caption": text} for text in texts], transform=transform),  # no picture is decoded
            preview=preview,
            export=export,
            separable=False,  # a mean over the hidden tokens
        )
