"""Interceptors around `apply` that replace flax's arithmetic in the matrix products and convolutions of a network."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Float

from lcm_jax.typing import Array
from vae16.convolution import AROUND
from vae16.layers import NearestConv, folded, interleaved


@dataclass(frozen=True, kw_only=True)
class LayerOverrides:
    """The functions that replace flax's arithmetic in some layers.

    takes: (dtype, kernel) -> whether a layer of this dtype with this kernel is replaced; other layers are left alone.
    multiply: (n, c) by a kernel (c, d), or (1, 1, c, d). convolve: (b, h, w, c) by (k, l, c, d), with strides and
    padding. Both may return any float dtype; it is cast to the layer's. fold: folds the kernel of `NearestConv`, as
    `vae16.layers.folded` does.
    """

    takes: Callable[[Any, Any], bool]
    multiply: Callable[[Float[Array, "n c"], Any], Float[Array, "n d"]]
    convolve: Callable[[Float[Array, "b h w c"], Any, Any, Any], Float[Array, "b h2 w2 d"]]
    fold: Callable[[Any], Any] = folded

    def around(self) -> contextlib.AbstractContextManager[None]:
        """Return a context in which flax's Dense, two-dimensional Conv and `NearestConv` use these functions."""
        return nn.intercept_methods(self._call)

    def _call(self, next_function: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        module = context.module
        params = module.variables.get("params", {}) if isinstance(module, (nn.Dense, nn.Conv, NearestConv)) else {}
        if context.method_name != "__call__" or "kernel" not in params:
            return next_function(*args, **kwargs)
        kernel, dtype = params["kernel"], jnp.dtype(module.dtype or args[0].dtype)
        if not self.takes(dtype, kernel):
            return next_function(*args, **kwargs)
        x, bias = args[0].astype(dtype), params.get("bias", 0.0)
        if isinstance(module, NearestConv):
            corners = self.convolve(x, self.fold(kernel), (1, 1), AROUND).astype(dtype)
            return interleaved(corners) + jnp.asarray(bias, dtype)
        strides = _pair(getattr(module, "strides", None) or 1)
        if isinstance(module, nn.Dense) or (module.kernel_size, strides) == ((1, 1), (1, 1)):
            y = self.multiply(x.reshape(-1, x.shape[-1]), kernel) + bias
            options = getattr(getattr(module, "dot_general", None), "keywords", {})  # T5 asks for sums in float32
            y = y.astype(options.get("preferred_element_type", dtype))
            return y.reshape(*x.shape[:-1], -1)  # after the cast: otherwise a TPU transposes the heads in float32
        padding = module.padding if isinstance(module.padding, (str, tuple)) else (_pair(module.padding),) * 2
        return (self.convolve(x, kernel, strides, padding) + bias).astype(dtype)


def _pair(value: Any) -> Any:
    return (value, value) if isinstance(value, int) else value
