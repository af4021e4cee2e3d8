"""A discriminator is heads on the features of a frozen network (projected GANs, 2111.01007; ADD, LADD, DMD2)."""

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
    """One small network for each feature map, the same at every place: a logit for every place of every map."""

    width: int = 64

    @nn.compact
    def __call__(self, features: Sequence[Float[Array, "b ... d"]]) -> Float[Array, "b k"]:
        logits = []
        for i, feature in enumerate(features):
            x = nn.LayerNorm(use_bias=False, use_scale=False)(feature.astype(jnp.float32))
            x = nn.silu(nn.Dense(self.width, dot_general=flat_dot, name=f"hidden_{i}")(x))
            logits.append(nn.Dense(1, dot_general=flat_dot, name=f"logit_{i}")(x).reshape(len(feature), -1))
        return jnp.concatenate(logits, axis=1)


def features(net: nn.Module, params: Any, x: Array, t: Array, cond: Any) -> list[Float[Array, "b ... d"]]:
    """What the blocks of a denoiser make of x: of a UNet down to its middle, of an MMDiT the picture's tokens."""

    def wanted(module: nn.Module, method: str) -> bool:
        return method == "__call__" and isinstance(module, _BLOCKS)

    _, seen = net.apply({"params": params}, x, t, cond, capture_intermediates=wanted, mutable=["intermediates"])
    calls = jax.tree.leaves(seen.get("intermediates", {}), is_leaf=lambda node: isinstance(node, tuple))
    if not calls:
        raise ValueError(f"a discriminator looks at the blocks of a UNet or an MMDiT; {type(net).__name__} has none")
    return [jax.tree.leaves(call)[0] for call in calls]
