"""The placement and memory layout of parameters on a device."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax.experimental.layout import Format, Layout
from jax.sharding import SingleDeviceSharding

from lcm_jax.typing import Array


def put_on_device(array: np.ndarray | Array, device: Any = None) -> Array:
    """Return a copy of a parameter on a device, by default JAX's default device; it shares no memory with `array`.

    On a GPU the kernel of a convolution, (h, w, in, out), is stored in the order that cuDNN reads, (out, h, w, in), and
    compiled programs use that layout: otherwise every call transposes all kernels, 8 % of a step of SD1.5's UNet on an
    H200.
    """
    if device is None and jax.default_backend() == "gpu" and _is_window(array.shape):
        return jax.device_put(array, as_cudnn_reads(jax.devices()[0]))
    if isinstance(array, np.ndarray) and array.base is not None and array.flags.c_contiguous:
        array = array.copy()  # a CPU would use aligned memory without a copy, whatever may_alias says
    return jax.device_put(array, device, may_alias=False)


def as_cudnn_reads(device: Any) -> Format:
    """Return the layout in which the axis `out` of a kernel (h, w, in, out) varies slowest."""
    return Format(Layout(major_to_minor=(3, 0, 1, 2)), SingleDeviceSharding(device))


def _is_window(shape: tuple[int, ...]) -> bool:
    """Return whether it is a convolution of more than one pixel; kernels of 1 x 1 are used as matrices."""
    return len(shape) == 4 and shape[0] * shape[1] > 1
