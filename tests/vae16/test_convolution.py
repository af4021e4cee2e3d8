"""The other ways to a convolution are the convolution, and are taken on a CPU alone."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array, export

from vae16 import convolution
from vae16.convolution import blocks, columns, convolve, corners, direct, places, winograd


def arrays(*shapes: tuple[int, ...], dtype: object = jnp.float32) -> list[Array]:
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes]


def test_winograd_is_the_convolution() -> None:
    x, kernel = arrays((2, 6, 10, 5), (3, 3, 5, 7))
    np.testing.assert_allclose(jax.jit(winograd)(x, kernel), direct(x, kernel), atol=1e-5)


@pytest.mark.parametrize("shape", [(1, 2), (2, 2), (3, 1)])
def test_blocks_of_pixels_are_the_convolution(shape: tuple[int, int]) -> None:
    x, kernel = arrays((2, 6, 10, 5), (3, 3, 5, 7))
    ours = jax.jit(partial(blocks, shape=shape))(x, kernel)
    np.testing.assert_allclose(ours, direct(x, kernel), atol=1e-5)


@pytest.mark.parametrize("size", [(1, 1), (2, 2), (2, 5), (3, 1)])
def test_neighbours_side_by_side_are_the_convolution(size: tuple[int, int]) -> None:
    x, kernel = arrays((2, *size, 5), (3, 3, 5, 7))
    np.testing.assert_allclose(jax.jit(columns)(x, kernel), direct(x, kernel), atol=1e-5)


def test_products_for_each_place_are_the_convolution() -> None:
    x, kernel = arrays((2, 6, 10, 5), (3, 3, 5, 7))
    np.testing.assert_allclose(jax.jit(places)(x, kernel), direct(x, kernel), atol=1e-5)


def test_its_error_is_about_the_direct_ones() -> None:
    """In the square: 0.8 to 1.6 times, by the order in which a machine's direct convolution adds."""
    x, kernel = arrays((1, 32, 32, 256), (3, 3, 256, 64))
    with jax.enable_x64(True):
        exact = np.asarray(direct(*(jnp.asarray(np.asarray(a), jnp.float64) for a in (x, kernel))))
    ours, plain = (
        np.square(np.asarray(method(x, kernel)) - exact).mean() for method in map(jax.jit, (winograd, direct))
    )
    assert ours < 2.5 * plain


def derivatives(way: Callable[..., Array], x: Array, kernel: Array, dx: Array, dk: Array) -> object:
    slopes = jax.grad(lambda *args: jnp.sin(way(*args)).sum(), (0, 1))
    along = [jax.jvp(partial(way, x), (kernel,), (dk,)), jax.jvp(lambda x: way(x, kernel), (x,), (dx,))]
    pairs = jnp.stack([x, dx]), jnp.stack([kernel, dk])
    return slopes(x, kernel), jax.jvp(slopes, (x, kernel), (dx, dk)), along, jax.vmap(slopes)(*pairs)


direct_ones = jax.jit(partial(derivatives, direct))


@pytest.mark.parametrize(
    ("method", "height", "side", "bounds"),
    [
        (convolve, 6, 3, {"WIDTH": 1, "SIZE": 1}),
        (convolve, 6, 3, {"WIDTH": 1, "SIZE": 1, "PRODUCTS": 1}),
        (convolve, 6, 3, {"HEAVY": 1}),
        (convolve, 6, 3, {"ROWS": 1}),
        (convolve, 2, 3, {}),
        (corners, 6, 2, {}),
    ],
)
def test_gradients_and_derivatives_along_a_direction(
    method: Callable[..., Array], height: int, side: int, bounds: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, bound in bounds.items():
        monkeypatch.setattr(convolution, name, bound)
    x, kernel, dx, dk = arrays(*((2, height, 4, 3), (side, side, 3, 5)) * 2)
    ours = jax.jit(partial(derivatives, method))(x, kernel, dx, dk)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4), ours, direct_ones(x, kernel, dx, dk))


