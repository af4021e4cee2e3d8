"""The context in which a network is applied: its layers' arithmetic follows from the precision of its parameters."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from jaxtyping import PyTree

from lcm_jax.precision import bfloat16_cpu, quantization
from lcm_jax.typing import Params
from mmdit.attention import bfloat16_attention, platform


@contextlib.contextmanager
def precision_context(params: Params) -> Iterator[Params]:
    """Yield the parameter tree to apply a module with; within this context its layers use the arithmetic for it.

    Networks with inputs in 8 bits attend in bfloat16, whose error is a tenth of the quantization's.
    """
    with contextlib.ExitStack() as stack:
        if platform() == "cpu":
            stack.enter_context(bfloat16_cpu.OVERRIDES.around())
        if quantization.in_8_bits(params):
            stack.enter_context(quantization.OVERRIDES.around())
            stack.enter_context(bfloat16_attention())
        yield quantization.dequantize(params)


def is_low_precision(*params: PyTree) -> bool:
    """Return whether any of some networks multiplies in bfloat16 or 8 bits: `compiler_options` differ for them."""
    return any(quantization.in_8_bits(tree) or bfloat16_cpu.is_bfloat16(tree) for tree in params)
