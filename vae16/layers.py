"""The building blocks of the autoencoder: convolution, group norm, residual block, attention, resampling.

Arrays are (b, h, w, c). Parameter paths follow the PyTorch names (see rules.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import linen as nn
from jax.custom_batching import custom_vmap
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from vae16 import gpu_group_norm
from vae16.convolution import convolve, corners

Types = dict[str, Any]  # the dtype and param_dtype of a module, which its children get too
_portable: ContextVar[bool] = ContextVar("portable", default=False)


@contextmanager
def portable() -> Iterator[None]:
    """Keep this package's own GPU kernels out of everything that is traced inside the `with` block.

    Programs that are exported for other machines need this: the kernels are compiled for this machine's GPU and
    version of Triton.
    """
    token = _portable.set(True)
    try:
        yield
    finally:
        _portable.reset(token)


def conv(
    features: int,
    size: int = 3,
    *,
    dtype: DTypeLike,
    param_dtype: DTypeLike,
    name: str | None = None,
    use_bias: bool = True,
) -> nn.Conv:
    """Return a convolution layer of stride 1 with PyTorch's symmetric padding, size // 2 pixels on each side."""
    return nn.Conv(
        features,
        (size, size),
        padding=size // 2,
        use_bias=use_bias,
        dtype=dtype,
        param_dtype=param_dtype,
        name=name,
        conv_general_dilated=convolve if size == 3 else None,
    )


def attend(q: Float[Array, "b n c"], k: Float[Array, "b n c"], v: Float[Array, "b n c"]) -> Float[Array, "b n c"]:
    """Return single-head attention softmax(q k^T / sqrt(c)) v, with the softmax in float32.

    This is the only function of this package that computes attention.
    """
    dtype = q.dtype
    if dtype == jnp.float16 and jax.default_backend() != "gpu":
        # jax sums float16 products in float32 here, which is implemented on GPUs only.
        q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
    return jax.nn.dot_product_attention(q[:, :, None], k[:, :, None], v[:, :, None])[:, :, 0].astype(dtype)


class GroupNorm(nn.Module):
    """Group normalisation (Wu & He 2018, eq. 1), followed by SiLU if `silu`; see `normalise`.

    In bfloat16 a GPU runs all of it as one kernel (`vae16/gpu_group_norm.py`), unless a gradient is computed. Raises
    ValueError unless num_groups divides the channels.
    """

    num_groups: int
    epsilon: float = 1e-6
    silu: bool = False
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"], offset: Float[Array, "b c"] | None = None
    ) -> Float[Array, "b h w c"]:
        """Return the norm of x + offset, where the offset of every pixel costs no further pass over x."""
        b, _, _, c = x.shape
        if c % self.num_groups:
            raise ValueError(
                f"{self.name}: {c} channels do not divide into {self.num_groups} groups; change num_groups"
            )
        scale = self.param("scale", nn.initializers.ones_init(), (c,), self.param_dtype)
        bias = self.param("bias", nn.initializers.zeros_init(), (c,), self.param_dtype)
        offset = jnp.zeros((b, c)) if offset is None else offset
        how = Normalisation(self.num_groups, self.epsilon, self.silu)
        if x.dtype == self.dtype == jnp.bfloat16 and not _portable.get():
            return _normalise_half(how, x, offset, scale, bias)
        return normalise(how, x, offset, scale, bias).astype(self.dtype)


class Normalisation(NamedTuple):
    """The static options of a group norm: number of groups, epsilon, and whether SiLU follows."""

    groups: int
    epsilon: float
    silu: bool


