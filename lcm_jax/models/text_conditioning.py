"""Text conditioning: the text encoders of a model of any family, with their tokenizers; parameters are arguments."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from lcm_jax.models.prompt_chunks import (
    Chunks,
    Rule,
    count_of,
    downweights,
    filled_up,
    masks,
    rule_of,
    tokens_in_chunks,
    tokens_in_one,
    weigh,
)
from lcm_jax.models.prompt_syntax import parse
from lcm_jax.precision.context import is_low_precision, precision_context
from lcm_jax.runtime.compiler_options import compiler_options
from lcm_jax.typing import Params
from mmdit.text import Encoding, T5Encoder, Tokenizer, sd3, sdxl, stable_diffusion

Ids = tuple[Int[Array, "n _"], ...]


@runtime_checkable
class Trees(Protocol):
    """Parameter trees by name, each of which may be put on the device only when it is asked for."""

    def __getitem__(self, name: str, /) -> Params: ...


T5_TOKENS = 256  # of a prompt, as diffusers has it, unless the tokenizer has fewer


@dataclass(frozen=True, kw_only=True, eq=False)
class Prompts:
    """Text encoders in the order in which their outputs are joined, each with its tokenizer.

    family: "sd", "sdxl" or "sd3". width: channels of SD3's context, its transformer's joint_attention_dim, to which the
    CLIPs' are padded. t5_tokens: SD3's tokens of a prompt for T5, with or without a T5; None is 256, or the tokenizer's
    length if that is less. clip_skip: the number of last layers of the CLIPs that are skipped: SD1's context is the
    state before them after the final norm, SDXL's and SD3's the one before that without it; None is 0. ValueError for
    t5_tokens and a clip_skip that the model cannot take.
    """

    modules: Mapping[str, Any]
    tokenizers: Mapping[str, Tokenizer]  # under the encoders' names
    family: str
    width: int = 0
    t5_tokens: int | None = None
    clip_skip: int | None = None

    def __post_init__(self) -> None:
        if self.t5_tokens is not None and self.family != "sd3":
            raise ValueError(
                f"t5_tokens is an option of SD3, and this model's prompts are of the family {self.family!r}"
            )
        most = self.most_t5_tokens
        if self.t5_tokens is not None and not 2 <= self.t5_tokens <= most:
            raise ValueError(f"t5_tokens is {self.t5_tokens}: this model's T5 reads from 2 to {most} tokens")
        clips = {name: module for name, module in self.modules.items() if name != self._t5}
        for name, module in clips.items():
            depth = module.config.num_hidden_layers - (self.family != "sd")
            if self.clip_skip is not None and not 0 <= self.clip_skip <= depth:
                layers = module.config.num_hidden_layers
                raise ValueError(
                    f"clip_skip is {self.clip_skip}: this model's {name} has {layers} layers, of which from 0 to "
                    f"{depth} can be skipped"
                )

    @property
    def _t5(self) -> str | None:
        return next((name for name, module in self.modules.items() if isinstance(module, T5Encoder)), None)

    @property
    def most_t5_tokens(self) -> int:
        """The length of T5's tokenizer; 512 without one."""
        return 512 if self._t5 is None else self.tokenizers[self._t5].max_length

    @cached_property
    def lengths(self) -> dict[str, int]:
        """The number of tokens of a prompt for each encoder; SD3 has "t5" even without a T5."""
        clips = {
            name: min(module.config.max_position_embeddings, self.tokenizers[name].max_length)
            for name, module in self.modules.items()
            if name != self._t5
        }
        t5 = {} if self.family != "sd3" else {"t5": self.t5_tokens or min(T5_TOKENS, self.most_t5_tokens)}
        return clips | t5

    @cached_property
    def widths(self) -> dict[str, int]:
        """The channels of "context" and, for SDXL and SD3, of "pooled"."""
        clips = [module.config for name, module in self.modules.items() if name != self._t5]
        if self.family == "sd3":
            return {"context": self.width, "pooled": sum(config.projection_dim for config in clips)}
        context = {"context": sum(config.hidden_size for config in clips)}
        return context if self.family == "sd" else context | {"pooled": clips[-1].projection_dim}

    def tokenize(self, texts: Sequence[str]) -> Ids:
        """Return token ids for each encoder; longer texts are cut off."""
        return tuple(
            jnp.asarray(self.tokenizers[name](list(texts), self.lengths["t5" if name == self._t5 else name]))
            for name in self.modules
        )

    def too_long(self, texts: Sequence[str], *, clips: bool = True) -> list[str]:
        """Return a line of warning for every encoder that cuts a text off; without `clips` for T5 alone."""
        lines = []
        for name in self.modules if clips else [name for name in self.modules if name == self._t5]:
            length = self.lengths["t5" if name == self._t5 else name]
            tokenizer = self.tokenizers[name]
            special = len(tokenizer.begin) + 1
            ids = tokenizer.pieces(texts)
            longest, text = max((len(row) + special, text) for row, text in zip(ids, texts, strict=True))
            if longest > length:
                lines.append(f"{name} reads {length} tokens and leaves out the rest of the {longest} of {text!r:.80}")
        return lines

    def __call__(
        self, params: Trees, texts: Sequence[str], sizes: Float[np.ndarray, "n s"] | None = None
    ) -> dict[str, Array]:
        """{"context": (n, l, d)}; for SDXL and SD3 "pooled" (n, p) too, for SDXL "time_ids": `sizes`."""
        trees = [params[name] for name in self.modules]
        return self._encode(is_low_precision(*trees))(trees, self.tokenize(texts), sizes)

    def chunks(self, params: Trees, text: str, syntax: str, *, most: int | None = None) -> Chunks:
        """Return the conditioning of one prompt with weights, in as many chunks as it needs.

        syntax: see `prompt_syntax`. most: the number of chunks after which the prompt is cut off; None is none.
        ValueError for weights that do not parse, and a prompt of too many chunks.
        """
        sections = parse(text, syntax)
        tokens = {
            name: tokens_in_one(self.tokenizers[name], sections, self.lengths["t5"])
            if name == self._t5
            else tokens_in_chunks(self.tokenizers[name], sections, self.lengths[name], syntax)
            for name in self.modules
        }
        clips = [name for name in self.modules if name != self._t5]
        count = max(len(tokens[name].ids) for name in clips)
        count = count_of(count if most is None else min(count, most))
        for name in clips:
            kept = tokens[name]._replace(**{field: array[:count] for field, array in tokens[name]._asdict().items()})
            tokens[name] = filled_up(kept, self.tokenizers[name], count)
        blended = downweights(sections) if syntax == "compel" else downweights(())
        trees = [params[name] for name in self.modules]
        return self._encode_chunks(is_low_precision(*trees))(
            trees,
            tuple(jnp.asarray(tokens[name].ids) for name in self.modules),
            tuple(jnp.asarray(tokens[name].weights) for name in self.modules),
            tuple(jnp.asarray(masks(tokens[name], blended)) if blended.fragments else None for name in self.modules),
            jnp.asarray(blended.shares),
            rule=rule_of(syntax, self.family),
        )

    @cached_property
    def _encode_chunks(self) -> Callable[[bool], Any]:
        options: dict[str, Any] = {"static_argnames": "rule"}
        return cache(
            lambda low: jax.jit(self._weighted, compiler_options=compiler_options(low_precision=low), **options)
        )

    def _weighted(
        self,
        params: Sequence[Params],
        ids: tuple[Int[Array, "_ _"], ...],  # T5 has one row, and a CLIP has one per chunk
        weights: tuple[Float[Array, "_ _"], ...],
        masked: tuple[Array | None, ...],
        shares: Float[Array, " v"],
        *,
        rule: Rule,
    ) -> Chunks:
        """Encode one prompt's chunks, those of its masked variants, and a chunk of the empty prompt, in one batch."""
        variants = len(shares)
        with contextlib.ExitStack() as stack:
            clips: list[Encoding] = []
            t5: Encoding | None = None
            for name, tree, row, hidden in zip(self.modules, params, ids, masked, strict=True):
                length = row.shape[1]
                empty = jnp.asarray([self.tokenizers[name].wrap([], length)], row.dtype)
                rows = jnp.concatenate([jnp.tile(row, (variants, 1)), empty])
                attention_mask = None
                if hidden is not None:
                    every = jnp.ones((1, len(row), length), bool)
                    attention_mask = jnp.concatenate([every, hidden]).reshape(-1, length)
                    attention_mask = jnp.concatenate([attention_mask, every[0, :1]])
                encoding = Encoding(
                    self._module(name), stack.enter_context(precision_context(tree)), rows, attention_mask
                )
                clips, t5 = (clips, encoding) if name == self._t5 else ([*clips, encoding], t5)
            cond = self._clips(clips, np.zeros((len(clips[0].ids), 6), np.float32))
            context, width = cond["context"], cond["context"].shape[-1]
            per_channel = [
                jnp.repeat(row[..., None], module.config.hidden_size, axis=-1)
                for (name, module), row in zip(self.modules.items(), weights, strict=True)
                if name != self._t5
            ]
            joined = jnp.concatenate(per_channel, axis=-1)
            joined = jnp.pad(joined, ((0, 0), (0, 0), (0, width - joined.shape[-1])), constant_values=1.0)
            count = len(joined)
            states = context[:-1].reshape(variants, count, *context.shape[1:])
            chunks = weigh(states, context[-1], joined, shares, rule)
            pooled = cond["pooled"][0] if "pooled" in cond else None
            tail = None
            if t5 is not None:
                z: Any = t5.module.apply({"params": t5.params}, t5.ids, t5.mask)
                row = next(w for name, w in zip(self.modules, weights, strict=True) if name == self._t5)
                tail = weigh(z[:-1, None], z[-1], jnp.broadcast_to(row[..., None], z[:1].shape), shares, rule)[0]
                tail = tail.astype(chunks.dtype)
            elif self.family == "sd3":
                tail = jnp.zeros((self.lengths["t5"], width), chunks.dtype)
            return Chunks(chunks, context[-1], tail, pooled)

    def _clips(self, clips: Sequence[Encoding], sizes: Any) -> dict[str, Array]:
        """Return what the CLIPs of a family give, without T5's tokens."""
        skip = self.clip_skip or 0
        if self.family == "sd":
            return stable_diffusion(clips[0], clip_skip=skip)
        if self.family == "sdxl":
            return sdxl(clips, sizes, clip_skip=skip)
        return sd3(clips, None, width=self.width, t5_tokens=0, clip_skip=skip)

    def _module(self, name: str) -> Any:
        """Return an encoder that finds the end of a text by the tokenizer's id.

        Old configs say 2 and mean the largest id, which is no longer the end's where a vocabulary has grown.
        """
        module = self.modules[name]
        if name == self._t5 or module.config.eos_token_id != 2:
            return module
        return module.clone(config=replace(module.config, eos_token_id=self.tokenizers[name].eos_token_id))

    def encode(
        self, params: Trees, ids: Ids | Sequence[Array], sizes: Float[Array, "n s"] | None = None
    ) -> dict[str, Array]:
        """Return the result of `__call__` from token ids, inside a larger program; differentiable in the parameters."""
        return self._joined([params[name] for name in self.modules], tuple(ids), sizes)

    def shapes(self, params: Trees) -> dict[str, tuple[int, ...]]:
        """Return the shapes of each conditioning array for one prompt."""
        sizes = jax.ShapeDtypeStruct((1, 6), jnp.float32) if self.family == "sdxl" else None
        out = jax.eval_shape(self._joined, [params[name] for name in self.modules], self.tokenize([""]), sizes)
        return {name: leaf.shape for name, leaf in out.items()}

    @cached_property
    def _encode(self) -> Callable[[bool], Any]:
        """The jitted encoder, one program for float32 and one for low-precision parameters."""
        return cache(lambda low: jax.jit(self._joined, compiler_options=compiler_options(low_precision=low)))

    def _joined(self, params: Sequence[Params], ids: Ids, sizes: Array | None) -> dict[str, Array]:
        """Encode with the parameters in the encoders' order, either all `Quantized` or none."""
        with contextlib.ExitStack() as stack:
            trees = [stack.enter_context(precision_context(tree)) for tree in params]
            parts = zip(self.modules, trees, ids, strict=True)
            encodings = [Encoding(self._module(name), tree, row) for name, tree, row in parts]
            skip = self.clip_skip or 0
            if self.family == "sd":
                return stable_diffusion(encodings[0], clip_skip=skip)
            if self.family == "sdxl":
                assert sizes is not None
                return sdxl(encodings, sizes, clip_skip=skip)
            clips = [e for e in encodings if not isinstance(e.module, T5Encoder)]
            t5 = next((e for e in encodings if isinstance(e.module, T5Encoder)), None)
            return sd3(clips, t5, width=self.width, t5_tokens=self.lengths["t5"], clip_skip=skip)


