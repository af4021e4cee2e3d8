"""Low-rank adapters (LoRA, Hu 2021, arXiv:2106.09685) as a tree beside the parameters.

    W' = W + scale * alpha / r * down @ up                   (B A in the paper, whose vectors are columns)

Adapters are `{path of a kernel: {"down", "up", "alpha"}}`, an ordinary pytree to differentiate, average, shard and
save; `merge` returns parameters that any network takes unchanged. Shapes follow the kernel (axes in JAX's order):

    dense         kernel (i, o)         down (i, r)         up (r, o)          alpha ()
    convolution   kernel (h, w, i, o)   down (h, w, i, r)   up (1, 1, r, o)    alpha ()
    stacked       one leading axis more on each array, also on alpha

alpha is a constant that is stored with the weights: it gets no gradient. `extract` goes the other way, from the
difference of two checkpoints to adapters.
"""

from __future__ import annotations

import contextlib
import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from lcm_jax.runtime.messages import few
from lcm_jax.typing import Array, Key, Params, Shapes
from mmdit.blocks import flat_dot

Adapters = dict[str, dict[str, Array | np.ndarray]]

DEFAULT_TARGETS = (
    r"(^|/)(to_q|to_k|to_v|to_out_0|proj_in|proj_out|ff/net_0/proj|ff/net_2|conv1|conv2|conv_shortcut"
    r"|(down|up)samplers_0/conv|time_emb_proj)/kernel$"
)
"""The layers that LCM-LoRA adapts (Luo 2023, arXiv:2311.05556, and its code): 67.25M parameters on SD1.5 at rank 64."""

MMDIT_TARGETS = r"(^|/)attn2?/(to_q|to_k|to_v|to_out_0|add_q_proj|add_k_proj|add_v_proj|to_add_out)/kernel$"
"""Every attention layer of SD3's MMDiT, for image and text tokens, as in diffusers' training script."""

CLIP_TARGETS = r"(^|/)self_attn/(q_proj|k_proj|v_proj|out_proj)/kernel$"
"""The attention layers of a CLIP text encoder."""


def stacked_axes(kernel: Any) -> int:
    """Return the number of axes in front of a dense (i, o) or convolution (h, w, i, o) kernel: 1 if layers are stacked.

    >>> import numpy as np
    >>> from lcm_jax import lora
    >>> [lora.stacked_axes(np.zeros(shape)) for shape in [(4, 6), (2, 4, 6), (3, 3, 4, 6), (2, 3, 3, 4, 6)]]
    [0, 1, 0, 1]
    """
    return (kernel.ndim - 2) % 2


def shapes(kernel: Any, rank: int) -> dict[str, tuple[int, ...]]:
    """Return the shapes of down, up and alpha for a kernel (any object with a shape and ndim).

    >>> import numpy as np
    >>> from lcm_jax import lora
    >>> lora.shapes(np.zeros((4, 6)), rank=2)
    {'down': (4, 2), 'up': (2, 6), 'alpha': ()}
    >>> lora.shapes(np.zeros((3, 3, 4, 6)), rank=2)
    {'down': (3, 3, 4, 2), 'up': (1, 1, 2, 6), 'alpha': ()}
    """
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
    """Return new float32 adapters for every kernel whose "/"-joined path matches the regex `targets` (re.search).

    down is uniform in +-1/sqrt(fan_in), as in PEFT; up is zero, so the network starts unchanged. alpha: None is `rank`,
    which makes the factor alpha / rank one. Raises ValueError if rank is below 1 or no kernel matches.

    >>> import jax, jax.numpy as jnp
    >>> from lcm_jax import lora
    >>> params = {"attn1": {"to_q": {"kernel": jnp.ones((4, 6)), "bias": jnp.ones(6)}}}
    >>> adapters = lora.init(jax.random.key(0), params, rank=2)
    >>> {path: adapter["down"].shape for path, adapter in adapters.items()}
    {'attn1/to_q/kernel': (4, 2)}
    """
    if rank < 1:
        raise ValueError(f"rank must be at least 1, got {rank}")
    flat = traverse_util.flatten_dict(params, sep="/")
    paths = _targeted(flat, targets)
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


def _targeted(flat: Mapping[str, Any], targets: str) -> list[str]:
    """Return the paths of the kernels that `targets` matches; ValueError if there are none."""
    kernels = [path for path in sorted(flat) if path.endswith("kernel")]
    paths = [path for path in kernels if re.search(targets, path)]
    if not paths:
        raise ValueError(f"targets {targets!r} match none of {few('kernels', kernels)}")
    return paths


