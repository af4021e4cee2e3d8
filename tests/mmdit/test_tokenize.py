"""Tokenizers: trained here, read by transformers, equal to a byte-pair encoder written out."""

from __future__ import annotations

import itertools
import json
import shutil
import unicodedata

import numpy as np
import pytest
import regex
from transformers import CLIPTokenizer

from mmdit.text.tokenize import BOS, EOS, Tokenizer, train_tokenizer

WORDS = ["cat", "cats", "dog", "red", "blue", "flag", "face", "smiling", "heart", "hand", "the", "a", "of", "with"]
RNG = np.random.default_rng(0)
CAPTIONS = [" ".join(RNG.choice(WORDS, RNG.integers(1, 7))) for _ in range(300)]
ODD = [
    "",
    " ",
    "A Photo OF a CAT.",
    "it's the dog's 2nd flag!!",
    "flag: Côte d’Ivoire",
    "flag: Cote d'Ivoire",
    "日本語の文",
    "مرحبا",
    "😀👩‍🚀 heart",
    "e\u0301 and é",
    "tab\tand\nnewline",
    "\x00\x7f",
    "\u200d\ufffd",
    "x" * 300,
    "naïve ÀÉÎ ß İ",
    "1234 56.7",
    "<|endoftext|> inside",
    "\U0010ffff",
]
LENGTH = 24


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(CAPTIONS, 600, path, LENGTH)
    return path


@pytest.fixture(scope="module")
def tokenizer(folder):
    return Tokenizer.load(folder)


def test_ids_are_transformers_ids_and_survive_each_form_of_the_folder(folder, tokenizer, tmp_path):
    texts = CAPTIONS + ODD
    ids = tokenizer(texts)
    assert ids.shape == (len(texts), LENGTH)
    assert ids.dtype == np.int32
    theirs = CLIPTokenizer.from_pretrained(str(folder))(texts, padding="max_length", truncation=True)["input_ids"]
    np.testing.assert_array_equal(ids, theirs)
    for names in (("tokenizer.json",), ("vocab.json", "merges.txt")):
        other = tmp_path / names[0]
        other.mkdir()
        for name in (*names, "tokenizer_config.json"):
            shutil.copy(folder / name, other / name)
        np.testing.assert_array_equal(Tokenizer.load(other)(texts), ids)


def test_ids_are_those_of_a_byte_pair_encoder_written_out(folder, tokenizer):
    """Sennrich et al. 2016, algorithm 1 applied: merge the pair learnt first until none is left."""
    vocabulary = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    lines = (folder / "merges.txt").read_text(encoding="utf-8").splitlines()[1:]
    ranks = {tuple(line.split(" ")): i for i, line in enumerate(lines)}
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = {b: chr(b) for b in printable} | {
        b: chr(256 + i) for i, b in enumerate(sorted(set(range(256)) - set(printable)))
    }

    def encode(word):
        parts = [letters[b] for b in word.encode()]
        parts[-1] += "</w>"
        while len(parts) > 1:
            best = min(itertools.pairwise(parts), key=lambda pair: ranks.get(pair, 1 << 30))
            if best not in ranks:
                break
            i = next(i for i in range(len(parts)) if tuple(parts[i : i + 2]) == best)
            parts[i : i + 2] = ["".join(best)]
        return [vocabulary[part] for part in parts]

    pattern = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+")
    texts = [t for t in CAPTIONS + ODD if EOS not in t and "İ" not in t]  # Python and Rust lower İ differently
    for text, row in zip(texts, tokenizer(texts), strict=True):
        words = pattern.findall(unicodedata.normalize("NFC", text).lower())
        ids = [vocabulary[BOS], *[i for word in words for i in encode(word)][: LENGTH - 2], vocabulary[EOS]]
        assert row.tolist() == ids + [vocabulary[EOS]] * (LENGTH - len(ids)), text


def test_every_text_begins_ends_and_is_padded(tokenizer):
    ids = tokenizer([*CAPTIONS, *(t for t in ODD if EOS not in t)], 10)
    assert (ids[:, 0] == tokenizer.bos_token_id).all()
    assert (ids[:, -1] == tokenizer.eos_token_id).all()
    inside = ids[:, 1:-1]
    ends = inside == tokenizer.eos_token_id
    assert (np.diff(ends.astype(int), axis=1) >= 0).all(), "nothing but padding follows the first end: no unknown token"
    np.testing.assert_array_equal(tokenizer("")[0, 1:], [tokenizer.pad_token_id] * (LENGTH - 1))
    np.testing.assert_array_equal(tokenizer("the red cat", 4)[0], [*tokenizer("the red cat")[0, :3], ids[0, -1]])


def test_the_vocabulary_is_laid_out_as_openais(folder, tokenizer):
    vocabulary = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    assert sorted(vocabulary.values()) == list(range(tokenizer.vocab_size))
    assert tokenizer.vocab_size <= 600
    assert (vocabulary["!"], vocabulary["a"], vocabulary["!</w>"]) == (0, 64, 256)  # as in CLIP's own
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (tokenizer.vocab_size - 2, tokenizer.vocab_size - 1)
    assert "cat</w>" in vocabulary
    assert tokenizer.max_length == LENGTH


def test_training_is_deterministic_and_text_comes_back(folder, tokenizer, tmp_path):
    train_tokenizer(iter(CAPTIONS), 600, tmp_path, LENGTH)
    for name in ("vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json"):
        assert (folder / name).read_bytes() == (tmp_path / name).read_bytes()
    assert tokenizer.decode(tokenizer("The Red cat, smiling")[0]) == "the red cat , smiling"


def test_a_saved_tokenizer_is_the_same_folder_whatever_it_was_used_for(folder, tokenizer, tmp_path):
    tokenizer(CAPTIONS, 7)
    tokenizer.save(tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {p.name: p.read_bytes() for p in folder.iterdir()}


def test_empty_batches_and_bad_sizes(tokenizer, tmp_path):
    assert tokenizer([], 5).shape == (0, 5)
    with pytest.raises(ValueError, match="length=1"):
        tokenizer("cat", 1)
    with pytest.raises(ValueError, match="vocab_size=500"):
        train_tokenizer(CAPTIONS, 500, tmp_path)


def test_a_missing_or_broken_folder_is_one_clear_line(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="no such folder"):
        Tokenizer.load(tmp_path / "absent")
    with pytest.raises(FileNotFoundError, match=r"neither tokenizer\.json"):
        Tokenizer.load(tmp_path)
    (tmp_path / "vocab.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match=r"merges\.txt"):
        Tokenizer.load(tmp_path)
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    broken = {"vocab.json": "{ not json", "tokenizer.json": "{}", "tokenizer_config.json": "["}
    for name, text in broken.items():
        other = tmp_path / name.replace(".", "_")
        shutil.copytree(folder, other)
        (other / name).write_text(text)
        if name == "vocab.json":
            (other / "tokenizer.json").unlink()
        with pytest.raises(ValueError, match="not a readable CLIP tokenizer") as error:
            Tokenizer.load(other)
        assert "\n" not in str(error.value)
        assert str(other) in str(error.value)
    with pytest.raises(ValueError, match="special token"):
        Tokenizer.load(tmp_path)
