"""`lcm_jax.load`: a pipeline from a bundled name, a folder, a single file or a hub id, with adapters merged."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lcm_jax.inference.call_options import real_number, refuse
from lcm_jax.inference.parameters import named_dtype
from lcm_jax.inference.pipeline import Pipeline
from lcm_jax.runtime.hardware import check_platform
from lcm_jax.weights.diffusers_folder import to_folder
from lcm_jax.weights.embeddings import bundled_embeddings, read_embedding, with_embeddings
from lcm_jax.weights.hub import locate
from lcm_jax.weights.lora.files import find_lora, load_loras
from lcm_jax.weights.model_files import read_model
from lcm_jax.weights.taesd import load_tiny


def load(
    name: str | Path,
    *,
    dtype: str | Any = "float32",
    lora: str | Path | tuple[str | Path, float] | Sequence[str | Path | tuple[str | Path, float]] | None = None,
    embeddings: str | Path | tuple[str | Path, str] | Sequence[str | Path | tuple[str | Path, str]] | None = None,
    tiny_vae: str | Path | None = None,
    variant: str | None = None,
    config: str | Path | None = None,
    t5: bool = True,
    scheduler: Mapping[str, Any] | None = None,
    **unknown: Any,
) -> Pipeline:
    """Load a pipeline from a bundled name ("openmoji"), a folder, a single .safetensors file or a hub id.

    name: a bundled name ("openmoji", "openmoji-teacher"), a diffusers or orbax folder, a single file, or a hub id.
    dtype: "float32", "bfloat16" or "float16", of parameters and computation. lora: an adapter file, folder or bundled
    name ("openmoji-lcm-lora"), an (adapter, weight) pair, or a list of these, merged into UNet and text encoders; the
    pipeline then draws by LCM unless a call names another sampler. embeddings: textual inversions in .safetensors
    files, a file, a pair (file, word), or a list of these; the word stands for the vectors in a prompt, by default the
    file's own or its name. A LoRA's file may hold some too, which are used. tiny_vae: a TAESD in place of the
    autoencoder. variant: the precision to read, such as "fp16", where files are kept in several. config: the diffusers
    folder or hub id with the configs, tokenizers and scheduler of a single file; by default those in its header, or the
    published one of its family. t5: False leaves out SD3's third text encoder, most of its memory. scheduler: keys that
    replace those of the scheduler config, such as {"prediction_type": "v_prediction"}.

    Raises FileNotFoundError or ValueError at once, in one line, for all that does not fit; the values stay in the
    files, mapped, until a network is first used.

    >>> import lcm_jax
    >>> lcm_jax.load("openmoji-teacher", lora=("openmoji-lcm-lora", 1.0)).settings()
    Settings(steps=4, guidance=1.0, sampler='lcm')
    """
    if unknown:
        refuse("load", unknown, LOAD_OPTIONS)
    if not isinstance(name, (str, Path)):
        raise ValueError(f"model {name!r:.80}: give a name or a path")
    kind = named_dtype(dtype)
    adapters = [(locate(path, what="LoRA").path, weight) for path, weight in _adapters(lora)]
    words = [(locate(path, what="embedding").path, word) for path, word in _words(embeddings)]
    check_platform()
    model = read_model(name, config=config, variant=variant, t5=t5, scheduler=scheduler)
    folder = to_folder(model, dtype=kind)
    found = [read_embedding(path, folder, word) for path, word in words]
    found += [embedding for path, _ in adapters for embedding in bundled_embeddings(find_lora(path), folder)]
    folder = with_embeddings(folder, found)
    if tiny_vae is not None:
        tiny = load_tiny(locate(tiny_vae).path, dtype=kind)
        folder = replace(folder, components={**folder.components, "vae": tiny})
    pipe = Pipeline(folder, source=model.scheduler_source)
    if adapters:
        networks = pipe.networks
        for path, weight in adapters:
            pipe.add_lora(load_loras(path, networks, embeddings=True), weight)
        pipe.adapted = True
    return pipe


LOAD_OPTIONS = tuple(name for name in inspect.signature(load).parameters if name != "unknown")


def _adapters(lora: Any) -> list[tuple[str | Path, float]]:
    """Return (adapter, weight) pairs from one adapter, a pair, or a list of either."""
    if lora is None:
        return []
    is_pair = isinstance(lora, tuple) and len(lora) == 2 and not isinstance(lora[1], (str, Path, tuple))
    given = [lora] if is_pair or not isinstance(lora, (list, tuple)) else lora
    pairs = [one if isinstance(one, (list, tuple)) and len(one) == 2 else (one, 1.0) for one in given]
    for path, _ in pairs:
        if not isinstance(path, (str, Path)):
            raise ValueError(f"lora is {lora!r:.80}: give a path, a pair (path, weight), or a list of these")
    return [(path, real_number(f"lora: the weight of {path}", weight)) for path, weight in pairs]


def _words(embeddings: Any) -> list[tuple[str | Path, str | None]]:
    """Return (file, word or None) pairs from one file, a pair, or a list of either."""
    if embeddings is None:
        return []
    is_pair = isinstance(embeddings, tuple) and len(embeddings) == 2 and not isinstance(embeddings[1], Path)
    is_pair = is_pair and not str(embeddings[1]).endswith(".safetensors")
    given = [embeddings] if is_pair or not isinstance(embeddings, (list, tuple)) else embeddings
    pairs = [tuple(one) if isinstance(one, (list, tuple)) and len(one) == 2 else (one, None) for one in given]
    for path, word in pairs:
        if not isinstance(path, (str, Path)) or not isinstance(word, (str, type(None))):
            raise ValueError(f"embeddings is {embeddings!r:.80}: give a file, a pair (file, word), or a list of these")
    return pairs