def delta(adapter: dict[str, Array | np.ndarray]) -> Array:
    """Return the change of a kernel, alpha / r * down @ up, in float32 and in the shape of the kernel.

    >>> import jax.numpy as jnp
    >>> from lcm_jax import lora
    >>> adapter = {"down": jnp.ones((3, 2)), "up": jnp.ones((2, 2)), "alpha": jnp.asarray(1.0)}
    >>> lora.delta(adapter).tolist()
    [[1.0, 1.0], [1.0, 1.0], [1.0, 1.0]]
    """
    down, up = adapter["down"].astype(jnp.float32), adapter["up"].astype(jnp.float32)
    factor = jax.lax.stop_gradient(adapter["alpha"].astype(jnp.float32)) / down.shape[-1]
    # A k x k convolution to r channels followed by a 1 x 1 convolution equals one k x k convolution with the product of
    # their kernels.
    product = jnp.matmul(down, up, precision=jax.lax.Precision.HIGHEST)
    return product * factor.reshape(factor.shape + (1,) * (product.ndim - factor.ndim))


def check_adapters(adapters: Adapters, params: Params | Shapes) -> None:
    """Raise ValueError unless every adapter has a kernel of its shape in `params`; the message names the others.

    >>> import jax.numpy as jnp
    >>> from lcm_jax import lora
    >>> adapter = {"down": jnp.ones((4, 2)), "up": jnp.ones((2, 6)), "alpha": jnp.asarray(2.0)}
    >>> lora.check_adapters({"to_q/kernel": adapter}, {"to_q": {"kernel": jnp.ones((4, 6))}})
    >>> lora.check_adapters({"to_q/kernel": adapter}, {"to_k": {"kernel": jnp.ones((4, 6))}})
    Traceback (most recent call last):
        ...
    ValueError: the network has no kernel for 1 adapters (to_q/kernel)
    """
    flat = traverse_util.flatten_dict(params, sep="/")
    unknown = [path for path in adapters if path not in flat]
    if unknown:
        raise ValueError(f"the network has no kernel for {few('adapters', unknown)}")
    misshaped = []
    for path, adapter in adapters.items():
        expected = shapes(flat[path], adapter["down"].shape[-1])
        if {name: tuple(x.shape) for name, x in adapter.items()} != expected:
            actual = tuple(tuple(adapter[name].shape) if name in adapter else None for name in ("down", "up"))
            misshaped.append(f"{path} (kernel {tuple(flat[path].shape)}, down and up {actual})")
    if misshaped:
        raise ValueError(f"shapes do not fit for {few('adapters', misshaped)}")


def merge_all(params: Params, parts: Sequence[tuple[Adapters, float | Array]]) -> Params:
    """Return the parameters with several sets of adapters added: W + sum_i scale_i * delta_i, over (adapters, scale).

    The sum is computed in float32; each parameter keeps its dtype. LCM-LoRA with a style is
    theta + 1.0 tau_LCM + 0.8 tau_style (arXiv:2311.05556, section 3.2). Scales may be traced. Raises ValueError if an
    adapter fits no kernel (`check_adapters`).

    >>> import jax.numpy as jnp
    >>> from lcm_jax import lora
    >>> params = {"to_q": {"kernel": jnp.zeros((1, 2))}}
    >>> lcm = {"to_q/kernel": {"down": jnp.ones((1, 1)), "up": jnp.ones((1, 2)), "alpha": jnp.asarray(1.0)}}
    >>> style = {"to_q/kernel": {"down": jnp.ones((1, 1)), "up": jnp.ones((1, 2)), "alpha": jnp.asarray(4.0)}}
    >>> lora.merge_all(params, [(lcm, 1.0), (style, 0.5)])["to_q"]["kernel"].tolist()
    [[3.0, 3.0]]
    """
    flat = traverse_util.flatten_dict(params, sep="/")
    changes: dict[str, Array] = {}
    for adapters, scale in parts:
        check_adapters(adapters, params)
        for path, adapter in adapters.items():
            term = scale * delta(adapter)
            changes[path] = changes[path] + term if path in changes else term
    for path, change in changes.items():
        flat[path] = (flat[path].astype(jnp.float32) + change).astype(flat[path].dtype)
    return traverse_util.unflatten_dict(flat, sep="/")


