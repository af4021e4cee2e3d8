"""Weights and long prompts against their formulas, written out here in numpy, on random encoders of each family."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lcm_jax.models.prompt_chunks import Chunks, count_of, downweights, join, tokens_in_chunks
from lcm_jax.models.prompt_syntax import parse
from lcm_jax.models.text_conditioning import Prompts
from mmdit.text import CLIPTextConfig, CLIPTextModel, T5Config, T5Encoder, Tokenizer, train_tokenizer, train_unigram

CAPTIONS = ["red heart", "yellow heart", "woman farmer, medium skin tone", "flag of france", "dog face", "cat face"]
LENGTH, ROOM, T5_TOKENS, WIDTH = 12, 10, 14, 24


@dataclass(frozen=True)
class Model:
    prompts: Prompts
    params: dict[str, Any]

    def states(self, name: str, ids: Any, mask: Any = None) -> tuple[np.ndarray, np.ndarray | None]:
        """The states and the projected embedding of one encoder, as the family takes them."""
        module, ids = self.prompts.modules[name], jnp.asarray(ids, jnp.int32)
        mask = None if mask is None else jnp.asarray(mask)
        if isinstance(module, T5Encoder):
            return np.asarray(module.apply({"params": self.params[name]}, ids, mask)), None
        last = self.prompts.family == "sd"
        module = module.clone(hidden_layer=-1 if last else -2, final_norm=last)
        out = module.apply({"params": self.params[name]}, ids, mask)
        return np.asarray(out.hidden), None if out.text_embeds is None else np.asarray(out.text_embeds)


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    """CLIP-L's, which pads with the end; bigG's, which pads with 0 and here splits words more; T5's."""
    folder = tmp_path_factory.mktemp("tokenizers")
    first = train_tokenizer(CAPTIONS, 600, folder / "1", LENGTH)
    second = copy.deepcopy(train_tokenizer(CAPTIONS[:2], 530, folder / "2", LENGTH).backend)
    second.pad_token = "!"
    assert second.pad_token_id == 0
    third = train_unigram(CAPTIONS, 60, folder / "3", 32)
    return {"text_encoder": first, "text_encoder_2": Tokenizer(second), "text_encoder_3": third}