def pair_texts(
    prompt: str | Sequence[str], negative_prompt: str | Sequence[str] | None, num_images: int
) -> tuple[list[str], list[str]]:
    """Return one prompt and one negative prompt for each image; ValueError where they or their numbers do not fit.

    negative_prompt: None is none, "".

    >>> from lcm_jax.models.text_conditioning import pair_texts
    >>> pair_texts(["a cat", "a dog"], "blurry", 1)
    (['a cat', 'a dog'], ['blurry', 'blurry'])
    """
    prompts = [text for text in _texts("prompt", prompt) for _ in range(num_images)]
    if not prompts:
        raise ValueError(f"nothing to draw: {'prompt is empty' if num_images > 0 else f'num_images={num_images}'}")
    if negative_prompt is None or isinstance(negative_prompt, str):
        return prompts, [negative_prompt or ""] * len(prompts)
    negatives = _texts("negative_prompt", negative_prompt)
    if len(negatives) * num_images == len(prompts):
        negatives = [text for text in negatives for _ in range(num_images)]
    if len(negatives) != len(prompts):
        raise ValueError(f"negative_prompt: {len(negatives)} texts for {len(prompts) // num_images} prompts")
    return prompts, negatives


def _texts(name: str, given: Any) -> list[str]:
    texts = [given] if isinstance(given, str) else list(given) if isinstance(given, Iterable) else [given]
    for text in texts:
        if not isinstance(text, str):
            raise ValueError(f"{name} is {given!r:.80}: give a text or a list of texts")
    return texts