def merge(params: Params, adapters: Adapters, scale: float | Array = 1.0) -> Params:
    """Return the parameters with the adapters added: W + scale * alpha / r * down @ up.

    >>> import jax.numpy as jnp
    >>> from lcm_jax import lora
    >>> params = {"to_q": {"kernel": jnp.zeros((1, 2))}}
    >>> adapters = {"to_q/kernel": {"down": jnp.ones((1, 1)), "up": jnp.ones((1, 2)), "alpha": jnp.asarray(1.0)}}
    >>> lora.merge(params, adapters, scale=0.5)["to_q"]["kernel"].tolist()
    [[0.5, 0.5]]
    """
    return merge_all(params, [(adapters, scale)])


@partial(jax.tree_util.register_dataclass, data_fields=("key",), meta_fields=("rate",))
@dataclass(frozen=True, kw_only=True)
class Dropout:
    """Dropout on the input of every adapter, as in PEFT: a share `rate` becomes zero, the rest is divided by 1 - rate.

    With one key an adapter draws the same mask in every call, so that a student and its target use the same masks (iCT,
    arXiv:2310.14189, section 3.2).

    >>> import jax
    >>> import jax.numpy as jnp
    >>> from lcm_jax import lora
    >>> dropped = lora.Dropout(key=jax.random.key(0), rate=0.5)(jnp.ones((1, 64)), "to_q/kernel")
    >>> sorted(set(dropped.ravel().tolist()))
    [0.0, 2.0]
    """

    key: Key
    rate: float

    def __call__(self, x: Array, path: str) -> Array:
        """Return the input `x` of the adapter at `path` after dropout."""
        key = jax.random.fold_in(self.key, zlib.crc32(path.encode()))
        keep = jax.random.bernoulli(key, 1.0 - self.rate, x.shape)
        return jnp.where(keep, x / (1.0 - self.rate), jnp.zeros_like(x))


class Adapted(NamedTuple):
    """Parameters and adapters that are not merged, y = W x + alpha / r up(down(x)): a tree for `branches`.

    Training adapters this way computes no gradient of the kernels and makes no second copy of them; merging in every
    step would do both.
    """

    params: Params
    adapters: Adapters
    dropout: Dropout | None = None


