"""Laws of the T5 encoder, and its tokenizer."""

from __future__ import annotations

import dataclasses
import importlib
import itertools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from transformers import T5Tokenizer

from mmdit.rules import RULES_T5
from mmdit.text.t5 import DenseReluDense, T5Encoder, relative_buckets
from mmdit.text.t5_config import T5_XXL, T5Config
from mmdit.text.tokenize import Tokenizer, train_tokenizer, train_unigram

SMALL = T5Config(
    vocab_size=64,
    d_model=16,
    d_kv=6,
    d_ff=24,
    num_layers=2,
    num_heads=2,
    relative_attention_num_buckets=8,
    relative_attention_max_distance=6,
    feed_forward_proj="gated-gelu",
)
IDS = jnp.asarray([[5, 9, 11, 40, 33, 2, 1, 0], [30, 7, 1, 0, 0, 0, 0, 0]])
COUNTS = np.arange(8) < np.asarray([[7], [3]])


@pytest.fixture(scope="module")
def params(random_params):
    return random_params(T5Encoder(SMALL).init, IDS)["params"]


apply = jax.jit(T5Encoder(SMALL).apply)


@pytest.fixture(scope="module")
def encode(params):
    """(ids, mask) -> states; compiled once with a mask, once without."""
    return lambda ids, mask=None: apply({"params": params}, ids, mask)


def unroll(params):
    """encoder/block/... -> encoder/block_i/..."""
    encoder = dict(params["encoder"])
    stacked = encoder.pop("block")
    blocks = {f"block_{i}": jax.tree.map(lambda x, i=i: x[i], stacked) for i in range(SMALL.num_layers)}
    return {**params, "encoder": encoder | blocks}


def close(a, b, tolerance=1e-5):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    assert np.linalg.norm(a - b) <= tolerance * np.linalg.norm(b)


