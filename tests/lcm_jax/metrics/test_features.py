from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from lcm_jax.metrics.features import NetworkFeatures


def test_batches_are_padded_and_compiled_once():
    traced = []

    def apply(params, images):
        traced.append(images.shape)
        return jnp.einsum("bhwc,cd->bhd", images, params)

    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (11, 4, 4, 3), dtype=np.uint8)
    params = rng.normal(size=(3, 5)).astype(np.float32)
    extract = NetworkFeatures(apply=apply, params=params, batch_size=4)
    found = extract(images)
    expected = np.einsum("bhwc,cd->bhd", images / 127.5 - 1, params).reshape(11, -1)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=1e-5)
    np.testing.assert_array_equal(extract(images[:3]), found[:3])
    assert traced == [(4, 4, 4, 3)]


@pytest.mark.wrong_types
def test_bad_pictures_are_named():
    extract = NetworkFeatures(apply=lambda params, images: images, params=None)
    with pytest.raises(ValueError, match="float64"):
        extract(np.zeros((1, 4, 4, 3)))
    with pytest.raises(ValueError, match="no pictures"):
        extract(np.zeros((0, 4, 4, 3), np.uint8))
    with pytest.raises(ValueError, match="batch_size"):
        NetworkFeatures(apply=lambda params, images: images, params=None, batch_size=0)
