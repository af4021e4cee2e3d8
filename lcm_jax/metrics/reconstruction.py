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
    x: Num[Array | np.ndarray, "n h w c"], y: Num[Array | np.ndarray, "n h w c"], data_range: float
) -> tuple[Float[Array, "n h w c"], Float[Array, "n h w c"]]:
    """Return both pictures in float32, in units of the data range."""
    if x.shape != y.shape or x.ndim != 4:
        raise ValueError(f"expected two picture batches of one shape (n, h, w, c), got {x.shape} and {y.shape}")
    if data_range <= 0:
        raise ValueError(f"data_range must be positive (255 for uint8, 2 for [-1, 1]), got {data_range}")
    return jnp.asarray(x, jnp.float32) / data_range, jnp.asarray(y, jnp.float32) / data_range


def psnr(
    x: Num[Array | np.ndarray, "n h w c"], y: Num[Array | np.ndarray, "n h w c"], *, data_range: float
) -> Float[Array, " n"]:
    """Return the peak signal-to-noise ratio of each picture in decibels, 10 log10(data_range^2 / MSE).

    It is infinite for equal pictures. data_range: the greatest minus the least possible value (255 for uint8, 2 for
    [-1, 1]).

    Raises ValueError if the shapes differ or are not (n, h, w, c), or `data_range` is not positive.

    >>> import jax.numpy as jnp
    >>> from lcm_jax.metrics import psnr
    >>> x = jnp.zeros((1, 4, 4, 3))
    >>> psnr(x, x + 0.1, data_range=1.0).round(3).tolist()
    [20.0]
    """
    a, b = _pair(x, y, data_range)
    return -10.0 * jnp.log10(jnp.mean(jnp.square(a - b), axis=(1, 2, 3)))


def _smooth(x: Float[Array, "n h w c"]) -> Float[Array, "n h-10 w-10 c"]:
    """Return the Gaussian average over the windows that are inside the picture."""
    n, h, w, c = x.shape
    offset = np.arange(WINDOW) - WINDOW // 2
    weight = np.exp(-0.5 * (offset / WINDOW_SIGMA) ** 2)
    taps = jnp.asarray(weight / weight.sum(), x.dtype)
    x = x.transpose(0, 3, 1, 2).reshape(n * c, 1, h, w)
    for window in (taps.reshape(1, 1, -1, 1), taps.reshape(1, 1, 1, -1)):
        x = jax.lax.conv_general_dilated(x, window, (1, 1), "VALID", precision=jax.lax.Precision.HIGHEST)
    return x.reshape(n, c, *x.shape[2:]).transpose(0, 2, 3, 1)


def ssim(
    x: Num[Array | np.ndarray, "n h w c"], y: Num[Array | np.ndarray, "n h w c"], *, data_range: float
) -> Float[Array, " n"]:
    """Return the mean structural similarity of each picture, in [-1, 1] (Wang 2004, eq. 13).

    SSIM = (2 mu_x mu_y + C1)(2 sigma_xy + C2) / ((mu_x^2 + mu_y^2 + C1)(sigma_x^2 + sigma_y^2 + C2)), where
    C = (K data_range)^2 with K1 = 0.01 and K2 = 0.03. The windows are Gaussian, 11 x 11 with sigma 1.5, and only those
    inside the picture count. The moments are weighted (biased), and the result is the mean over windows and channels:
    scikit-image's `gaussian_weights=True, use_sample_covariance=False`.

    Raises ValueError as `psnr` does, and if a side of the pictures is shorter than 11 pixels.

    >>> import jax.numpy as jnp
    >>> from lcm_jax.metrics import ssim
    >>> x, y = jnp.full((1, 11, 11, 1), 0.2), jnp.full((1, 11, 11, 1), 0.9)
    >>> round(float(ssim(x, y, data_range=1.0)[0]), 3)  # flat pictures: (2 * 0.18 + C1) / (0.04 + 0.81 + C1)
    0.424
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