def test_no_window_of_a_gradient_is_larger_than_its_picture_on_a_cpu() -> None:
    """XLA:CPU turns such a convolution about, into a loop of its own."""

    def padded(platform: str) -> bool:
        """Whether the picture is padded by itself."""
        slope = jax.jit(jax.grad(lambda kernel, x: (corners(x, kernel) ** 2).sum()))
        text = export.export(slope, platforms=(platform,))(*arrays((2, 2, 3, 4), (1, 4, 4, 3))).mlir_module()
        return "stablehlo.pad" in text

    assert [padded(platform) for platform in ("cpu", "tpu", "cuda")] == [True, False, False]


def test_gradients_go_by_what_is_fast_for_them() -> None:
    def convolutions(platform: str, pixels: int, *widths: int) -> int:
        """Of the gradient alone."""
        x, kernel = (jax.ShapeDtypeStruct(s, jnp.float32) for s in ((1, pixels, pixels, widths[0]), (3, 3, *widths)))
        slopes = jax.jit(jax.grad(lambda *args: convolve(*args).sum(), (0, 1)))
        return export.export(slopes, platforms=(platform,))(x, kernel).mlir_module().count("stablehlo.convolution")

    for wide in ((64, 320, 320), (16, 1280, 1280)):
        assert [convolutions(platform, *wide) for platform in ("cpu", "tpu", "cuda")] == [0, 2, 2]
    assert [convolutions("cpu", *small) for small in ((64, 64, 64), (16, 256, 256))] == [2, 2]


def test_no_zeros_are_convolved() -> None:
    """Along a direction of the picture alone."""
    x, kernel = arrays((1, 4, 4, 3), (2, 2, 3, 5))
    program = export.export(jax.jit(lambda x, kernel: jax.jvp(lambda x: corners(x, kernel), (x,), (x,))[1]))(x, kernel)
    assert program.mlir_module().count("stablehlo.convolution") == 1


def test_it_is_taken_where_it_pays() -> None:
    def convolutions(platform: str, side: int, width: int, dtype: object = jnp.float32) -> int:
        method = arrays((1, side, side, width), (3, 3, width, width), dtype=dtype)
        program = export.export(jax.jit(convolve), platforms=(platform,))(*method)
        return program.mlir_module().count("stablehlo.convolution")

    assert [convolutions(platform, 64, 64) for platform in ("cpu", "tpu", "cuda")] == [0, 1, 1]
    assert [
        convolutions("cpu", side, width) for side, width in ((65, 64), (64, 32), (16, 64), (16, 1024), (130, 64))
    ] == [1] * 5
    assert convolutions("cpu", 32, 64) == 0
    assert convolutions("cpu", 16, 160) == 0, "a kernel that stays in the cache is turned for a few pixels too"
    assert [convolutions(platform, 2, 8) for platform in ("cpu", "tpu", "cuda")] == [0, 1, 1]
    assert convolutions("cpu", 64, 64, jnp.bfloat16) == 1


def test_blocks_are_taken_where_they_pay() -> None:
    def steps(platform: str, side: int, inner: int, outer: int) -> tuple[int, ...]:
        """Strides of the only convolution of a program."""
        method = arrays((1, side, side, inner), (3, 3, inner, outer))
        text = export.export(jax.jit(convolve), platforms=(platform,))(*method).mlir_module()
        assert text.count("stablehlo.convolution") == 1
        found = re.search(r"stride = \[(\d), (\d)\]", text)
        return (1, 1) if found is None else tuple(map(int, found.groups()))

    assert [steps(platform, 32, 128, 3) for platform in ("cpu", "tpu", "cuda")] == [(2, 2), (1, 1), (1, 1)]
    assert [steps("cpu", 32, *widths) for widths in ((3, 64), (4, 8), (3, 65), (5, 64))] == [
        (1, 2),
        (2, 2),
        (1, 1),
        (1, 1),
    ]
    assert steps("cpu", 30, 128, 3) == steps("cpu", 33, 128, 3) == (1, 1)
