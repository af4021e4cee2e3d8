"""Networks in 8 bits: kernels of int8 or float8 with a scale for each output, and inputs rounded as they come.

The arithmetic is qwix's. What is rounded is every wide Dense and Conv, save what acts on times or texts alone, and what
a network begins and ends with: these cost little and err much (2311.16503, 2405.17873).
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import traverse_util
from jaxtyping import Float

from lcm_jax.extras import require
from lcm_jax.typing import Array, Params
from mmdit.attention import halved
from mmdit.cpu_attention import largest

KINDS = ("int8", "int8w", "fp8")
NARROW = 32  # features: kernels with fewer inputs or outputs stay as they are
_NOTHING = 1e-30  # a row without larger numbers is noughts; its step is a normal number still
_STAY = re.compile(
    r"(^|/)(time_\w+|add_embedding|\w+_embed|\w+_embedder|conv_in|conv_out|norm\w*|attn2/to_[kv])/|^proj_out/"
)


@partial(jax.tree_util.register_dataclass, data_fields=("params",), meta_fields=("kind",))
@dataclass(frozen=True, kw_only=True)
class Quantized:
    """Parameters of which some kernels are `qwix.QArray`: the tree of a network that `rounding` is around."""

    params: Params
    kind: str


def in_8_bits(params: Params) -> bool:
    """Whether a network's products are: its programs have `compiler_options` of their own."""
    return isinstance(params, Quantized) and params.kind != "int8w"


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


@contextlib.contextmanager
def rounding(kind: str) -> Iterator[None]:
    """Within it flax's Dense and Conv take kernels that are `qwix.QArray`.

    Attention is bfloat16's then unless the kernels alone are rounded: that errs a tenth as much as the rest.
    """
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
        return _multiply(module, x, kernel, own.get("bias", 0.0))

    with nn.intercept_methods(call), contextlib.nullcontext() if kind == "int8w" else halved():
        yield


def _multiply(module: Any, x: Array, kernel: Any, bias: Array | float) -> Array:
    """What a Dense, or a Conv of two sides, makes of x and of a `qwix.QArray`.

    Each row of x has a scale, of a convolution each picture, as its sums go over pixels. Not qwix's: cuDNN has integer
    convolutions whose sums become float32 before anything else, and XLA:CPU wants the maxima otherwise.
    """
    how: dict[str, Any] = {"preferred_element_type": jnp.int32 if kernel.qvalue.dtype == jnp.int8 else jnp.float32}
    scales = kernel.scale.astype(jnp.float32).reshape(-1)
    if isinstance(module, nn.Dense) or (module.kernel_size, _both(module.strides or 1)) == ((1, 1), (1, 1)):
        values, scale = _rounded(x.reshape(-1, x.shape[-1]), kernel.qvalue.dtype)
        sums = jnp.dot(values, kernel.qvalue.reshape(kernel.qvalue.shape[-2:]), **how)
        y = sums.astype(jnp.float32) * (scale * scales) + bias
        return y.astype(x.dtype).reshape(*x.shape[:-1], -1)  # in this order: else a TPU turns heads in float32
    values, scale = _rounded(x.reshape(len(x), -1), kernel.qvalue.dtype)
    padding = module.padding if isinstance(module.padding, (str, tuple)) else (_both(module.padding),) * 2
    dimensions = ("NHWC", "HWIO", "NHWC")
    sums = jax.lax.conv_general_dilated(
        values.reshape(x.shape), kernel.qvalue, _both(module.strides or 1), padding, dimension_numbers=dimensions, **how
    )
    return (sums.astype(jnp.float32) * (scale * scales)[:, None, None] + bias).astype(x.dtype)


def _both(of: Any) -> Any:
    return (of, of) if isinstance(of, int) else of


def _rounded(x: Float[Array, "n m"], dtype: Any) -> tuple[Float[Array, "n m"], Float[Array, "n 1"]]:
    """Rows in 8 bits, and what one step of each is."""
    top = jax.lax.platform_dependent(
        jnp.abs(x.astype(jnp.float32)), cpu=largest, default=partial(jnp.max, axis=-1, keepdims=True)
    )
    most = 127.0 if dtype == jnp.int8 else float(jnp.finfo(dtype).max)
    scale = jnp.maximum(top, _NOTHING) / most
    steps = x.astype(jnp.float32) / scale
    return (jnp.round(steps) if dtype == jnp.int8 else steps).astype(dtype), scale
