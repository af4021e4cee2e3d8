"""How the library's programs are compiled, and what they take."""

from __future__ import annotations

from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
from jax.errors import JaxRuntimeError

Options = dict[str, bool | int | str]

# What is needed last is made last: SD1.5's UNet at 512 pixels holds 0.09 GB beside its weights, not 0.67, and takes 4
# to 10 % less time (openmoji's up to 4 % more); kernels that a program multiplies out, such as T5's in int8w, are not
# all whole at once. A training step of openmoji's LCM takes 284 ms and 0.26 GB by this and XLA's own products, not 306
# and 0.31.
_IN_ORDER: Options = {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}
_OPTIONS: dict[str, Options] = {
    # XLA's own matrix products and reductions: its fusions by YNNPACK take 1.2 to 1.6 times as long (the openmoji
    # networks, jax 0.10.2, two cores with AVX2; SD1.5 at 512 pixels, all convolutions, is as it was).
    "cpu": {"xla_cpu_experimental_ynn_fusion_type": "", **_IN_ORDER},
    # Products of one input stay apart: one product for q, k and v together is cut into three copies, and keys and
    # values of all layers together need their kernels copied side by side at every call (SD1.5's UNet at batch 1 on an
    # H200: 6.8 to 5.0 ms). And they are cuBLAS's, which add bias and residual themselves, not Triton's (5.1 to 4.6 ms).
    "gpu": {"xla_gpu_dot_merger_threshold_mb": 0, "xla_gpu_enable_triton_gemm": False},
}
_NARROW: dict[str, Options] = {
    # YNNPACK has the processor's products of bfloat16 and int8, and convolutions of int8, where XLA has plain loops
    # (Intel with AMX, 320 channels of 64 x 64 pixels in int8: 800 and 2.5 ms, float32 25).
    "cpu": {
        "xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT,"
        "LIBRARY_FUSION_TYPE_INDIVIDUAL_CONVOLUTION",
        **_IN_ORDER,
    },
}


@cache
def compiler_options(*, low_precision: bool = False, platform: str | None = None) -> Options:
    """`jax.jit`'s compiler_options for a platform, by default that of the default device. narrow: for a program most of
    whose products are of bfloat16 or int8. What an XLA does not know any more is left out.
    """
    target = platform or jax.default_backend()
    options = (_NARROW if low_precision else _OPTIONS).get(target) or _OPTIONS.get(target, {})
    return {name: value for name, value in options.items() if _known(name, value)}


@cache
def _known(name: str, value: bool | int | str) -> bool:
    try:
        jax.jit(jnp.negative, compiler_options={name: value}).lower(0.0).compile()
    except JaxRuntimeError:
        return False
    return True


def memory_of(compiled: Any) -> int:
    """Bytes on a device of a program's arguments, results and temporaries."""
    found = compiled.memory_analysis()
    held = found.argument_size_in_bytes + found.output_size_in_bytes + found.temp_size_in_bytes
    return int(held - found.alias_size_in_bytes)
