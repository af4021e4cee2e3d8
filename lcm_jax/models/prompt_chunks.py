"""Prompts of any length in chunks: tokens with weights, what the weights do to the encoders' states, and one length.

A CLIP reads 77 tokens. A longer prompt is encoded in chunks of 75, each with its own begin and end, whose states stand
behind one another. The number of chunks is a shape of the program that draws, so only those of `COUNTS` occur.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from lcm_jax.models.prompt_syntax import Sections
from mmdit.text import Tokenizer

COUNTS = (1, 2, 3, 4, 6, 8, 12, 16, 24)
"""Numbers of chunks that occur; others are filled up with chunks of the empty prompt."""
BACKTRACK = 20  # tokens that A1111 moves to the next chunk at most, so that a chunk ends at a comma
SMALLEST = 1e-5  # of compel's weights: that of 0 would be infinite

Rule = Literal["scale", "scale_keep_mean", "interpolate"]
"""The rule by which a weight w changes a state z: w z; w z, after which the chunk gets its mean back; e + w (z - e),
with e the state of the empty prompt at the same place."""


class Tokens(NamedTuple):
    """One prompt for one encoder, in chunks: ids, weights, and for each place the number of its fragment or -1."""

    ids: Int[np.ndarray, "c l"]
    weights: Float[np.ndarray, "c l"]
    fragments: Int[np.ndarray, "c l"]


class Chunks(NamedTuple):
    """The conditioning of one prompt before prompts are brought to one length.

    empty: one chunk of the empty prompt. tail: the states of T5, which follow all chunks. pooled: of the first chunk.
    """

    chunks: Float[Array, "c l d"]
    empty: Float[Array, "l d"]
    tail: Float[Array, "t d"] | None
    pooled: Float[Array, " p"] | None


def rule_of(syntax: str, family: str) -> Rule:
    """Return what weights do. A1111's mean is kept for SD1 and SD2 alone: that of SDXL's states is too near to 0."""
    if syntax != "a1111":
        return "interpolate"
    return "scale_keep_mean" if family == "sd" else "scale"


def tokens_in_chunks(tokenizer: Tokenizer, sections: Sections, length: int, syntax: str) -> Tokens:
    """Return a prompt's tokens in chunks of `length`, a section beginning a new one.

    a1111: a chunk that is full ends at its last comma, if that is at most BACKTRACK tokens away; the vectors of an
    embedding stay together. comfyui: so do the tokens of a word, up to seven. compel: chunks are full.
    """
    room = length - len(tokenizer.begin) - 1
    chunks: list[list[tuple[int, float, int]]] = []
    number = 0
    for section in sections:
        chunk: list[tuple[int, float, int]] = []
        for text, weight in section:
            for group in _groups(tokenizer, text, room, syntax):
                if len(chunk) + len(group) > room:
                    moved = _after_comma(tokenizer, chunk, group[0]) if syntax == "a1111" else len(chunk)
                    chunks.append(chunk[:moved])
                    chunk = chunk[moved:]
                chunk = [*chunk, *((i, weight, number) for i in group)]
            number += 1
        chunks.append(chunk)
    ids = [tokenizer.wrap([i for i, _, _ in chunk], length) for chunk in chunks]
    weights, fragments = np.ones((len(chunks), length), np.float32), np.full((len(chunks), length), -1, np.int32)
    for row, chunk in enumerate(chunks):
        for place, (_, weight, fragment) in enumerate(chunk, len(tokenizer.begin)):
            weights[row, place], fragments[row, place] = weight, fragment
    return Tokens(np.asarray(ids, np.int32), weights, fragments)


def tokens_in_one(tokenizer: Tokenizer, sections: Sections, length: int) -> Tokens:
    """Return a prompt's tokens without chunks, as T5 reads them, cut off after `length`."""
    fragments = [fragment for section in sections for fragment in section]
    pieces = tokenizer.pieces([text for text, _ in fragments])
    flat = [(i, fragments[k].weight, k) for k, ids in enumerate(pieces) for i in ids]
    first = len(tokenizer.begin)
    flat = flat[: length - 1 - first]
    weights, numbers = np.ones((1, length), np.float32), np.full((1, length), -1, np.int32)
    for place, (_, weight, fragment) in enumerate(flat, first):
        weights[0, place], numbers[0, place] = weight, fragment
    return Tokens(np.asarray([tokenizer.wrap([i for i, _, _ in flat], length)], np.int32), weights, numbers)


def _groups(tokenizer: Tokenizer, text: str, room: int, syntax: str) -> list[list[int]]:
    """Return the tokens of a fragment, in groups that stay in one chunk."""
    runs = {run[0]: len(run) for run in tokenizer.runs.values()}

    def vectors(ids: Sequence[int]) -> list[list[int]]:
        groups, at = [], 0
        while at < len(ids):
            count = runs.get(ids[at], 1)
            count = count if count <= room else 1
            groups.append(list(ids[at : at + count]))
            at += count
        return groups

    if syntax != "comfyui":
        return vectors(tokenizer.pieces([text])[0])
    words = [ids for ids in tokenizer.pieces(text.split()) if ids] if text.split() else []
    return [group for ids in words for group in ([ids] if len(ids) < 8 else vectors(ids))]


