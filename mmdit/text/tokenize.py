"""The tokenizers of CLIP and T5: load one from a folder, or train one on captions."""

from __future__ import annotations

import copy
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int
from tokenizers import Tokenizer as BackendTokenizer
from tokenizers import models, pre_tokenizers, trainers

# Without PyTorch transformers warns, while it is imported, that its models are missing. Tokenizers do not need them.
_QUIET = "TRANSFORMERS_NO_ADVISORY_WARNINGS"
_before = os.environ.get(_QUIET)
os.environ[_QUIET] = "1"
from transformers import AddedToken, CLIPTokenizer, T5Tokenizer  # noqa: E402
from transformers.utils import is_protobuf_available, is_sentencepiece_available  # noqa: E402

if _before is None:
    del os.environ[_QUIET]
else:
    os.environ[_QUIET] = _before

BOS, EOS = "<|startoftext|>", "<|endoftext|>"
SUFFIX = "</w>"  # ends a word: "cat</w>" is the word, "cat" the beginning of "cats"
_MOST_BYTES = 64 << 20  # of a file
_MOST_TOKENS = 4096  # of a text; a larger model_max_length is transformers' way to say that there is none
PAD, END, UNKNOWN, SENTINEL = "<pad>", "</s>", "<unk>", "<extra_id_0>"  # of T5; SENTINEL replaces a masked token


def _check_sizes(folder: Path) -> None:
    for path in sorted(folder.glob("*")):
        if path.is_file() and path.stat().st_size > _MOST_BYTES:
            raise ValueError(f"{path}: larger than {_MOST_BYTES >> 20} MiB, which no file of a tokenizer is")


def _kind(folder: Path) -> type[CLIPTokenizer] | type[T5Tokenizer]:
    """Return T5's class if the folder has a Unigram model, else CLIP's, whose reader reports missing files."""
    if (folder / "spiece.model").is_file():
        return T5Tokenizer
    try:
        unigram = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]["type"] == "Unigram"
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        unigram = False
    return T5Tokenizer if unigram else CLIPTokenizer


def _check_files(folder: Path, kind: type[CLIPTokenizer] | type[T5Tokenizer]) -> None:
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder; a tokenizer folder was expected")
    if (folder / "tokenizer.json").is_file():
        return
    if kind is T5Tokenizer and not (is_sentencepiece_available() and is_protobuf_available()):
        raise ValueError(
            f"{folder}: spiece.model is read with the packages sentencepiece and protobuf; "
            "install them, or put the model's tokenizer.json beside it"
        )
    if kind is CLIPTokenizer and not all((folder / name).is_file() for name in ("vocab.json", "merges.txt")):
        raise FileNotFoundError(f"{folder}: has neither tokenizer.json nor vocab.json with merges.txt")