@pytest.mark.parametrize(("num_buckets", "max_distance"), [(32, 128), (8, 6), (4, 2), (18, 50)])
def test_buckets_are_the_geometric_ones_counted_in_integers(num_buckets, max_distance):
    """Beyond e exact ones, bucket e + k begins where (n / e)^far >= (max / e)^k: no logarithm, no rounding."""
    half = num_buckets // 2
    exact, far = half // 2, half - half // 2
    length = max_distance + 40

    def bucket(offset):
        n = abs(offset)
        if n >= exact:
            reached = (k for k in range(far) if n**far * exact**k >= max_distance**k * exact**far)
            n = exact + max(reached)
        return n + (half if offset > 0 else 0)

    ours = relative_buckets(length, num_buckets, max_distance)
    assert ours.shape == (length, length)
    for i in (0, length // 3, length - 1):
        assert ours[i].tolist() == [bucket(j - i) for j in range(length)]
    assert set(np.unique(ours)) == set(range(num_buckets)) - {half}, "a key after the query is at least one away"


def test_what_is_masked_changes_nothing(encode):
    mask = jnp.asarray(COUNTS)
    states = encode(IDS, mask)
    np.testing.assert_array_equal(encode(jnp.where(mask, IDS, 17), mask)[COUNTS], states[COUNTS])
    unmasked = encode(IDS)
    close(encode(IDS, jnp.ones_like(mask)), unmasked)
    assert jnp.abs(encode(jnp.where(mask, IDS, 17)) - unmasked)[COUNTS].max() > 1e-3, "padding counts without a mask"


def test_masked_padding_on_either_side_is_no_padding_at_all(encode, params):
    """Only distances enter, so a text may also be moved."""
    alone = apply({"params": params}, IDS[1:, :3])
    moved = jnp.roll(IDS, 4, axis=1)
    close(encode(IDS, jnp.asarray(COUNTS))[1, :3], alone[0])
    close(encode(moved, jnp.asarray(np.roll(COUNTS, 4, axis=1)))[1, 4:7], alone[0])


def test_the_order_of_tokens_matters(encode, params):
    """Through the position bias alone: without it the encoder permutes with its tokens."""
    swapped = IDS[:, ::-1]
    assert jnp.abs(encode(swapped)[:, ::-1] - encode(IDS)).max() > 1e-2
    flat = {**params, "encoder": params["encoder"] | {"relative_attention_bias": {"embedding": jnp.zeros((8, 2))}}}
    apply = jax.jit(T5Encoder(SMALL).apply)
    close(apply({"params": flat}, swapped)[:, ::-1], apply({"params": flat}, IDS))


@pytest.mark.parametrize("kind", ["gated-gelu", "relu"])
def test_scanned_equals_unrolled(random_params, kind):
    config = dataclasses.replace(SMALL, feed_forward_proj=kind)
    scanned = T5Encoder(config, scan=True)
    params = random_params(scanned.init, IDS)["params"]
    stacked = jax.jit(scanned.apply)({"params": params}, IDS)
    listed = T5Encoder(config, remat=True)
    like = jax.eval_shape(listed.init, jax.random.key(0), IDS)["params"]
    assert jax.tree.map(jnp.shape, unroll(params)) == jax.tree.map(jnp.shape, like)
    close(jax.jit(listed.apply)({"params": unroll(params)}, IDS), stacked)


def test_recomputation_changes_no_gradient(params):
    def gradient(remat):
        module = T5Encoder(SMALL, remat=remat)
        return jax.jit(jax.grad(lambda p: jnp.sum(module.apply({"params": p}, IDS) ** 3)))(params)

    def same(a, b):
        np.testing.assert_allclose(a, b, atol=1e-4 * np.abs(b).max())

    jax.tree.map(same, gradient(True), gradient(False))


def test_half_precision_stays_near_float32(encode, params):
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    out = jax.jit(T5Encoder(SMALL, dtype=jnp.bfloat16).apply)({"params": half}, IDS)
    assert out.dtype == jnp.bfloat16
    close(out, encode(IDS), 0.05)


def test_float16_survives_sums_beyond_its_range(params):
    """The feed-forward layers of T5-XXL answer with values above 65504."""
    factors = {"wi_1": 100, "wo": 1e4}
    flat = traverse_util.flatten_dict(params)
    large = traverse_util.unflatten_dict({p: factors.get(p[-2], 1) * np.asarray(leaf) for p, leaf in flat.items()})
    exact = apply({"params": large}, IDS, None)
    half = jax.tree.map(lambda x: x.astype(np.float16), large)
    out = jax.jit(T5Encoder(SMALL, dtype=jnp.float16).apply)({"params": half}, IDS)
    assert out.dtype == jnp.float16
    close(out, exact, 0.02)
    module = DenseReluDense(dataclasses.replace(SMALL, feed_forward_proj="relu"), dtype=jnp.float16)
    kernels = {"wi": jnp.ones((16, 24)), "wo": jnp.full((24, 16), 300.0)}
    wide = module.apply({"params": {name: {"kernel": leaf} for name, leaf in kernels.items()}}, jnp.ones((1, 1, 16)))
    np.testing.assert_array_equal(wide, 24 * 16 * 300.0)  # 115200


def test_xxl_has_the_published_size():
    shapes = jax.eval_shape(T5Encoder(T5_XXL).init, jax.random.key(0), jnp.zeros((1, 77), jnp.int32))
    assert sum(x.size for x in jax.tree.leaves(shapes)) == 4_762_310_656


def test_configuration_survives_a_round_trip():
    assert T5Config.from_dict(SMALL.to_dict() | {"dropout_rate": 0.1, "num_decoder_layers": 2}) == SMALL
    derived = {"dense_act_fn": "gelu_new", "is_gated_act": True, "is_decoder": False, "use_cache": None}
    assert T5Config.from_dict(T5_XXL.to_dict() | derived) == T5_XXL


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"feed_forward_proj": "gated-silu"}, "gated-silu"),
        ({"model_type": "umt5"}, "umt5"),
        ({"dense_act_fn": "relu"}, "dense_act_fn='relu'"),
        ({"is_decoder": True}, "is_decoder"),
        ({"num_heads": 0}, "num_heads=0"),
        pytest.param({"d_model": "16"}, "d_model='16'", marks=pytest.mark.wrong_types),
        ({"relative_attention_max_distance": 2}, "relative_attention_max_distance=2"),
        ({"relative_attention_num_buckets": 3}, "relative_attention_num_buckets=3"),
    ],
)
def test_an_unsupported_configuration_is_one_clear_line(change, words):
    with pytest.raises(ValueError, match=re.escape(words)) as error:
        T5Config.from_dict(SMALL.to_dict() | change, source="somewhere/config.json")
    assert str(error.value).startswith("somewhere/config.json")
    assert "\n" not in str(error.value)


@pytest.mark.wrong_types
def test_a_mask_must_fit_the_ids(params):
    with pytest.raises(ValueError, match=r"\(2, 7\)"):
        T5Encoder(SMALL).apply({"params": params}, IDS, jnp.ones((2, 7), bool))


def test_rules_name_the_layers():
    names = {
        "encoder/block/layer_1/DenseReluDense/wi_0/kernel": "encoder.block.*.layer.1.DenseReluDense/wi_0/kernel",
        "encoder/block_11/layer_0/layer_norm/scale": "encoder/block.11.layer.0.layer_norm/scale",
        "encoder/final_layer_norm/scale": "encoder/final_layer_norm/scale",
    }
    for path, name in names.items():
        for pattern, replacement in RULES_T5:
            path = re.sub(pattern, replacement, path)
        assert path == name


