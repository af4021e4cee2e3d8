"""Low-rank adapters (Hu 2021, arXiv:2106.09685) as a tree beside the parameters: W' = W + scale * alpha / r * up down.

Adapters are `{path of a kernel: {"down", "up", "alpha"}}`, an ordinary pytree to differentiate, average, shard and
save; `merge` gives parameters that any network takes unchanged. Shapes follow the kernel (axes in JAX's order):

    dense         kernel (i, o)         down (i, r)         up (r, o)          alpha ()
    convolution   kernel (h, w, i, o)   down (h, w, i, r)   up (1, 1, r, o)    alpha ()
    stacked       one leading axis more on each of them, alpha too

alpha is a constant that travels with the weights: `merge` passes it no gradient.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from lcm_jax.typing import Array, Key, Params

Adapters = dict[str, dict[str, Array]]

DEFAULT_TARGETS = (
    r"(^|/)(to_q|to_k|to_v|to_out_0|proj_in|proj_out|ff/net_0/proj|ff/net_2|conv1|conv2|conv_shortcut"
    r"|(down|up)samplers_0/conv|time_emb_proj)/kernel$"
)
"""The layers of LCM-LoRA (Luo 2023, arXiv:2311.05556, and its code): 67.25M parameters on SD1.5 at rank 64."""


def few(what: str, items: Sequence[str], shown: int = 5) -> str:
    """`3 what: a, b, c`, cut after a few."""
    more = f", and {len(items) - shown} more" if len(items) > shown else ""
    return f"{len(items)} {what}: {', '.join(items[:shown])}{more}"


def stacked_axes(kernel: Any) -> int:
    """Leading axes in front of a dense (i, o) or convolution (h, w, i, o) kernel: 1 if layers are stacked."""
    return (kernel.ndim - 2) % 2


def shapes(kernel: Any, rank: int) -> dict[str, tuple[int, ...]]:
    """Shapes of down, up and alpha for a kernel (anything with a shape and ndim)."""
    lead = stacked_axes(kernel)
    stack, window = tuple(kernel.shape[:lead]), tuple(kernel.shape[lead:-2])
    inputs, outputs = kernel.shape[-2:]
    return {
        "down": (*stack, *window, inputs, rank),
        "up": (*stack, *(1 for _ in window), rank, outputs),
        "alpha": stack,
    }


def init(
    key: Key, params: Params, *, rank: int, alpha: float | None = None, targets: str = DEFAULT_TARGETS
) -> Adapters:
    """Adapters for every kernel whose "/"-joined path the regex `targets` finds, in float32 for any parameters.

    down is uniform in +-1/sqrt(fan_in), as PEFT does; up is zero, so the network starts unchanged. alpha: None is
    `rank`, a factor alpha / rank of one.
    """
    if rank < 1:
        raise ValueError(f"rank must be at least 1, got {rank}")
    flat = traverse_util.flatten_dict(params, sep="/")
    paths = sorted(path for path in flat if path.endswith("kernel") and re.search(targets, path))
    if not paths:
        kernels = [path for path in flat if path.endswith("kernel")]
        raise ValueError(f"targets {targets!r} match none of {few('kernels', kernels)}")
    adapters: Adapters = {}
    for path, path_key in zip(paths, jax.random.split(key, len(paths)), strict=True):
        shape = shapes(flat[path], rank)
        bound = float(np.prod(flat[path].shape[stacked_axes(flat[path]) : -1])) ** -0.5
        adapters[path] = {
            "down": jax.random.uniform(path_key, shape["down"], jnp.float32, -bound, bound),
            "up": jnp.zeros(shape["up"], jnp.float32),
            "alpha": jnp.full(shape["alpha"], rank if alpha is None else alpha, jnp.float32),
        }
    return adapters


def delta(adapter: dict[str, Array]) -> Array:
    """alpha / r * up down, shaped as the kernel, in float32."""
    down, up = adapter["down"].astype(jnp.float32), adapter["up"].astype(jnp.float32)
    factor = jax.lax.stop_gradient(adapter["alpha"].astype(jnp.float32)) / down.shape[-1]
    # A k x k convolution to r channels and then a 1 x 1 one are a k x k convolution with the product of their kernels.
    product = jnp.matmul(down, up, precision=jax.lax.Precision.HIGHEST)
    return product * factor.reshape(factor.shape + (1,) * (product.ndim - factor.ndim))


def check(adapters: Adapters, params: Params) -> None:
    """ValueError that names the adapters without a kernel of their shape in `params`."""
    flat = traverse_util.flatten_dict(params, sep="/")
    unknown = [path for path in adapters if path not in flat]
    if unknown:
        raise ValueError(f"the network has no kernel for {few('adapters', unknown)}")
    wrong = []
    for path, adapter in adapters.items():
        want = shapes(flat[path], adapter["down"].shape[-1])
        if {name: tuple(x.shape) for name, x in adapter.items()} != want:
            found = tuple(tuple(adapter[name].shape) if name in adapter else None for name in ("down", "up"))
            wrong.append(f"{path} (kernel {tuple(flat[path].shape)}, down and up {found})")
    if wrong:
        raise ValueError(f"shapes do not fit for {few('adapters', wrong)}")


def merge_all(params: Params, parts: Sequence[tuple[Adapters, float | Array]]) -> Params:
    """W + sum of scale_i * delta_i over (adapters, scale), added in float32; each leaf keeps its dtype.

    LCM-LoRA with a style: theta + 1.0 tau_LCM + 0.8 tau_style (arXiv:2311.05556, section 3.2). Scales may be traced.
    """
    flat = traverse_util.flatten_dict(params, sep="/")
    added: dict[str, Array] = {}
    for adapters, scale in parts:
        check(adapters, params)
        for path, adapter in adapters.items():
            term = scale * delta(adapter)
            added[path] = added[path] + term if path in added else term
    for path, change in added.items():
        flat[path] = (flat[path].astype(jnp.float32) + change).astype(flat[path].dtype)
    return traverse_util.unflatten_dict(flat, sep="/")


def merge(params: Params, adapters: Adapters, scale: float | Array = 1.0) -> Params:
    """Parameters with the adapters added: W + scale * alpha / r * up down."""
    return merge_all(params, [(adapters, scale)])


def count(adapters: Adapters) -> int:
    """Number of trained parameters (down and up)."""
    return sum(int(np.prod(adapter[name].shape)) for adapter in adapters.values() for name in ("down", "up"))
