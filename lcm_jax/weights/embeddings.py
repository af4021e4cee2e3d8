"""Textual inversions (Gal et al. 2022, 2208.01618): new words with learned vectors, from and to safetensors files.

diffusers   {word: (n, d) or (d,)}                         one text encoder (SD1, SD2)
A1111       string_to_param.*, emb_params (kohya), emp_params (OneTrainer): the word is the file's name
SDXL, SD3   clip_l, clip_g, t5 (t5xxl): the word is the file's name
a LoRA      bundle_emb.WORD.KEY with the keys above

A word of n vectors takes n places of a prompt. The vectors become rows of the text encoders' tables of tokens, and the
word joins the tokenizers' vocabularies under the names that diffusers gives: word, word_1, word_2.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from lcm_jax.runtime.messages import few, shown
from lcm_jax.weights.component import Component
from lcm_jax.weights.diffusers_folder import Folder
from lcm_jax.weights.lora.names import EMBEDDING
from lcm_jax.weights.safetensors_files import is_finite, read_metadata, read_safetensors, save_tensors
from mmdit.text import T5Encoder

FILE_NAME = "learned_embeds.safetensors"  # in a folder, as diffusers' training writes it
# Encoder of a family -> its keys in a file; the first is written.
KEYS: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "sd": {"text_encoder": ("", "string_to_param.*", "emb_params", "emp_params", "clip_l")},
    "sdxl": {"text_encoder": ("clip_l",), "text_encoder_2": ("clip_g",)},
    "sd3": {"text_encoder": ("clip_l",), "text_encoder_2": ("clip_g",), "text_encoder_3": ("t5", "t5xxl")},
}
_KNOWN = {key for encoders in KEYS.values() for keys in encoders.values() for key in keys}
_OUTPUT = re.compile(r"^(\w+)_out$")  # OneTrainer: replaces what the encoder puts out
_BESIDE = re.compile(r"^(string_to_token\.\*|step|sd_checkpoint\w*|name)$")  # of A1111's training, no vectors
_BASES = {768: "SD1", 1024: "SD2"}  # by the width of a file for one encoder
CLIP_TABLE, T5_TABLE = "text_model/embeddings/token_embedding/embedding", "shared/embedding"


class Embedding(NamedTuple):
    """A word, its vectors (n, d) for each text encoder that has any, and the file that errors name."""

    word: str
    vectors: Mapping[str, np.ndarray]
    source: str


def read_embedding(path: str | Path, folder: Folder, word: str | None = None) -> Embedding:
    """Return the textual inversion in a file (or a folder with `FILE_NAME`), for a model.

    word: that stands for it in a prompt; None: the file's own, else its name. Raises FileNotFoundError, and ValueError
    in one line for a pickle, for what is no embedding, and for one that was made for another model.
    """
    path = Path(path)
    path = path / FILE_NAME if path.is_dir() else path
    tensors = dict(read_safetensors(path))
    _warn_of_outputs(tensors, path)
    if len(tensors) > 1:
        tensors = {key: tensor for key, tensor in tensors.items() if not _BESIDE.match(key)}
    name = path.stem
    if len(tensors) == 1 and (key := next(iter(tensors))) not in _KNOWN:
        name, tensors = key, {"": tensors[key]}
    elif (named := read_metadata(path).get("name")) is not None and named.strip():
        name = named.strip()
    return _fitted(word or name, tensors, folder, str(path))


def bundled_embeddings(path: str | Path, folder: Folder) -> list[Embedding]:
    """Return the textual inversions in a LoRA's file.

    A word that is in a vocabulary already is left out, with a warning, as a LoRA cannot be given other words.
    """
    words: dict[str, dict[str, np.ndarray]] = {}
    for key, tensor in read_safetensors(path).items():
        if key.startswith(EMBEDDING):
            word, name = _bundled_key(key)
            words.setdefault(word, {})[name] = tensor
    found = []
    for word, tensors in sorted(words.items()):
        source = f"{path}: {EMBEDDING}{word}"
        _warn_of_outputs(tensors, source)
        if re.search(r"\s", word) or any(_has_word(folder.tokenizers[name], word) for name in folder.tokenizers):
            warnings.warn(
                f"{path}: holds an embedding {shown(word, 80)}, which is left out: it is in the vocabulary, or has "
                "spaces; its word in a prompt is plain text here",
                stacklevel=3,
            )
            continue
        found.append(_fitted(word, {k: v for k, v in tensors.items() if not _BESIDE.match(k)}, folder, source))
    return found


def _bundled_key(key: str) -> tuple[str, str]:
    """Return the word and the key behind it; a word may have points."""
    rest = key.removeprefix(EMBEDDING)
    for name in (*sorted(_KNOWN - {""}, key=len, reverse=True), "string_to_token.*"):
        if rest.endswith(f".{name}"):
            return rest.removesuffix(f".{name}"), name
    word, _, name = rest.rpartition(".")
    return (word, name) if word else (rest, "")


def _has_word(tokenizer: Any, word: str) -> bool:
    vocabulary = tokenizer.backend.get_vocab()
    return word in vocabulary or f"{word}</w>" in vocabulary


def _warn_of_outputs(tensors: dict[str, np.ndarray], source: str | Path) -> None:
    """Take the vectors that replace an encoder's outputs out of a file's tensors, with a warning."""
    outputs = sorted(key for key in tensors if (match := _OUTPUT.match(key)) is not None and match[1] in _KNOWN)
    for key in outputs:
        del tensors[key]
    if outputs:
        warnings.warn(f"{source}: {few('output embeddings', outputs)} of OneTrainer are left out", stacklevel=3)


def _fitted(word: str, tensors: Mapping[str, np.ndarray], folder: Folder, source: str) -> Embedding:
    """Return an embedding for a model's encoders; ValueError if it is for another model."""
    encoders = KEYS[folder.family]
    known = {key: name for name, keys in encoders.items() for key in keys}
    unknown = sorted(key for key in tensors if key not in known)
    if unknown and not any(key in _KNOWN for key in unknown):
        raise ValueError(f"{source}: not a textual inversion that can be read: it has {few('other keys', unknown)}")
    made_for = _made_for(tensors)
    if made_for == "sdxl" and folder.family == "sd3":  # the CLIPs are the same
        made_for = "sd3"
        if "text_encoder_3" in folder.tokenizers:
            warnings.warn(f"{source}: has no vectors for T5, to which the word is plain text", stacklevel=3)
    if unknown or not tensors or made_for != folder.family:
        whose = {"sd": "SD1 or SD2", "sdxl": "SDXL", "sd3": "SD3"}
        raise ValueError(f"{source}: an embedding for {whose[made_for]}, and this model is {whose[folder.family]}")
    vectors: dict[str, np.ndarray] = {}
    for key, tensor in tensors.items():
        name, array = known[key], np.asarray(tensor)
        if not jnp.issubdtype(array.dtype, jnp.floating) or array.ndim not in (1, 2) or not array.size:
            raise ValueError(
                f"{source}: {shown(key or word)} is {array.dtype} of shape {array.shape}; vectors are (n, d)"
            )
        if not is_finite(array):
            raise ValueError(f"{source}: {shown(key or word)} holds infinity or NaN; copy or download it again")
        if name not in folder.tokenizers:
            continue  # a model without its T5, or a refiner without its first encoder
        array = np.atleast_2d(array.astype(np.float32))
        width = _width(folder.components[name])
        if array.shape[1] != width:
            base = (
                f" (those of {_BASES[array.shape[1]]})"
                if key in ("", "emb_params") and array.shape[1] in _BASES
                else ""
            )
            raise ValueError(
                f"{source}: vectors of {array.shape[1]} numbers{base}, and this model's {name} has {width}"
            )
        vectors[name] = array
    if not vectors:
        raise ValueError(f"{source}: has vectors for no text encoder of this model")
    return Embedding(word, vectors, source)


