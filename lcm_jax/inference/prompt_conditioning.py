"""The conditioning of a call: prompts with weights, of any length, that change with the step, or given as arrays."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from lcm_jax.diffusion.time_grids import CAPACITY
from lcm_jax.models.prompt_chunks import COUNTS, Chunks, join
from lcm_jax.models.prompt_syntax import check_syntax, is_scheduled, parse, texts_by_step
from lcm_jax.models.text_conditioning import Prompts
from lcm_jax.typing import Array, Cond
from mmdit.text import zero_prompt


class PromptOptions(NamedTuple):
    """The way in which the prompts of a call are read.

    syntax: None is plain text, cut off where an encoder ends. clip_skip, t5_tokens: see `Prompts`. most_chunks: the
    number of chunks of 75 tokens after which a prompt with a syntax is cut off; None is none.

    >>> PromptOptions("a1111")._replace(clip_skip=1)
    PromptOptions(syntax='a1111', clip_skip=1, t5_tokens=None, most_chunks=None)
    """

    syntax: str | None = None
    clip_skip: int | None = None
    t5_tokens: int | None = None
    most_chunks: int | None = None


class Conditions(NamedTuple):
    """The conditioning of prompts and negative prompts, leaves (b, ...).

    With parts, the leaves are (b, p, ...), and parts has the number of each step's part: step -> 0 ... p - 1.
    """

    cond: Cond
    null: Cond
    parts: Int[Array, " steps"] | None = None


def check_prompts(texts: Sequence[str], syntax: str | None, steps: int | None) -> None:
    """Raise ValueError for a syntax that there is not, and for prompts that do not parse in it.

    steps: the number of steps in which prompts may change; None: they may not.

    >>> check_prompts(["a (red:1.3) heart", "[cat:dog:0.5]"], "a1111", 4)
    """
    if syntax is None:
        return
    check_syntax(syntax)
    for text in dict.fromkeys(texts):
        if steps is None and is_scheduled(text, syntax):
            raise ValueError(
                f"prompt {text!r:.80}: [a:b:0.5] and [a|b] change with the step, and only drawing pictures has steps"
            )
        for now in dict.fromkeys(texts_by_step(text, syntax, steps or 1)):
            parse(now, syntax)


def encode(texts: Prompts, params: Any, prompts: Sequence[str], rows: Any, options: PromptOptions) -> dict[str, Array]:
    """Return the conditioning of texts; one that is too long for an encoder, or for most_chunks, is a warning.

    rows: of SDXL's size conditioning, one for each text. (texts, parameters) -> {"context": (n, l, d), ...}.
    """
    if options.syntax is None:
        for line in texts.too_long(prompts):
            warnings.warn(line, stacklevel=3)
        return texts(params, prompts, rows)
    check_prompts(prompts, options.syntax, None)
    _warn_of_cuts(texts, prompts, options)
    encoder = _Encoder(texts, params, options)
    return _with_sizes(join([encoder[text] for text in prompts], repeats=texts.family != "sd3"), rows)


def _warn_of_cuts(texts: Prompts, prompts: Sequence[str], options: PromptOptions) -> None:
    """Warn of prompts with a syntax that T5 cuts off, and where chunks are few the CLIPs too."""
    assert options.syntax is not None
    plain = ["".join(part.text for section in parse(text, options.syntax) for part in section) for text in prompts]
    for line in texts.too_long(plain, clips=options.most_chunks is not None):
        warnings.warn(line, stacklevel=4)


class _Encoder(dict[str, Chunks]):
    """The chunks of each text, encoded when they are first asked for."""

    def __init__(self, texts: Prompts, params: Any, options: PromptOptions) -> None:
        super().__init__()
        self.texts, self.params, self.options = texts, params, options

    def __missing__(self, text: str) -> Chunks:
        assert self.options.syntax is not None
        chunks = self.texts.chunks(self.params, text, self.options.syntax, most=self.options.most_chunks)
        self[text] = chunks
        return chunks


def _with_sizes(cond: Mapping[str, Array], rows: Any) -> dict[str, Array]:
    return dict(cond) if rows is None else {**cond, "time_ids": jnp.asarray(rows)}


def weighted_conditions(
    texts: tuple[Prompts, Prompts],
    params: Any,
    prompts: Sequence[str],
    negatives: Sequence[str],
    sizes: tuple[Any, Any],
    options: PromptOptions,
    *,
    zeros: bool,
    guided: bool,
    steps: int = 1,
) -> Conditions:
    """Return the conditioning of prompts with weights, of one number of chunks, in the parts of which steps have some.

    texts: the encoders of the prompts, and those of the negative prompts. sizes: rows of SDXL's size conditioning for
    both. zeros: whether the negative prompt is SDXL's empty one. guided: without guidance there is none. A step whose
    texts are those of another one has its part: n steps -> p parts, of which the last is repeated up to a number of
    `COUNTS`, so that schedules of as many parts are one program. In 4 steps "a [cat:dog:0.5]" has two parts: steps 0
    and 1 have "a cat", steps 2 and 3 "a dog", and parts_of_steps is (0, 0, 1, 1).
    """
    alone = zeros or not guided
    by_step = [texts_by_step(text, options.syntax, steps) for text in prompts]
    by_step += [] if alone else [texts_by_step(text, options.syntax, steps) for text in negatives]
    _warn_of_cuts(texts[0], list(dict.fromkeys(text for row in by_step for text in row)), options)
    columns = list(zip(*by_step, strict=True))  # for each step, the texts of all rows
    parts = list(dict.fromkeys(columns))
    parts_of_steps = np.asarray([parts.index(column) for column in columns], np.int32)
    if len(parts) > 1:  # the number of parts is a shape
        parts += [parts[-1]] * (next((n for n in COUNTS if n >= len(parts)), len(parts)) - len(parts))
    first, second = (_Encoder(encoders, params, options) for encoders in texts)
    n = len(prompts)
    encoded = [first[text] for part in parts for text in part[:n]]
    encoded += [second[text] for part in parts for text in part[n:]]
    both = join(encoded, repeats=texts[0].family != "sd3")

    def rows(start: int) -> dict[str, Array]:
        """Return the leaves of n rows in all parts, (n, p, ...), or (n, ...) where there is one."""
        taken = {name: leaf[start : start + n * len(parts)] for name, leaf in both.items()}
        stacked = {name: leaf.reshape(len(parts), n, *leaf.shape[1:]).swapaxes(0, 1) for name, leaf in taken.items()}
        return {name: leaf[:, 0] for name, leaf in stacked.items()} if len(parts) == 1 else stacked

    def sized(cond: Mapping[str, Array], row: Any) -> dict[str, Array]:
        if row is None:
            return dict(cond)
        wide = jnp.tile(jnp.asarray(row, jnp.float32), (n, 1))
        return _with_sizes(cond, wide if len(parts) == 1 else jnp.repeat(wide[:, None], len(parts), axis=1))

    cond = sized(rows(0), sizes[0])
    null = cond if not guided else sized(rows(0), sizes[1]) if zeros else sized(rows(n * len(parts)), sizes[1])
    null = zero_prompt(null) if zeros and guided else null
    if len(parts) == 1:
        return Conditions(cond, null)
    numbers = np.concatenate([parts_of_steps, np.full(CAPACITY - steps, parts_of_steps[-1], np.int32)])
    return Conditions(cond, null, jnp.asarray(numbers))


def given_embeds(name: str, value: Any, texts: Prompts) -> dict[str, Array]:
    """Return a conditioning that was given in place of prompts, checked: {"context": (n, l, d)} and "pooled" (n, p).

    value: what `Pipeline.encode_prompt` returns, or for SD1 and SD2 the array alone: array -> {"context": array}.
    ValueError for what does not fit.
    """
    widths = texts.widths
    leaves = dict(value) if isinstance(value, Mapping) else {"context": value}
    leaves.pop("time_ids", None)
    if leaves.keys() != widths.keys():
        asked = " and ".join(f"{leaf!r}" for leaf in widths)
        raise ValueError(
            f"{name} has {', '.join(map(repr, leaves)) or 'nothing'}: this model takes a dict with {asked}"
        )
    arrays = {}
    for leaf, width in widths.items():
        shape = ("n", "l", width) if leaf == "context" else ("n", width)
        try:
            array = np.asarray(leaves[leaf], np.float32)
        except (TypeError, ValueError):
            raise ValueError(f"{name}: {leaf} is a {type(leaves[leaf]).__name__}, and an array is needed") from None
        if array.ndim != len(shape) or array.shape[-1] != width or not array.size:
            wanted = f"({', '.join(map(str, shape))})"
            raise ValueError(f"{name}: {leaf} has the shape {array.shape}, and this model takes {wanted}")
        if not np.isfinite(array).all():
            raise ValueError(f"{name}: {leaf} holds infinity or NaN")
        arrays[leaf] = jnp.asarray(leaves[leaf])
    if len({len(array) for array in arrays.values()}) > 1:
        raise ValueError(f"{name}: its arrays have other numbers of rows: {[len(a) for a in arrays.values()]}")
    return arrays


def same_length(cond: Mapping[str, Array], null: Mapping[str, Array], *, repeats: bool) -> Conditions:
    """Return both with one number of tokens, the shorter repeated where cross-attention allows it.

    >>> pair = same_length({"context": jnp.ones((1, 4, 2))}, {"context": jnp.ones((1, 2, 2))}, repeats=True)
    >>> pair.null["context"].shape
    (1, 4, 2)
    """
    long, short = cond["context"].shape[1], null["context"].shape[1]
    if long == short:
        return Conditions(dict(cond), dict(null))
    if not repeats or max(long, short) % min(long, short):
        raise ValueError(
            f"the prompt has {long} tokens and the negative prompt {short}: give prompt_embeds and "
            "negative_prompt_embeds of one length"
        )

    def repeated(leaves: Mapping[str, Array]) -> dict[str, Array]:
        context = leaves["context"]
        return {**leaves, "context": jnp.tile(context, (1, max(long, short) // context.shape[1], 1))}

    return Conditions(repeated(cond), repeated(null))
