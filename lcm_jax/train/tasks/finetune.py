"""DreamBooth and plain finetuning: a model goes on learning from a few pictures, held by what it drew before."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from lcm_jax import lora
from lcm_jax.data import Cache, cached
from lcm_jax.generate import Generator, as_apply
from lcm_jax.objectives import Diffusion
from lcm_jax.places import cache_dir
from lcm_jax.sampling import SAMPLERS, Spacing, pad, time_grid
from lcm_jax.train.loop import Task
from lcm_jax.train.step import Metrics
from lcm_jax.train.tasks.common import captions, loader
from lcm_jax.train.tasks.diffusion import build_net, check_fit
from lcm_jax.train.tasks.distillation import LoraConfig
from lcm_jax.train.tasks.latent import Conditioner, LatentTask, draw_latents, export_folder, preview
from lcm_jax.typing import Array, Key, Nets, Params, Schedule
from lcm_jax.weights.families import DENOISERS, class_name
from lcm_jax.weights.files import read_json
from lcm_jax.weights.folders import Component, load_component
from lcm_jax.weights.hub import Location, locate
from lcm_jax.weights.lora import save_loras
from lcm_jax.weights.model import lora_networks
from lcm_jax.weights.scheduler import SCHEDULERS, read_scheduler

PRIOR = "prior_"  # before the names of a record's fields that are of a class picture
DRAWN = 16  # class pictures at a time


@dataclass(frozen=True, kw_only=True)
class FinetuneTask(LatentTask):
    """A model goes on with the diffusion loss on `data` (captions as they are: "a sks dog").

    DreamBooth (Ruiz et al. 2022, 2208.12242 eq. 2) adds prior_weight times the same loss on pictures that the model
    drew of class_prompt ("a dog") before it learned anything, so that it does not forget what a dog is.
    """

    model: str = "openmoji-teacher"  # a bundled name, folder or hub id: all its networks
    class_prompt: str = ""  # none: no class pictures
    class_pictures: int = 100
    class_steps: int = 50
    class_guidance: float = 4.0
    prior_weight: float = 1.0
    train_text: bool = False  # the CLIP text encoders learn too
    lora: LoraConfig | None = None  # train adapters instead of all weights
    caption_dropout: float = 0.0
    preview_steps: int = 25
    preview_guidance: float = 4.0
    remat: bool = False
    dtype: str = "float32"

    def build(self) -> Task:
        location = locate(self.model)
        config_file = location.at("scheduler") / "scheduler_config.json"
        scheduler = read_json(config_file)
        schedule, kind = read_scheduler(scheduler, source=str(config_file))
        objective = Diffusion(schedule=schedule, kind=kind, caption_dropout=self.caption_dropout)
        conditioner = Conditioner.load(self.model, self.model)
        part = next((name for name in DENOISERS if location.at(name).is_dir()), "unet")
        whole = load_component(location.path, location.place(part))
        check_fit(whole.module.config, conditioner, self.data.sizes)
        source = self.data.open()
        net = build_net(whole.module.config, dtype=self.dtype, remat=self.remat)
        generator = Generator(net=net, vae=conditioner.vae.module, schedule=schedule, kind=kind)
        null = conditioner.encode_text([""])
        described = {"data": self.data.name, "split": self.data.split, "size": self.data.size}
        records: Any = conditioner.encode_source(source, described)
        if self.train_text:
            records = _WithIds(records, conditioner, captions(source))
        if self.class_prompt:
            digest = _digest(location, part)
            prior = self.class_records(generator, whole.params, conditioner, schedule, digest)
            records = _Beside(records, prior, conditioner if self.train_text else None, self.class_prompt)

        texts = [name for name in conditioner.texts if name != "text_encoder_3"] if self.train_text else []
        frozen = {"net": whole.params, **conditioner.params}
        learning = {"net": lora.DEFAULT_TARGETS, **dict.fromkeys(texts, lora.CLIP_TARGETS)}
        adapted = self.lora
        if adapted is not None:
            learning["net"] = adapted.targets

        def init(key: Key) -> Params:
            if adapted is None:
                return {name: jax.tree.map(jnp.copy, frozen[name]) for name in learning}
            keys = jax.random.split(key, len(learning))
            return {
                name: lora.init(k, frozen[name], rank=adapted.rank, alpha=adapted.alpha, targets=targets)
                for k, (name, targets) in zip(keys, learning.items(), strict=True)
            }

        def trees(params: Params, still: Params) -> dict[str, Params]:
            """Every network's parameters; of the denoiser adapters stay branches."""
            own = dict(still)
            for name, tree in params.items():
                if adapted is None:
                    own[name] = tree
                else:
                    own[name] = lora.Adapted(still[name], tree) if name == "net" else lora.merge(still[name], tree)
            return own

        def one(
            nets: Nets, networks: dict[str, Params], batch: dict[str, Array], key: Key
        ) -> tuple[Array, dict[str, Array]]:
            ids = [batch.pop(name) for name in sorted(batch) if name.startswith("ids_")]
            draw, rest = jax.random.split(key)
            latents = draw_latents(draw, batch)
            if ids:
                latents["cond"] = conditioner.prompts.encode(networks, ids)
            return objective(nets, latents, rest)

        def loss(
            params: Params, ema: Params, still: Params, batch: dict[str, Array], key: Key, step: Array
        ) -> tuple[Array, Metrics]:
            networks = trees(params, still["networks"])
            nets = Nets(as_apply(net), networks["net"], null=still["null"])
            first, second = jax.random.split(key)
            own = {name: leaf for name, leaf in batch.items() if not name.startswith(PRIOR)}
            value, metrics = one(nets, networks, own, first)
            if not self.class_prompt:
                return value, metrics
            kept = {name.removeprefix(PRIOR): leaf for name, leaf in batch.items() if name.startswith(PRIOR)}
            prior, _ = one(nets, networks, kept, second)
            total = value + self.prior_weight * prior
            return total, {**metrics, "loss": total, "own": value, "prior": prior}

        sampler = SCHEDULERS.get(scheduler.get("_class_name", ""), "ddim")
        show = preview(
            generator,
            conditioner,
            captions(source, 16),
            sampler=sampler,
            steps=self.preview_steps,
            guidance=self.preview_guidance,
        )

        def export(ema: Params, path: Path) -> None:
            own = jax.device_get(ema)
            if adapted is not None:
                path.mkdir(parents=True, exist_ok=True)
                modules = {part: net, **{name: conditioner.texts[name].module for name in texts}}
                like = {part: frozen["net"], **{name: frozen[name] for name in texts}}
                networks = lora_networks({n: (class_name(m), m.config, like[n]) for n, m in modules.items()})
                found = {part if name == "net" else name: tree for name, tree in own.items()}
                save_loras(path / "pytorch_lora_weights.safetensors", found, networks)
                return
            around = replace(
                conditioner,
                texts={
                    name: Component(text.module, own.get(name, text.params)) for name, text in conditioner.texts.items()
                },
            )
            export_folder(path, Component(net, own["net"]), around, schedule, kind, sampler=sampler)

        def drawing(ema: Params) -> Params:
            return lora.merge(frozen["net"], ema["net"]) if adapted is not None else ema["net"]

        return Task(
            init=init,
            loss=loss,
            frozen={"networks": frozen, "null": null, "vae": conditioner.vae.params},
            batches=loader(records),
            preview=lambda ema, still: show(drawing(ema), still["vae"]),
            export=export,
        )

    def class_records(
        self, generator: Generator, params: Params, conditioner: Conditioner, schedule: Schedule, digest: str
    ) -> Cache:
        """Latents that the model draws of the class prompt, once."""
        spec = SAMPLERS["euler"]
        grid = pad(time_grid(spec, schedule, self.class_steps, spacing=Spacing(timestep_spacing="trailing")))
        cond, null = (conditioner.encode_text([text] * DRAWN) for text in (self.class_prompt, ""))
        side, channels = generator.net.config.sample_size, generator.net.config.in_channels

        @jax.jit
        def draw(params: Params, key: Key) -> Array:
            noise, rest = jax.random.split(key)
            x = jax.random.normal(noise, (DRAWN, side, side, channels))
            x = x * schedule.sigma(grid.times[0])
            return generator.latents(
                params, cond, null, x, grid, self.class_guidance, rest, sampler=spec, guided=self.class_guidance != 1.0
            )

        def produce() -> Iterator[dict[str, Any]]:
            one = {name: np.asarray(leaf[0], np.float16) for name, leaf in cond.items()}
            batches = range(-(-self.class_pictures // DRAWN))
            for i in tqdm(batches, f"drawing {self.class_prompt!r}", unit="batch", disable=None):
                made = np.asarray(draw(params, jax.random.fold_in(jax.random.key(0), i)), np.float16)
                for latent in made[: self.class_pictures - i * DRAWN]:
                    yield {"mean": latent, "std": np.zeros_like(latent), **one}

        described = {
            "kind": "class pictures",
            "version": 1,
            "weights": conditioner.digest + digest,
            "prompt": self.class_prompt,
            "count": self.class_pictures,
            "steps": self.class_steps,
            "guidance": self.class_guidance,
        }
        return cached(cache_dir() / "latents", described, produce, total=self.class_pictures)


def _digest(location: Location, part: str) -> str:
    digest = hashlib.sha256()
    for file in sorted(location.at(part).glob("*.safetensors")):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _ids(conditioner: Conditioner, texts: list[str]) -> list[np.ndarray]:
    return [np.asarray(ids) for ids in conditioner.prompts.tokenize(texts)]


class _WithIds:
    """Records with their captions' tokens in the place of their conditioning."""

    def __init__(self, records: Cache, conditioner: Conditioner, texts: list[str]) -> None:
        self._records, self._ids = records, _ids(conditioner, texts)

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        record = self._records[index]
        return {
            **{name: record[name] for name in ("mean", "std")},
            **{f"ids_{i}": ids[index] for i, ids in enumerate(self._ids)},
        }


class _Beside:
    """Each record with a class picture; the shorter of the two lists is gone through again."""

    def __init__(self, records: Any, prior: Any, conditioner: Conditioner | None, prompt: str) -> None:
        self._records, self._prior = records, prior
        self._ids = None if conditioner is None else _ids(conditioner, [prompt])

    def __len__(self) -> int:
        return max(len(self._records), len(self._prior))

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        prior = dict(self._prior[index % len(self._prior)])
        if self._ids is not None:
            prior = {name: prior[name] for name in ("mean", "std")}
            prior |= {f"ids_{i}": ids[0] for i, ids in enumerate(self._ids)}
        return {**self._records[index % len(self._records)], **{PRIOR + name: leaf for name, leaf in prior.items()}}
