"""Changes to a UNet's attention from outside: precomputed keys and values of the text, and tokens of past frames.

Both are interceptors around `apply`: the network and its parameters do not change. Layers that nn.scan stacks share one
path and keep their usual attention.
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

Tokens = dict[str, Float[Array, "b _ _"]]  # "/"-joined path of a layer -> tokens


def keys_values(net: Any, params: Any, context: Float[Array, "b l d"]) -> Tokens:
    """Return the keys and values of every cross-attention for a context: {path of the layer: (b, l, c)}.

    For networks other than the UNet it is empty: in an MMDiT the text changes from block to block.
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


def use_keys_values(tokens: Tokens) -> contextlib.AbstractContextManager[None]:
    """Return a context manager in which the layers named in `tokens` return these tokens instead of computing them.

    tokens: the keys and values of `keys_values`.

    >>> import jax
    >>> from lcm_jax.nets import UNet, UNetConfig, example_inputs
    >>> from lcm_jax.nets.attention_hooks import use_keys_values, keys_values
    >>> sizes = dict(block_out_channels=(4,), cross_attention_dim=4, attention_head_dim=1, norm_num_groups=2)
    >>> blocks = dict(down_block_types=("CrossAttnDownBlock2D",), up_block_types=("UpBlock2D",), mid_block_type=None)
    >>> net = UNet(UNetConfig(**sizes, **blocks, layers_per_block=1))
    >>> x, t, cond = example_inputs(net.config)
    >>> def denoise(params):
    ...     with use_keys_values(keys_values(net, params, cond["context"])):
    ...         return net.apply({"params": params}, x, t, cond)
    >>> jax.eval_shape(denoise, jax.eval_shape(net.init, jax.random.key(0), x, t, cond)["params"]).shape
    (1, 8, 8, 4)
    """

    def call(next_function: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        output = tokens.get("/".join(context.module.path)) if isinstance(context.module, nn.Dense) else None
        return next_function(*args, **kwargs) if output is None else output

    return nn.intercept_methods(call)


@dataclass(frozen=True, kw_only=True)
class Memory:
    """The self-attention tokens of past frames, and a dict that collects those of this frame.

    This is the feature bank of StreamV2V's extended self-attention (arXiv:2405.15757, section 3.3); it stores tokens
    before their projection to keys and values. past: {path of the layer: tokens}; layers without an entry attend only
    to their own tokens. cold: true while `past` has no values yet; then a layer attends to its own tokens twice, which
    does not change its result. tokens: this frame's tokens, filled while `apply` is traced.
    """

    past: Mapping[str, Array] = field(default_factory=dict)
    cold: Array | bool = False
    tokens: Tokens = field(default_factory=dict)


def extended_attention(memory: Memory) -> contextlib.AbstractContextManager[None]:
    """Return a context manager in which every self-attention of a UNet also attends to the past tokens in `memory`.

    It stores this frame's tokens in `memory.tokens`.
    """

    def call(next_function: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        module = context.module
        if not isinstance(module, Attention) or context.method_name != "__call__" or args[0] is not args[1]:
            return next_function(*args, **kwargs)
        tokens, path = args[0], "/".join(module.path)
        memory.tokens[path] = tokens
        if path not in memory.past:
            return next_function(*args, **kwargs)
        past = jnp.where(memory.cold, tokens, memory.past[path].astype(tokens.dtype))
        return next_function(tokens, jnp.concatenate([tokens, past], axis=1))

    return nn.intercept_methods(call)
