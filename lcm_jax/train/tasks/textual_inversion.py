"""Textual inversion (Gal et al. 2022, 2208.01618): a new word is learned from a few pictures, and nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from lcm_jax.data import Source
from lcm_jax.diffusion.schedules import DDPM
from lcm_jax.models.latent_diffusion import LatentDiffusion, as_apply
from lcm_jax.objectives import Diffusion
from lcm_jax.parallel.sharding import BatchedMap, param_sharding
from lcm_jax.train.task import Task
from lcm_jax.train.tasks.common import DataConfig, Dtype, captions, check_dtype, check_preview_steps, loader
from lcm_jax.train.tasks.conditioner import Conditioner, local_mesh
from lcm_jax.train.tasks.diffusion import build_net, check_fit
from lcm_jax.train.tasks.finetune import TOKENS
from lcm_jax.train.tasks.latent import draw_latents, preview
from lcm_jax.train.train_step import Metrics, Progress
from lcm_jax.typing import Array, Key, Nets, Params
from lcm_jax.weights.component import Component
from lcm_jax.weights.embeddings import FILE_NAME, save_embedding, table_of, with_rows
from lcm_jax.weights.hub import locate
from lcm_jax.weights.registry import DENOISERS
from lcm_jax.weights.safetensors_files import read_json
from lcm_jax.weights.scheduler_config import read_scheduler, sampler_of
from mmdit.blocks import Remat


@dataclass(frozen=True, kw_only=True)
class TextualInversionTask:
    """A word whose vectors, in every text encoder of the model, are trained with the diffusion loss on `data`.

    Each picture is seen with each of the templates, in which {word} is the new word and {caption} the picture's
    caption. The vectors begin as those of the tokens of `initializer`, or at random as the other tokens are spread.
    ValueError for values that cannot be used.
    """

    model: str = "openmoji-teacher"  # a bundled name, folder or hub id: all its networks
    data: DataConfig = DataConfig()
    objective: Diffusion = Diffusion(schedule=DDPM(), caption_dropout=0.0)  # its schedule and kind are the model's
    word: str = "<new>"
    vectors: int = 1  # of the word, each of which takes a place of a prompt
    initializer: str = ""  # a text that describes the pictures roughly; empty: random vectors
    templates: tuple[str, ...] = ("a photo of {word}", "a rendering of {word}", "a picture of one {word}")
    preview_prompts: tuple[str, ...] = ()  # empty: the first captions of the data in the first template
    preview_steps: int = 25  # sampling steps of a preview
    preview_guidance: float = 4.0
    remat: Remat = False  # what the backward pass recomputes: nothing, all of a block, or what a policy does not keep
    dtype: Dtype = "float32"  # of the computation; vectors, norms and losses are float32

    def __post_init__(self) -> None:
        if self.vectors < 1:
            raise ValueError(f"task.vectors is {self.vectors}; it must be at least 1")
        if not self.templates:
            raise ValueError('task.templates is empty: give at least one, such as "a photo of {word}"')
        for template in self.templates:
            if "{word}" not in template:
                raise ValueError(f"task.templates: {template!r:.80} has no {{word}}, so nothing would be learned of it")
        check_dtype("task.dtype", self.dtype)
        check_preview_steps(self.preview_steps)

    def prompt(self, template: str, caption: str) -> str:
        """Return the prompt of a picture."""
        return template.replace("{caption}", caption).replace("{word}", self.word)

    def build(self) -> Task:
        """Return the task; raise ValueError, before any picture is encoded, if model, word and data do not fit."""
        location = locate(self.model)
        config_file = location.at("scheduler") / "scheduler_config.json"
        scheduler = read_json(config_file)
        schedule, kind = read_scheduler(scheduler, source=str(config_file))
        objective = replace(self.objective, schedule=schedule, kind=kind)
        original = Conditioner.load(self.model, self.model)
        part = next((name for name in DENOISERS if location.at(name).is_dir()), "unet")
        base = location.load(part, shardings=param_sharding(local_mesh()))
        if base.module.config.time_cond_proj_dim is not None:
            raise ValueError(f"task.model {self.model} is a distilled student with a w-embedding: train on its teacher")
        check_fit(base.module.config, original, self.data.sizes)
        conditioner, ids = self.with_word(original)
        prompts = conditioner.prompts
        net = build_net(base.module.config, dtype=self.dtype, remat=self.remat)
        source = self.data.open(encoded=True)
        texts = captions(source)

        model = LatentDiffusion(net=net, vae=conditioner.vae.module, schedule=schedule, kind=kind)
        described = {"data": self.data.name, "split": self.data.split, "size": self.data.size}
        records = original.encode_source(source, described)
        tokens = [prompts.tokenize([self.prompt(t, caption) for caption in texts]) for t in self.templates]
        pictures = _Pictures(
            records=records, tokens=[[np.asarray(ids_of_encoder) for ids_of_encoder in one] for one in tokens]
        )

        def init(key: Key) -> Params:
            return {name: _vectors(text, ids[name], jax.random.fold_in(key, i), self._start(conditioner, name))
                    for i, (name, text) in enumerate(conditioner.texts.items())}  # fmt: skip

        def trees(params: Params, frozen: Mapping[str, Params]) -> dict[str, Params]:
            return {
                name: _with_vectors(frozen[name], table_of(text.module), ids[name], params[name])
                for name, text in conditioner.texts.items()
            }

        def loss(
            params: Params, ema: Params, frozen: Params, batch: dict[str, Array], key: Key, progress: Progress
        ) -> tuple[Array, Metrics]:
            draw, rest = jax.random.split(key)
            latents = draw_latents(draw, {name: batch[name] for name in ("mean", "std")})
            ids_of_encoder = [batch[name] for name in sorted(batch) if name.startswith(TOKENS)]
            sizes = batch.get("time_ids")
            sizes = None if sizes is None else sizes.astype(jnp.float32)
            latents["cond"] = prompts.encode(trees(params, frozen["texts"]), ids_of_encoder, sizes)
            return objective(Nets(as_apply(net), frozen["net"], null=frozen["null"]), latents, rest)

        shown = list(self.preview_prompts) or [self.prompt(self.templates[0], text) for text in texts[:16]]
        options: dict[str, Any] = {"sampler": sampler_of(scheduler), "steps": self.preview_steps}
        show = preview(model, conditioner, shown, guidance=self.preview_guidance, **options)

        def full_preview(ema: Params, frozen: Params, batched_map: BatchedMap) -> dict[str, float | np.ndarray]:
            return show(frozen["net"], frozen["vae"], batched_map, trees(ema, frozen["texts"]))

        def export(ema: Params, path: Path) -> None:
            path.mkdir(parents=True, exist_ok=True)
            save_embedding(path / FILE_NAME, self.word, jax.device_get(ema), prompts.family)

        return Task(
            init=init,
            loss=loss,
            frozen={
                "net": base.params,
                "texts": conditioner.params,
                "null": conditioner.null,
                "vae": conditioner.vae.params,
            },
            batches=loader(pictures),
            preview=full_preview,
            export=export,
            captions=shown,
        )

    def with_word(self, conditioner: Conditioner) -> tuple[Conditioner, dict[str, list[int]]]:
        """Return text encoders with rows for the word, zeros as yet, and its ids in each."""
        tokenizers, texts, ids = dict(conditioner.prompts.tokenizers), dict(conditioner.texts), {}
        for name, text in conditioner.texts.items():
            try:
                tokenizers[name], ids_of_encoder = tokenizers[name].with_words({self.word: self.vectors})
            except ValueError as error:
                raise ValueError(f"task.word: {error}") from None
            ids[name] = ids_of_encoder[self.word]
            width = getattr(text.module.config, "hidden_size", None) or text.module.config.d_model
            texts[name] = with_rows(text, ids[name], np.zeros((self.vectors, width), np.float32))
        modules = {name: text.module for name, text in texts.items()}
        prompts = replace(conditioner.prompts, modules=modules, tokenizers=tokenizers)
        return replace(conditioner, texts=texts, prompts=prompts), ids

    def _start(self, conditioner: Conditioner, name: str) -> Sequence[int]:
        """Return the tokens of the initializer for an encoder, none where the vectors begin at random."""
        return conditioner.prompts.tokenizers[name].pieces([self.initializer])[0] if self.initializer else ()


def _vectors(text: Component, ids: Sequence[int], key: Key, start: Sequence[int]) -> Array:
    """Return the vectors of a word before the first step."""
    table = traverse_util.flatten_dict(text.params, sep="/")[table_of(text.module)].astype(jnp.float32)
    if start:
        return jnp.stack([table[start[i % len(start)]] for i in range(len(ids))])
    known = table[: min(ids)]
    noise = jax.random.normal(key, (len(ids), table.shape[1]))
    return known.mean(0) + known.std(0) * noise


def _with_vectors(tree: Params, path: str, ids: Sequence[int], vectors: Array) -> Params:
    """Return a text encoder's parameters with the word's rows in its table."""
    flat = traverse_util.flatten_dict(tree, sep="/")
    table = flat[path]
    flat[path] = table.at[jnp.asarray(ids)].set(vectors.astype(table.dtype))
    grown: Params = traverse_util.unflatten_dict(flat, sep="/")
    return grown


@dataclass(frozen=True, kw_only=True, eq=False)
class _Pictures:
    """Encoded records with the token ids of their prompts, each record once for each template."""

    records: Source
    tokens: Sequence[Sequence[np.ndarray]]  # for each template and encoder, (n, l)

    def __len__(self) -> int:
        return len(self.records) * len(self.tokens)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        template, number = divmod(index, len(self.records))
        record = self.records[number]
        kept = {name: record[name] for name in ("mean", "std", "time_ids") if name in record}
        return kept | {f"{TOKENS}{i}": ids[number] for i, ids in enumerate(self.tokens[template])}
