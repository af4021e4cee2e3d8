"""The frozen networks around the trained one, and the encoding of pictures and captions by them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from lcm_jax.data import Cache, Columns, Record, Source, cached
from lcm_jax.data.mixing import SYNTHETIC
from lcm_jax.data.record_store import Known, Made, stored
from lcm_jax.data.records import record_keys
from lcm_jax.models.latent_diffusion import to_float
from lcm_jax.models.text_conditioning import Prompts
from lcm_jax.parallel.sharding import BatchedMap, batch_parts, make_mesh, param_sharding
from lcm_jax.runtime.cache import cache_dir
from lcm_jax.runtime.compiler_options import compiler_options
from lcm_jax.runtime.image_io import Size
from lcm_jax.runtime.progress import progress
from lcm_jax.train.tasks.encoding import encode_records
from lcm_jax.typing import Array, Cond, Params
from lcm_jax.weights.abstract_params import abstract_params
from lcm_jax.weights.diffusers_folder import TOKENIZERS, Component
from lcm_jax.weights.hub import locate
from lcm_jax.weights.registry import class_name
from mmdit.text import Tokenizer, size_ids, zero_prompt
from vae16 import scale

ENCODE_BATCH = 32  # pictures that are encoded together, at most
MEGAPIXEL = 2**20  # pixels
Learned = tuple[Mapping[str, Params], BatchedMap]  # text encoders' parameters, and the devices that hold them
_SETTINGS = (".json", ".txt", ".model")  # endings of the files beside the weights
FAMILY_OF = {"text_encoder": "sd", "text_encoder_2": "sdxl", "text_encoder_3": "sd3"}  # by the last text encoder


@dataclass(frozen=True, kw_only=True)
class Conditioner:
    """The frozen networks around the trained one: an autoencoder, and text encoders that make the conditioning.

    A model with one text encoder has the conditioning of Stable Diffusion 1 and 2, with two that of SDXL, with three
    that of SD3. The networks are sharded over the devices of `batched_map`, and so are the batches that they encode.
    """

    vae: Component
    texts: Mapping[str, Component]
    prompts: Prompts
    digest: str  # of the weights, part of the name of what they encoded
    settings: str  # a digest of the configs and tokenizers, which change what the weights make
    batched_map: BatchedMap

    @classmethod
    def load(cls, vae: str, text: str, mesh: Mesh | None = None) -> Conditioner:
        """Load the autoencoder of one model, and the text encoders and tokenizers of another (names or folders).

        mesh: devices of this process; None: all of them.
        """
        mesh = local_mesh() if mesh is None else mesh
        vae_location, text_location = locate(vae), locate(text)
        names = tuple(name for name in TOKENIZERS if text_location.at(name).is_dir()) or ("text_encoder",)
        family = FAMILY_OF[names[-1]]
        texts = {name: text_location.load(name, shardings=param_sharding(mesh)) for name in names}
        prompts = Prompts(
            modules={name: part.module for name, part in texts.items()},
            tokenizers={name: Tokenizer.load(text_location.at(TOKENIZERS[name])) for name in names},
            family=family,
            width=texts["text_encoder_3"].module.config.d_model if family == "sd3" else 0,
        )
        digest = hashlib.sha256()
        for path in (vae_location.at("vae"), *map(text_location.at, names)):
            for file in sorted(path.glob("*.safetensors")):
                with file.open("rb") as stream:
                    while block := stream.read(1 << 24):
                        digest.update(block)
        settings = hashlib.sha256()
        tokenizers = (text_location.at(TOKENIZERS[name]) for name in names)
        for path in (vae_location.at("vae"), *map(text_location.at, names), *tokenizers):
            for file in sorted(path.iterdir()):
                if file.is_file() and file.suffix in _SETTINGS:
                    settings.update(hashlib.sha256(file.read_bytes()).digest())
        component = vae_location.load("vae", shardings=param_sharding(mesh))
        batched_map = BatchedMap(mesh=mesh, most=ENCODE_BATCH)
        return cls(
            vae=component,
            texts=texts,
            prompts=prompts,
            digest=digest.hexdigest(),
            settings=settings.hexdigest(),
            batched_map=batched_map,
        )

    @property
    def params(self) -> dict[str, Params]:
        """The parameters of the text encoders, by name."""
        return {name: text.params for name, text in self.texts.items()}

    def release(self) -> None:
        """Free the parameters of the text encoders; they are read again when they are needed."""
        for text in self.texts.values():
            text.release()

    @cached_property
    def widths(self) -> dict[str, int]:
        """The channels of each leaf of the conditioning."""
        shapes = {
            name: abstract_params(class_name(text.module), text.module.config) for name, text in self.texts.items()
        }
        return {name: shape[-1] for name, shape in self.prompts.shapes(shapes).items()}

    def encode_text(
        self, captions: list[str], size: Size | None = None, learned: Learned | None = None
    ) -> Mapping[str, np.ndarray]:
        """Return the conditioning of n captions: {"context": (n, l, d)}, with several encoders also "pooled" (n, p).

        SDXL has "time_ids" (n, 6) too, which say that the picture has `size` and was not cropped.

        size: (height, width) in pixels; None: the autoencoder's. learned: text encoders to use for the frozen ones.
        """
        side = self.vae.module.config.sample_size
        sizes = size_ids(size or (side, side), batch=len(captions)) if self.prompts.family == "sdxl" else None
        params, batched_map = (self.params, self.batched_map) if learned is None else learned
        cond: Mapping[str, np.ndarray] = batched_map(
            partial(self._encode_text, params), (self.prompts.tokenize(captions), sizes)
        )
        return cond

    @cached_property
    def _encode_text(self) -> Any:
        return jax.jit(lambda params, inputs: self.prompts.encode(params, *inputs), compiler_options=compiler_options())

    def empty(self, n: int = 1, learned: Learned | None = None) -> Cond:
        """Return the conditioning of n empty prompts; for SDXL it is zero."""
        cond: Cond = {name: jnp.asarray(leaf) for name, leaf in self.encode_text([""], learned=learned).items()}
        cond = zero_prompt(cond) if self.prompts.family == "sdxl" else cond
        return {name: jnp.repeat(leaf, n, axis=0) for name, leaf in cond.items()}

    @cached_property
    def null(self) -> Cond:
        """The unconditional embedding for caption dropout: `empty` without time_ids, which describe the picture."""
        return {name: leaf for name, leaf in self.empty().items() if name != "time_ids"}

    def encode(
        self, records: Sequence[Record], batch: int, *, synthetic: bool = False
    ) -> Iterator[dict[str, np.ndarray]]:
        """Yield, for each record, its latent's posterior "mean" and "std" (scaled) and its caption's conditioning.

        All arrays are float16.

        records: at most `batch`, with pictures of one size. synthetic: the conditioning of the synthetic caption is
        added, as synthetic_context and so on.
        """
        fill = batch - len(records)  # every batch has one shape, so there is one compilation
        images = np.stack([r["image"] for r in records] + [records[-1]["image"]] * fill)
        most = batch // batch_parts(self.batched_map.mesh)
        mean, std = self.batched_map(partial(self._posterior, self.vae.params), images, most=most)
        columns = {"mean": mean, "std": std}
        for prefix in ("", SYNTHETIC) if synthetic else ("",):
            captions: list[Any] = [r.get(f"{prefix}caption") for r in records] + [""] * fill
            cond = self.encode_text(captions, (images.shape[1], images.shape[2]))
            columns |= {f"{prefix}{name}": leaf for name, leaf in cond.items()}
        arrays = {name: np.asarray(column, np.float16) for name, column in columns.items()}
        for i in range(len(records)):
            yield {name: array[i] for name, array in arrays.items()}

    @cached_property
    def _posterior(self) -> Any:
        vae = self.vae.module

        @partial(jax.jit, compiler_options=compiler_options())
        def posterior(params: Params, images: Array) -> tuple[Array, Array]:
            mean, logvar = vae.apply({"params": params}, to_float(images), method="encode")
            return scale(mean, vae.config), jnp.exp(0.5 * logvar) * vae.config.scaling_factor

        return posterior

    @property
    def produced_by(self) -> dict[str, Any]:
        """The part of a cache's description that the networks and this code determine."""
        return {"kind": "latents", "version": 1, "weights": self.digest, "settings": self.settings}

    def encode_source(
        self, source: Source, described: dict[str, Any], *, synthetic: bool = False, first: int | None = None
    ) -> Source:
        """Return the source's records as `encode` makes them, computed once and then read from a cache.

        They are known by the content of their pictures and captions (lcm_jax.data.record_store): only those that are
        new or have changed are encoded. A source that `lcm-jax encode` has made is returned as it is.

        source: pictures of one size. described: what a source that never changes is known by, see `cached`. synthetic:
        as for `encode`. first: the number of records to encode; None: all. Raises ValueError for a source that was
        encoded with other weights, and for a picture that cannot be read, when those before it are encoded.
        """
        count = len(source) if first is None else min(first, len(source))
        if isinstance(source, Cache):
            if source.produced_by["weights"] != self.digest:
                raise ValueError(
                    f"{source.folder}: encoded with other weights, those of {source.produced_by.get('model')}, than "
                    "task.vae and task.text have; give its model there, or encode the data again"
                )
            names = tuple(name for name in source.fields if synthetic or not name.startswith(SYNTHETIC))
            return Columns(source=source, names=names, indices=range(count))
        height, width = source[0]["image"].shape[:2]
        batch = encode_batch((height, width), batch_parts(self.batched_map.mesh))
        root = cache_dir() / "latents"
        if getattr(source, "is_fixed", False):

            def produce() -> Iterator[dict[str, Any]]:
                for start in range(0, count, batch):
                    records = [source[i] for i in range(start, min(start + batch, count))]
                    yield from self.encode(records, batch, synthetic=synthetic)

            produced_by = {**self.produced_by, **described, **({} if first is None else {"first": first})}
            return cached(root, produced_by | ({"synthetic": True} if synthetic else {}), produce, total=count)

        def make(missing: list[int], known: Known) -> Iterator[Made]:
            options: dict[str, Any] = {"batch": batch, "synthetic": synthetic}
            with progress(len(missing), "encoding", "picture") as bar:
                yield from encode_records(self.encode, source, keys, missing, known, progressed=bar.update, **options)

        keys = record_keys(source, json.dumps(described), count)
        produced_by = {**self.produced_by, "size": [height, width], "synthetic": synthetic}
        return stored(root, produced_by, keys, make)


def decode_batch(size: Size) -> int:
    """Return how many pictures of (height, width) a device encodes or decodes at a time: a megapixel together."""
    return max(1, MEGAPIXEL // (size[0] * size[1]))


def encode_batch(size: Size, parts: int = 1) -> int:
    """Return how many pictures of (height, width) are encoded at a time by `parts` devices."""
    return parts * max(1, min(decode_batch(size), ENCODE_BATCH // parts))


def local_mesh() -> Mesh:
    """Return a mesh of this process's devices that shards large networks: a T5-XXL is larger than a small chip."""
    return make_mesh(f"fsdp={jax.local_device_count()}", devices=jax.local_devices())
