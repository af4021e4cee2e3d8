"""Quantized networks: kernels in int8 or float8 with a scale for each output, and inputs rounded at every call.

qwix rounds the kernels, this module the inputs. All wide Dense and Conv layers are quantized, except those that act on
times or texts alone and the first and last layers of a network: these cost little and err much (2311.16503,
2405.17873).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import traverse_util
from jaxtyping import Float, Num, PyTree

from lcm_jax.precision.layer_overrides import LayerOverrides
from lcm_jax.runtime.optional_deps import require
from lcm_jax.typing import Array, Params
from mmdit.cpu_attention import row_max
from vae16.layers import folded

KINDS = ("int8", "int8w", "fp8")
PARTS = ("denoiser", "text", "vae")  # of a pipeline
NARROW = 32  # features: kernels with fewer inputs or outputs are not quantized
_NOTHING = 1e-30  # rows whose numbers are all smaller round to zeros; above it a step is a normal float32
_STAY = (
    r"(^|/)(time_\w+|add_embedding|\w+_embed|\w+_embedder|conv_in|conv_out|text_projection|norm\w*|attn2/to_[kv])/"
    r"|^proj_out/"
)
# The inputs of T5's second feed-forward product have outliers (2208.07339), and its sums exceed float16's range.
_STAY_WITH_INPUTS = _STAY + r"|/wo/"


@partial(jax.tree_util.register_dataclass, data_fields=("params",), meta_fields=("kind",))
@dataclass(frozen=True, kw_only=True)
class Quantized:
    """Parameters of which some kernels are `qwix.QArray`, for a module applied in `context.precision_context`."""

    params: PyTree  # inside jax also of what stands for an array, such as its shape
    kind: str


def in_8_bits(params: PyTree) -> bool:
    """Return whether a network multiplies in 8 bits, inputs too, by `OVERRIDES`: kind "int8" or "fp8"."""
    return isinstance(params, Quantized) and params.kind != "int8w"


def check_kind(kind: str) -> None:
    """Raise ValueError if a kind is unknown or the device cannot compute in it, ModuleNotFoundError without qwix."""
    if kind not in KINDS:
        raise ValueError(f"quantize {kind!r} is unknown; known are {', '.join(KINDS)}")
    device = jax.devices()[0]
    if kind == "fp8" and float(getattr(device, "compute_capability", "0") or 0) < 8.9:
        raise ValueError(
            f"quantize 'fp8': {device.device_kind} has no 8-bit floats (NVIDIA's have from 8.9 on); use int8"
        )
    require("quant")


def check_part(part: str) -> None:
    """Raise ValueError unless `part` is a part of a pipeline that can be quantized."""
    if part not in PARTS:
        raise ValueError(f"quantize: part {part!r} is unknown; known are {', '.join(PARTS)}")


def parse(texts: Sequence[str]) -> dict[str, str]:
    """Return {part: kind} from "KIND", which is the denoiser's, and "PART=KIND"; ValueError as the checks raise it.

    >>> parse(["int8", "text=int8w"])
    {'denoiser': 'int8', 'text': 'int8w'}
    """
    kinds: dict[str, str] = {}
    for text in texts:
        part, _, kind = text.rpartition("=")
        part = part or PARTS[0]
        check_part(part)
        if part in kinds:
            raise ValueError(f"quantize: {text!r} sets the {part} a second time; give it once")
        check_kind(kind)
        kinds[part] = kind
    return kinds


def quantize(params: Params, kind: str) -> Quantized:
    """Return parameters with the wide kernels in 8 bits.

    kind: "int8" and "fp8" round the inputs too, at every call, by row (of a convolution by picture); "int8w" rounds the
    kernels alone, which saves memory and no arithmetic. Raise as `check_kind` does.

    >>> import jax.numpy as jnp
    >>> params = {"fc": {"kernel": jnp.ones((64, 32)), "bias": jnp.zeros(32)}}
    >>> quantized = quantize(params, "int8")
    >>> quantized.params["fc"]["kernel"].qvalue.dtype, quantized.params["fc"]["bias"].dtype
    (dtype('int8'), dtype('float32'))
    """
    round_parameter = rounder(kind)
    tree = traverse_util.path_aware_map(lambda path, leaf: round_parameter("/".join(map(str, path)), leaf), params)
    return Quantized(params=tree, kind=kind)


def rounder(kind: str) -> Callable[[str, Array], Any]:
    """Return the function (path, parameter) -> the leaf of `Quantized.params`: the parameter, or its `qwix.QArray`.

    It takes one parameter at a time, so that a network can be rounded while it is loaded. Raise as `check_kind` does.

    >>> import jax.numpy as jnp
    >>> round_parameter = rounder("int8")
    >>> kernel = round_parameter("mid/fc/kernel", jnp.ones((64, 32)))
    >>> kernel.qvalue.shape, kernel.scale.shape  # a scale for each output
    ((64, 32), (1, 32))
    >>> round_parameter("conv_in/kernel", jnp.ones((64, 32))).dtype  # the first layer is not quantized
    dtype('float32')
    """
    check_kind(kind)
    dtype = jnp.float8_e4m3fn if kind == "fp8" else jnp.int8
    stay = _STAY if kind == "int8w" else _STAY_WITH_INPUTS

    def round_parameter(path: str, leaf: Array) -> Any:
        wide = path.endswith("kernel") and leaf.ndim >= 2 and min(leaf.shape[-2:]) >= NARROW
        return _rounded_kernel(leaf, dtype) if wide and not re.search(stay, path) else leaf

    return round_parameter


@partial(jax.jit, static_argnames="dtype")
def _rounded_kernel(kernel: Array, dtype: Any) -> Any:
    """Return a kernel in 8 bits, with a scale for each output, and for each layer of a stack by nn.scan."""
    import qwix

    axes = {kernel.ndim - 1} | ({0} if kernel.ndim in (3, 5) else set())
    return qwix.quantize(kernel, dtype, channelwise_axes=tuple(axes))


def dequantize(params: Params) -> Params:
    """Return the tree that a module takes: float kernels for "int8w", else the `qwix.QArray`s that `OVERRIDES` takes.

    >>> import jax.numpy as jnp
    >>> params = {"fc": {"kernel": jnp.ones((64, 32))}}
    >>> dequantize(quantize(params, "int8w"))["fc"]["kernel"].dtype, dequantize(params) is params
    (dtype('float32'), True)
    """
    if not isinstance(params, Quantized):
        return params
    if params.kind != "int8w":
        return params.params
    import qwix

    def out(leaf: Any) -> Array:
        return qwix.dequantize(leaf) if isinstance(leaf, qwix.QArray) else leaf

    return jax.tree.map(out, params.params, is_leaf=lambda leaf: isinstance(leaf, qwix.QArray))


def _multiply(x: Float[Array, "n c"], kernel: Any) -> Float[Array, "n d"]:
    """Multiply in 8 bits, with a scale for each row of x. Not by qwix's product: its maxima are slow on XLA:CPU."""
    values, scale = _rounded(x, kernel.qvalue.dtype)
    sums = jnp.dot(values, kernel.qvalue.reshape(kernel.qvalue.shape[-2:]), preferred_element_type=_sums(kernel))
    return sums.astype(jnp.float32) * (scale * kernel.scale.astype(jnp.float32).reshape(-1))