def normalise(
    how: Normalisation,
    x: Float[Array, "b h w c"],
    offset: Float[Array, "b c"],
    scale: Float[Array | np.ndarray, " c"],
    bias: Float[Array | np.ndarray, " c"],
) -> Float[Array, "b h w c"]:
    """Return the group norm of x + offset, computed and returned in float32.

    First and second moments per channel give those of the group, and mean, variance, scale, bias and offset become one
    multiply-add x * a + b with a, b of shape (b, 1, 1, c). The second moment is taken about a sample of the channel
    itself (any constant shift cancels in exact arithmetic), which avoids the cancellation of E[x^2] - E[x]^2 when the
    mean is large. In bfloat16 it is taken about zero: the rounding to eight bits is coarser than this cancellation.

    >>> import jax, jax.numpy as jnp
    >>> from vae16.layers import Normalisation, normalise
    >>> x, one = jnp.array([-1.0, 1.0]).reshape(1, 1, 2, 1), jnp.ones(1)
    >>> options = Normalisation(groups=1, epsilon=0.0, silu=False)
    >>> y = jax.jit(normalise, static_argnums=0)(options, x, jnp.zeros((1, 1)), scale=one, bias=one)
    >>> [round(float(value), 4) for value in y.ravel()]
    [0.0, 2.0]
    """
    b, h, w, c = x.shape
    offset, scale, bias = (jnp.asarray(leaf, jnp.float32) for leaf in (offset, scale, bias))
    x32 = x.astype(jnp.float32)
    origin, centred = offset, x32
    if x.dtype != jnp.bfloat16:
        sample = jax.lax.stop_gradient(x32[:, h // 2, w // 2])
        origin, centred = origin + sample, x32 - sample[:, None, None]
    first = _mean(centred)
    variance = _mean(jnp.square(centred)) - jnp.square(first)
    mean = (first + origin).reshape(b, how.groups, -1)
    group_mean = mean.mean(-1, keepdims=True)
    between_groups = jnp.square(mean - group_mean).mean(-1, keepdims=True)
    group_variance = jnp.maximum(variance.reshape(mean.shape).mean(-1, keepdims=True) + between_groups, 0.0)
    shape = mean.shape
    a = jnp.broadcast_to(jax.lax.rsqrt(group_variance + how.epsilon), shape).reshape(b, c) * scale
    shift = bias + (offset - jnp.broadcast_to(group_mean, shape).reshape(b, c)) * a
    y = x32 * a[:, None, None] + shift[:, None, None]
    return nn.silu(y) if how.silu else y


def _mean(x: Float[Array, "b h w c"]) -> Float[Array, "b c"]:
    """Return the mean over the pixels.

    On a CPU each row is summed by a matrix product: with XLA's reductions the norm takes 1.3 to 2 times as long.
    """

    def by_products(x: Array) -> Array:
        b, h, w, _ = x.shape
        return (jnp.full((b, h, 1, w), 1 / w, x.dtype) @ x)[:, :, 0].mean(1)

    return jax.lax.platform_dependent(x, cpu=by_products, default=partial(jnp.mean, axis=(1, 2)))


def _rounded(how: Normalisation, x: Array, *arrays: Array) -> Array:
    return normalise(how, x, *arrays).astype(x.dtype)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _normalise_half(how: Normalisation, x: Array, offset: Array, scale: Array, bias: Array) -> Array:
    plain = partial(_rounded, how)
    if not gpu_group_norm.fits(x) or jax.sharding.get_abstract_mesh().manual_axes:
        # shard_map and pmap would need to know which of the kernel's outputs vary over their axes.
        return plain(x, offset, scale, bias)

    @custom_vmap
    def run(*arrays: Array) -> Array:
        kernel = partial(gpu_group_norm.group_norm, **how._asdict())
        return jax.lax.platform_dependent(*arrays, cuda=kernel, default=plain)

    @run.def_vmap
    def _(copies: int, batched: list[bool], *arrays: Array) -> tuple[Array, bool]:
        if any(batched[2:]):
            return jax.vmap(plain, [0 if mapped else None for mapped in batched])(*arrays), True
        copied = (
            jax.lax.broadcast(leaf, () if mapped else (copies,)) for leaf, mapped in zip(arrays, batched, strict=True)
        )
        x, offset = (leaf.reshape(-1, *leaf.shape[2:]) for leaf in (next(copied), next(copied)))
        return run(x, offset, *arrays[2:]).reshape(copies, -1, *x.shape[1:]), True

    return run(x, offset, scale, bias)


@_normalise_half.defjvp
def _(how: Normalisation, primals: tuple[Array, ...], tangents: tuple[Array, ...]) -> tuple[Array, Array]:
    return jax.jvp(partial(_rounded, how), primals, tangents)


class ResnetBlock(nn.Module):
    """The residual block x + f(f(x)), where f is norm, SiLU and a 3x3 convolution.

    x passes through a 1x1 convolution where the width changes.
    """

    features: int
    num_groups: int
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w d"]:
        types: Types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        h = GroupNorm(self.num_groups, silu=True, **types, name="norm1")(x)
        h = conv(self.features, **types, name="conv1")(h)
        h = GroupNorm(self.num_groups, silu=True, **types, name="norm2")(h)
        h = conv(self.features, **types, name="conv2")(h)
        if x.shape[-1] != self.features:
            x = conv(self.features, 1, **types, name="conv_shortcut")(x)
        return x + h


class SelfAttention(nn.Module):
    """Single-head self-attention over all positions, added to its input: x + attention(norm(x))."""

    num_groups: int
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        types: Types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        b, h, w, c = x.shape
        # Dense layers on (b n, c): for the kernel's gradient of (b, n, c) XLA:CPU copies the arrays that it contracts.
        y = GroupNorm(self.num_groups, **types, name="group_norm")(x).reshape(-1, c)
        q, k, v = (nn.Dense(c, **types, name=name)(y).reshape(b, h * w, c) for name in ("to_q", "to_k", "to_v"))
        y = nn.Dense(c, **types, name="to_out_0")(attend(q, k, v).reshape(-1, c))
        return x + y.reshape(b, h, w, c)


class Downsample(nn.Module):
    """A 3x3 convolution of stride 2, padded below and to the right only, as the published weights expect."""

    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c"]:
        types: Types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        return nn.Conv(x.shape[-1], (3, 3), strides=2, padding=((0, 1), (0, 1)), **types, name="conv")(x)


class NearestConv(nn.Module):
    """A 3x3 convolution of the image doubled by nearest neighbour, computed at the original resolution.

    Each of the four output phases (even or odd row, even or odd column) sees two rows and two columns of the input: it
    is a 2x2 convolution whose kernel adds the taps that fall on the same input pixel. That is 16 instead of 36 products
    for each input pixel. One convolution computes the four phases at every corner of a pixel (`folded`); interleaved
    they are the output plus a border of one pixel, which is removed (`interleaved`).
    """

    features: int
    use_bias: bool = True
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b 2*h 2*w d"]:
        c, d = x.shape[-1], self.features
        kernel = self.param("kernel", nn.linear.default_kernel_init, (3, 3, c, d), self.param_dtype)
        y = interleaved(corners(x.astype(self.dtype), folded(kernel).astype(self.dtype)))
        if self.use_bias:
            y += self.param("bias", nn.initializers.zeros_init(), (d,), self.param_dtype).astype(self.dtype)
        return y


def folded(kernel: Float[Array, "3 3 c d"]) -> Float[Array, "2 2 c 4*d"]:
    """Return the kernels of `NearestConv`'s four phases, side by side on the last axis."""

    def fold(taps: Array) -> tuple[Array, Array]:
        """Return the two taps, along the first axis, of the later and of the earlier of two output pixels."""
        return jnp.stack([taps[0] + taps[1], taps[2]]), jnp.stack([taps[0], taps[1] + taps[2]])

    phases = [phase.swapaxes(0, 1) for row in fold(kernel) for phase in fold(row.swapaxes(0, 1))]
    return jnp.concatenate(phases, axis=-1)


def interleaved(corners: Float[Array, "b h1 w1 d4"]) -> Float[Array, "b 2*h1-2 2*w1-2 d4//4"]:
    """Put the pixels of the four phases at their positions and remove the border."""
    return rearrange(corners, "b h w (p q d) -> b (h p) (w q) d", p=2, q=2)[:, 1:-1, 1:-1]


class Upsample(nn.Module):
    """The nearest-neighbour doubling of height and width, then a 3x3 convolution."""

    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b 2*h 2*w c"]:
        return NearestConv(x.shape[-1], dtype=self.dtype, param_dtype=self.param_dtype, name="conv")(x)