# The tokenizer.
WORDS = ["cat", "cats", "dog", "red", "flag", "smiling", "heart", "hands", "the", "of", "with"]
RNG = np.random.default_rng(0)
CAPTIONS = [" ".join(RNG.choice(WORDS, RNG.integers(1, 7))) for _ in range(300)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A Unigram vocabulary learnt from the captions, laid out and saved as T5's."""
    path = tmp_path_factory.mktemp("t5")
    train_unigram(CAPTIONS, 60, path)
    return path


def test_the_same_captions_give_the_same_vocabulary(folder, tmp_path):
    assert train_unigram(CAPTIONS, 60, tmp_path).vocab_size <= 60
    for file in folder.iterdir():
        assert (tmp_path / file.name).read_text(encoding="utf-8") == file.read_text(encoding="utf-8")


def test_the_sentinel_is_the_last_piece_and_a_clip_has_none(folder, tmp_path):
    tokenizer = Tokenizer.load(folder)
    assert tokenizer.mask_token_id == tokenizer.vocab_size - 1
    with pytest.raises(ValueError, match="has no <extra_id_0>"):
        _ = train_tokenizer(CAPTIONS, 600, tmp_path).mask_token_id


def test_ids_are_the_likeliest_pieces_then_the_end_then_zeros(folder):
    """Kudo 2018, equation 1: of all segmentations, the one with the largest sum of log-probabilities."""
    pieces = dict(map(tuple, json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]))
    number = {piece: i for i, piece in enumerate(pieces)}

    def segment(word):
        best = {0: (0.0, ())}
        for end in range(1, len(word) + 1):
            starts = [s for s in best if word[s:end] in pieces]
            options = [(best[s][0] + pieces[word[s:end]], (*best[s][1], number[word[s:end]])) for s in starts]
            if options:
                best[end] = max(options)
        return best[len(word)]

    tokenizer = Tokenizer.load(folder)
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.max_length) == (0, 1, 512)
    texts = [*CAPTIONS[:50], "", "  cat \n dog ", "catdog handshand"]
    for length in (77, 6):
        ids = tokenizer(texts, length)
        assert ids.shape == (len(texts), length)
        assert ids.dtype == np.int32
        for text, row in zip(texts, ids, strict=True):
            parts = [segment("▁" + word) for word in text.split()]
            total = sum(part[0] for part in parts)
            cut = list(itertools.chain(*(part[1] for part in parts)))[: length - 1]
            found = row[: list(row).index(1)].tolist()
            assert len(found) == len(cut)
            assert row.tolist() == [*found, 1, *[0] * (length - len(found) - 1)]
            if length == 77:  # ties may be broken either way
                scores = list(pieces.values())
                assert sum(scores[i] for i in found) == pytest.approx(total, abs=1e-4), text
    assert tokenizer.decode(tokenizer("the  red cats", 77)[0]) == "the red cats"
    assert 2 in tokenizer("cat ☃")[0], "what no piece spells is unknown"


def test_it_is_transformers_tokenizer_saved_and_loaded_again(folder, tmp_path):
    texts = [*CAPTIONS[:20], "", "snow ☃ man", "</s> inside", "a\tb"]
    tokenizer = Tokenizer.load(folder)
    theirs = T5Tokenizer.from_pretrained(str(folder))
    for length in (77, 256, 512):
        want = theirs(texts, padding="max_length", truncation=True, max_length=length)["input_ids"]
        np.testing.assert_array_equal(tokenizer(texts, length), want)
    again = tokenizer.save(tmp_path)
    assert not (tmp_path / "merges.txt").exists()
    np.testing.assert_array_equal(again(texts), tokenizer(texts))
    assert again.max_length == 512
    want = T5Tokenizer.from_pretrained(str(tmp_path))(texts, padding="max_length", max_length=512)["input_ids"]
    np.testing.assert_array_equal(again(texts), want)
    assert tokenizer([], 9).shape == (0, 9)


def test_spiece_model_alone_is_read_where_its_packages_are(folder, tmp_path, monkeypatch):
    pb2 = pytest.importorskip("transformers.utils.sentencepiece_model_pb2_new")
    vocabulary = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
    proto = pb2.ModelProto()
    proto.trainer_spec.unk_id = 2
    for i, (piece, score) in enumerate(vocabulary):
        proto.pieces.add(piece=piece, score=score, type=(3, 3, 2)[i] if i < 3 else 1)
    (tmp_path / "spiece.model").write_bytes(proto.SerializeToString())
    monkeypatch.setattr("mmdit.text.tokenize.is_sentencepiece_available", lambda: False)
    with pytest.raises(ValueError, match=r"sentencepiece.*tokenizer\.json") as error:
        Tokenizer.load(tmp_path)
    assert "\n" not in str(error.value)
    # transformers asks for the package but reads the file by protobuf alone.
    monkeypatch.setattr("mmdit.text.tokenize.is_sentencepiece_available", lambda: True)
    converter = importlib.import_module("transformers.convert_slow_tokenizer")
    monkeypatch.setattr(converter, "requires_backends", lambda *_: None)
    np.testing.assert_array_equal(Tokenizer.load(tmp_path)(CAPTIONS), Tokenizer.load(folder)(CAPTIONS))


def test_a_broken_t5_folder_and_a_token_it_has_not_are_one_clear_line(folder, tmp_path):
    values = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    (tmp_path / "tokenizer.json").write_text(json.dumps(values | {"model": {"type": "Unigram", "vocab": [["a", 0.0]]}}))
    with pytest.raises(ValueError, match=r"T5 tokenizer|special token") as error:
        Tokenizer.load(tmp_path)
    assert "\n" not in str(error.value)
    assert str(tmp_path) in str(error.value)
    with pytest.raises(ValueError, match="before a text"):
        _ = Tokenizer.load(folder).bos_token_id