def _convolve(x: Float[Array, "b h w c"], kernel: Any, strides: Any, padding: Any) -> Float[Array, "b h2 w2 d"]:
    """Convolve in 8 bits, with a scale for each picture, as the sums are over pixels.

    Not by qwix's convolution: cuDNN has integer convolutions only if their sums become float32 before anything else.
    """
    values, scale = _rounded(x.reshape(len(x), -1), kernel.qvalue.dtype)
    scales = scale * kernel.scale.astype(jnp.float32).reshape(-1)
    values, numbers = values.reshape(x.shape), ("NHWC", "HWIO", "NHWC")
    sums = jax.lax.conv_general_dilated(
        values, kernel.qvalue, strides, padding, dimension_numbers=numbers, preferred_element_type=_sums(kernel)
    )
    return sums.astype(jnp.float32) * scales[:, None, None]


def _sums(kernel: Any) -> Any:
    return jnp.int32 if kernel.qvalue.dtype == jnp.int8 else jnp.float32


def _is_rounded(_: Any, kernel: Any) -> bool:
    return not isinstance(kernel, jax.Array)


def _fold(kernel: Any) -> Any:
    import qwix

    return _rounded_kernel(folded(qwix.dequantize(kernel)), kernel.qvalue.dtype)


OVERRIDES = LayerOverrides(takes=_is_rounded, multiply=_multiply, convolve=_convolve, fold=_fold)


def _rounded(x: Float[Array, "n m"], dtype: Any) -> tuple[Num[Array, "n m"], Float[Array, "n 1"]]:
    """Return rows in 8 bits, and the size of one step of each row."""
    largest_magnitude = jax.lax.platform_dependent(
        jnp.abs(x.astype(jnp.float32)), cpu=row_max, default=partial(jnp.max, axis=-1, keepdims=True)
    )
    most = 127.0 if dtype == jnp.int8 else float(jnp.finfo(dtype).max)
    scale = jnp.maximum(largest_magnitude, _NOTHING) / most
    steps = x.astype(jnp.float32) / scale
    return (jnp.round(steps) if dtype == jnp.int8 else steps).astype(dtype), scale
