from __future__ import annotations

import jax
import numpy as np
import pytest
import scipy.ndimage

from lcm_jax.metrics import reconstruction
from lcm_jax.metrics.reconstruction import psnr

ssim = jax.jit(reconstruction.ssim, static_argnames="data_range")


@pytest.fixture(scope="module")
def pictures():
    rng = np.random.default_rng(0)
    x = scipy.ndimage.gaussian_filter(rng.normal(size=(2, 24, 19, 3)), (0, 2, 2, 0))
    x = np.clip(128 + 300 * x, 0, 255).astype(np.uint8)
    y = np.clip(x + rng.normal(scale=[[[[8]]], [[[40]]]], size=x.shape), 0, 255).astype(np.uint8)
    return x, y


def ssim_oracle(x, y, data_range):
    """Wang's definition in float64 with scipy's Gaussian filter, cropped to the windows that fit."""

    def smooth(z):
        return scipy.ndimage.gaussian_filter(z, (1.5, 1.5, 0), truncate=3.5)[5:-5, 5:-5]

    x, y = np.float64(x), np.float64(y)
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    ux, uy = smooth(x), smooth(y)
    vx, vy, vxy = smooth(x * x) - ux**2, smooth(y * y) - uy**2, smooth(x * y) - ux * uy
    return np.mean((2 * ux * uy + c1) * (2 * vxy + c2) / ((ux**2 + uy**2 + c1) * (vx + vy + c2)))


def test_psnr_of_a_known_error():
    x = np.zeros((2, 4, 4, 3), np.uint8)
    y = x + np.array([1, 16], np.uint8)[:, None, None, None]
    expected = 20 * np.log10([255.0, 255.0 / 16])
    np.testing.assert_allclose(psnr(x, y, data_range=255), expected, rtol=1e-6)
    np.testing.assert_allclose(psnr(x / 127.5 - 1, y / 127.5 - 1, data_range=2), expected, rtol=1e-5)
    assert np.isposinf(psnr(x, x, data_range=255)).all()


def test_ssim_of_a_picture_with_itself_is_one(pictures):
    x, _ = pictures
    np.testing.assert_allclose(ssim(x, x, data_range=255), 1.0, atol=1e-6)


def test_ssim_agrees_with_the_definition(pictures):
    x, y = pictures
    expected = [ssim_oracle(a, b, 255) for a, b in zip(x, y, strict=True)]
    assert expected[0] > 0.9 > expected[1]
    np.testing.assert_allclose(ssim(x, y, data_range=255), expected, rtol=1e-5)
    np.testing.assert_allclose(ssim(y, x, data_range=255), expected, rtol=1e-5)
    np.testing.assert_allclose(ssim(x / 127.5, y / 127.5, data_range=2), expected, rtol=1e-5)


def test_ssim_of_flat_pictures_is_the_luminance_term():
    x, y = np.full((1, 11, 11, 1), 0.2), np.full((1, 11, 11, 1), 0.9)
    expected = (2 * 0.18 + 1e-4) / (0.04 + 0.81 + 1e-4)
    np.testing.assert_allclose(reconstruction.ssim(x, y, data_range=1), expected, rtol=1e-5)


def test_both_can_be_compiled_and_differentiated(pictures):
    x, y = (np.float32(p) / 255 for p in pictures)
    gradient = jax.jit(jax.grad(lambda z: ssim(z, y, data_range=1).sum() + psnr(z, y, data_range=1).sum()))(x)
    assert np.isfinite(gradient).all()


@pytest.mark.wrong_types
def test_bad_input_is_named(pictures):
    x, y = pictures
    with pytest.raises(ValueError, match="one shape"):
        psnr(x, y[:1], data_range=255)
    with pytest.raises(ValueError, match="data_range must be positive"):
        psnr(x, y, data_range=0)
    with pytest.raises(ValueError, match="11 x 11"):
        ssim(x[:, :10], y[:, :10], data_range=255)
