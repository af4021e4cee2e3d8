"""The discriminator of adversarial distillation: heads on the features of a frozen network."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from lcm_jax.nets.discriminator_heads import Heads
from lcm_jax.typing import Array, Cond, Image, Key, Params


@dataclass(frozen=True, kw_only=True)
class Discriminator:
    """Heads on features; `frozen` has the parameters these are computed with, if they are not the objective's base."""

    features: Callable[[Params, Image, Array, Cond], list[Array]]
    net: Any
    frozen: dict[str, Params]

    def bind(self, frozen: Params) -> Callable[..., Array]:
        """The `Critic` that objectives ask."""
        eyes = frozen["eyes"] if self.frozen else None

        def logits_of(heads: Params, base: Params, x: Image, t: Array, cond: Cond) -> Array:
            hidden = self.features(base if eyes is None else eyes, x, t, cond)
            logits: Array = Heads().apply({"params": heads}, hidden)  # type: ignore[assignment]
            return logits

        return logits_of

    def init(self, key: Key, teacher: Params, null: Cond) -> Params:
        """Random heads."""
        side, channels = self.net.config.sample_size, self.net.config.in_channels
        base = self.frozen["eyes"] if self.frozen else teacher

        def hidden(base: Params, null: Cond) -> list[Array]:
            return self.features(base, jnp.zeros((1, side, side, channels)), jnp.zeros(1), null)

        shapes = jax.eval_shape(hidden, base, null)
        return Heads().init(key, [jnp.zeros(leaf.shape) for leaf in shapes])["params"]
