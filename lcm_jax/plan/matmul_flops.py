"""FLOPs of matrix products, convolutions and attention, whether the compiler writes them or calls a library."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache

import numpy as np

from lcm_jax.plan.hlo import Computation, Instruction

_FLASH = {
    "flash_attention": 2,
    "flash_mha_bwd_dq": 3,
    "flash_mha_bwd_dkv": 4,
    "flash_tangent_fwd": 6,
    "flash_tangent_bwd_q": 9,
    "flash_tangent_bwd_k": 12,
}  # products in jax's kernels for TPUs, and in those of mmdit.tpu_attention_jvp
_FLASH_NAME = re.compile("|".join(_FLASH))

# Matrix products in cuDNN's attention: logits, and weights times values; backward, logits again and four gradients.
_FUSED = {"__cudnn$fmhaSoftmax": 2, "__cudnn$fmhaSoftmaxBackward": 5}

Dims = tuple[int, ...]


def flops_of(op: Instruction, computation: Computation) -> float:
    """Return the FLOPs of an instruction; a multiplication and an addition are two.

    Only matrix products, convolutions and attention count: sums and functions of single numbers are free. Raises
    ValueError for a convolution without dim_labels.
    """
    if op.opcode not in ("dot", "convolution", "custom-call"):
        return 0.0
    inputs = [computation[name].shapes[0].dims for name in op.operands[:2] if computation[name].shapes]
    if op.opcode == "dot":
        contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", op.attributes)
        return _product(op.shapes[0].dims, inputs[0], contracted[1].split(",") if contracted else [])
    if op.opcode == "convolution":
        return _convolution(op, inputs[0], inputs[1], op.shapes[0].dims)
    return _library(op, inputs)


def _library(op: Instruction, inputs: list[Dims]) -> float:
    """Return the FLOPs of a kernel that the compiler calls: jax's flash attention on TPUs, cuBLAS and cuDNN on GPUs."""
    if kernel := _FLASH_NAME.search(op.name):  # after the names of transformations, as in transpose_jvp_....
        (*batch, queries, width), (*_, keys, _) = inputs
        return 2.0 * _FLASH[kernel[0]] * math.prod(batch) * queries * keys * width
    name, result = op.target, op.shapes[0].dims
    if name.startswith("__cublas$"):
        contracted = re.search(r'"lhs_contracting_dimensions":(\[[^\]]*\])', op.attributes)
        return _product(result, inputs[0], json.loads(contracted[1]) if contracted else [])
    # A gradient of a convolution keeps the labels of the convolution, so its shapes are put where theirs were.
    if name.startswith("__cudnn$convBackwardInput"):
        return _convolution(op, result, inputs[1], inputs[0])
    if name.startswith("__cudnn$convBackwardFilter"):
        return _convolution(op, inputs[0], result, inputs[1])
    if name.startswith("__cudnn$conv"):
        return _convolution(op, inputs[0], inputs[1], result)
    if name in _FUSED:
        (examples, queries, heads, width), (_, keys, *_) = inputs
        return 2.0 * _FUSED[name] * examples * heads * queries * keys * width
    return 0.0


def _product(result: Dims, lhs: Dims, contracted: Sequence[str]) -> float:
    """Return the FLOPs of a matrix product; `contracted` are the axes of `lhs` that are summed over."""
    return 2.0 * math.prod(result) * math.prod(lhs[int(axis)] for axis in contracted if axis)


def _convolution(op: Instruction, lhs: Dims, rhs: Dims, result: Dims) -> float:
    """Return the FLOPs of a convolution without those on padding and on the holes of a dilation.

    On TPUs every matrix product is a convolution, and a batch of products is one whose window meets a single number of
    the input at a time.
    """
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", op.attributes)
    if labels is None:
        raise ValueError(f"HLO: convolution {op.name} has no dim_labels")
    inputs, kernel, outputs = labels.groups()
    window = dict(re.findall(r"(\w+)=([\w\-]+)", (re.search(r"window=\{([^}]*)\}", op.attributes) or ["", ""])[1]))
    flops = 2.0 * rhs[kernel.index("i")]
    for i in range(len(kernel) - 2):
        axis = str(i)
        stride, inner, outer = (int(_nth(window, key, i, "1")) for key in ("stride", "lhs_dilate", "rhs_dilate"))
        low = int(_nth(window, "pad", i, "0_0").split("_")[0])
        out = result[outputs.index(axis)]
        flops *= _pairs(out, rhs[kernel.index(axis)], lhs[inputs.index(axis)], stride, low, inner, outer)
    batch, features = (result[outputs.index(label)] for label in ("b", "f"))
    return flops * batch * features


def _nth(window: Mapping[str, str], key: str, i: int, default: str) -> str:
    return window[key].split("x")[i] if key in window else default


@lru_cache(maxsize=4096)
def _pairs(out: int, kernel: int, size: int, stride: int, low: int, inner: int, outer: int) -> int:
    """Count, along one axis, the pairs of an output and a tap of the kernel that meet a number of the input."""
    position = np.arange(out)[:, None] * stride + np.arange(kernel) * outer - low
    inside = (position >= 0) & (position <= (size - 1) * inner) & (position % inner == 0)
    return int(inside.sum())
