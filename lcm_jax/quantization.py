"""Networks in 8 bits: kernels of int8 or float8 with a scale for each output, and inputs rounded as they come.

The arithmetic is qwix's. What is rounded is every wide Dense and Conv, save what acts on times or texts alone, and what
a network begins and ends with: these cost little and err much (2311.16503, 2405.17873).
"""

from __future__ import annotations

import contextlib
import re
from dataclasses import dataclass
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import traverse_util

from lcm_jax.extras import require
from lcm_jax.typing import Array, Params

KINDS = ("int8", "int8w", "fp8")
NARROW = 32  # features: kernels with fewer inputs or outputs stay as they are
_STAY = re.compile(
    r"(^|/)(time_\w+|add_embedding|\w+_embed|\w+_embedder|conv_in|conv_out|norm\w*|attn2/to_[kv])/|^proj_out/"
)


@partial(jax.tree_util.register_dataclass, data_fields=("params",), meta_fields=("kind",))
@dataclass(frozen=True, kw_only=True)
class Quantized:
    """Parameters of which some kernels are `qwix.QArray`: the tree of a network that `rounding` is around."""

    params: Params
    kind: str


def check(kind: str) -> None:
    """ValueError for what is unknown, or what the device has no arithmetic for; ModuleNotFoundError without qwix."""
    if kind not in KINDS:
        raise ValueError(f"quantize {kind!r} is unknown; known are {', '.join(KINDS)}")
    device = jax.devices()[0]
    if kind == "fp8" and float(getattr(device, "compute_capability", "0") or 0) < 8.9:
        raise ValueError(
            f"quantize 'fp8': {device.device_kind} has no 8-bit floats (NVIDIA's have from 8.9 on); use int8"
        )
    require("quant")


def quantize(params: Params, kind: str) -> Quantized:
    """Kernels in 8 bits. kind: "int8" and "fp8" round the inputs too, by row (of a convolution by picture); "int8w" the
    kernels alone, which saves memory and no arithmetic.
    """
    check(kind)
    import qwix

    dtype = jnp.float8_e4m3fn if kind == "fp8" else jnp.int8

    @jax.jit
    def rounded(kernel: Array) -> Any:
        # A scale for each output, and for each layer of those that nn.scan has stacked.
        axes = {kernel.ndim - 1} | ({0} if kernel.ndim in (3, 5) else set())
        return qwix.quantize(kernel, dtype, channelwise_axes=tuple(axes))

    flat = traverse_util.flatten_dict(params, sep="/")
    wide = {path: leaf for path, leaf in flat.items() if _is_wide(path, leaf)}
    return Quantized(
        params=traverse_util.unflatten_dict(flat | {k: rounded(v) for k, v in wide.items()}, sep="/"), kind=kind
    )


def _is_wide(path: str, leaf: Array) -> bool:
    name = path.rpartition("/")[2]
    return name == "kernel" and leaf.ndim >= 2 and min(leaf.shape[-2:]) >= NARROW and not _STAY.search(path)


def rounding(kind: str) -> contextlib.AbstractContextManager[None]:
    """Within it flax's Dense and Conv take kernels that are `qwix.QArray`."""
    import qwix

    def call(next_function: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        module = context.module
        own = module.variables.get("params", {}) if isinstance(module, (nn.Dense, nn.Conv)) else {}
        kernel = own.get("kernel")
        if context.method_name != "__call__" or not isinstance(kernel, qwix.QArray):
            return next_function(*args, **kwargs)
        dtype = module.dtype or args[0].dtype
        x = args[0].astype(dtype)
        if kind == "int8w":
            whole = {**own, "kernel": qwix.dequantize(kernel).astype(dtype)}
            return module.clone(parent=None, name=None).apply({"params": whole}, x)
        if isinstance(module, nn.Dense):
            rows = qwix.quantize(x.reshape(-1, x.shape[-1]), kernel.qvalue.dtype, channelwise_axes=(0,))
            y = qwix.dot(rows, kernel).reshape(*x.shape[:-1], -1)
        else:
            assert isinstance(module, nn.Conv)
            pictures = qwix.quantize(x, kernel.qvalue.dtype, channelwise_axes=(0,))
            y = _convolve(module, pictures, kernel)
        return (y + own["bias"] if "bias" in own else y).astype(dtype)

    return nn.intercept_methods(call)


def _convolve(module: nn.Conv, x: Any, kernel: Any) -> Array:
    """What a module of ours, of two sides, strides and padding, is of `qwix.QArray`s with a scale for each picture and

    each output; float32. Not qwix's: cuDNN has integer convolutions whose sums become float32 before anything else.
    """
    strides: Any = module.strides or 1
    padding: Any = module.padding
    sums = jax.lax.conv_general_dilated(
        x.qvalue,
        kernel.qvalue,
        (strides,) * 2 if isinstance(strides, int) else strides,
        padding if isinstance(padding, (str, tuple)) else ((padding, padding),) * 2,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        preferred_element_type=jnp.int32 if x.qvalue.dtype == jnp.int8 else jnp.float32,
    )
    return sums.astype(jnp.float32) * (x.scale.astype(jnp.float32) * kernel.scale.astype(jnp.float32))
