"""Low-rank adapters (Hu 2021, arXiv:2106.09685) as a tree beside the parameters: W' = W + scale * alpha / r * up down.

Adapters are `{path of a kernel: {"down", "up", "alpha"}}`, an ordinary pytree to differentiate, average, shard and
save; `merge` gives parameters that any network takes unchanged. Shapes follow the kernel (axes in JAX's order):

    dense         kernel (i, o)         down (i, r)         up (r, o)          alpha ()
    convolution   kernel (h, w, i, o)   down (h, w, i, r)   up (1, 1, r, o)    alpha ()
    stacked       one leading axis more on each of them, alpha too

alpha is a constant that travels with the weights: `merge` passes it no gradient. `extract` is the way back, from the
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
from lcm_jax.typing import Array, Key, Params
from mmdit.blocks import flat_dot

Adapters = dict[str, dict[str, Array]]

DEFAULT_TARGETS = (
    r"(^|/)(to_q|to_k|to_v|to_out_0|proj_in|proj_out|ff/net_0/proj|ff/net_2|conv1|conv2|conv_shortcut"
    r"|(down|up)samplers_0/conv|time_emb_proj)/kernel$"
)
"""The layers of LCM-LoRA (Luo 2023, arXiv:2311.05556, and its code): 67.25M parameters on SD1.5 at rank 64."""

MMDIT_TARGETS = r"(^|/)attn2?/(to_q|to_k|to_v|to_out_0|add_q_proj|add_k_proj|add_v_proj|to_add_out)/kernel$"
"""Every attention of SD3's MMDiT, of the picture's tokens and of the text's, as in diffusers' training script."""

CLIP_TARGETS = r"(^|/)self_attn/(q_proj|k_proj|v_proj|out_proj)/kernel$"
"""The attentions of a CLIP text encoder."""


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
    """The paths of the kernels that `targets` finds."""
    kernels = [path for path in sorted(flat) if path.endswith("kernel")]
    paths = [path for path in kernels if re.search(targets, path)]
    if not paths:
        raise ValueError(f"targets {targets!r} match none of {few('kernels', kernels)}")
    return paths


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


@partial(jax.tree_util.register_dataclass, data_fields=("key",), meta_fields=("rate",))
@dataclass(frozen=True, kw_only=True)
class Dropout:
    """Of what enters an adapter, as in PEFT: a share `rate` is zeroed, the rest divided by 1 - rate.

    One key gives an adapter the same mask at every call, so that a student and its own target share theirs (iCT,
    2310.14189 sec. 3.2).
    """

    key: Key
    rate: float

    def __call__(self, x: Array, path: str) -> Array:
        """The input of the adapter at `path`."""
        kept = jax.random.bernoulli(jax.random.fold_in(self.key, zlib.crc32(path.encode())), 1.0 - self.rate, x.shape)
        return jnp.where(kept, x / (1.0 - self.rate), jnp.zeros_like(x))


class Adapted(NamedTuple):
    """Parameters and adapters that are not merged: the tree of a network that `branches` is around.

    To train adapters so takes no gradient of the kernels and no second copy of them, as merging in every step would.
    """

    params: Params
    adapters: Adapters
    dropout: Dropout | None = None


def branches(adapters: Adapters, dropout: Dropout | None = None) -> contextlib.AbstractContextManager[None]:
    """Within it every flax Dense and Conv with an adapter gives y + alpha / r * up(down(x)); the others are unchanged.

    Adapters of stacked layers are refused: there is one for each layer, and inside of a scan no telling which.
    """
    stacked = [path for path, adapter in adapters.items() if jnp.ndim(adapter["alpha"])]
    if stacked:
        raise ValueError(f"{few('adapters', stacked)} are of stacked layers: merge them, or build the network unrolled")

    def call(next_function: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        y, module = next_function(*args, **kwargs), context.module
        path = "/".join((*module.path, "kernel"))
        adapter = None
        if context.method_name == "__call__" and isinstance(module, (nn.Dense, nn.Conv)):
            adapter = adapters.get(path)
        if adapter is None:
            return y
        x = args[0] if dropout is None else dropout(args[0], path)
        rank, outputs = adapter["up"].shape[-2:]
        down_layer = module.clone(parent=None, name=None, features=rank, use_bias=False)
        z: Any = down_layer.apply({"params": {"kernel": adapter["down"]}}, x)
        up = jax.lax.stop_gradient(adapter["alpha"]) / rank * adapter["up"].reshape(rank, outputs)
        return y + flat_dot(z, up.astype(z.dtype)).astype(y.dtype)

    return nn.intercept_methods(call)


def count(adapters: Adapters) -> int:
    """Number of trained parameters (down and up)."""
    return sum(int(np.prod(adapter[name].shape)) for adapter in adapters.values() for name in ("down", "up"))


class Extraction(NamedTuple):
    """What `extract` found. residual: kernel -> |change - LoRA| / |change| in the Frobenius norm, 0 if nothing is lost.
    untouched: the parameters that changed and have no adapter, which the LoRA therefore leaves as they were."""

    adapters: Adapters
    residual: dict[str, float]
    untouched: list[str]


def extract(
    base: Params, tuned: Params, *, rank: int, targets: str = DEFAULT_TARGETS, energy: float | None = None
) -> Extraction:
    """The LoRA that leads from one checkpoint to another: for each kernel the change's best approximation of its rank
    in the Frobenius norm, by truncated SVD (Eckart and Young 1936), on the host. Kernels that did not change get none.

    energy: keep the fewest singular values that hold this share (0, 1] of the change's squared norm, at most `rank`; a
    stack of layers takes what the neediest one does. alpha is the rank that is kept: the factor is one.
    """
    if rank < 1:
        raise ValueError(f"rank must be at least 1, got {rank}")
    if energy is not None and not 0 < energy <= 1:
        raise ValueError(f"energy is a share of the squared norm in (0, 1], got {energy}")
    old, new = (traverse_util.flatten_dict(params, sep="/") for params in (base, tuned))
    strange = sorted(old.keys() ^ new.keys()) + [p for p in old if p in new and old[p].shape != new[p].shape]
    if strange:
        raise ValueError(f"the checkpoints are of two networks: {few('parameters of one alone or reshaped', strange)}")
    paths = set(_targeted(old, targets))
    found = Extraction({}, {}, [])
    for path in sorted(old):
        change = np.asarray(new[path], np.float32) - np.asarray(old[path], np.float32)
        if not np.isfinite(change).all():
            raise ValueError(f"{path}: the difference of the checkpoints holds NaN or infinity")
        if not change.any():
            continue
        if path in paths:
            found.adapters[path], found.residual[path] = _factorise(change, rank, energy)
        else:
            found.untouched.append(path)
    return found


def _factorise(change: np.ndarray, rank: int, energy: float | None) -> tuple[dict[str, Array], float]:
    """An adapter for a kernel's change, and the share of its norm that is lost."""
    stack, outputs = change.shape[: stacked_axes(change)], change.shape[-1]
    matrix = change.reshape(*stack, -1, outputs)
    u, s, v = np.linalg.svd(matrix, full_matrices=False)
    r = min(rank, s.shape[-1])
    if energy is not None:
        held = np.cumsum(np.square(s, dtype=np.float64), axis=-1)
        r = min(r, 1 + int((held < energy * held[..., -1:]).sum(axis=-1).max()))
    root = np.sqrt(s[..., :r])
    down, up = u[..., :r] * root[..., None, :], root[..., :, None] * v[..., :r, :]
    shape = shapes(change, r)
    adapter = {"down": jnp.asarray(down.reshape(shape["down"])), "up": jnp.asarray(up.reshape(shape["up"]))}
    adapter["alpha"] = jnp.full(shape["alpha"], r, jnp.float32)
    return adapter, float(np.linalg.norm(matrix - down @ up) / np.linalg.norm(matrix))
