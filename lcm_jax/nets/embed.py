"""The embeddings of numbers (time, guidance, image sizes) as vectors, all in float32."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float

from lcm_jax.nets.layers import dense


def sinusoidal(
    t: Float[Array, " b"], dim: int, *, flip_sin_to_cos: bool = False, freq_shift: float = 1.0, period: float = 1e4
) -> Float[Array, "b dim"]:
    """Return [sin(t w_i), cos(t w_i)] with w_i = period^(-i / (dim/2 - freq_shift)), the time embedding of DDPM.

    flip_sin_to_cos puts the cosines first. An odd dim ends with a zero.

    >>> import jax.numpy as jnp
    >>> from lcm_jax.nets.embed import sinusoidal
    >>> sinusoidal(jnp.zeros(1), 5).tolist()
    [[0.0, 0.0, 1.0, 1.0, 0.0]]
    """
    half = dim // 2
    # The frequencies are computed by NumPy: an accelerator's approximate exp would shift the phase at large t.
    frequencies = period ** (-np.arange(half) / (half - freq_shift))
    angles = t.astype(jnp.float32)[:, None] * frequencies.astype(np.float32)
    first, second = (jnp.cos, jnp.sin) if flip_sin_to_cos else (jnp.sin, jnp.cos)
    return jnp.pad(jnp.concatenate([first(angles), second(angles)], axis=-1), ((0, 0), (0, dim % 2)))


def guidance_embedding(w: Float[Array, " b"] | Float[Array, "b 3"], dim: int = 256) -> Float[Array, "b dim"]:
    """Return the w-embedding, the classifier-free guidance embedding of LCM (arXiv:2310.04378, section 4.3).

    w = guidance - 1 is the guidance scale of each example; the embedding is the sinusoid of 1000 w. With (w, start,
    end) the network is guided within an interval of times, as shares of the way from clean to noise, and the embedding
    is that of w plus what the ends add to it: nothing for the whole interval, (w, 0, 1).

    >>> import jax.numpy as jnp
    >>> from lcm_jax.nets import guidance_embedding
    >>> guidance_embedding(jnp.array([0.0, 7.5])).shape
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


class TimestepEmbedding(nn.Module):
    """The MLP on a sinusoid: two dense layers with SiLU between them.

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
        width = x.shape[-1]
        inputs = {"cond_proj": (condition, self.cond_proj_dim), "span_proj": (span, width if self.spans else None)}
        for name, (value, dim) in inputs.items():
            if value is None and dim is not None and self.is_initializing():
                value = jnp.zeros((x.shape[0], dim), jnp.float32)
            if value is not None:
                zero = nn.initializers.zeros_init()
                x = x + dense(width, name, jnp.float32, self.param_dtype, use_bias=False, kernel_init=zero)(value)
        x = dense(self.features, "linear_1", jnp.float32, self.param_dtype)(x)
        return dense(self.features, "linear_2", jnp.float32, self.param_dtype)(nn.silu(x))
