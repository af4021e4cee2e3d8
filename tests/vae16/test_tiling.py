"""Tiled and sliced application against whole application."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vae16 import AutoencoderConfig, AutoencoderKL, decode_tiled, encode_tiled, sliced, tiled
from vae16.tiling import _starts


@pytest.fixture(scope="module")
def vae():
    config = AutoencoderConfig(block_out_channels=(4, 8), norm_num_groups=4, mid_block_add_attention=False)
    module = AutoencoderKL(config)
    return module, jax.jit(module.init)(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))["params"]


def smooth(h: int, w: int, c: int) -> jax.Array:
    y, x = jnp.meshgrid(jnp.linspace(0, 1, h), jnp.linspace(0, 1, w), indexing="ij")
    phase = jnp.arange(c) * 0.7
    return jnp.stack([jnp.sin(2 * y[..., None] + phase), jnp.cos(x[..., None] * 3 - phase)])


def double(x: jax.Array) -> jax.Array:
    return jax.image.resize(x, (x.shape[0], 2 * x.shape[1], 2 * x.shape[2], x.shape[3]), "nearest") ** 2


@pytest.mark.parametrize(("h", "w"), [(20, 33), (16, 40), (41, 16), (17, 17)])
def test_pointwise_function_is_unchanged_by_tiling(h, w):
    x = smooth(h, w, 3)
    whole = double(x)
    np.testing.assert_allclose(jax.jit(lambda x: tiled(double, x, tile=16, overlap=5))(x), whole, atol=1e-6)
    np.testing.assert_allclose(tiled(double, x, tile=16, overlap=0), whole, atol=1e-6)


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


def test_a_tile_that_holds_the_image_is_exactly_whole(vae):
    module, params = vae
    z = jax.random.normal(jax.random.key(1), (1, 6, 8, 4))
    whole = jax.jit(lambda z: module.apply({"params": params}, z, method="decode"))(z)
    np.testing.assert_array_equal(jax.jit(lambda z: decode_tiled(module, params, z, tile=8, overlap=2))(z), whole)


def waves(size: int, period: int, c: int) -> jax.Array:
    """Smooth and stationary: every tile of whole periods has the same norm statistics as the whole image."""
    angle = 2 * jnp.pi * jnp.arange(size) / period
    phase = jnp.arange(c) * 0.7
    return (jnp.sin(angle[:, None, None] + phase) + jnp.cos(angle[None, :, None] - phase))[None]


def test_tiled_decode_of_a_smooth_latent_has_no_seams(vae):
    """What remains is the random network's response to the zero padding at tile borders, faded out by the ramps."""
    module, params = vae
    z = waves(48, 8, 4)
    whole = jax.jit(lambda z: module.apply({"params": params}, z, method="decode"))(z)
    blended, butted = (
        jax.jit(lambda z, overlap=overlap: decode_tiled(module, params, z, tile=32, overlap=overlap))(z) - whole
        for overlap in (16, 0)
    )
    assert blended.shape == whole.shape
    assert float(jnp.abs(blended).mean()) < 0.1 * float(whole.std())
    for axis in (1, 2):  # a seam is a jump of the error from one pixel to the next
        jump, seam = (jnp.abs(jnp.diff(y[:, 4:-4, 4:-4], axis=axis)).max() for y in (blended, butted))
        assert jump < 0.5 * seam


def test_tiled_encode_is_close_to_whole(vae):
    module, params = vae
    x = waves(64, 16, 3)[:, :, :48]
    mean, logvar = jax.jit(lambda x: encode_tiled(module, params, x, tile=32, overlap=12))(x)
    want, want_logvar = jax.jit(lambda x: module.apply({"params": params}, x, method="encode"))(x)
    assert mean.shape == logvar.shape == want.shape
    for a, b in ((mean, want), (logvar, want_logvar)):
        assert float(jnp.abs(a - b).mean()) < 0.2 * float(b.std())


def test_sliced_equals_batched(vae):
    module, params = vae
    z = jax.random.normal(jax.random.key(1), (3, 4, 4, 4))

    def decode(z):
        return module.apply({"params": params}, z, method="decode")

    one_by_one, whole = jax.jit(lambda z: (sliced(decode, z), decode(z)))(z)
    np.testing.assert_allclose(one_by_one, whole, atol=1e-5)


def test_bad_tiles_are_named():
    with pytest.raises(ValueError, match="overlap"):
        tiled(double, jnp.zeros((1, 8, 8, 3)), tile=4, overlap=4)
    with pytest.raises(ValueError, match="multiples of 8"):
        tiled(double, jnp.zeros((1, 20, 8, 3)), tile=8, overlap=2, multiple=8)
