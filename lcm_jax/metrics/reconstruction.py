"""Distances between a picture and its reconstruction: PSNR and SSIM. LPIPS is `vae16.perceptual`."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Num

WINDOW = 11  # pixels
WINDOW_SIGMA = 1.5  # pixels
K1, K2 = 0.01, 0.03


def _pair(
    x: Num[Array, "n h w c"], y: Num[Array, "n h w c"], data_range: float
) -> tuple[Float[Array, "n h w c"], Float[Array, "n h w c"]]:
    """Both pictures in float32, in units of the data range."""
    if x.shape != y.shape or x.ndim != 4:
        raise ValueError(f"expected two picture batches of one shape (n, h, w, c), got {x.shape} and {y.shape}")
    if data_range <= 0:
        raise ValueError(f"data_range must be positive (255 for uint8, 2 for [-1, 1]), got {data_range}")
    return jnp.asarray(x, jnp.float32) / data_range, jnp.asarray(y, jnp.float32) / data_range


def psnr(x: Num[Array, "n h w c"], y: Num[Array, "n h w c"], *, data_range: float) -> Float[Array, " n"]:
    """10 log10(data_range^2 / MSE) in decibel for each picture; infinite for equal pictures.

    data_range: greatest minus least possible value (255 for uint8, 2 for [-1, 1]).
    """
    a, b = _pair(x, y, data_range)
    return -10.0 * jnp.log10(jnp.mean(jnp.square(a - b), axis=(1, 2, 3)))


def _smooth(x: Float[Array, "n h w c"]) -> Float[Array, "n h-10 w-10 c"]:
    """Gaussian average over the windows that lie inside the picture."""
    n, h, w, c = x.shape
    offset = np.arange(WINDOW) - WINDOW // 2
    weight = np.exp(-0.5 * (offset / WINDOW_SIGMA) ** 2)
    taps = jnp.asarray(weight / weight.sum(), x.dtype)
    x = x.transpose(0, 3, 1, 2).reshape(n * c, 1, h, w)
    for window in (taps.reshape(1, 1, -1, 1), taps.reshape(1, 1, 1, -1)):
        x = jax.lax.conv_general_dilated(x, window, (1, 1), "VALID", precision=jax.lax.Precision.HIGHEST)
    return x.reshape(n, c, *x.shape[2:]).transpose(0, 2, 3, 1)


def ssim(x: Num[Array, "n h w c"], y: Num[Array, "n h w c"], *, data_range: float) -> Float[Array, " n"]:
    """Mean structural similarity (Wang 2004, eq. 13) of each picture, in [-1, 1].

    11 x 11 Gaussian windows of sigma 1.5, only those inside the picture, K1 = 0.01, K2 = 0.03, weighted (biased)
    moments, and the mean over channels: scikit-image's `gaussian_weights=True, use_sample_covariance=False`.
    """
    a, b = _pair(x, y, data_range)
    if min(a.shape[1:3]) < WINDOW:
        raise ValueError(f"SSIM needs pictures of at least {WINDOW} x {WINDOW} pixels, got {a.shape[1]} x {a.shape[2]}")
    # Moments about each picture's mean: E[x^2] - E[x]^2 loses fewer digits in float32.
    centre_a, centre_b = a.mean(axis=(1, 2), keepdims=True), b.mean(axis=(1, 2), keepdims=True)
    a, b = a - centre_a, b - centre_b
    mean_a, mean_b, aa, bb, ab = jnp.split(_smooth(jnp.concatenate([a, b, a * a, b * b, a * b])), 5)
    var_a, var_b, cov = aa - mean_a * mean_a, bb - mean_b * mean_b, ab - mean_a * mean_b
    mean_a, mean_b = mean_a + centre_a, mean_b + centre_b
    c1, c2 = K1**2, K2**2
    luminance = (2 * mean_a * mean_b + c1) / (mean_a * mean_a + mean_b * mean_b + c1)
    structure = (2 * cov + c2) / (var_a + var_b + c2)
    return jnp.mean(luminance * structure, axis=(1, 2, 3))
