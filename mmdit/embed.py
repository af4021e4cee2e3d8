"""What enters the blocks: patches with their places, and the vector of time, guidance and pooled text."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Float

from mmdit.config import MMDiTConfig

TIME_WIDTH = 256  # of the sinusoid of time, in every MMDiT


def patchify(x: Float[Array, "b h w c"], patch: int) -> Float[Array, "b n p"]:
    """Patches in rows, each with its rows, columns and channels as one vector."""
    return rearrange(x, "b (h p) (w q) c -> b (h w) (p q c)", p=patch, q=patch)


def unpatchify(tokens: Float[Array, "b n p"], patch: int, height: int) -> Float[Array, "b h w c"]:
    """The inverse of patchify; height: in pixels of the result."""
    return rearrange(tokens, "b (h w) (p q c) -> b (h p) (w q) c", h=height // patch, p=patch, q=patch)


def position_grid(size: int, base: int, width: int) -> Float[Array, "1 n d"]:
    """Sinusoids of the column, then of the row, of every patch of a square of `size` patches, n = size^2.

    Position i counts as i base / size, where base is the patches on a side of the picture trained on, so that a grid
    made larger keeps its range. Each axis has width / 2 channels [sin(p w_j), cos(p w_j)], w_j = 1e4^(-4 j / width).
    """
    quarter = width // 4
    places = np.arange(size, dtype=np.float32) / np.float32(size / base)
    angles = np.outer(places.astype(np.float64), 1e4 ** (-np.arange(quarter) / quarter))
    axis = jnp.asarray(np.concatenate([np.sin(angles), np.cos(angles)], axis=1), jnp.float32)
    shape = (size, size, width // 2)
    columns, rows = jnp.broadcast_to(axis[None], shape), jnp.broadcast_to(axis[:, None], shape)
    return jnp.concatenate([columns, rows], axis=-1).reshape(1, size * size, width)


def sinusoidal(
    t: Float[Array, " b"], dim: int, *, cosines_first: bool = False, freq_shift: float = 1.0
) -> Float[Array, "b dim"]:
    """[sin(t w_i), cos(t w_i)] with w_i = 1e4^(-i / (dim/2 - freq_shift)), in float32."""
    half = dim // 2
    # On the host: an accelerator's approximate exp would shift the phase at large t.
    frequencies = 1e4 ** (-np.arange(half) / (half - freq_shift))
    angles = t.astype(jnp.float32)[:, None] * frequencies.astype(np.float32)
    first, second = (jnp.cos, jnp.sin) if cosines_first else (jnp.sin, jnp.cos)
    return jnp.concatenate([first(angles), second(angles)], axis=-1)


def guidance_embedding(w: Float[Array, " b"], dim: int) -> Float[Array, "b dim"]:
    """The guidance scale w = guidance - 1 as a vector: the sinusoid of 1000 w (LCM, arXiv:2310.04378, section 4.3)."""
    return sinusoidal(1000.0 * w.astype(jnp.float32), dim)


def _project_patches(x: Array, kernel: Array, strides: Any, *_: Any, precision: Any = None, **__: Any) -> Array:
    """The convolution whose stride is its kernel, as the matrix product that it is."""
    patch = strides[0]
    y = jnp.dot(patchify(x, patch), kernel.reshape(-1, kernel.shape[-1]), precision=precision)
    return y.reshape(x.shape[0], x.shape[1] // patch, x.shape[2] // patch, kernel.shape[-1])


class PatchEmbed(nn.Module):
    """Projected patches plus their places: a picture of any size and shape takes the middle of the position grid.

    The grid lies with the parameters, as files have it (`pos_embed`), but is a constant: it has no gradient.
    """

    config: MMDiTConfig
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b n d"]:
        config, patch, size = self.config, self.config.patch_size, self.config.pos_embed_max_size
        tokens = nn.Conv(
            config.width,
            (patch, patch),
            (patch, patch),
            padding="VALID",
            name="proj",
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            kernel_init=nn.initializers.xavier_uniform(in_axis=(0, 1, 2), out_axis=3),  # of the matrix product
            conv_general_dilated=_project_patches,
        )(x)
        rows, columns = tokens.shape[1:3]

        def init(_: Array) -> Array:
            return position_grid(size, config.sample_size // patch, config.width).astype(self.param_dtype)

        grid = jax.lax.stop_gradient(self.param("pos_embed", init)).reshape(size, size, config.width)
        top, left = (size - rows) // 2, (size - columns) // 2
        places = grid[top : top + rows, left : left + columns]
        tokens = tokens.astype(jnp.float32) + places.astype(jnp.float32)
        return tokens.reshape(x.shape[0], rows * columns, config.width).astype(self.dtype)


class Embedder(nn.Module):
    """Two layers, in float32.

    cond_proj_dim: width of a second input (guidance); spans: there is a third of x's width (how far a step reaches).
    Their projections, zero at first, are added to x.
    """

    features: int
    cond_proj_dim: int | None = None
    param_dtype: Any = jnp.float32
    spans: bool = False

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b n"],
        condition: Float[Array, "b w"] | None = None,
        span: Float[Array, "b n"] | None = None,
    ) -> Float[Array, "b d"]:
        types = {"dtype": jnp.float32, "param_dtype": self.param_dtype}
        normal, zero = nn.initializers.normal(0.02), nn.initializers.zeros_init()
        width = x.shape[-1]
        extra = {"cond_proj": (condition, self.cond_proj_dim), "span_proj": (span, width if self.spans else None)}
        for name, (value, dim) in extra.items():
            if value is None and dim is not None and self.is_initializing():
                value = jnp.zeros((x.shape[0], dim), jnp.float32)
            if value is not None:
                x = x + nn.Dense(width, use_bias=False, kernel_init=zero, name=name, **types)(value)
        x = nn.silu(nn.Dense(self.features, kernel_init=normal, name="linear_1", **types)(x))
        return nn.Dense(self.features, kernel_init=normal, name="linear_2", **types)(x)


class TimeTextEmbed(nn.Module):
    """One vector for the modulation of all blocks: time (with guidance) plus pooled text, in float32."""

    features: int
    cond_proj_dim: int | None = None
    param_dtype: Any = jnp.float32
    spans: bool = False

    @nn.compact
    def __call__(
        self,
        t: Float[Array, " b"],
        pooled: Float[Array, "b p"],
        guidance: Float[Array, " b"] | None = None,
        span: Float[Array, " b"] | None = None,
    ) -> Float[Array, "b d"]:
        time = sinusoidal(t, TIME_WIDTH, cosines_first=True, freq_shift=0.0)
        reach = None if span is None else sinusoidal(span, TIME_WIDTH, cosines_first=True, freq_shift=0.0)
        w = None if guidance is None else guidance_embedding(guidance, self.cond_proj_dim or 0)
        embed = Embedder(self.features, self.cond_proj_dim, self.param_dtype, self.spans, name="timestep_embedder")
        text = Embedder(self.features, param_dtype=self.param_dtype, name="text_embedder")
        return embed(time, w, reach) + text(pooled.astype(jnp.float32))
