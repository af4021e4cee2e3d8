"""The discriminator of adversarial distillation: trained heads on the features of a frozen network."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from lcm_jax.nets.discriminator_heads import Heads, pooled_text
from lcm_jax.typing import Array, Cond, Image, Key, Params


@dataclass(frozen=True, kw_only=True)
class Discriminator:
    """Heads on features of a frozen network.

    features: (params, x, t, cond) -> features. net: the student's network, for the shape of x. frozen: {"eyes":
    parameters of a separate feature extractor}, or empty: the features are those of the objective's base network.
    """

    features: Callable[[Params, Image, Array, Cond], list[Array]]
    net: Any
    frozen: dict[str, Params]

    def bind(self, frozen: Params) -> Callable[..., Array]:
        """Return the `Critic` of the objectives, which computes logits from the heads' parameters."""
        extractor = frozen["eyes"] if self.frozen else None

        def critic(heads: Params, base: Params, x: Image, t: Array, cond: Cond) -> Array:
            features = self.features(base if extractor is None else extractor, x, t, cond)
            logits: Array = Heads().apply({"params": heads}, features, t, pooled_text(cond))  # type: ignore[assignment]
            return logits

        return critic

    def init(self, key: Key, teacher: Params, null: Cond) -> Params:
        """Return random parameters of the heads."""
        side, channels = self.net.config.sample_size, self.net.config.in_channels
        base = self.frozen["eyes"] if self.frozen else teacher

        def features(base: Params, null: Cond) -> list[Array]:
            return self.features(base, jnp.zeros((1, side, side, channels)), jnp.zeros(1), null)

        shapes = jax.eval_shape(features, base, null)
        maps = [jnp.zeros(leaf.shape) for leaf in shapes]
        return Heads().init(key, maps, jnp.zeros(1), jnp.zeros(pooled_text(null).shape))["params"]
