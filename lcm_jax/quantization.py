"""Networks in 8 bits: kernels of int8 or float8 with a scale for each output, and inputs rounded as they come.

The arithmetic is qwix's. What is rounded is every wide Dense and Conv, save what acts on times or texts alone, and what
a network begins and ends with: these cost little and err much (2311.16503, 2405.17873).
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Sequence
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
from vae16.layers import NearestConv, folded, interleaved

KINDS = ("int8", "int8w", "fp8")
PARTS = ("denoiser", "text", "vae")  # of a pipeline
NARROW = 32  # features: kernels with fewer inputs or outputs stay as they are
_NOTHING = 1e-30  # a row without larger numbers is noughts; its step is a normal number still
_STAY = (
    r"(^|/)(time_\w+|add_embedding|\w+_embed|\w+_embedder|conv_in|conv_out|text_projection|norm\w*|attn2/to_[kv])/"
    r"|^proj_out/"
)
# The inputs of T5's second feed-forward product have outliers (2208.07339), and its sums leave the range of float16.
_STAY_WITH_INPUTS = _STAY + r"|/wo/"


@partial(jax.tree_util.register_dataclass, data_fields=("params",), meta_fields=("kind",))
@dataclass(frozen=True, kw_only=True)
class Quantized:
    """Parameters of which some kernels are `qwix.QArray`; `reading` gives them to a module."""

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


def check_part(part: str) -> None:
    """ValueError for what is no part of a pipeline."""
    if part not in PARTS:
        raise ValueError(f"quantize: part {part!r} is unknown; known are {', '.join(PARTS)}")


def parse(texts: Sequence[str]) -> dict[str, str]:
    """{part: kind} of "KIND", which is the denoiser's, and "PART=KIND"; checked, before a model is loaded."""
    kinds: dict[str, str] = {}
    for text in texts:
        part, _, kind = text.rpartition("=")
        part = part or PARTS[0]
        check_part(part)
        if part in kinds:
            raise ValueError(f"quantize: {text!r} is the second word on the {part}; give one")
        check(kind)
        kinds[part] = kind
    return kinds


def quantize(params: Params, kind: str) -> Quantized:
    """Kernels in 8 bits. kind: "int8" and "fp8" round the inputs too, by row (of a convolution by picture); "int8w" the
    kernels alone, which saves memory and no arithmetic.
    """
    each, flat = rounder(kind), traverse_util.flatten_dict(params, sep="/")
    tree = traverse_util.unflatten_dict({path: each(path, leaf) for path, leaf in flat.items()}, sep="/")
    return Quantized(params=tree, kind=kind)


def rounder(kind: str) -> Callable[[str, Array], Any]:
    """(path, parameter) to what takes its place: of `Quantized.params` each by itself."""
    check(kind)
    dtype = jnp.float8_e4m3fn if kind == "fp8" else jnp.int8
    stay = _STAY if kind == "int8w" else _STAY_WITH_INPUTS

    def each(path: str, leaf: Array) -> Any:
        wide = path.endswith("kernel") and leaf.ndim >= 2 and min(leaf.shape[-2:]) >= NARROW
        return _rounded_kernel(leaf, dtype) if wide and not re.search(stay, path) else leaf

    return each


@partial(jax.jit, static_argnames="dtype")
def _rounded_kernel(kernel: Array, dtype: Any) -> Any:
    """A scale for each output, and for each layer of those that nn.scan has stacked."""
    import qwix

    axes = {kernel.ndim - 1} | ({0} if kernel.ndim in (3, 5) else set())
    return qwix.quantize(kernel, dtype, channelwise_axes=tuple(axes))


@contextlib.contextmanager
def reading(params: Params) -> Iterator[Params]:
    """The tree that a module takes, of parameters that may be `Quantized`: within it its layers know kernels that are
    `qwix.QArray`.

    Attention is bfloat16's then unless the kernels alone are rounded: that errs a tenth as much as the rest.
    """
    if not isinstance(params, Quantized):
        yield params
        return
    with nn.intercept_methods(_interceptor(params.kind)), halved() if in_8_bits(params) else contextlib.nullcontext():
        yield params.params


def _interceptor(kind: str) -> Callable[..., Any]:
    import qwix

    def call(next_function: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        module = context.module
        own = module.variables.get("params", {}) if isinstance(module, (nn.Dense, nn.Conv, NearestConv)) else {}
        kernel = own.get("kernel")
        if context.method_name != "__call__" or not isinstance(kernel, qwix.QArray):
            return next_function(*args, **kwargs)
        dtype = module.dtype or args[0].dtype
        x, bias = args[0].astype(dtype), own.get("bias", 0.0)
        if kind == "int8w":
            whole = {**own, "kernel": qwix.dequantize(kernel).astype(dtype)}
            return module.clone(parent=None, name=None).apply({"params": whole}, x)
        if isinstance(module, NearestConv):
            again = _rounded_kernel(folded(qwix.dequantize(kernel)), kernel.qvalue.dtype)
            return interleaved(_convolve(x, again, 0.0, padding=((1, 1), (1, 1)))) + jnp.asarray(bias, dtype)
        strides = _both(getattr(module, "strides", None) or 1)
        if isinstance(module, nn.Dense) or (module.kernel_size, strides) == ((1, 1), (1, 1)):
            return _multiply(x, kernel, bias)
        padding = module.padding if isinstance(module.padding, (str, tuple)) else (_both(module.padding),) * 2
        return _convolve(x, kernel, bias, strides=strides, padding=padding)

    return call


def _multiply(x: Array, kernel: Any, bias: Array | float) -> Array:
    """x (..., c) by a `qwix.QArray` of c by d, with a scale for each row of x.

    Not qwix's own: XLA:CPU wants the maxima otherwise.
    """
    values, scale = _rounded(x.reshape(-1, x.shape[-1]), kernel.qvalue.dtype)
    sums = jnp.dot(values, kernel.qvalue.reshape(kernel.qvalue.shape[-2:]), preferred_element_type=_sums(kernel))
    y = sums.astype(jnp.float32) * (scale * kernel.scale.astype(jnp.float32).reshape(-1)) + bias
    return y.astype(x.dtype).reshape(*x.shape[:-1], -1)  # in this order: else a TPU turns heads in float32


def _convolve(x: Array, kernel: Any, bias: Array | float, *, strides: Any = (1, 1), padding: Any) -> Array:
    """A convolution of two sides by a `qwix.QArray`, with a scale for each picture, as its sums go over pixels.

    Not qwix's own: cuDNN has integer convolutions whose sums become float32 before anything else.
    """
    values, scale = _rounded(x.reshape(len(x), -1), kernel.qvalue.dtype)
    scales = scale * kernel.scale.astype(jnp.float32).reshape(-1)
    sums = jax.lax.conv_general_dilated(
        values.reshape(x.shape),
        kernel.qvalue,
        strides,
        padding,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        preferred_element_type=_sums(kernel),
    )
    return (sums.astype(jnp.float32) * scales[:, None, None] + bias).astype(x.dtype)


def _sums(kernel: Any) -> Any:
    return jnp.int32 if kernel.qvalue.dtype == jnp.int8 else jnp.float32


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