def branches(adapters: Adapters, dropout: Dropout | None = None) -> contextlib.AbstractContextManager[None]:
    """Return a context in which every flax Dense and Conv with an adapter gives y + alpha / r * up(down(x)).

    Other layers are unchanged. dropout: applied to the x of the adapters. Raises ValueError for adapters of stacked
    layers, since inside a scan the layer's index is not known.

    >>> import flax.linen as nn, jax.numpy as jnp
    >>> from lcm_jax import lora
    >>> net = nn.Sequential([nn.Dense(2)])
    >>> params = {"layers_0": {"kernel": jnp.eye(2), "bias": jnp.zeros(2)}}
    >>> adapters = {"layers_0/kernel": {"down": jnp.ones((2, 1)), "up": jnp.ones((1, 2)), "alpha": jnp.asarray(1.0)}}
    >>> with lora.branches(adapters):
    ...     y = net.apply({"params": params}, jnp.asarray([1.0, 2.0]))
    >>> y.tolist()
    [4.0, 5.0]
    """
    stacked = [path for path, adapter in adapters.items() if jnp.ndim(adapter["alpha"])]
    if stacked:
        raise ValueError(f"{few('adapters', stacked)} are of stacked layers: merge them, or build the network unrolled")

    inside = False  # the down projection is a Dense or Conv too, and has no adapter

    def call(next_function: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        nonlocal inside
        y, module = next_function(*args, **kwargs), context.module
        if inside:
            return y
        path = "/".join((*module.path, "kernel"))
        adapter = None
        if context.method_name == "__call__" and isinstance(module, (nn.Dense, nn.Conv)):
            adapter = adapters.get(path)
        if adapter is None:
            return y
        x = args[0] if dropout is None else dropout(args[0], path)
        rank, outputs = adapter["up"].shape[-2:]
        down_layer = module.clone(parent=None, name=None, features=rank, use_bias=False)
        inside = True
        try:
            z: Any = down_layer.apply({"params": {"kernel": adapter["down"]}}, x)
        finally:
            inside = False
        up = jax.lax.stop_gradient(adapter["alpha"]) / rank * adapter["up"].reshape(rank, outputs)
        return y + flat_dot(z, jnp.asarray(up, z.dtype)).astype(y.dtype)

    return nn.intercept_methods(call)


def count(adapters: Adapters | Shapes) -> int:
    """Return the number of trained parameters (down and up, without alpha).

    >>> import jax.numpy as jnp
    >>> from lcm_jax import lora
    >>> lora.count({"to_q/kernel": {"down": jnp.ones((4, 2)), "up": jnp.ones((2, 6)), "alpha": jnp.asarray(2.0)}})
    20
    """
    return sum(int(np.prod(adapter[name].shape)) for adapter in adapters.values() for name in ("down", "up"))


class Extraction(NamedTuple):
    """The result of `extract`.

    relative_error: kernel -> |change - LoRA| / |change| in the Frobenius norm, 0 if nothing is lost. untouched: the
    paths of the parameters that changed but get no adapter, so that the LoRA leaves them as they are in the base.
    """

    adapters: Adapters
    relative_error: dict[str, float]
    untouched: list[str]


def extract(
    base: Params, tuned: Params, *, rank: int, targets: str = DEFAULT_TARGETS, energy: float | None = None
) -> Extraction:
    """Return the LoRA that turns the checkpoint `base` into `tuned`, as well as adapters of this rank can.

    For each kernel that changed: the best approximation of rank `rank` to tuned - base in the Frobenius norm, by
    truncated SVD (Eckart and Young 1936), on the host. Kernels that did not change get no adapter.

    energy: a share in (0, 1] of the change's squared norm; keep the fewest singular values that reach it, at most
    `rank` of them. A stack of layers keeps as many as its most demanding layer. alpha is the rank that is kept, so the
    factor alpha / r is one. Raises ValueError if the two trees differ in paths or shapes, if the change holds NaN or
    infinity, if no kernel matches `targets`, and for a rank or energy out of range.

    >>> import jax.numpy as jnp
    >>> from lcm_jax import lora
    >>> base = {"to_q": {"kernel": jnp.zeros((2, 2)), "bias": jnp.zeros(2)}}
    >>> tuned = {"to_q": {"kernel": jnp.diag(jnp.asarray([4.0, 3.0])), "bias": jnp.ones(2)}}
    >>> found = lora.extract(base, tuned, rank=1)
    >>> {path: round(error, 3) for path, error in found.relative_error.items()}, found.untouched
    ({'to_q/kernel': 0.6}, ['to_q/bias'])
    """
    if rank < 1:
        raise ValueError(f"rank must be at least 1, got {rank}")
    if energy is not None and not 0 < energy <= 1:
        raise ValueError(f"energy is a share of the squared norm in (0, 1], got {energy}")
    old, new = (traverse_util.flatten_dict(params, sep="/") for params in (base, tuned))
    unequal = sorted(old.keys() ^ new.keys()) + [p for p in old if p in new and old[p].shape != new[p].shape]
    if unequal:
        what = "parameters are in one alone or differ in shape"
        raise ValueError(f"the checkpoints are of two networks: {few(what, unequal)}")
    paths = set(_targeted(old, targets))
    extraction = Extraction({}, {}, [])
    for path in sorted(old):
        change = np.asarray(new[path], np.float32) - np.asarray(old[path], np.float32)
        if not np.isfinite(change).all():
            raise ValueError(f"{path}: the difference of the checkpoints holds NaN or infinity")
        if not change.any():
            continue
        if path in paths:
            extraction.adapters[path], extraction.relative_error[path] = _factorise(change, rank, energy)
        else:
            extraction.untouched.append(path)
    return extraction


def _factorise(change: np.ndarray, rank: int, energy: float | None) -> tuple[dict[str, Array | np.ndarray], float]:
    """Return an adapter for a kernel's change, and the share of the change's norm that is lost."""
    stack, outputs = change.shape[: stacked_axes(change)], change.shape[-1]
    matrix = change.reshape(*stack, -1, outputs)
    u, s, v = np.linalg.svd(matrix, full_matrices=False)
    r = min(rank, s.shape[-1])
    if energy is not None:
        cumulative = np.cumsum(np.square(s, dtype=np.float64), axis=-1)
        r = min(r, 1 + int((cumulative < energy * cumulative[..., -1:]).sum(axis=-1).max()))
    root = np.sqrt(s[..., :r])
    down, up = u[..., :r] * root[..., None, :], root[..., :, None] * v[..., :r, :]
    shape = shapes(change, r)
    adapter: dict[str, Array | np.ndarray]
    adapter = {"down": jnp.asarray(down.reshape(shape["down"])), "up": jnp.asarray(up.reshape(shape["up"]))}
    adapter["alpha"] = jnp.full(shape["alpha"], r, jnp.float32)
    return adapter, float(np.linalg.norm(matrix - down @ up) / np.linalg.norm(matrix))
