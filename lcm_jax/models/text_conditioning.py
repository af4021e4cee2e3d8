"""Text conditioning: the text encoders of a model of any family, with their tokenizers; parameters are arguments."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

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
    length if that is less. ValueError for t5_tokens that the model cannot take.
    """

    modules: Mapping[str, Any]
    tokenizers: Mapping[str, Tokenizer]  # under the encoders' names
    family: str
    width: int = 0
    t5_tokens: int | None = None

    def __post_init__(self) -> None:
        if self.t5_tokens is not None and self.family != "sd3":
            raise ValueError(
                f"t5_tokens is an option of SD3, and this model's prompts are of the family {self.family!r}"
            )
        most = self.most_t5_tokens
        if self.t5_tokens is not None and not 2 <= self.t5_tokens <= most:
            raise ValueError(f"t5_tokens is {self.t5_tokens}: this model's T5 reads from 2 to {most} tokens")

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

    def tokenize(self, texts: Sequence[str]) -> Ids:
        """Return token ids for each encoder; longer texts are cut off."""
        return tuple(
            jnp.asarray(self.tokenizers[name](list(texts), self.lengths["t5" if name == self._t5 else name]))
            for name in self.modules
        )

    def too_long(self, texts: Sequence[str]) -> list[str]:
        """Return a line of warning for every encoder that cuts a text off."""
        lines = []
        for name in self.modules:
            length = self.lengths["t5" if name == self._t5 else name]
            ids = self.tokenizers[name].backend(list(texts), verbose=False)["input_ids"]
            longest, text = max(zip(map(len, ids), texts, strict=True))
            if longest > length:
                lines.append(f"{name} reads {length} tokens and leaves out the rest of the {longest} of {text!r:.80}")
        return lines

    def __call__(
        self, params: Trees, texts: Sequence[str], sizes: Float[np.ndarray, "n s"] | None = None
    ) -> dict[str, Array]:
        """{"context": (n, l, d)}; for SDXL and SD3 "pooled" (n, p) too, for SDXL "time_ids": `sizes`."""
        trees = [params[name] for name in self.modules]
        return self._encode(is_low_precision(*trees))(trees, self.tokenize(texts), sizes)

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
            encodings = [Encoding(*parts) for parts in zip(self.modules.values(), trees, ids, strict=True)]
            if self.family == "sd":
                return stable_diffusion(encodings[0])
            if self.family == "sdxl":
                assert sizes is not None
                return sdxl(encodings, sizes)
            clips = [e for e in encodings if not isinstance(e.module, T5Encoder)]
            t5 = next((e for e in encodings if isinstance(e.module, T5Encoder)), None)
            return sd3(clips, t5, width=self.width, t5_tokens=self.lengths["t5"])


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
