"""FLOPs of matrix products, convolutions and attention, as a compiler writes them or leaves them to a library."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache

import numpy as np

from lcm_jax.plan.hlo import Computation, Instruction

_FLASH = {"flash_attention": 2, "flash_mha_bwd_dq": 3, "flash_mha_bwd_dkv": 4}  # products of jax's kernels for TPUs
_FLASH_NAME = re.compile("|".join(_FLASH))

# Products of cuDNN's attention: logits and their sum with the values; backward, the logits again and four gradients.
_FUSED = {"__cudnn$fmhaSoftmax": 2, "__cudnn$fmhaSoftmaxBackward": 5}

Dims = tuple[int, ...]


def flops_of(op: Instruction, computation: Computation) -> float:
    """One multiplication and addition are two. None but of products: sums and functions of single numbers are free."""
    if op.opcode not in ("dot", "convolution", "custom-call"):
        return 0.0
    given = [computation[name].shapes[0].dims for name in op.operands[:2] if computation[name].shapes]
    if op.opcode == "dot":
        summed = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", op.attributes)
        return _product(op.shapes[0].dims, given[0], summed[1].split(",") if summed else [])
    if op.opcode == "convolution":
        return _convolution(op, given[0], given[1], op.shapes[0].dims)
    return _library(op, given)


def _library(op: Instruction, given: list[Dims]) -> float:
    """Of a kernel that the compiler calls: jax's flash attention on a TPU, cuBLAS and cuDNN on a GPU."""
    if kernel := _FLASH_NAME.match(op.name):
        (*many, length, width), (*_, others, _) = given
        return 2.0 * _FLASH[kernel[0]] * math.prod(many) * length * others * width
    name, result = op.target, op.shapes[0].dims
    if name.startswith("__cublas$"):
        summed = re.search(r'"lhs_contracting_dimensions":(\[[^\]]*\])', op.attributes)
        return _product(result, given[0], json.loads(summed[1]) if summed else [])
    if name.startswith("__cudnn$convBackwardInput"):  # from the results' gradient, under the labels of the convolution
        return _convolution(op, result, given[1], given[0])
    if name.startswith("__cudnn$convBackwardFilter"):
        return _convolution(op, given[0], result, given[1])
    if name.startswith("__cudnn$conv"):
        return _convolution(op, given[0], given[1], result)
    if name in _FUSED:
        (batch, length, heads, width), (_, others, *_) = given
        return 2.0 * _FUSED[name] * batch * heads * length * others * width
    return 0.0


def _product(result: Dims, lhs: Dims, summed: Sequence[str]) -> float:
    """summed: the axes of lhs that are."""
    return 2.0 * math.prod(result) * math.prod(lhs[int(axis)] for axis in summed if axis)


def _convolution(op: Instruction, lhs: Dims, rhs: Dims, result: Dims) -> float:
    """Products with padding and with the holes of a dilation are none: on TPUs every matrix product is a convolution,
    and a batch of them one whose window meets a single number at a time."""
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
    """Along one axis: pairs of an output and a tap of the kernel that meet a number of the input."""
    place = np.arange(out)[:, None] * stride + np.arange(kernel) * outer - low
    inside = (place >= 0) & (place <= (size - 1) * inner) & (place % inner == 0)
    return int(inside.sum())
