"""How the library's programs are compiled."""

from __future__ import annotations

from functools import cache

import jax
import jax.numpy as jnp
from jax.errors import JaxRuntimeError

_OWN_PRODUCTS = {"xla_cpu_experimental_ynn_fusion_type": ""}


@cache
def compiler_options() -> dict[str, str] | None:
    """`jax.jit`'s compiler_options for the default device, None for XLA's own choice.

    On a CPU matrix products and reductions are left to XLA, as its fusions by YNNPACK take 1.2 to 1.6 times as long
    (the openmoji networks, jax 0.10.2, two cores with AVX2; SD1.5 at 512 pixels, all convolutions, is as it was). An
    XLA that does not know the option any more is left alone.
    """
    if jax.default_backend() != "cpu":
        return None
    try:
        jax.jit(jnp.negative, compiler_options=_OWN_PRODUCTS).lower(0.0).compile()
    except JaxRuntimeError:
        return None
    return _OWN_PRODUCTS
