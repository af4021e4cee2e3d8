"""Where parameters lie does not change what they are, and programs take it over."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lcm_jax.weights import device


def test_on_a_gpu_kernels_of_convolutions_lie_as_cudnn_reads_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")  # XLA:CPU knows layouts too
    kernel = np.random.default_rng(0).standard_normal((3, 3, 4, 8)).astype(np.float32)
    placed = device.put_on_device(kernel)
    assert placed.format.layout.major_to_minor == (3, 0, 1, 2)
    np.testing.assert_array_equal(placed, kernel)
    names = ("NHWC", "HWIO", "NHWC")
    convolve = jax.jit(lambda x, k: jax.lax.conv_general_dilated(x, k, (1, 1), "SAME", dimension_numbers=names))
    x = jnp.ones((1, 5, 5, 4))
    taken = convolve.lower(x, placed).compile()
    assert taken.input_formats[0][1].layout.major_to_minor == (3, 0, 1, 2)
    np.testing.assert_allclose(taken(x, placed), convolve(x, kernel), rtol=1e-6)


@pytest.mark.parametrize("shape", [(4,), (4, 8), (1, 1, 4, 8), (2, 3, 3, 4, 8)])
def test_all_else_lies_as_ever(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    placed = device.put_on_device(np.ones(shape, np.float32))
    assert placed.format.layout.major_to_minor == tuple(range(len(shape)))
