"""Tiled and sliced application against whole application."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vae16 import AutoencoderConfig, AutoencoderKL, decode_tiled, encode_tiled, sliced, tiled
from vae16.tiling import _starts


@pytest.fixture(scope="module")
def vae(random_params):
    config = AutoencoderConfig(
        block_out_channels=(4, 8), layers_per_block=1, norm_num_groups=4, mid_block_add_attention=False
    )
    module = AutoencoderKL(config)
    return module, random_params(module.init, jnp.zeros((1, 8, 8, 3)))["params"]


@pytest.fixture(scope="module")
def decoded(vae):
    """A smooth latent and what the whole of it decodes to."""
    module, params = vae
    z = waves(48, 8, 4)
    return z, jax.jit(lambda z: module.apply({"params": params}, z, method="decode"))(z)


def smooth(h: int, w: int, c: int) -> np.ndarray:
    y, x = np.meshgrid(np.linspace(0, 1, h), np.linspace(0, 1, w), indexing="ij")
    phase = np.arange(c) * 0.7
    return np.stack([np.sin(2 * y[..., None] + phase), np.cos(x[..., None] * 3 - phase)]).astype(np.float32)


def double(x: jax.Array) -> jax.Array:
    return jax.image.resize(x, (x.shape[0], 2 * x.shape[1], 2 * x.shape[2], x.shape[3]), "nearest") ** 2


@pytest.mark.parametrize(("h", "w"), [(20, 33), (16, 40), (41, 16), (17, 17)])
def test_pointwise_function_is_unchanged_by_tiling(h, w):
    @jax.jit
    def decode_both(x):
        return double(x), [tiled(double, x, tile=16, overlap=overlap) for overlap in (5, 0)]

    full, tiles = decode_both(smooth(h, w, 3))
    for y in tiles:
        np.testing.assert_allclose(y, full, atol=1e-6)


def test_starts_cover_and_overlap():
    for size in range(1, 80):
        for tile, overlap, multiple in ((7, 2, 1), (16, 4, 1), (16, 0, 1), (16, 4, 4), (16, 6, 8), (24, 0, 8)):
            starts = _starts(size * multiple, tile, overlap, multiple)
            assert starts[0] == 0
            assert starts[-1] + tile >= size * multiple
            assert all(s % multiple == 0 for s in starts)
            gaps = np.diff(starts)
            assert (gaps > 0).all()
            assert (gaps <= max(tile - overlap, 1) + multiple - 1).all()
            assert (gaps <= tile).all()


def test_a_tile_that_holds_the_image_is_exactly_whole(vae, decoded):
    module, params = vae
    z, full = decoded
    np.testing.assert_array_equal(jax.jit(lambda z: decode_tiled(module, params, z, tile=50, overlap=2))(z), full)


def waves(size: int, period: int, c: int) -> np.ndarray:
    """Smooth and stationary: every tile of whole periods has the same norm statistics as the whole image."""
    angle = 2 * np.pi * np.arange(size) / period
    phase = np.arange(c) * 0.7
    return (np.sin(angle[:, None, None] + phase) + np.cos(angle[None, :, None] - phase))[None].astype(np.float32)


def test_tiled_decode_of_a_smooth_latent_has_no_seams(vae, decoded):
    """What remains is the random network's response to the zero padding at tile borders, faded out by the ramps."""
    module, params = vae
    z, full = decoded
    blended, butted = (
        np.asarray(jax.jit(lambda z, overlap=overlap: decode_tiled(module, params, z, tile=32, overlap=overlap))(z))
        - full
        for overlap in (16, 0)
    )
    assert blended.shape == full.shape
    assert np.abs(blended).mean() < 0.1 * np.std(full)
    for axis in (1, 2):  # a seam is a jump of the error from one pixel to the next
        step, seam = (np.abs(np.diff(y[:, 4:-4, 4:-4], axis=axis)).max() for y in (blended, butted))
        assert step < 0.5 * seam


def test_tiled_encode_is_close_to_whole(vae):
    module, params = vae
    x = waves(64, 16, 3)[:, :, :48]
    mean, logvar = jax.jit(lambda x: encode_tiled(module, params, x, tile=32, overlap=12))(x)
    want, want_logvar = jax.jit(lambda x: module.apply({"params": params}, x, method="encode"))(x)
    assert mean.shape == logvar.shape == want.shape
    for a, b in ((mean, want), (logvar, want_logvar)):
        assert np.abs(np.asarray(a) - b).mean() < 0.2 * np.std(b)


def test_sliced_equals_batched():
    z = jax.random.normal(jax.random.key(1), (3, 4, 4, 4))

    def of_each_image(z):
        return double(z - z.mean((1, 2, 3), keepdims=True))

    one_by_one, full = jax.jit(lambda z: (sliced(of_each_image, z), of_each_image(z)))(z)
    assert full.shape == (3, 8, 8, 4)
    np.testing.assert_allclose(one_by_one, full, atol=1e-5)


def test_bad_tiles_are_named():
    with pytest.raises(ValueError, match="overlap"):
        tiled(double, jnp.zeros((1, 8, 8, 3)), tile=4, overlap=4)
    with pytest.raises(ValueError, match="multiples of 8"):
        tiled(double, jnp.zeros((1, 20, 8, 3)), tile=8, overlap=2, multiple=8)
