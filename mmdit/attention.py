"""The attention function of this package: it chooses the kernel by platform, precision and shapes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, PartitionSpec
from jaxtyping import Array, Bool, Float

from mmdit import cpu_attention, tpu_attention, tpu_attention_jvp

Implementation = Literal["xla", "cudnn", "cpu", "tpu"]
_platform: ContextVar[str | None] = ContextVar("platform", default=None)
_halved: ContextVar[bool] = ContextVar("halved", default=False)
_forward_mode: ContextVar[Literal["", "frozen", "differentiable"]] = ContextVar("forward_mode", default="")
_mesh_axes: ContextVar[tuple[Mesh | AbstractMesh, tuple[str, ...], str] | None] = ContextVar("mesh_axes", default=None)


@contextmanager
def lowering_for(platform: str) -> Iterator[None]:
    """Choose kernels for `platform` in everything that is traced inside the `with` block.

    platform: "cpu", "gpu" or "tpu", the one that the program will be compiled for, whatever devices this process has.

    >>> from mmdit import attention
    >>> with attention.lowering_for("tpu"):
    ...     attention.platform()
    'tpu'
    """
    token = _platform.set(platform)
    try:
        yield
    finally:
        _platform.reset(token)


def platform() -> str:
    """Return the platform that kernels are chosen for: that of `lowering_for`, else this process' default backend."""
    return _platform.get() or jax.default_backend()


@contextmanager
def bfloat16_attention() -> Iterator[None]:
    """Compute every attention that is traced inside the `with` block in bfloat16; its output keeps its dtype."""
    token = _halved.set(True)
    try:
        yield
    finally:
        _halved.reset(token)


@contextmanager
def forward_mode(*, frozen: bool = False) -> Iterator[None]:
    """Choose kernels that `jax.jvp` can differentiate in everything that is traced inside the `with` block.

    That is `mmdit.tpu_attention_jvp` on a TPU for long sequences, and "xla" elsewhere. frozen: the derivative is a
    target, without a gradient of its own; the kernel, whose gradient is one for both outputs, then computes less.

    >>> import jax, jax.numpy as jnp
    >>> from mmdit.attention import attention, forward_mode
    >>> q = jnp.ones((1, 2, 1, 8))
    >>> with forward_mode():
    ...     _, tangent = jax.jvp(lambda q: attention(q, q, q), (q,), (q,))
    >>> tangent.shape
    (1, 2, 1, 8)
    """
    token = _forward_mode.set("frozen" if frozen else "differentiable")
    try:
        yield
    finally:
        _forward_mode.reset(token)


@contextmanager
def attention_mesh(mesh: Mesh | AbstractMesh, rows: tuple[str, ...], heads: str) -> Iterator[None]:
    """Shard the TPU kernel of every attention that is traced inside the `with` block over a mesh.

    rows: the mesh axes that divide the batch. heads: the mesh axis that divides the heads, if their number is a
    multiple of its size. XLA cannot partition a Pallas kernel by itself.
    """
    token = _mesh_axes.set((mesh, rows, heads))
    try:
        yield
    finally:
        _mesh_axes.reset(token)


def attention(
    query: Float[Array, "b l h d"],
    key: Float[Array, "b m h d"],
    value: Float[Array, "b m h d"],
    *,
    causal: bool = False,
    mask: Bool[Array, " b #h #l m"] | None = None,
    bias: Float[Array, "#b h l m"] | None = None,
    scale: float | None = None,
    implementation: Implementation | None = None,
) -> Float[Array, "b l h d"]:
    """Return softmax(scale q k^T + bias) v per head, with the softmax in float32.

    query (b, l, h, d), key and value (b, m, h, d). scale: 1 / sqrt(d) by default. mask: True where a query may attend
    to a key. causal: a query attends only to keys of its own and earlier positions.

    implementation: None chooses one by platform and inputs:

    - "cudnn", cuDNN's flash kernel, on an NVIDIA GPU in half precision, unless there is a mask or bias and the kernel
      has no gradient in JAX (lengths are odd, or heads are wider than 128);
    - "cpu", `mmdit.cpu_attention`, on a CPU without causal, mask and bias;
    - "tpu", `mmdit.tpu_attention`, on a TPU without causal, mask and bias for long sequences, where the process has
      one device or `attention_mesh` names the mesh;
    - "xla" for everything else, and within `forward_mode` for all but "tpu".

    Raises ValueError if the implementation asked for does not support these inputs.

    >>> import jax, jax.numpy as jnp
    >>> from mmdit.attention import attention
    >>> query, key = (jax.ShapeDtypeStruct((2, length, 3, 8), jnp.float32) for length in (5, 7))
    >>> jax.eval_shape(attention, query, key, key).shape
    (2, 5, 3, 8)
    """
    target, dtype = platform(), query.dtype
    if _halved.get():
        query, key, value = (x.astype(jnp.bfloat16) for x in (query, key, value))
    if implementation is None:
        half = query.dtype in (jnp.bfloat16, jnp.float16)
        fits = query.shape[-1] % 8 == 0 and query.shape[-1] <= _max_head_width(target)
        fits &= _has_gradient(query, key) or (mask is None and bias is None)
        plain = not causal and mask is None and bias is None
        implementation = "cudnn" if half and fits and target == "gpu" else "xla"
        implementation = "cpu" if plain and target == "cpu" else implementation
        implementation = "xla" if _forward_mode.get() else implementation
        flash_on_tpu = plain and target == "tpu" and tpu_attention.fits(query, key) and _can_shard(query)
        implementation = "tpu" if flash_on_tpu else implementation
    if query.dtype == jnp.float16 and target != "gpu":
        # jax sums float16 products in float32 here, which is implemented on GPUs only.
        query, key, value = (x.astype(jnp.float32) for x in (query, key, value))
    if implementation in ("cpu", "tpu"):
        if causal or mask is not None or bias is not None:
            raise ValueError(
                f"implementation {implementation!r} has no causal, mask or bias: use 'xla', or leave it out"
            )
        if implementation == "cpu":
            return cpu_attention.attend(query, key, value, scale=scale).astype(dtype)
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        mode = _forward_mode.get()

        def attend(*qkv: Array) -> Array:
            if mode:
                return tpu_attention_jvp.attend(*qkv, scale, mode == "frozen")
            return tpu_attention.attend(*qkv, scale)

        return _on_each_device(attend, query, key, value).astype(dtype)
    options: dict[str, Any] = {"scale": scale, "is_causal": causal, "implementation": implementation}
    if implementation == "cudnn" and not _has_gradient(query, key):
        if mask is not None or bias is not None:
            raise ValueError(
                "implementation 'cudnn' has no mask or bias where lengths are odd or heads wider than 128: use 'xla'"
            )
        return flash(tuple(options.items()), query, key, value).astype(dtype)
    return jax.nn.dot_product_attention(query, key, value, bias, mask, **options).astype(dtype)