def _after_comma(tokenizer: Tokenizer, chunk: Sequence[tuple[int, float, int]], following: int) -> int:
    """Return the number of tokens of a full chunk that stay in it."""
    comma = tokenizer.pieces([","])[0][-1:]
    places = [place for place, (i, _, _) in enumerate(chunk) if [i] == comma]
    if [following] == comma or not places or len(chunk) - places[-1] > BACKTRACK:
        return len(chunk)
    return places[-1] + 1


def filled_up(tokens: Tokens, tokenizer: Tokenizer, count: int) -> Tokens:
    """Return the tokens in `count` chunks, the further ones those of the empty prompt."""
    more, length = count - len(tokens.ids), tokens.ids.shape[1]
    if not more:
        return tokens
    empty = np.tile(np.asarray(tokenizer.wrap([], length), np.int32), (more, 1))
    weights, fragments = np.ones((more, length), np.float32), np.full((more, length), -1, np.int32)
    parts = (empty, weights, fragments)
    return Tokens(*(np.concatenate(pair) for pair in zip(tokens, parts, strict=True)))


def count_of(*counts: int) -> int:
    """Return the number of chunks of a program for prompts that have these numbers; ValueError if they are too many.

    >>> count_of(1, 3), count_of(5)
    (3, 6)
    """
    most = max(counts)
    if most > COUNTS[-1]:
        raise ValueError(f"a prompt has {most} chunks of 75 tokens, and at most {COUNTS[-1]} are read: shorten it")
    exact = math.lcm(*counts)
    return exact if exact in COUNTS else next(count for count in COUNTS if count >= most)


class Downweights(NamedTuple):
    """compel's way with weights below 1: the prompt blended with prompts in which such a fragment is masked."""

    fragments: tuple[int, ...]  # one for each blended prompt; -2 masks nothing, and has the share 0
    shares: Float[np.ndarray, " v_plus_1"]  # of the prompt itself, and of the blended ones; their sum is 1


def downweights(sections: Sections) -> Downweights:
    """Return how fragments of a weight w below 1 are blended out: with the weight tan((1 - w) pi / 2) beside 1.

    Their number is a shape: 0, 1, 2, 4, 8 and so on.
    """
    weights = [weight for section in sections for _, weight in section]
    below = [(i, math.tan((1.0 - max(SMALLEST, w)) * math.pi / 2)) for i, w in enumerate(weights) if w < 1.0]
    count = 0 if not below else 1 << (len(below) - 1).bit_length()
    below += [(-2, 0.0)] * (count - len(below))
    shares = np.asarray([1.0, *(share for _, share in below)])
    return Downweights(tuple(i for i, _ in below), (shares / shares.sum()).astype(np.float32))


def masks(tokens: Tokens, blended: Downweights) -> Bool[np.ndarray, "v c l"]:
    """Return, for each blended prompt, which tokens may be attended to: all but those of its fragment."""
    return np.asarray([tokens.fragments != fragment for fragment in blended.fragments])


def weigh(
    states: Float[Array, "v c l d"],
    empty: Float[Array, "l d"],
    weights: Float[Array, "c l d"],
    shares: Float[Array, " v"],
    rule: Rule,
) -> Float[Array, "c l d"]:
    """Return the states of a prompt with the weights applied, and the v prompts of compel's blend summed up."""
    z = states.astype(jnp.float32)
    if rule == "interpolate":
        e = empty.astype(jnp.float32)
        # where the weight is 1 the state is kept to the last bit
        weighted = jnp.where(weights == 1.0, z, e + weights * (z - e))
        return jnp.tensordot(shares, weighted, axes=1).astype(states.dtype)
    weighted = (z * weights)[0]
    if rule == "scale_keep_mean":
        before, after = z[0].mean((1, 2), keepdims=True), weighted.mean((1, 2), keepdims=True)
        weighted = jnp.where(before == after, weighted, weighted * (before / after))
    return weighted.astype(states.dtype)


def join(prompts: Sequence[Chunks], *, repeats: bool) -> dict[str, Array]:
    """Return {"context": (n, l, d)} and "pooled" of n prompts, with one number of chunks for all.

    repeats: whether a prompt's chunks are repeated where that fits: cross-attention to every token m times is that to
    every token once, so that a prompt draws the same beside a longer one. Otherwise chunks of the empty prompt follow,
    as where image and text attend to one another (SD3).
    """
    counts = [len(prompt.chunks) for prompt in prompts]
    count = count_of(*counts) if repeats else next(c for c in COUNTS if c >= max(counts))
    rows = []
    for prompt, length in zip(prompts, counts, strict=True):
        fits = repeats and count % length == 0
        empties = jnp.broadcast_to(prompt.empty, (0 if fits else count - length, *prompt.empty.shape))
        chunks = jnp.tile(prompt.chunks, (count // length if fits else 1, 1, 1))
        context = jnp.concatenate([chunks, empties]).reshape(-1, prompt.empty.shape[-1])
        rows.append(context if prompt.tail is None else jnp.concatenate([context, prompt.tail]))
    cond = {"context": jnp.stack(rows)}
    pooled = [prompt.pooled for prompt in prompts if prompt.pooled is not None]
    return cond | ({"pooled": jnp.stack(pooled)} if pooled else {})
