"""The discriminator of adversarial distillation: heads on the features of a frozen network.

Projected GANs (arXiv:2111.01007) introduced it; ADD, LADD and DMD2 distil diffusion models with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from lcm_jax.nets.blocks import DownBlock, MidBlock
from mmdit.blocks import JointBlock, flat_dot

_BLOCKS = (DownBlock, MidBlock, JointBlock)


class Heads(nn.Module):
    """The discriminator heads: one small MLP for each feature map, which gives a logit at every position of the map.

    features: list of (b, ..., d). Returns the logits of all maps and positions (b, k).

    >>> import jax, jax.numpy as jnp
    >>> from lcm_jax.nets.discriminator_heads import Heads
    >>> maps = [jax.ShapeDtypeStruct((2, 4, 4, 8), jnp.float32), jax.ShapeDtypeStruct((2, 6, 8), jnp.float32)]
    >>> logits, _ = jax.eval_shape(Heads(width=4).init_with_output, jax.random.key(0), maps)
    >>> logits.shape
    (2, 22)
    """

    width: int = 64

    @nn.compact
    def __call__(self, features: Sequence[Float[Array, "b ... _"]]) -> Float[Array, "b k"]:
        logits = []
        for i, feature in enumerate(features):
            x = nn.LayerNorm(use_bias=False, use_scale=False)(feature.astype(jnp.float32))
            x = nn.silu(nn.Dense(self.width, dot_general=flat_dot, name=f"hidden_{i}")(x))
            logits.append(nn.Dense(1, dot_general=flat_dot, name=f"logit_{i}")(x).reshape(len(feature), -1))
        return jnp.concatenate(logits, axis=1)


def features(net: nn.Module, params: Any, x: Array, t: Array, cond: Any) -> list[Float[Array, "b ... _"]]:
    """Return the outputs of a denoiser's blocks for x: a UNet's down and middle blocks, or an MMDiT's image tokens.

    Raises ValueError for a network that has no such blocks.
    """

    def is_block(module: nn.Module, method: str) -> bool:
        return method == "__call__" and isinstance(module, _BLOCKS)

    _, state = net.apply({"params": params}, x, t, cond, capture_intermediates=is_block, mutable=["intermediates"])
    calls = jax.tree.leaves(state.get("intermediates", {}), is_leaf=lambda node: isinstance(node, tuple))
    if not calls:
        raise ValueError(
            f"{type(net).__name__} has no blocks for a discriminator: use a UNet or an MMDiT as its feature network"
        )
    return [jax.tree.leaves(call)[0] for call in calls]