def _made_for(tensors: Iterable[str]) -> str:
    """Return the family whose keys a file has."""
    keys = set(tensors)
    if keys & {"t5", "t5xxl"}:
        return "sd3"
    return "sdxl" if "clip_g" in keys else "sd"


def _width(component: Component) -> int:
    config = component.module.config
    return int(config.d_model if isinstance(component.module, T5Encoder) else config.hidden_size)


def with_embeddings(folder: Folder, embeddings: Sequence[Embedding]) -> Folder:
    """Return the model with the words in its tokenizers and the vectors in its text encoders.

    The parameters stay in their files until they are used. ValueError for a word that is there already.
    """
    components, tokenizers = dict(folder.components), dict(folder.tokenizers)
    for embedding in embeddings:
        for name, vectors in embedding.vectors.items():
            try:
                tokenizers[name], ids = tokenizers[name].with_words({embedding.word: len(vectors)})
            except ValueError as error:
                raise ValueError(f"{embedding.source}: {error}, such as (file, '<my-word>')") from None
            components[name] = with_rows(components[name], ids[embedding.word], vectors)
    return replace(folder, components=components, tokenizers=tokenizers)


def table_of(module: Any) -> str:
    """Return the path of a text encoder's table of token embeddings among its parameters."""
    return T5_TABLE if isinstance(module, T5Encoder) else CLIP_TABLE


def with_rows(component: Component, ids: Sequence[int], vectors: np.ndarray) -> Component:
    """Return a text encoder in whose table the rows `ids` are `vectors`; the table grows where it has to."""
    module, path = component.module, table_of(component.module)
    size = max(module.config.vocab_size, max(ids) + 1)

    def grown(name: str, leaf: Any) -> Any:
        if name != path:
            return leaf
        table = jnp.pad(jnp.asarray(leaf), ((0, size - leaf.shape[0]), (0, 0)))
        return table.at[jnp.asarray(ids)].set(jnp.asarray(vectors, table.dtype))

    def make(transform: Any = None) -> Any:
        then = transform or (lambda _, leaf: leaf)
        return component.map_params(lambda name, leaf: then(name, grown(name, leaf)))

    return Component(module.clone(config=replace(module.config, vocab_size=size)), make)


def save_embedding(path: str | Path, word: str, vectors: Mapping[str, np.ndarray], family: str) -> None:
    """Write a textual inversion that diffusers, A1111 and ComfyUI read. vectors: encoder -> (n, d).

    Of one encoder the key is the word, of several the encoders' own (`KEYS`).
    """
    tensors = {KEYS[family][name][0] or word: np.asarray(array, np.float32) for name, array in vectors.items()}
    save_tensors(path, tensors, {"name": word})
