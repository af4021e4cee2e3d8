"""How the library's programs are compiled, and what they take."""

from __future__ import annotations

from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
from jax.errors import JaxRuntimeError

_OPTIONS: dict[str, dict[str, bool | int | str]] = {
    # XLA's own matrix products and reductions: its fusions by YNNPACK take 1.2 to 1.6 times as long (the openmoji
    # networks, jax 0.10.2, two cores with AVX2; SD1.5 at 512 pixels, all convolutions, is as it was).
    "cpu": {"xla_cpu_experimental_ynn_fusion_type": ""},
    # Products of one input stay apart: one product for q, k and v together is cut into three copies, and keys and
    # values of all layers together need their kernels copied side by side at every call (SD1.5's UNet at batch 1 on an
    # H200: 6.8 to 5.0 ms). And they are cuBLAS's, which add bias and residual themselves, not Triton's (5.1 to 4.6 ms).
    "gpu": {"xla_gpu_dot_merger_threshold_mb": 0, "xla_gpu_enable_triton_gemm": False},
}


_IN_8_BITS: dict[str, dict[str, bool | int | str]] = {
    # YNNPACK has the processor's 8-bit products and convolutions, where XLA has plain loops (Intel with AMX, 320
    # channels of 64 x 64 pixels: 800 and 2.5 ms, float32 25).
    "cpu": {
        "xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT,"
        "LIBRARY_FUSION_TYPE_INDIVIDUAL_CONVOLUTION"
    },
}


@cache
def compiler_options(*, in_8_bits: bool = False) -> dict[str, bool | int | str] | None:
    """`jax.jit`'s compiler_options for the default device, None for XLA's own choice.

    in_8_bits: for a program most of whose products are of int8. An XLA that does not know an option any more is left
    alone.
    """
    options = _OPTIONS.get(jax.default_backend())
    if in_8_bits:
        options = _IN_8_BITS.get(jax.default_backend(), options)
    if options is None:
        return None
    try:
        jax.jit(jnp.negative, compiler_options=options).lower(0.0).compile()
    except JaxRuntimeError:
        return None
    return options


def memory_of(compiled: Any) -> int:
    """Bytes on a device of a program's arguments, results and temporaries."""
    found = compiled.memory_analysis()
    held = found.argument_size_in_bytes + found.output_size_in_bytes + found.temp_size_in_bytes
    return int(held - found.alias_size_in_bytes)
