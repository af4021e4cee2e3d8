"""CLIP tokenizers: load one from a folder, or train one on captions."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int
from tokenizers import Tokenizer as BackendTokenizer
from tokenizers import models, pre_tokenizers, trainers
from transformers import CLIPTokenizer

BOS, EOS = "<|startoftext|>", "<|endoftext|>"
SUFFIX = "</w>"  # closes a word: "cat</w>" is the word, "cat" the beginning of "cats"


@dataclass(frozen=True)
class Tokenizer:
    """Texts -> (b, length) int32 ids: BOS, the text's tokens cut to fit, EOS, then padding."""

    backend: CLIPTokenizer

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Tokenizer:
        """A transformers CLIPTokenizer folder: tokenizer.json, or vocab.json and merges.txt. Reads local files only."""
        path = Path(folder)
        if not path.is_dir():
            raise FileNotFoundError(f"{path}: no such folder; a CLIP tokenizer folder was expected")
        pair = [path / "vocab.json", path / "merges.txt"]
        if not (path / "tokenizer.json").is_file() and not all(p.is_file() for p in pair):
            raise FileNotFoundError(f"{path}: holds neither tokenizer.json nor vocab.json with merges.txt")
        try:
            backend = CLIPTokenizer.from_pretrained(str(path), local_files_only=True)
        except Exception as error:  # tokenizers raises bare Exception on a malformed file
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ValueError(f"{path}: not a readable CLIP tokenizer ({reason})") from error
        # transformers appends special tokens it does not find, with ids that the network has no embedding for.
        vocabulary = backend.backend_tokenizer.get_vocab(with_added_tokens=False)
        for token in (backend.bos_token, backend.eos_token):
            if token not in vocabulary:
                raise ValueError(f"{path}: the vocabulary lacks the special token {token!r}")
        return cls(backend)

    @property
    def vocab_size(self) -> int:
        return len(self.backend)

    @property
    def max_length(self) -> int:
        """The model's length, 77 for CLIP where the folder does not say."""
        length = self.backend.model_max_length
        return int(length) if length < 1_000_000 else 77

    @property
    def bos_token_id(self) -> int:
        return int(self.backend.bos_token_id)

    @property
    def eos_token_id(self) -> int:
        return int(self.backend.eos_token_id)

    @property
    def pad_token_id(self) -> int:
        return int(self.backend.pad_token_id)

    def __call__(self, texts: str | Sequence[str], length: int | None = None) -> Int[np.ndarray, "b l"]:
        length = self.max_length if length is None else length
        if length < 2:
            raise ValueError(f"length={length} leaves no room for the begin and end tokens; give at least 2")
        batch = [texts] if isinstance(texts, str) else list(texts)
        if not batch:
            return np.zeros((0, length), np.int32)
        encoded = self.backend(batch, padding="max_length", truncation=True, max_length=length)
        return np.asarray(encoded["input_ids"], np.int32)

    def decode(self, ids: Sequence[int] | Int[np.ndarray, " l"]) -> str:
        """The text without special tokens; the case and the spacing of the original are lost."""
        return str(self.backend.decode([int(i) for i in ids], skip_special_tokens=True))

    def save(self, folder: str | os.PathLike[str]) -> Tokenizer:
        """A folder that transformers and older readers of vocab.json with merges.txt take; read back from there."""
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        fast = self.backend.backend_tokenizer
        fast.no_padding()  # the last call's settings, and below how it was loaded, would be written along
        fast.no_truncation()
        for key in ("is_local", "local_files_only"):
            self.backend.init_kwargs.pop(key, None)
        self.backend.save_pretrained(str(path))
        # transformers 5 writes tokenizer.json only; older readers, and people, want the pair.
        model = json.loads(fast.to_str())["model"]
        lines = ["#version: 0.2", *(" ".join(pair) for pair in model["merges"])]
        (path / "vocab.json").write_text(json.dumps(model["vocab"], ensure_ascii=False), encoding="utf-8")
        (path / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
        return Tokenizer.load(path)


def train_tokenizer(
    captions: Iterable[str], vocab_size: int, folder: str | os.PathLike[str], max_length: int = 77
) -> Tokenizer:
    """Byte-pair encoding (Sennrich et al. 2016) in CLIP's format, written as a CLIPTokenizer folder.

    The vocabulary is laid out as OpenAI's: 256 byte symbols, the same closing a word, the merges, BOS, EOS. All bytes
    are in it, so every Unicode text has ids. Fewer captions than `vocab_size` needs give a smaller vocabulary:
    take `Tokenizer.vocab_size` for the network.
    """
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    symbols = letters + [letter + SUFFIX for letter in letters]
    if vocab_size < len(symbols) + 2:
        raise ValueError(f"vocab_size={vocab_size} is below the {len(symbols) + 2} of the byte alphabet and BOS, EOS")
    splitter = CLIPTokenizer(vocab={BOS: 0, EOS: 1}, merges=[]).backend_tokenizer
    learner = BackendTokenizer(models.BPE(end_of_word_suffix=SUFFIX, continuing_subword_prefix=""))
    learner.normalizer, learner.pre_tokenizer = splitter.normalizer, splitter.pre_tokenizer
    # The trainer breaks ties by id and numbers unknown symbols in hash order: naming them all makes it deterministic.
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 2, special_tokens=symbols, end_of_word_suffix=SUFFIX, show_progress=False
    )
    learner.train_from_iterator(captions, trainer)
    merges: Any = [tuple(pair) for pair in json.loads(learner.to_str())["model"]["merges"]]

    words = [*symbols, *dict.fromkeys(a + b for a, b in merges), BOS, EOS]
    vocabulary = {word: i for i, word in enumerate(words)}
    return Tokenizer(CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=max_length)).save(folder)
