"""The one edge of this package to an attention kernel."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Bool, Float

from mmdit import cpu_attention, tpu_attention

Implementation = Literal["xla", "cudnn", "cpu", "tpu"]
_platform: ContextVar[str | None] = ContextVar("platform", default=None)
_halved: ContextVar[bool] = ContextVar("halved", default=False)
_cut: ContextVar[tuple[Mesh, tuple[str, ...], str] | None] = ContextVar("cut", default=None)


@contextmanager
def lowering_for(platform: str) -> Iterator[None]:
    """What is traced inside will be compiled for "cpu", "gpu" or "tpu", whatever device this process has."""
    token = _platform.set(platform)
    try:
        yield
    finally:
        _platform.reset(token)


def platform() -> str:
    """What is traced now will be compiled for."""
    return _platform.get() or jax.default_backend()


@contextmanager
def halved() -> Iterator[None]:
    """What is traced inside attends in bfloat16, whatever the dtype of what comes in and goes out."""
    token = _halved.set(True)
    try:
        yield
    finally:
        _halved.reset(token)


@contextmanager
def attention_mesh(mesh: Mesh, rows: tuple[str, ...], heads: str) -> Iterator[None]:
    """What is traced inside has batches that are cut along the axes `rows` of a mesh, and heads along `heads`.

    XLA cannot cut a TPU's kernel: it has to be told.
    """
    token = _cut.set((mesh, rows, heads))
    try:
        yield
    finally:
        _cut.reset(token)


def attention(
    query: Float[Array, "b l h d"],
    key: Float[Array, "b m h d"],
    value: Float[Array, "b m h d"],
    *,
    causal: bool = False,
    mask: Bool[Array, "b #h #l m"] | None = None,
    bias: Float[Array, "#b h l m"] | None = None,
    scale: float | None = None,
    implementation: Implementation | None = None,
) -> Float[Array, "b l h d"]:
    """softmax(scale q k^T + bias) v per head, where scale is 1 / sqrt(d) unless given.

    The softmax runs in float32 whatever the inputs are.

    Without `implementation` half-precision inputs take cuDNN's flash kernel on an NVIDIA device, unless lengths are odd
    or heads wide under a mask or bias; a CPU takes `cpu_attention` and a TPU that is alone or in a mesh that is told
    (`attention_mesh`), of long ones, `tpu_attention`, unless there is a mask or bias; all else is XLA's.
    """
    target, dtype = platform(), query.dtype
    if _halved.get():
        query, key, value = (x.astype(jnp.bfloat16) for x in (query, key, value))
    if implementation is None:
        half = query.dtype in (jnp.bfloat16, jnp.float16)
        fits = query.shape[-1] % 8 == 0 and query.shape[-1] <= _widest(target)
        fits &= _has_gradient(query, key) or (mask is None and bias is None)
        plain = not causal and mask is None and bias is None
        implementation = "cudnn" if half and fits and target == "gpu" else "xla"
        implementation = "cpu" if plain and target == "cpu" else implementation
        tiled = plain and target == "tpu" and tpu_attention.fits(query, key) and _known_cut(query)
        implementation = "tpu" if tiled else implementation
    if query.dtype == jnp.float16 and target != "gpu":
        # jax asks for float16 products summed in float32, which it has on GPUs alone.
        query, key, value = (x.astype(jnp.float32) for x in (query, key, value))
    if implementation in ("cpu", "tpu"):
        if causal or mask is not None or bias is not None:
            raise ValueError(
                f"implementation {implementation!r} has no causal, mask or bias: use 'xla', or leave it out"
            )
        if implementation == "cpu":
            return cpu_attention.attend(query, key, value, scale=scale).astype(dtype)
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        return _on_each_part(partial(tpu_attention.attend, scale=scale), query, key, value).astype(dtype)
    options: dict[str, Any] = {"scale": scale, "is_causal": causal, "implementation": implementation}
    if implementation == "cudnn" and not _has_gradient(query, key):
        if mask is not None or bias is not None:
            raise ValueError("implementation 'cudnn': no mask or bias where lengths are odd or heads wider than 128")
        return flash(tuple(options.items()), query, key, value).astype(dtype)
    return jax.nn.dot_product_attention(query, key, value, bias, mask, **options).astype(dtype)


def _known_cut(query: Array) -> bool:
    """Whether a kernel can be told which rows of a batch are where: all on one device, or equal parts on a mesh."""
    cut = _cut.get()
    if cut is None:
        return jax.default_backend() == "tpu" and jax.device_count() == 1
    mesh, rows, _ = cut
    return query.shape[0] % math.prod(mesh.shape[axis] for axis in rows) == 0


def _on_each_part(attend: Callable[..., Array], *qkv: Array) -> Array:
    """`attend` of all rows and heads, each device of the mesh that is told, if one is, taking its own."""
    cut = _cut.get()
    if cut is None:
        return attend(*qkv)
    mesh, rows, heads = cut
    divide = qkv[0].shape[2] % mesh.shape[heads] == 0
    spec = PartitionSpec(rows, None, heads if divide else None)
    return jax.shard_map(attend, mesh=mesh, in_specs=(spec,) * 3, out_specs=spec, check_vma=False)(*qkv)


def _widest(platform: str) -> int:
    """Numbers of a head that cuDNN's kernel takes: more than 128 from Hopper on."""
    here = platform == "gpu" == jax.default_backend()
    capability = getattr(jax.devices()[0], "compute_capability", "0") if here else "0"
    return 256 if float(capability) >= 9.0 else 128


def _has_gradient(query: Array, key: Array) -> bool:
    """Whether cuDNN's kernel has one in jax, rather than values alone."""
    return query.shape[1] % 2 == key.shape[1] % 2 == 0 and query.shape[-1] <= 128


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def flash(options: tuple[tuple[str, Any], ...], query: Array, key: Array, value: Array) -> Array:
    """Attention by a kernel that has no gradient for these shapes; where one is asked for, by another way."""
    return jax.nn.dot_product_attention(query, key, value, **dict(options))


def _forward(options: tuple[tuple[str, Any], ...], *arrays: Array) -> tuple[Array, Any]:
    wide = arrays[0].shape[-1] > 128
    other = partial(attend_even, **(dict(options) | ({"implementation": "xla"} if wide else {})))
    return jax.vjp(other, *arrays)


def _backward(options: tuple[tuple[str, Any], ...], back: Any, slope: Array) -> Any:
    return back(slope)


flash.defvjp(_forward, _backward)


def attend_even(query: Array, key: Array, value: Array, **options: Any) -> Array:
    """Attention of odd lengths by a kernel whose gradient is for even ones alone, as cuDNN's in jax: one token more,

    which no one looks at.
    """
    q, k, v = (jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, 0), (0, 0))) for x in (query, key, value))
    of_query, of_key = (jnp.full(x.shape[:1], x.shape[1], jnp.int32) for x in (query, key))
    options |= {"query_seq_lengths": of_query, "key_value_seq_lengths": of_key}
    return jax.nn.dot_product_attention(q, k, v, **options)[:, : query.shape[1]]
