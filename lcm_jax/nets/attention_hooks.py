"""What a UNet's attentions look at, changed from outside: the text's keys and values given, or past frames remembered.

Both are interceptors around `apply`: the network and its parameters stay as they are. Layers stacked by nn.scan share
one path and are passed by.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from flax import traverse_util
from jax import Array
from jaxtyping import Float

from lcm_jax.nets.blocks import Attention
from lcm_jax.nets.unet import UNet

Tokens = dict[str, Float[Array, "b n c"]]  # "/"-joined path of a layer -> tokens


def keys_values(net: Any, params: Any, context: Float[Array, "b l d"]) -> Tokens:
    """Keys and values of every attention on the text, of a context: {path of the layer: (b, l, c)}.

    Nothing for networks other than the UNet: in an MMDiT the text changes from block to block.
    """
    if not isinstance(net, UNet):
        return {}
    flat = traverse_util.flatten_dict(params, sep="/")
    context = context.astype(net.dtype)
    return {
        path.removesuffix("/kernel"): context @ kernel.astype(net.dtype)
        for path, kernel in flat.items()
        if path.endswith(("attn2/to_k/kernel", "attn2/to_v/kernel")) and kernel.ndim == 2
    }


def given(tokens: Tokens) -> contextlib.AbstractContextManager[None]:
    """Within it the layers of `keys_values` give their tokens and are not computed."""

    def call(next_function: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        found = tokens.get("/".join(context.module.path)) if isinstance(context.module, nn.Dense) else None
        return next_function(*args, **kwargs) if found is None else found

    return nn.intercept_methods(call)


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Tokens that self-attention looked at before, and room for those that it looks at now.

    StreamV2V's extended self-attention (2405.15757, section 3.3), with the tokens before their projection in the bank.
    past: of each layer; layers without look at their own only. cold: past holds nothing yet, and their own tokens are
    seen twice, which changes no attention. seen: filled while `apply` is traced.
    """

    past: Mapping[str, Array] = field(default_factory=dict)
    cold: Array | bool = False
    seen: Tokens = field(default_factory=dict)


def remembering(memory: Memory) -> contextlib.AbstractContextManager[None]:
    """Within it every self-attention of a UNet looks at its own tokens and at those that the memory has for it."""

    def call(next_function: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        module = context.module
        if not isinstance(module, Attention) or context.method_name != "__call__" or args[0] is not args[1]:
            return next_function(*args, **kwargs)
        tokens, path = args[0], "/".join(module.path)
        memory.seen[path] = tokens
        if path not in memory.past:
            return next_function(*args, **kwargs)
        past = jnp.where(memory.cold, tokens, memory.past[path].astype(tokens.dtype))
        return next_function(tokens, jnp.concatenate([tokens, past], axis=1))

    return nn.intercept_methods(call)
