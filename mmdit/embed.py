"""The inputs of the blocks: patches with position embeddings, and the vector of time, guidance and pooled text."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Float

from mmdit.config import MMDiTConfig

TIME_WIDTH = 256  # channels of the sinusoid of time, in every MMDiT


def patchify(x: Float[Array, "b h w c"], patch: int) -> Float[Array, "b n p"]:
    """Return the patches of x, row by row, each with its rows, columns and channels as one vector.

    >>> import jax.numpy as jnp
    >>> from mmdit.embed import patchify, unpatchify
    >>> x = jnp.arange(48).reshape(1, 4, 6, 2) * 1.0
    >>> tokens = patchify(x, 2)
    >>> tokens.shape, bool((unpatchify(tokens, 2, height=4) == x).all())
    ((1, 6, 8), True)
    """
    return rearrange(x, "b (h p) (w q) c -> b (h w) (p q c)", p=patch, q=patch)


def unpatchify(tokens: Float[Array, "b n p"], patch: int, height: int) -> Float[Array, "b h w c"]:
    """Return the array whose patches are `tokens`, the inverse of `patchify`; height: of the result, in pixels."""
    return rearrange(tokens, "b (h w) (p q c) -> b (h p) (w q) c", h=height // patch, p=patch, q=patch)


def position_grid(size: int, base: int, width: int) -> Float[Array, "1 n d"]:
    """Return the position embeddings of a square of `size` x `size` patches: sinusoids of the column, then of the row.

    Position i counts as p = i base / size, where base is the number of patches on a side of the images in training, so
    a larger grid has the same range. Each axis has width / 2 channels [sin(p w_j), cos(p w_j)] with
    w_j = 1e4^(-4 j / width); n = size^2 and d = width.

    >>> from mmdit.embed import position_grid
    >>> position_grid(size=3, base=3, width=8).shape
    (1, 9, 8)
    """
    quarter = width // 4
    positions = np.arange(size, dtype=np.float32) / np.float32(size / base)
    angles = np.outer(positions.astype(np.float64), 1e4 ** (-np.arange(quarter) / quarter))
    axis = jnp.asarray(np.concatenate([np.sin(angles), np.cos(angles)], axis=1), jnp.float32)
    shape = (size, size, width // 2)
    columns, rows = jnp.broadcast_to(axis[None], shape), jnp.broadcast_to(axis[:, None], shape)
    return jnp.concatenate([columns, rows], axis=-1).reshape(1, size * size, width)


def sinusoidal(
    t: Float[Array, " b"], dim: int, *, cosines_first: bool = False, freq_shift: float = 1.0
) -> Float[Array, "b dim"]:
    """Return [sin(t w_i), cos(t w_i)] with w_i = 1e4^(-i / (dim/2 - freq_shift)), in float32.

    cosines_first: return [cos, sin].

    >>> import jax.numpy as jnp
    >>> from mmdit.embed import sinusoidal
    >>> sinusoidal(jnp.zeros(1), 4).tolist()
    [[0.0, 0.0, 1.0, 1.0]]
    """
    half = dim // 2
    # The frequencies are computed by NumPy: an accelerator's approximate exp would shift the phase at large t.
    frequencies = 1e4 ** (-np.arange(half) / (half - freq_shift))
    angles = t.astype(jnp.float32)[:, None] * frequencies.astype(np.float32)
    first, second = (jnp.cos, jnp.sin) if cosines_first else (jnp.sin, jnp.cos)
    return jnp.concatenate([first(angles), second(angles)], axis=-1)


def guidance_embedding(w: Float[Array, " b"] | Float[Array, "b 3"], dim: int) -> Float[Array, "b dim"]:
    """Return the w-embedding, the classifier-free guidance embedding of LCM (arXiv:2310.04378, section 4.3).

    w = guidance - 1 is the guidance scale of each example; the embedding is the sinusoid of 1000 w. With (w, start,
    end) the network is guided within an interval of times, as shares of the way from clean to noise, and the embedding
    is that of w plus what the ends add to it: nothing for the whole interval, (w, 0, 1).

    >>> import jax.numpy as jnp
    >>> from mmdit.embed import guidance_embedding
    >>> guidance_embedding(jnp.array([0.0, 7.5]), 256).shape
    (2, 256)
    >>> whole = guidance_embedding(jnp.array([[7.5, 0.0, 1.0]]), 256)
    >>> bool(jnp.allclose(whole, guidance_embedding(jnp.array([7.5]), 256)))
    True
    """
    w = 1000.0 * w.astype(jnp.float32)
    if w.ndim == 1:
        return sinusoidal(w, dim)
    w, start, end = w.T
    zero = sinusoidal(jnp.zeros_like(w), dim)
    # the end's frequencies are in the other order, so that it is not taken for the start
    ends = sinusoidal(start, dim) - zero + (sinusoidal(1000.0 - end, dim) - zero)[:, ::-1]
    return sinusoidal(w, dim) + ends


def _project_patches(x: Array, kernel: Array, strides: Any, *_: Any, precision: Any = None, **__: Any) -> Array:
    """Compute a convolution whose stride is its kernel size as one matrix product."""
    patch = strides[0]
    y = jnp.dot(patchify(x, patch), kernel.reshape(-1, kernel.shape[-1]), precision=precision)
    return y.reshape(x.shape[0], x.shape[1] // patch, x.shape[2] // patch, kernel.shape[-1])


class PatchEmbed(nn.Module):
    """The projected patches plus their position embeddings; any image takes the middle of the position grid.

    The grid is one of the parameters, because published files have it (`pos_embed`), but it is a constant without
    gradient.
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
            kernel_init=nn.initializers.xavier_uniform(in_axis=(0, 1, 2), out_axis=3),  # as for the matrix product
            conv_general_dilated=_project_patches,
        )(x)
        rows, columns = tokens.shape[1:3]

        def init(_: Array) -> Array:
            return position_grid(size, config.sample_size // patch, config.width).astype(self.param_dtype)

        grid = jax.lax.stop_gradient(self.param("pos_embed", init)).reshape(size, size, config.width)
        top, left = (size - rows) // 2, (size - columns) // 2
        positions = grid[top : top + rows, left : left + columns]
        tokens = tokens.astype(jnp.float32) + positions.astype(jnp.float32)
        return tokens.reshape(x.shape[0], rows * columns, config.width).astype(self.dtype)


class Embedder(nn.Module):
    """The MLP of an embedding: two dense layers with SiLU between them, in float32.

    cond_proj_dim: width of a second input, the w-embedding. spans: whether there is a third input, of x's width, the
    embedding of the length of the step. Their projections, zero at first, are added to x.
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
        inputs = {"cond_proj": (condition, self.cond_proj_dim), "span_proj": (span, width if self.spans else None)}
        for name, (value, dim) in inputs.items():
            if value is None and dim is not None and self.is_initializing():
                value = jnp.zeros((x.shape[0], dim), jnp.float32)
            if value is not None:
                x = x + nn.Dense(width, use_bias=False, kernel_init=zero, name=name, **types)(value)
        x = nn.silu(nn.Dense(self.features, kernel_init=normal, name="linear_1", **types)(x))
        return nn.Dense(self.features, kernel_init=normal, name="linear_2", **types)(x)


class TimeTextEmbed(nn.Module):
    """The vector that modulates all blocks: the embedding of time (with guidance) plus pooled text, in float32."""

    features: int
    cond_proj_dim: int | None = None
    param_dtype: Any = jnp.float32
    spans: bool = False

    @nn.compact
    def __call__(
        self,
        t: Float[Array, " b"],
        pooled: Float[Array, "b p"],
        guidance: Float[Array, " b"] | Float[Array, "b 3"] | None = None,
        span: Float[Array, " b"] | None = None,
    ) -> Float[Array, "b d"]:
        time = sinusoidal(t, TIME_WIDTH, cosines_first=True, freq_shift=0.0)
        step = None if span is None else sinusoidal(span, TIME_WIDTH, cosines_first=True, freq_shift=0.0)
        w = None if guidance is None else guidance_embedding(guidance, self.cond_proj_dim or 0)
        embed = Embedder(self.features, self.cond_proj_dim, self.param_dtype, self.spans, name="timestep_embedder")
        text = Embedder(self.features, param_dtype=self.param_dtype, name="text_embedder")
        return embed(time, w, step) + text(pooled.astype(jnp.float32))
