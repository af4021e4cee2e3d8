"""What a stream knows of its prompts: each text is encoded once, and several are blended by weights."""

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
CAPACITY = 8  # texts in a blend: padded to, so that their number is no shape
REMEMBERED = 64  # texts


def lerp(parts: Array, weights: Array) -> Array:
    """sum w_i a_i / sum w_i over the leading axis."""
    return jnp.tensordot(weights / weights.sum(), parts, axes=1).astype(parts.dtype)


def slerp(parts: Array, weights: Array) -> Array:
    """On the arc between the vectors of the last axis, their length interpolated too; more than two one after another.

    Between a and b at angle w: sin((1 - s) w) / sin w a + sin(s w) / sin w b. What is almost parallel is interpolated
    linearly.
    """

    def join(held: tuple[Array, Array], new: tuple[Array, Array]) -> tuple[tuple[Array, Array], None]:
        (a, total), (b, weight) = held, new
        share = weight / jnp.maximum(total + weight, 1e-12)
        lengths = [jnp.linalg.norm(v, axis=-1, keepdims=True) for v in (a, b)]
        unit_a, unit_b = (v / jnp.maximum(n, 1e-12) for v, n in zip((a, b), lengths, strict=True))
        angle = jnp.arccos(jnp.clip(jnp.sum(unit_a * unit_b, axis=-1, keepdims=True), -1.0, 1.0))
        sine = jnp.maximum(jnp.sin(angle), 1e-12)
        arc = jnp.sin((1.0 - share) * angle) / sine * unit_a + jnp.sin(share * angle) / sine * unit_b
        arc = arc * ((1.0 - share) * lengths[0] + share * lengths[1])
        mixed = jnp.where(sine > 1e-4, arc, (1.0 - share) * a + share * b)
        return (jnp.where(weight > 0.0, mixed, a), total + weight), None

    wide = parts.astype(jnp.float32)
    held, _ = jax.lax.scan(join, (wide[0], weights[0]), (wide[1:], weights[1:]))
    return held[0].astype(parts.dtype)


class PromptCache:
    """The conditioning of texts for one pipeline and one picture size, one row each."""

    def __init__(self, pipe: Pipeline, size: tuple[int, int]) -> None:
        self.pipe, self.sizes = pipe, pipe.size_conditioning(size)
        self.encoded = 0  # how often a text encoder ran
        self._texts: OrderedDict[str, Cond] = OrderedDict()

    def __call__(self, net: Params, prompts: Weighted, how: Blend = "lerp") -> Cond:
        """Of several texts with weights above 0, with the network's keys and values (`Generator.precompute`).

        net: the denoiser's parameters.
        """
        parts = [self._encode(text) for text, _ in prompts]
        blank = CAPACITY - len(parts)
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *parts, *[parts[0]] * blank)
        weights = jnp.asarray([weight for _, weight in prompts] + [0.0] * blank, jnp.float32)
        return _blending(self.pipe.model)(net, stacked, weights, how=how)

    def negative(self, net: Params, text: str) -> Cond:
        """Of a negative prompt."""
        options: dict[str, Any] = {"empty": text == "", "guided": True}
        return _precomputing(self.pipe.model)(net, self.pipe.conditions([""], [text], self.sizes, **options)[1])

    def forget(self) -> None:
        """The text encoders have other parameters now."""
        self._texts.clear()

    def _encode(self, text: str) -> Cond:
        if text not in self._texts:
            self._texts[text] = self.pipe.encode_prompt([text], sizes=self.sizes[0])
            self.encoded += 1
            if len(self._texts) > REMEMBERED:
                self._texts.popitem(last=False)
        self._texts.move_to_end(text)
        return self._texts[text]


@cache
def _precomputing(model: LatentDiffusion) -> Any:
    """`Generator.precompute`, compiled once for all streams of a model."""
    return jax.jit(model.precompute)


@cache
def _blending(model: LatentDiffusion) -> Any:
    """(net, stacked, weights, how) -> the blend with the network's keys and values."""

    @partial(jax.jit, static_argnames="how")
    def blend(net: Params, stacked: Cond, weights: Array, how: Blend) -> Cond:
        mix = {"lerp": lerp, "slerp": slerp}[how]
        return model.precompute(net, {name: mix(leaf, weights) for name, leaf in stacked.items()})

    return blend