@pytest.fixture(scope="module")
def models(tokenizers: dict[str, Tokenizer]) -> Callable[[str], Model]:
    made: dict[str, Model] = {}

    def make(family: str) -> Model:
        if family not in made:
            names = {"sd": ["text_encoder"], "sd2": ["text_encoder_2"], "sdxl": ["text_encoder", "text_encoder_2"]}
            modules, params = {}, {}
            for i, name in enumerate(names.get(family, list(tokenizers))):
                ids = jnp.zeros((1, 4), jnp.int32)
                if name == "text_encoder_3":
                    sizes = dict(vocab_size=60, d_model=WIDTH, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
                    module: Any = T5Encoder(T5Config(**sizes))
                else:
                    eos = tokenizers[name].eos_token_id if name == "text_encoder_2" else 2  # as old configs say
                    sizes = dict(hidden_size=8 + 4 * i, intermediate_size=16, num_hidden_layers=2, projection_dim=6)
                    sizes |= dict(num_attention_heads=2, max_position_embeddings=LENGTH, eos_token_id=eos)
                    module = CLIPTextModel(
                        CLIPTextConfig(vocab_size=600, **sizes), projection=family not in ("sd", "sd2")
                    )
                shapes = jax.eval_shape(module.init, jax.random.key(0), ids)["params"]
                random = np.random.default_rng(i)
                modules[name] = module
                params[name] = jax.tree.map(
                    lambda s, r=random: (0.4 * r.standard_normal(s.shape) + (s.ndim == 1)).astype(np.float32), shapes
                )
            prompts = Prompts(
                modules=modules,
                tokenizers={name: tokenizers[name] for name in modules},
                family=family.replace("sd2", "sd"),
                width=WIDTH if family == "sd3" else 0,
                t5_tokens=T5_TOKENS if family == "sd3" else None,
            )
            made[family] = Model(prompts, params)
        return made[family]

    return make


def chunks_by_hand(tokenizer: Tokenizer, texts: Sequence[tuple[str, float]]) -> tuple[list[list[int]], np.ndarray]:
    """Full chunks of the tokens, for texts without commas: begin, ten tokens, end, padding."""
    flat = [(i, w) for text, w in texts for i in tokenizer.backend(text, add_special_tokens=False)["input_ids"]]
    rows, weights = [], []
    for start in range(0, max(len(flat), 1), ROOM):
        part = flat[start : start + ROOM]
        tail = LENGTH - len(part) - 2
        rows.append([tokenizer.bos_token_id, *(i for i, _ in part), tokenizer.eos_token_id])
        rows[-1] += [tokenizer.pad_token_id] * tail
        weights.append([1.0, *(w for _, w in part), *[1.0] * (tail + 1)])
    return rows, np.asarray(weights)


def expected(model: Model, texts: Sequence[tuple[str, float]], rule: str, count: int) -> dict[str, np.ndarray]:
    """The formulas: z w, z w with the mean of z, or e + w (z - e); encoders beside one another, chunks behind."""
    columns, pooled = [], []
    for name, tokenizer in model.prompts.tokenizers.items():
        if name == "text_encoder_3":
            continue
        rows, weights = chunks_by_hand(tokenizer, texts)
        empty, _ = chunks_by_hand(tokenizer, [("", 1.0)])
        rows += empty * (count - len(rows))
        weights = np.concatenate([weights, np.ones((count - len(weights), LENGTH))])[..., None]
        z, embeds = model.states(name, rows)
        if rule == "interpolate":
            e, _ = model.states(name, empty)
            z = e + weights * (z - e)
        else:
            before, z = z, z * weights
            if rule == "mean":
                z = z * np.stack([b.mean() / a.mean() for b, a in zip(before, z, strict=True)])[:, None, None]
        columns.append(z.reshape(count * LENGTH, -1))
        pooled += [] if embeds is None else [embeds[0]]
    context = np.concatenate(columns, axis=-1)
    if model.prompts.family == "sd3":
        context = np.pad(context, ((0, 0), (0, WIDTH - context.shape[-1])))
        tokenizer = model.prompts.tokenizers["text_encoder_3"]
        flat = [(i, w) for t, w in texts for i in tokenizer.backend(t, add_special_tokens=False)["input_ids"]]
        flat = flat[: T5_TOKENS - 1]
        fill = [tokenizer.pad_token_id] * (T5_TOKENS - 1 - len(flat))
        z, _ = model.states("text_encoder_3", [[*(i for i, _ in flat), tokenizer.eos_token_id, *fill]])
        e, _ = model.states("text_encoder_3", [[tokenizer.eos_token_id, *[tokenizer.pad_token_id] * (T5_TOKENS - 1)]])
        w = np.asarray([*(w for _, w in flat), *[1.0] * (T5_TOKENS - len(flat))])[:, None]
        context = np.concatenate([context, e[0] + w * (z[0] - e[0]) if rule == "interpolate" else z[0] * w])
    if not pooled:
        return {"context": context}
    return {"context": context, "pooled": np.concatenate(pooled) if model.prompts.family == "sd3" else pooled[-1]}


def check(got: Chunks, want: dict[str, np.ndarray]) -> None:
    joined = join([got], repeats=True)
    assert joined.keys() == want.keys()
    for name, leaf in want.items():
        np.testing.assert_allclose(joined[name][0], leaf, atol=2e-5 * np.abs(leaf).max())


SOME = "red (heart:1.5) dog"
PARTS = [("red ", 1.0), ("heart", 1.5), (" dog", 1.0)]
LONG = "(red heart red heart red heart:0.7) " + "dog face cat face " * 3
LONG_PARTS = [("red heart red heart red heart", 0.7), (" " + "dog face cat face " * 3, 1.0)]


@pytest.mark.parametrize(
    ("family", "rule"),
    [
        ("sd", "mean"),
        pytest.param("sd2", "mean", marks=pytest.mark.slow),
        pytest.param("sdxl", "scale", marks=pytest.mark.slow),
        ("sd3", "scale"),
    ],
)
def test_weights_of_a1111(models: Callable[[str], Model], family: str, rule: str) -> None:
    model = models(family)
    got = model.prompts.chunks(model.params, SOME, "a1111")
    count = len(got.chunks)
    check(got, expected(model, PARTS, rule, count))
    plain = model.prompts.chunks(model.params, "red heart dog", "a1111")
    assert np.abs(np.asarray(got.chunks - plain.chunks)).max() > 0.1, "the weight shows"


@pytest.mark.parametrize("family", [pytest.param("sd", marks=pytest.mark.slow), "sdxl"])
def test_weights_of_comfyui(models: Callable[[str], Model], family: str) -> None:
    model = models(family)
    got = model.prompts.chunks(model.params, SOME, "comfyui")
    check(got, expected(model, PARTS, "interpolate", len(got.chunks)))


@pytest.mark.parametrize(
    ("family", "rule", "count"),
    [
        ("sd", "mean", 2),
        pytest.param("sd2", "mean", 6, marks=pytest.mark.slow),
        ("sdxl", "scale", 6),  # the second encoder needs five chunks, the first is filled up
        pytest.param("sd3", "scale", 6, marks=pytest.mark.slow),
    ],
)
def test_long_prompts_are_chunks(models: Callable[[str], Model], family: str, rule: str, count: int) -> None:
    model = models(family)
    got = model.prompts.chunks(model.params, LONG, "a1111")
    assert len(got.chunks) == count
    check(got, expected(model, LONG_PARTS, rule, count))
    cut = model.prompts.chunks(model.params, LONG, "a1111", most=1)
    np.testing.assert_allclose(cut.chunks[0], got.chunks[0], atol=1e-5)


@pytest.mark.parametrize("family", ["sd", pytest.param("sdxl", marks=pytest.mark.slow)])
def test_compel_blends_what_is_below_one(models: Callable[[str], Model], family: str) -> None:
    """e + w (z - e), averaged with the same of a prompt that does not see the fragment: tan((1 - w) pi / 2) to 1."""
    model = models(family)
    got = model.prompts.chunks(model.params, "red (heart)0.4 dog+", "compel")
    columns = []
    for name, tokenizer in model.prompts.tokenizers.items():
        parts = [("red", 1.0), ("heart", 0.4), ("dog", 1.1)]
        rows, weights = chunks_by_hand(tokenizer, parts)
        empty, _ = chunks_by_hand(tokenizer, [("", 1.0)])
        seen = (weights != 0.4).reshape(np.shape(rows))
        e = model.states(name, empty)[0]
        full, masked = (
            e + weights[..., None] * (model.states(name, rows, mask)[0] - e) for mask in (np.ones_like(seen), seen)
        )
        share = math.tan(0.6 * math.pi / 2)
        columns.append((full + share * masked) / (1.0 + share))
    want = np.concatenate(columns, axis=-1).reshape(-1, sum(column.shape[-1] for column in columns))
    np.testing.assert_allclose(join([got], repeats=True)["context"][0], want, atol=5e-5)


def test_downweights_have_few_shapes() -> None:
    for count, padded in ((0, 0), (1, 1), (2, 2), (3, 4), (5, 8)):
        blended = downweights(parse(" ".join(f"(a)0.{i + 1} b" for i in range(count)), "compel"))
        assert len(blended.fragments) == padded
        assert blended.shares.shape == (padded + 1,)
        np.testing.assert_allclose(blended.shares.sum(), 1.0, rtol=1e-6)
    assert np.isfinite(downweights(parse("(a)0", "compel")).shares).all()


def test_a_full_chunk_ends_at_a_near_comma(tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers["text_encoder"]

    def texts(text: str, syntax: str) -> list[str]:
        ids = tokens_in_chunks(tokenizer, parse(text, syntax), LENGTH, syntax).ids
        return [tokenizer.decode(row).replace(" ", "") for row in ids]

    text = "red heart, red heart, " + "dog face " * 3
    assert texts(text, "a1111") == ["redheart,redheart,", "dogfacedogfacedogface"]
    assert texts(text, "compel") == ["redheart,redheart,dogfacedogface", "dogface"]
    assert texts("red heart BREAK dog, face", "a1111") == ["redheart", "dog,face"]
    far = "red, " + "heart " * 25  # the comma is more than 20 tokens away in a chunk of 30
    ids = tokens_in_chunks(tokenizer, parse(far, "a1111"), 27, "a1111").ids
    assert (ids[0] != tokenizer.pad_token_id).sum() == 26, "full: 25 tokens and the begin"


def test_vectors_of_an_embedding_stay_together(tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer, ids = tokenizers["text_encoder"].with_words({"<new>": 4})
    tokens = tokens_in_chunks(tokenizer, parse("heart " * 8 + "(<new>:1.3)", "a1111"), LENGTH, "a1111")
    assert tokens.ids[1, 1:5].tolist() == ids["<new>"]
    np.testing.assert_allclose(tokens.weights[1], [1.0, *[1.3] * 4, *[1.0] * 7], rtol=1e-6)
    words = tokens_in_chunks(tokenizer, parse("heart " * 8 + "<new>", "comfyui"), LENGTH, "comfyui")
    assert words.ids[1, 1:5].tolist() == ids["<new>"]


def test_numbers_of_chunks() -> None:
    assert [count_of(n) for n in (1, 2, 3, 4, 5, 7, 9, 13, 17, 24)] == [1, 2, 3, 4, 6, 8, 12, 16, 24, 24]
    assert count_of(2, 3) == 6
    assert count_of(8, 12) == 24
    assert count_of(16, 12) == 16  # no common multiple: the shorter is filled up
    with pytest.raises(ValueError, match="25 chunks of 75 tokens, and at most 24"):
        count_of(25, 1)


def test_a_shorter_prompt_is_repeated_where_that_changes_nothing() -> None:
    def prompt(count: int, value: float) -> Chunks:
        return Chunks(jnp.full((count, 2, 1), value), jnp.zeros((2, 1)), jnp.full((1, 1), -value), None)

    alike = np.asarray(join([prompt(1, 7.0), prompt(2, 5.0)], repeats=True)["context"])[..., 0]
    assert alike.tolist() == [[7.0] * 4 + [-7.0], [5.0] * 4 + [-5.0]]
    filled = np.asarray(join([prompt(1, 7.0), prompt(2, 5.0)], repeats=False)["context"])[..., 0]
    assert filled.tolist() == [[7.0] * 2 + [0.0] * 2 + [-7.0], [5.0] * 4 + [-5.0]]


def test_the_end_is_found_by_value(models: Callable[[str], Model]) -> None:
    """A config of before 2023 says 2 and means the largest id; new words have larger ones."""
    model = models("sdxl")
    tokenizer, _ = model.prompts.tokenizers["text_encoder"].with_words({"<new>": 1})
    prompts = replace(model.prompts, tokenizers={**model.prompts.tokenizers, "text_encoder": tokenizer})
    assert prompts._module("text_encoder").config.eos_token_id == tokenizer.eos_token_id
    assert prompts._module("text_encoder_2") is prompts.modules["text_encoder_2"]


@pytest.mark.parametrize(("family", "most"), [("sd", 2), ("sdxl", 1), ("sd3", 1)])
def test_no_more_layers_can_be_skipped_than_there_are(models: Callable[[str], Model], family: str, most: int) -> None:
    prompts = models(family).prompts
    assert replace(prompts, clip_skip=most).clip_skip == most
    for skip in (most + 1, -1):
        with pytest.raises(
            ValueError, match=f"clip_skip is {skip}: this model's text_encoder has 2 layers, .* 0 to {most}"
        ):
            replace(prompts, clip_skip=skip)