@dataclass(frozen=True)
class Tokenizer:
    """The tokenizer of CLIP or T5: texts -> int32 ids (b, length).

    The ids are BOS (CLIP only), the text's tokens truncated to fit, EOS, then padding. A word of several tokens that
    was added to the vocabulary (a textual inversion of several vectors) has them under the names word, word_1, word_2
    as in diffusers, and takes as many places.
    """

    backend: CLIPTokenizer | T5Tokenizer

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Tokenizer:
        """Read a CLIPTokenizer or T5Tokenizer folder of transformers; local files only.

        The folder has tokenizer.json, or its sources: vocab.json with merges.txt for CLIP, spiece.model for T5. Raises
        FileNotFoundError if files are missing, and ValueError if they are not readable or lack a special token.
        """
        path = Path(folder)
        _check_sizes(path)
        kind = _kind(path)
        _check_files(path, kind)
        name = kind.__name__.removesuffix("Tokenizer")
        try:
            backend = kind.from_pretrained(str(path), local_files_only=True)
        except Exception as error:  # tokenizers raises bare Exception on a malformed file
            reason = str(error).splitlines()[0][:300] if str(error) else type(error).__name__
            line = reason if reason.isprintable() else repr(reason)
            raise ValueError(f"{path}: not a readable {name} tokenizer ({line})") from error
        length = backend.model_max_length
        if isinstance(length, bool) or not isinstance(length, (int, float)) or not length >= 2:
            raise ValueError(f"{path}: model_max_length is {length!r:.160}; give the model's number of tokens")
        # transformers appends special tokens that are missing, with ids for which the network has no embedding.
        vocabulary = backend.backend_tokenizer.get_vocab(with_added_tokens=False)
        for token in (backend.eos_token, backend.bos_token if kind is CLIPTokenizer else backend.pad_token):
            if token not in vocabulary:
                raise ValueError(f"{path}: the vocabulary lacks the special token {token!r:.160}")
        if backend.pad_token not in backend.get_vocab():
            raise ValueError(f"{path}: the vocabulary lacks the padding token {backend.pad_token!r:.160}")
        return cls(backend)

    @property
    def class_name(self) -> str:
        """The name of transformers' class, as in a model_index.json."""
        return "T5TokenizerFast" if isinstance(self.backend, T5Tokenizer) else "CLIPTokenizer"

    @property
    def vocab_size(self) -> int:
        """The number of tokens, special tokens included."""
        return len(self.backend)

    @property
    def max_length(self) -> int:
        """The model's number of tokens; 77 for CLIP and 512 for T5 if the folder does not say."""
        length = self.backend.model_max_length
        return int(length) if length <= _MOST_TOKENS else 512 if isinstance(self.backend, T5Tokenizer) else 77

    @property
    def bos_token_id(self) -> int:
        """The id of the token before a text; raises ValueError for T5, which has none."""
        if self.backend.bos_token_id is None:
            raise ValueError("this is a T5 tokenizer: it has no token before a text")
        return int(self.backend.bos_token_id)

    @property
    def eos_token_id(self) -> int:
        """The id of the token after a text."""
        return int(self.backend.eos_token_id)

    @property
    def pad_token_id(self) -> int:
        """The id of the padding."""
        return int(self.backend.pad_token_id)

    @property
    def mask_token_id(self) -> int:
        """The id of the token that replaces a masked token, T5's first sentinel; raises ValueError without one."""
        number = self.backend.backend_tokenizer.token_to_id(SENTINEL)
        if number is None:
            raise ValueError(f"this tokenizer has no {SENTINEL}; use a T5 tokenizer")
        return int(number)

    @cached_property
    def runs(self) -> Mapping[int, tuple[int, ...]]:
        """The ids of added words of several tokens, by the id of the first."""
        added = self.backend.get_added_vocab()
        found = {}
        for word, first in added.items():
            run = [first]
            while (number := added.get(f"{word}_{len(run)}")) is not None:
                run.append(number)
            if len(run) > 1:
                found[int(first)] = tuple(map(int, run))
        return found

    def with_words(self, words: Mapping[str, int]) -> tuple[Tokenizer, dict[str, list[int]]]:
        """Return the tokenizer with new words of some number of tokens each, and the ids of those tokens.

        ValueError for a word that is in the vocabulary already, or that a tokenizer cannot find in a text.
        """
        backend = copy.deepcopy(self.backend)
        ids: dict[str, list[int]] = {}
        for word, count in words.items():
            if not word or not word.isprintable() or re.search(r"\s", word):
                raise ValueError(f"the word {word!r:.80} for an embedding: give one word without spaces")
            tokens = [word, *(f"{word}_{i}" for i in range(1, count))]
            vocabulary = backend.get_vocab()
            known = next((token for token in tokens if token in vocabulary or token + SUFFIX in vocabulary), None)
            if known is not None:
                raise ValueError(f"the word {word!r:.80} for an embedding is in the vocabulary: give another")
            # A word of letters must stand alone: "art" is not meant in "party".
            alone = re.fullmatch(r"\w+", word) is not None
            backend.add_tokens([AddedToken(token, single_word=alone, normalized=True) for token in tokens])
            vocabulary = backend.get_vocab()
            ids[word] = [int(vocabulary[token]) for token in tokens]
        return Tokenizer(backend), ids

    def pieces(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text alone, of any length, without begin, end and padding."""
        if not texts:
            return []
        encoded = self.backend(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
        runs = self.runs
        return [[part for i in ids for part in runs.get(i, (i,))] for ids in encoded]

    @property
    def begin(self) -> list[int]:
        """The ids before a text: BOS for CLIP, none for T5."""
        return [] if self.backend.bos_token_id is None else [self.bos_token_id]

    def wrap(self, ids: Sequence[int], length: int) -> list[int]:
        """Return the ids of a text with begin and end, truncated and padded to `length`."""
        kept = [*self.begin, *ids[: length - 1 - len(self.begin)], self.eos_token_id]
        return kept + [self.pad_token_id] * (length - len(kept))

    def __call__(self, texts: str | Sequence[str], length: int | None = None) -> Int[np.ndarray, "b l"]:
        """Return the ids of one text or several, padded and truncated to `length`, by default `max_length`.

        Raises ValueError for a length below 2.
        """
        length = self.max_length if length is None else length
        if length < 2:
            raise ValueError(f"length={length} leaves no room for the begin and end tokens; give at least 2")
        batch = [texts] if isinstance(texts, str) else list(texts)
        if not batch:
            return np.zeros((0, length), np.int32)
        if self.runs:
            return np.asarray([self.wrap(ids, length) for ids in self.pieces(batch)], np.int32)
        encoded = self.backend(batch, padding="max_length", truncation=True, max_length=length)
        return np.asarray(encoded["input_ids"], np.int32)

    def decode(self, ids: Sequence[int] | Int[np.ndarray, " l"]) -> str:
        """Return the text of these ids without special tokens; the case and the spacing of the original are lost."""
        return str(self.backend.decode([int(i) for i in ids], skip_special_tokens=True))

    def save(self, folder: str | os.PathLike[str]) -> Tokenizer:
        """Write a folder that transformers loads, and return the tokenizer that is read back from it.

        For CLIP it has vocab.json and merges.txt too, for older readers.
        """
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        fast = self.backend.backend_tokenizer
        fast.no_padding()  # else the last call's settings, and below the loading options, would be written too
        fast.no_truncation()
        for key in ("is_local", "local_files_only"):
            self.backend.init_kwargs.pop(key, None)
        self.backend.save_pretrained(str(path))
        if isinstance(self.backend, CLIPTokenizer):
            # transformers 5 writes tokenizer.json only; older programs, and people, read the pair.
            model = json.loads(fast.to_str())["model"]
            lines = ["#version: 0.2", *(" ".join(pair) for pair in model["merges"])]
            (path / "vocab.json").write_text(json.dumps(model["vocab"], ensure_ascii=False), encoding="utf-8")
            (path / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
        return Tokenizer.load(path)


def train_tokenizer(
    captions: Iterable[str], vocab_size: int, folder: str | os.PathLike[str], max_length: int = 77
) -> Tokenizer:
    """Train a byte-pair encoding (Sennrich et al. 2016) in CLIP's format and write a CLIPTokenizer folder.

    The vocabulary has OpenAI's order: 256 byte symbols, the same at the end of a word, the merges, BOS, EOS. It has all
    bytes, so every Unicode text has ids. Too few captions for `vocab_size` give a smaller vocabulary: use
    `Tokenizer.vocab_size` for the network. Raises ValueError if `vocab_size` is less than the byte symbols need.
    """
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    symbols = letters + [letter + SUFFIX for letter in letters]
    if vocab_size < len(symbols) + 2:
        raise ValueError(
            f"vocab_size={vocab_size} is too small: the byte alphabet with BOS and EOS needs {len(symbols) + 2}"
        )
    splitter = CLIPTokenizer(vocab={BOS: 0, EOS: 1}, merges=[]).backend_tokenizer
    learner = BackendTokenizer(models.BPE(end_of_word_suffix=SUFFIX, continuing_subword_prefix=""))
    learner.normalizer, learner.pre_tokenizer = splitter.normalizer, splitter.pre_tokenizer
    # The trainer breaks ties by id and numbers unlisted symbols in hash order: listing all makes it deterministic.
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 2, special_tokens=symbols, end_of_word_suffix=SUFFIX, show_progress=False
    )
    learner.train_from_iterator(captions, trainer)
    merges: Any = [tuple(pair) for pair in json.loads(learner.to_str())["model"]["merges"]]

    words = [*symbols, *dict.fromkeys(a + b for a, b in merges), BOS, EOS]
    vocabulary = {word: i for i, word in enumerate(words)}
    return Tokenizer(CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=max_length)).save(folder)


def train_unigram(
    captions: Iterable[str], vocab_size: int, folder: str | os.PathLike[str], max_length: int = 512
) -> Tokenizer:
    """Train a unigram language model over pieces (Kudo 2018, arXiv:1804.10959) and write a T5Tokenizer folder.

    The ids are as in T5: padding 0, end 1, unknown 2, the pieces from the most to the least likely, and one sentinel at
    the end. Letters that are in no caption are unknown. Too few captions for `vocab_size` give a smaller vocabulary.
    """
    special = [PAD, END, UNKNOWN]
    learner = BackendTokenizer(models.Unigram())
    learner.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
    trainer = trainers.UnigramTrainer(
        vocab_size=vocab_size - 1, special_tokens=special, unk_token=UNKNOWN, show_progress=False
    )
    learner.train_from_iterator(captions, trainer)
    learnt = json.loads(learner.to_str())["model"]["vocab"][len(special) :]
    # The trainer's threads add numbers in any order: with rounding the same captions always give the same vocabulary.
    pieces = sorted(((piece, round(score, 5)) for piece, score in learnt), key=lambda pair: (-pair[1], pair[0]))
    vocabulary = [*((token, 0.0) for token in special), *pieces, (SENTINEL, 0.0)]
    return Tokenizer(T5Tokenizer(vocab=vocabulary, extra_ids=1, model_max_length=max_length)).save(folder)
