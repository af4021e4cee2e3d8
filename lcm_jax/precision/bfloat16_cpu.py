"""Networks in bfloat16 on a CPU.

Processors multiply bfloat16 two to five times as fast as float32 (AVX-512 BF16, AMX), but XLA:CPU uses that only in
matrix products with float32 sums; anything else it emulates, converting the kernels to float32 at every call. So this
module asks for such products, and computes convolutions with them.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import BFloat16, Float, PyTree

from lcm_jax.precision.layer_overrides import LayerOverrides
from lcm_jax.typing import Array
from vae16.convolution import convolve_bfloat16


def _takes(dtype: Any, kernel: Any) -> bool:
    return bool(dtype == jnp.bfloat16) and isinstance(kernel, jax.Array)


def _multiply(x: BFloat16[Array, "n c"], kernel: Array) -> Float[Array, "n d"]:
    return jnp.dot(x, _half(kernel).reshape(kernel.shape[-2:]), preferred_element_type=jnp.float32)


def _convolve(x: BFloat16[Array, "b h w c"], kernel: Array, strides: Any, padding: Any) -> Array:
    return convolve_bfloat16(x, _half(kernel), strides, padding)


def _half(kernel: Array) -> BFloat16[Array, "*k"]:
    return kernel.astype(jnp.bfloat16)


OVERRIDES = LayerOverrides(takes=_takes, multiply=_multiply, convolve=_convolve)


def is_bfloat16(params: PyTree) -> bool:
    """Return whether any parameter of a network is bfloat16.

    >>> import jax.numpy as jnp
    >>> is_bfloat16({"kernel": jnp.zeros((2, 2), jnp.bfloat16)}), is_bfloat16({"kernel": jnp.zeros((2, 2))})
    (True, False)
    """
    return any(getattr(leaf, "dtype", None) == jnp.bfloat16 for leaf in jax.tree.leaves(params))
