"""The discriminator of adversarial distillation: heads on the features of a frozen network.

Projected GANs (arXiv:2111.01007) introduced it; ADD, LADD and DMD2 distil diffusion models with it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from flax import traverse_util
from jax import Array
from jaxtyping import Float

from lcm_jax.nets.embed import sinusoidal
from mmdit.blocks import flat_dot


class Heads(nn.Module):
    """The discriminator heads: one small MLP for each feature map, which gives a logit at every position of the map.

    A head is told the time and the text by projection (Miyato and Koyama 2018, 1802.05637), as those of ADD and LADD
    are: the logit of a hidden vector h is v . h + P(c) . h, where c holds the time's sinusoids and the pooled text.

    features: list of (b, ..., d). t: network time (b,). text: pooled text (b, d). Returns the logits of all maps and
    positions (b, k).

    >>> import jax, jax.numpy as jnp
    >>> from lcm_jax.nets.discriminator_heads import Heads
    >>> maps = [jax.ShapeDtypeStruct((2, 4, 4, 8), jnp.float32), jax.ShapeDtypeStruct((2, 6, 8), jnp.float32)]
    >>> condition = jnp.zeros(2), jnp.zeros((2, 5))
    >>> logits, _ = jax.eval_shape(Heads(width=4).init_with_output, jax.random.key(0), maps, *condition)
    >>> logits.shape
    (2, 22)
    """

    width: int = 64

    @nn.compact
    def __call__(
        self, features: Sequence[Float[Array, "b ... _"]], t: Float[Array, " b"], text: Float[Array, "b _"]
    ) -> Float[Array, "b k"]:
        condition = jnp.concatenate([sinusoidal(t, self.width), text.astype(jnp.float32)], axis=-1)
        logits = []
        for i, feature in enumerate(features):
            x = nn.LayerNorm(use_bias=False, use_scale=False)(feature.astype(jnp.float32))
            x = nn.silu(nn.Dense(self.width, dot_general=flat_dot, name=f"hidden_{i}")(x))
            condition_vector = nn.Dense(self.width, name=f"condition_{i}")(nn.silu(condition))
            agreement = jnp.einsum("b...d,bd->b...", x, condition_vector) / self.width**0.5
            logit = nn.Dense(1, dot_general=flat_dot, name=f"logit_{i}")(x)[..., 0] + agreement
            logits.append(logit.reshape(len(feature), -1))
        return jnp.concatenate(logits, axis=1)


def pooled_text(cond: Mapping[str, Array]) -> Float[Array, "b d"]:
    """Return one vector for each text: the pooled embedding where there is one, else the mean of the tokens.

    >>> import jax.numpy as jnp
    >>> from lcm_jax.nets.discriminator_heads import pooled_text
    >>> pooled_text({"context": jnp.ones((2, 77, 8))}).shape
    (2, 8)
    """
    return cond["pooled"] if "pooled" in cond else cond["context"].mean(1)


def features(net: nn.Module, params: Any, *inputs: Any) -> list[Float[Array, "b ... _"]]:
    """Return the outputs of a network's blocks: a UNet's down and middle blocks, an MMDiT's or CLIP's image tokens.

    They are in the order of the blocks' names, each its own array whether the network stacks its blocks or not. Raises
    ValueError for a network that has no such blocks.
    """
    _, state = net.apply({"params": params}, *inputs, mutable=["features"])
    sown = traverse_util.flatten_dict(state.get("features", {}))
    if not sown:
        raise ValueError(
            f"{type(net).__name__} has no blocks for a discriminator: use a UNet or an MMDiT as its feature network"
        )
    maps: list[Array] = []
    for path in sorted(sown, key=_natural):
        (value,) = sown[path]
        maps += list(value) if path[-1] == "tokens" and value.ndim == 4 else [value]  # blocks that nn.scan stacks
    return maps


def _natural(path: tuple[str, ...]) -> list[tuple[str, int]]:
    """Return a sorting key in which block 10 comes after block 2."""
    return [(name, int(number or 0)) for name, number in re.findall(r"(\D+)(\d*)", "/".join(path))]