def _can_shard(query: Array) -> bool:
    """Return whether the batch is on one device, or `attention_mesh` divides it into equal parts."""
    mesh_axes = _mesh_axes.get()
    if mesh_axes is None:
        return jax.default_backend() == "tpu" and jax.device_count() == 1
    mesh, rows, _ = mesh_axes
    return query.shape[0] % math.prod(mesh.shape[axis] for axis in rows) == 0


def _on_each_device(attend: Callable[..., Array], *qkv: Array) -> Array:
    """Apply `attend` on every device of `attention_mesh` to that device's part of the batch and heads."""
    mesh_axes = _mesh_axes.get()
    if mesh_axes is None:
        return attend(*qkv)
    mesh, rows, heads = mesh_axes
    divide = qkv[0].shape[2] % mesh.shape[heads] == 0
    spec = PartitionSpec(rows, None, heads if divide else None)
    return jax.shard_map(attend, mesh=mesh, in_specs=(spec,) * 3, out_specs=spec, check_vma=False)(*qkv)


def _max_head_width(platform: str) -> int:
    """Return the largest head width that cuDNN's kernel supports: 256 from Hopper on, else 128."""
    on_gpu = platform == "gpu" == jax.default_backend()
    capability = getattr(jax.devices()[0], "compute_capability", "0") if on_gpu else "0"
    return 256 if float(capability) >= 9.0 else 128


def _has_gradient(query: Array, key: Array) -> bool:
    """Return whether JAX has the gradient of cuDNN's kernel for these shapes, rather than its values only."""
    return query.shape[1] % 2 == key.shape[1] % 2 == 0 and query.shape[-1] <= 128


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def flash(options: tuple[tuple[str, Any], ...], query: Array, key: Array, value: Array) -> Array:
    """Compute attention by a kernel that has no gradient in JAX for these shapes.

    Where a gradient is computed, odd lengths are padded (`attend_even`), and heads wider than 128 go to XLA. options:
    the keyword arguments of `jax.nn.dot_product_attention`, as pairs.
    """
    return jax.nn.dot_product_attention(query, key, value, **dict(options))


def _forward(options: tuple[tuple[str, Any], ...], *arrays: Array) -> tuple[Array, Any]:
    wide = arrays[0].shape[-1] > 128
    differentiable = partial(attend_even, **(dict(options) | ({"implementation": "xla"} if wide else {})))
    return jax.vjp(differentiable, *arrays)


def _backward(options: tuple[tuple[str, Any], ...], vjp: Any, cotangent: Array) -> Any:
    return vjp(cotangent)


flash.defvjp(_forward, _backward)


def attend_even(query: Array, key: Array, value: Array, **options: Any) -> Array:
    """Compute attention with odd lengths made even by one token that nothing attends to.

    This is for kernels that have a gradient for even lengths only, as cuDNN's in JAX.
    """
    q, k, v = (jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, 0), (0, 0))) for x in (query, key, value))
    query_lengths, key_lengths = (jnp.full(x.shape[:1], x.shape[1], jnp.int32) for x in (query, key))
    options |= {"query_seq_lengths": query_lengths, "key_value_seq_lengths": key_lengths}
    return jax.nn.dot_product_attention(q, k, v, **options)[:, : query.shape[1]]
