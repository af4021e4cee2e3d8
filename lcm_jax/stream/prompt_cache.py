"""The text conditioning of a stream: each text is encoded once, and several are blended by weights."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from functools import cache, partial
from typing import Any, Literal

import jax
import jax.numpy as jnp

from lcm_jax.inference.pipeline import Pipeline
from lcm_jax.models.latent_diffusion import LatentDiffusion
from lcm_jax.typing import Array, Cond, Params

Blend = Literal["lerp", "slerp"]
Weighted = Sequence[tuple[str, float]]
CAPACITY = 8  # texts of a blend: all are padded to it, so that a change of their number compiles nothing
REMEMBERED = 64  # texts of which the encoding is kept, those used last


def lerp(parts: Array, weights: Array) -> Array:
    """Return the weighted mean sum w_i a_i / sum w_i over the leading axis.

    >>> import jax.numpy as jnp
    >>> lerp(jnp.array([[0.0, 4.0], [4.0, 0.0]]), jnp.array([1.0, 3.0])).tolist()
    [3.0, 1.0]
    """
    return jnp.tensordot(weights / weights.sum(), parts, axes=1).astype(parts.dtype)


def slerp(parts: Array, weights: Array) -> Array:
    """Return vectors of the last axis blended on the arc between them, their lengths interpolated linearly.

    Unit vectors a and b at angle w give (sin((1 - s) w) a + sin(s w) b) / sin w, s being b's share of the weights. More
    than two vectors are blended one after another; almost parallel ones are interpolated linearly.

    >>> import jax.numpy as jnp
    >>> middle = slerp(jnp.array([[1.0, 0.0], [0.0, 3.0]]), jnp.array([0.5, 0.5]))
    >>> round(float(jnp.linalg.norm(middle)), 4)
    2.0
    """

    def blend_next(blend: tuple[Array, Array], new: tuple[Array, Array]) -> tuple[tuple[Array, Array], None]:
        (a, total), (b, weight) = blend, new
        share = weight / jnp.maximum(total + weight, 1e-12)
        lengths = [jnp.linalg.norm(v, axis=-1, keepdims=True) for v in (a, b)]
        unit_a, unit_b = (v / jnp.maximum(n, 1e-12) for v, n in zip((a, b), lengths, strict=True))
        angle = jnp.arccos(jnp.clip(jnp.sum(unit_a * unit_b, axis=-1, keepdims=True), -1.0, 1.0))
        sine = jnp.maximum(jnp.sin(angle), 1e-12)
        arc = jnp.sin((1.0 - share) * angle) / sine * unit_a + jnp.sin(share * angle) / sine * unit_b
        arc = arc * ((1.0 - share) * lengths[0] + share * lengths[1])
        mixed = jnp.where(sine > 1e-4, arc, (1.0 - share) * a + share * b)
        return (jnp.where(weight > 0.0, mixed, a), total + weight), None

    vectors = parts.astype(jnp.float32)
    (blended, _), _ = jax.lax.scan(blend_next, (vectors[0], weights[0]), (vectors[1:], weights[1:]))
    return blended.astype(parts.dtype)


class PromptCache:
    """A cache of the conditioning of texts, one row each, for one pipeline and one picture size.

    size: (height, width) in pixels. encoded: how often a text encoder has run.
    """

    def __init__(self, pipe: Pipeline, size: tuple[int, int]) -> None:
        self.pipe, self.sizes = pipe, pipe.size_conditioning(size)
        self.encoded = 0
        # All texts of a stream have one shape: of one with a syntax the first chunk of 75 tokens is read.
        self._one_chunk: dict[str, Any] = {} if pipe.prompt_syntax is None else {"most_chunks": 1}
        self._texts: OrderedDict[str, Cond] = OrderedDict()

    def __call__(self, net: Params, prompts: Weighted, how: Blend = "lerp") -> Cond:
        """Return the blend of texts, with the denoiser's keys and values of it (`LatentDiffusion.precompute`).

        net: the denoiser's parameters. prompts: at most CAPACITY (text, weight) pairs, the weights above 0. how: "lerp"
        or "slerp".
        """
        parts = [self._encode(text) for text, _ in prompts]
        padding = CAPACITY - len(parts)
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *parts, *[parts[0]] * padding)
        weights = jnp.asarray([weight for _, weight in prompts] + [0.0] * padding, jnp.float32)
        return _blending(self.pipe.model)(net, stacked, weights, how=how)

    def negative(self, net: Params, text: str) -> Cond:
        """Return the conditioning of a negative prompt, with the denoiser's keys and values of it."""
        options: dict[str, Any] = {"empty": text == "", "guided": True, **self._one_chunk}
        return _precomputing(self.pipe.model)(net, self.pipe.conditions([""], [text], self.sizes, **options)[1])

    def forget(self) -> None:
        """Discard the encoded texts, when the text encoders' parameters have changed."""
        self._texts.clear()

    def _encode(self, text: str) -> Cond:
        if text not in self._texts:
            self._texts[text] = self.pipe.encode_prompt([text], sizes=self.sizes[0], **self._one_chunk)
            self.encoded += 1
            if len(self._texts) > REMEMBERED:
                self._texts.popitem(last=False)
        self._texts.move_to_end(text)
        return self._texts[text]


@cache
def _precomputing(model: LatentDiffusion) -> Any:
    """Return `LatentDiffusion.precompute`, compiled once for all streams of a model."""
    return jax.jit(model.precompute)


@cache
def _blending(model: LatentDiffusion) -> Any:
    """Return the compiled function (net, stacked, weights, how) -> the blend, with the network's keys and values."""

    @partial(jax.jit, static_argnames="how")
    def blend(net: Params, stacked: Cond, weights: Array, how: Blend) -> Cond:
        mix = {"lerp": lerp, "slerp": slerp}[how]
        return model.precompute(net, {name: mix(leaf, weights) for name, leaf in stacked.items()})

    return blend
