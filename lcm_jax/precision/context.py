"""Parameters as a network reads them, in whatever precision they are."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from lcm_jax.precision import bfloat16_cpu, quantization
from lcm_jax.typing import Params
from mmdit.attention import halved, platform


@contextlib.contextmanager
def precision_context(params: Params) -> Iterator[Params]:
    """The tree that a module takes; within it, its layers multiply as that precision wants.

    Attention in a network whose inputs are in 8 bits is bfloat16's: that errs a tenth as much as the rest.
    """
    with contextlib.ExitStack() as stack:
        if platform() == "cpu":
            stack.enter_context(bfloat16_cpu.OVERRIDES.around())
        if quantization.in_8_bits(params):
            stack.enter_context(quantization.OVERRIDES.around())
            stack.enter_context(halved())
        yield quantization.dequantize(params)


def is_low_precision(*params: Params) -> bool:
    """Whether the products of some networks are of fewer bits than float32's: see `compiling.compiler_options`."""
    return any(quantization.in_8_bits(tree) or bfloat16_cpu.is_half(tree) for tree in params)
