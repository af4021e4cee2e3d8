"""DreamBooth and plain finetuning: a model is trained further on a few pictures, with a prior of its own pictures."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lcm_jax import lora
from lcm_jax.data import Cache, Source, cached
from lcm_jax.diffusion.samplers import get_sampler, walk
from lcm_jax.diffusion.schedules import DDPM
from lcm_jax.diffusion.time_grids import pad
from lcm_jax.models.latent_diffusion import LatentDiffusion, as_apply
from lcm_jax.objectives import Diffusion
from lcm_jax.parallel.sharding import BatchedMap, batch_parts, param_sharding
from lcm_jax.runtime.cache import cache_dir
from lcm_jax.runtime.progress import progress
from lcm_jax.train.task import Task
from lcm_jax.train.tasks.common import DataConfig, Dtype, captions, check_dtype, check_preview_steps, loader
from lcm_jax.train.tasks.conditioner import Conditioner, decode_batch, local_mesh
from lcm_jax.train.tasks.diffusion import build_net, check_fit
from lcm_jax.train.tasks.latent import draw_latents, preview
from lcm_jax.train.tasks.lora_config import LoraConfig
from lcm_jax.train.train_step import Metrics, Progress
from lcm_jax.typing import Array, Cond, Image, Key, Nets, Params
from lcm_jax.weights.diffusers_folder import Component, Folder, save_folder
from lcm_jax.weights.hub import locate
from lcm_jax.weights.lora.files import save_loras
from lcm_jax.weights.model_files import lora_networks
from lcm_jax.weights.registry import DENOISERS, class_name
from lcm_jax.weights.safetensors_files import read_json
from lcm_jax.weights.scheduler_config import read_scheduler, read_spacing, sampler_of
from mmdit.blocks import Remat
from mmdit.text import T5Encoder

NET = "net"  # the denoiser's key among the trained networks
TOKENS = "tokens_"  # prefix of a record's token ids, before the number of the text encoder
DRAWN = 16  # class pictures sampled at a time, at most
CLASS_SEED = 0  # of the class pictures


@dataclass(frozen=True, kw_only=True)
class FinetuneTask:
    """A model trained further with the diffusion loss on `data`, whose captions are used as they are ("a sks dog").

    DreamBooth (Ruiz et al. 2022, 2208.12242 eq. 2) adds prior_weight times the same loss on pictures that the model
    drew of class_prompt ("a dog") before the training, so that it does not forget what a dog is. A batch then has one
    such picture for each picture of `data`.
    """

    model: str = "openmoji-teacher"  # a bundled name, folder or hub id: all its networks
    data: DataConfig = DataConfig()
    objective: Diffusion = Diffusion(schedule=DDPM(), caption_dropout=0.0)  # its schedule and kind are the model's
    class_prompt: str = ""  # empty: no class pictures
    class_pictures: int = 100  # number of class pictures
    class_steps: int = 50  # sampling steps of a class picture
    class_guidance: float = 4.0  # guidance of a class picture
    prior_weight: float = 1.0  # weight of the loss on class pictures
    train_text: bool = False  # train the CLIP text encoders too
    lora: LoraConfig | None = None  # train adapters instead of all weights
    preview_prompts: tuple[str, ...] = ()  # empty: the first captions of the data
    preview_steps: int = 25  # sampling steps of a preview
    preview_guidance: float = 4.0
    remat: Remat = False  # what the backward pass recomputes: nothing, all of a block, or what a policy does not keep
    dtype: Dtype = "float32"  # of the computation; parameters, norms and losses are float32

    def __post_init__(self) -> None:
        for name in ("class_pictures", "class_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"task.{name} is {getattr(self, name)}; it must be at least 1")
        if self.prior_weight < 0:
            raise ValueError(f"task.prior_weight is {self.prior_weight}; it must not be negative")
        check_dtype("task.dtype", self.dtype)
        check_preview_steps(self.preview_steps)

    def build(self) -> Task:
        """Return the task; raise ValueError, before any picture is encoded or drawn, if model and data do not fit."""
        location = locate(self.model)
        config_file = location.at("scheduler") / "scheduler_config.json"
        scheduler = read_json(config_file)
        schedule, kind = read_scheduler(scheduler, source=str(config_file))
        objective = replace(self.objective, schedule=schedule, kind=kind)
        conditioner = Conditioner.load(self.model, self.model)
        part = next((name for name in DENOISERS if location.at(name).is_dir()), "unet")
        base = location.load(part, shardings=param_sharding(local_mesh()))
        if base.module.config.time_cond_proj_dim is not None:
            raise ValueError(f"task.model {self.model} is a distilled student with a w-embedding: finetune its teacher")
        check_fit(base.module.config, conditioner, self.data.sizes)
        net = build_net(base.module.config, dtype=self.dtype, remat=self.remat)
        texts = [
            n for n, text in conditioner.texts.items() if self.train_text and not isinstance(text.module, T5Encoder)
        ]
        if texts and conditioner.prompts.family == "sdxl":
            raise ValueError("task.train_text: the text encoders of SDXL cannot be trained; leave train_text out")
        networks = {NET: base.params, **(conditioner.params if texts else {})}
        learners = Learners(networks=networks, texts=texts, lora=self.lora)
        jax.eval_shape(learners.init, jax.random.key(0))  # raises what is wrong with rank and targets
        source = self.data.open(encoded=True)

        model = LatentDiffusion(net=net, vae=conditioner.vae.module, schedule=schedule, kind=kind)
        described = {"data": self.data.name, "split": self.data.split, "size": self.data.size}
        kinds = [Pictures.of(conditioner, conditioner.encode_source(source, described), captions(source), texts)]
        if self.class_prompt:
            weights = conditioner.digest + conditioner.settings + _digest(location.at(part))
            drawn = self.class_records(model, base.params, conditioner, scheduler, weights)
            kinds.append(Pictures.of(conditioner, drawn, [self.class_prompt] * len(drawn), texts))
        weights_by_kind = jnp.asarray([1.0, self.prior_weight][: len(kinds)])
        empty_tokens = conditioner.prompts.tokenize([""])

        def loss(
            params: Params, ema: Params, frozen: Params, batch: dict[str, Array], key: Key, progress: Progress
        ) -> tuple[Array, Metrics]:
            trees = learners.trees(params, frozen["networks"])
            null = conditioner.prompts.encode(trees, empty_tokens) if texts else frozen["null"]
            nets = Nets(as_apply(net), trees[NET], null=null)

            def kind_loss(batch: dict[str, Array], key: Key) -> tuple[Array, Metrics]:
                draw, rest = jax.random.split(key)
                latents = draw_latents(draw, {n: leaf for n, leaf in batch.items() if not n.startswith(TOKENS)})
                if texts:
                    tokens = [batch[name] for name in sorted(batch) if name.startswith(TOKENS)]
                    latents["cond"] = conditioner.prompts.encode(trees, tokens)
                return objective(nets, latents, rest)

            keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(len(kinds)))
            # vmap, so that the network is traced once for both kinds
            losses, metrics = jax.vmap(kind_loss, in_axes=(1, 0))(batch, keys)
            total = jnp.sum(weights_by_kind * losses)
            scalars = {name: values[0] for name, values in metrics.items()} | {"loss": total}
            return total, scalars if len(kinds) == 1 else {**scalars, "own": losses[0], "prior": losses[1]}

        shown = list(self.preview_prompts) or captions(source, 16)
        show = preview(
            model,
            conditioner,
            shown,
            sampler=sampler_of(scheduler),
            steps=self.preview_steps,
            guidance=self.preview_guidance,
        )

        if not texts:
            conditioner.release()

        def full_preview(ema: Params, frozen: Params, batched_map: BatchedMap) -> dict[str, float | np.ndarray]:
            trees = learners.trees(ema, frozen["networks"])
            return show(trees[NET], frozen["vae"], batched_map, trees if texts else None)

        def export(ema: Params, path: Path) -> None:
            trained = {part if name == NET else name: tree for name, tree in jax.device_get(ema).items()}
            original = {part: Component(net, base.params), "vae": conditioner.vae, **conditioner.texts}
            if self.lora is not None:
                path.mkdir(parents=True, exist_ok=True)
                parts = {name: (class_name(c.module), c.module.config, c.params) for name, c in original.items()}
                save_loras(path / "pytorch_lora_weights.safetensors", trained, lora_networks(parts))
                return
            components = original | {name: Component(original[name].module, tree) for name, tree in trained.items()}
            tokenizers = conditioner.prompts.tokenizers
            save_folder(path, Folder(components=components, tokenizers=tokenizers, scheduler=scheduler))

        return Task(
            init=learners.init,
            loss=loss,
            frozen={
                "networks": learners.frozen,
                "null": conditioner.null,
                "vae": conditioner.vae.params,
            },
            batches=loader(Beside(kinds=kinds)),
            preview=full_preview,
            export=export,
            captions=shown,
        )

    def class_records(
        self,
        model: LatentDiffusion,
        params: Params,
        conditioner: Conditioner,
        scheduler: Mapping[str, Any],
        weights: str,
    ) -> Cache:
        """Return records of latents that the model draws for the class prompt with its own sampler, made once.

        The latents are of the size of `data`'s pictures, and are read from a cache the next time.

        weights: the digest of all weights, configs and tokenizers that draw them.
        """
        spacing = read_spacing(scheduler)
        sampler = sampler_of(scheduler)
        spec = get_sampler(sampler).configured(spacing, model.kind)
        walked = walk(spec, model.schedule, self.class_steps, spacing=spacing)
        parts = batch_parts(conditioner.batched_map.mesh)
        drawn = min(DRAWN, parts * decode_batch((self.data.size, self.data.size)))
        cond, null = conditioner.encode_text([self.class_prompt] * drawn), conditioner.empty(drawn)
        vae, guidance = conditioner.vae.module.config, self.class_guidance
        side = self.data.size // vae.downsample_factor
        noise_sigma = spec.init_noise_sigma(
            model.schedule, walked.times, spacing
        )  # outside jit: it needs concrete arrays

        @jax.jit
        def draw(params: Params, key: Key, inputs: tuple[Cond, Cond, Image]) -> Array:
            options: dict[str, Any] = {"sampler": spec, "guided": guidance != 1.0}
            return model.latents(params, *inputs, pad(walked), guidance, key, **options)

        def produce() -> Iterator[dict[str, Any]]:
            record_cond = {name: np.asarray(leaf[0], np.float16) for name, leaf in cond.items()}
            starts = range(0, self.class_pictures, drawn)
            for start in progress(starts, f"drawing {self.class_prompt!r}", "batch"):
                noise, rest = jax.random.split(jax.random.fold_in(jax.random.key(CLASS_SEED), start))
                x = noise_sigma * jax.random.normal(noise, (drawn, side, side, vae.latent_channels))
                latents = conditioner.batched_map(partial(draw, params, rest), (cond, null, x)).astype(np.float16)
                for latent in latents[: self.class_pictures - start]:
                    yield {"mean": latent, "std": np.zeros_like(latent), **record_cond}

        produced_by = {
            "kind": "class pictures",
            "version": 2,
            "weights": weights,
            "prompt": self.class_prompt,
            "count": self.class_pictures,
            "batch": drawn,  # the noise of a picture depends on it
            "seed": CLASS_SEED,
            "dtype": self.dtype,
            "size": self.data.size,
            "scheduler": dict(scheduler),
            "sampler": sampler,
            "steps": self.class_steps,
            "guidance": guidance,
        }
        return cached(cache_dir() / "latents", produced_by, produce, total=self.class_pictures)


@dataclass(frozen=True, kw_only=True, eq=False)
class Learners:
    """The trained networks of a model: the denoiser and the text encoders named in `texts`, in full or by adapters."""

    networks: Mapping[str, Params]  # before the training: the denoiser, and all text encoders if one is trained
    texts: Sequence[str]
    lora: LoraConfig | None

    @property
    def frozen(self) -> dict[str, Params]:
        """The parameters that a step needs and does not change, by network."""
        learning = set() if self.lora is not None else {NET, *self.texts}
        return {name: tree for name, tree in self.networks.items() if name not in learning}

    def init(self, key: Key) -> Params:
        """Return the trained trees before the first step: copies of the networks, or adapters without effect yet."""
        if self.lora is None:
            return {name: jax.tree.map(jnp.copy, self.networks[name]) for name in (NET, *self.texts)}
        config, targets = self.lora, {NET: self.lora.targets, **dict.fromkeys(self.texts, lora.CLIP_TARGETS)}
        return {
            name: lora.init(k, self.networks[name], rank=config.rank, alpha=config.alpha, targets=pattern)
            for k, (name, pattern) in zip(jax.random.split(key, len(targets)), targets.items(), strict=True)
        }

    def trees(self, params: Params, frozen: Mapping[str, Params]) -> dict[str, Params]:
        """Return every network's parameters; adapters are merged, but the denoiser's are kept as `lora.Adapted`."""
        if self.lora is None:
            return {**frozen, **params}
        texts = {name: lora.merge(frozen[name], params[name]) for name in self.texts}
        return {**frozen, **texts, NET: lora.Adapted(frozen[NET], params[NET])}


@dataclass(frozen=True, kw_only=True, eq=False)
class Pictures:
    """Encoded records; if text encoders are trained, with token ids of the captions instead of the conditioning."""

    records: Source
    tokens: Mapping[str, np.ndarray] | None  # (n, l) for each encoder

    @classmethod
    def of(cls, conditioner: Conditioner, records: Source, texts: list[str], learning: Sequence[str]) -> Pictures:
        """Return the records with their captions `texts`; `learning` names the text encoders that are trained."""
        ids = enumerate(conditioner.prompts.tokenize(texts)) if learning else ()
        return cls(
            records=records, tokens={f"{TOKENS}{i}": np.asarray(tokens) for i, tokens in ids} if learning else None
        )

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        record = self.records[index]
        if self.tokens is None:
            return record
        posterior = {name: record[name] for name in ("mean", "std")}
        return posterior | {name: ids[index] for name, ids in self.tokens.items()}


@dataclass(frozen=True, kw_only=True, eq=False)
class Beside:
    """A source whose record i is record i of each kind, stacked; a shorter kind starts again at its end."""

    kinds: Sequence[Source]

    def __len__(self) -> int:
        return max(map(len, self.kinds))

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        records = [kind[index % len(kind)] for kind in self.kinds]
        return {name: np.stack([record[name] for record in records]) for name in records[0]}


def _digest(folder: Path) -> str:
    """Return a digest of a network's weights and its configs."""
    digest = hashlib.sha256()
    for file in sorted([*folder.glob("*.safetensors"), *folder.glob("*.json")]):
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()
