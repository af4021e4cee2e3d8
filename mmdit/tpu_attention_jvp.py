"""Attention and its derivative along a direction in one pass on a TPU, without a matrix of logits.

With S = scale q k^T, P = softmax(S) and o = P v, the direction (q', k', v') gives

    S' = scale (q' k^T + q k'^T),    o' = (P S') v - delta o + P v',    delta = rowsum(P S'),

where products of matrices of logits are elementwise. All sums over keys are weighted by exp(S - m), as those of o are,
so that flash attention's running maximum m (2205.14135) serves them too. sCM (2410.11081, app. C) and MeanFlow need
this; JAX's flash kernels have no forward mode.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from mmdit.tpu_attention import dot_product_attention_tpu_bwd, dot_product_attention_tpu_fwd

TILE, LANES = 512, 128  # the most rows of a tile; the numbers of which their lengths are multiples
LOWEST = -1e30  # the logit of padding


@partial(jax.custom_jvp, nondiff_argnums=(3, 4))
def attend(
    query: Float[Array, "b l h d"],
    key: Float[Array, "b m h d"],
    value: Float[Array, "b m h d"],
    scale: float,
    frozen: bool = False,
) -> Float[Array, "b l h d"]:
    """Return softmax(scale q k^T) v per head, for `jax.jvp`; its output there has a gradient.

    frozen: tangents have none, so that the gradient of the output is plain attention's. A gradient of the function
    itself, not under `jax.jvp`, is that of `mmdit.tpu_attention.attend`.
    """
    return dot_product_attention_tpu_fwd(query, key, value, scale=scale)


@attend.defjvp
def _attend_jvp(scale: float, frozen: bool, primals: Sequence[Array], tangents: Sequence[Array]) -> tuple[Array, Array]:
    stop = jax.lax.stop_gradient if frozen else tuple
    o, *tangent = attend_with_tangent(*primals, *stop(tuple(tangents)), scale)
    return o, stop(tuple(tangent))[0]


@partial(jax.custom_vjp, nondiff_argnums=(6,))
def attend_with_tangent(
    query: Float[Array, "b l h d"],
    key: Float[Array, "b m h d"],
    value: Float[Array, "b m h d"],
    query_tangent: Float[Array, "b l h d"],
    key_tangent: Float[Array, "b m h d"],
    value_tangent: Float[Array, "b m h d"],
    scale: float,
) -> tuple[Float[Array, "b l h d"], Float[Array, "b l h d"]]:
    """Return (o, o') of the module's equations.

    The gradient stores the six arguments and both outputs, two numbers a row, and no logits.

    >>> import jax, jax.numpy as jnp
    >>> from mmdit.tpu_attention_jvp import attend_with_tangent
    >>> q, k = (jax.ShapeDtypeStruct((2, length, 3, 8), jnp.float32) for length in (5, 7))
    >>> [y.shape for y in jax.eval_shape(lambda q, k: attend_with_tangent(q, k, k, q, k, k, 0.3), q, k)]
    [(2, 5, 3, 8), (2, 5, 3, 8)]
    """
    arrays = (query, key, value, query_tangent, key_tangent, value_tangent)
    return _forward(arrays, scale, differentiated=False)[0]


def _forward(
    arrays: Sequence[Array], scale: float, *, differentiated: bool
) -> tuple[tuple[Array, Array], tuple[Array, ...]]:
    """Return (o, o') and, for a gradient, the padded (log-sum-exp of the logits, delta), one number a query."""
    q, k = arrays[0], arrays[1]
    padded = [_tiled(x) for x in arrays]
    call = _Tiles(q, k, scale=scale)
    b, n, width = padded[0].shape
    rows, row = jax.ShapeDtypeStruct((b, n, width), q.dtype), jax.ShapeDtypeStruct((b, 1, n), jnp.float32)
    row_scratch = pltpu.VMEM((call.queries, width), jnp.float32)
    column_scratch = pltpu.VMEM((call.queries, 1), jnp.float32)
    o, tangent, *numbers = call(
        _forward_kernel,
        "flash_tangent_fwd",
        inputs=[(x, "qkkqkk"[i]) for i, x in enumerate(padded)],
        outputs=[(rows, "q"), (rows, "q"), *[(row, "row")] * (2 if differentiated else 0)],
        scratch=[column_scratch, column_scratch, column_scratch, row_scratch, row_scratch],
    )
    return (_untiled(o, q), _untiled(tangent, q)), tuple(numbers)


def _attend_fwd(*arguments: Any) -> tuple[tuple[Array, Array], Any]:
    *primals, scale = arguments
    arrays = [primal.value for primal in primals]
    outputs, rows = _forward(arrays, scale, differentiated=True)
    return outputs, (arrays, outputs, rows)


def _attend_bwd(scale: float, saved: Any, cotangents: tuple[Any, Any]) -> tuple[Array, ...]:
    arrays, (o, tangent), (lse, delta) = saved
    slope, tangent_slope = cotangents
    q, k, v = arrays[:3]
    if isinstance(tangent_slope, SymbolicZero):  # a target is behind a stop_gradient: this is plain attention's
        slope = jnp.zeros_like(o) if isinstance(slope, SymbolicZero) else slope
        gradients = dot_product_attention_tpu_bwd(q, k, v, slope, scale=scale)
        return (*gradients, *(jnp.zeros_like(x) for x in arrays[3:]))
    slope = jnp.zeros_like(o) if isinstance(slope, SymbolicZero) else slope

    def row(x: Array, y: Array) -> Array:
        sums = jnp.sum(x.astype(jnp.float32) * y.astype(jnp.float32), axis=-1)  # (b, l, h)
        sums = sums.swapaxes(1, 2).reshape(lse.shape[0], 1, -1)
        return jnp.pad(sums, ((0, 0), (0, 0), (0, lse.shape[2] - sums.shape[2])))

    gamma = row(tangent_slope, o)
    tau = row(slope, o) + row(tangent_slope, tangent) - delta * gamma
    padded = [_tiled(x) for x in arrays]
    inputs = [(x, "qkkqkk"[i]) for i, x in enumerate(padded)]
    inputs += [(_tiled(x), "q") for x in (slope, tangent_slope)] + [(x, "row") for x in (lse, delta, gamma, tau)]
    gradients = {}
    for side, kernel, count in (("q", _query_kernel, 2), ("k", _key_kernel, 4)):
        call = _Tiles(q, k, scale=scale, over=side)
        like = padded[0] if side == "q" else padded[1]
        scratch = [pltpu.VMEM((call.queries if side == "q" else call.keys, like.shape[-1]), jnp.float32)] * count
        outputs = [(jax.ShapeDtypeStruct(like.shape, q.dtype), side)] * count
        gradients[side] = call(kernel, f"flash_tangent_bwd_{side}", inputs=inputs, outputs=outputs, scratch=scratch)
    of_query, of_query_tangent = (_untiled(x, q) for x in gradients["q"])
    of_key, of_key_tangent, of_value, of_value_tangent = (_untiled(x, k) for x in gradients["k"])
    return of_query, of_key, of_value, of_query_tangent, of_key_tangent, of_value_tangent


attend_with_tangent.defvjp(_attend_fwd, _attend_bwd, symbolic_zeros=True)


class _Tiles:
    """The grid of a kernel over heads, tiles of one side and, one after the other, tiles of the other side.

    over: the side whose tiles are outputs, "q" for queries or "k" for keys.
    """

    def __init__(
        self, q: Float[Array, "b l h d"], k: Float[Array, "b m h d"], *, scale: float, over: str = "q"
    ) -> None:
        self.queries, self.keys = _tile(q), _tile(k)
        self.over, self.options = over, {"scale": scale, "keys": k.shape[1]}
        tiles = -(-q.shape[1] // self.queries), -(-k.shape[1] // self.keys)
        self.grid = (q.shape[0] * q.shape[2], *(tiles if over == "q" else tiles[::-1]))

    def spec(self, like: Array | jax.ShapeDtypeStruct, side: str) -> pl.BlockSpec:
        """Return the tile that a point of the grid has of queries "q" or keys "k", (_, n, d), or of a "row" (_, 1, n).

        A row has a number for each query. As (_, n, 1) each of them would take the 128 lanes of a TPU's memory.
        """
        axis = 1 if (self.over == "k") == (side == "k") else 2
        if side == "row":
            return pl.BlockSpec((1, 1, self.queries), lambda *index: (index[0], 0, index[axis]))
        block = (1, self.queries if side == "q" else self.keys, like.shape[-1])
        return pl.BlockSpec(block, lambda *index: (index[0], index[axis], 0))

    def __call__(
        self,
        kernel: Callable[..., None],
        name: str,
        *,
        inputs: Sequence[tuple[Array, str]],
        outputs: Sequence[tuple[jax.ShapeDtypeStruct, str]],
        scratch: Sequence[Any],
    ) -> Any:
        """Return the outputs of a kernel; each array comes with its side."""
        params = pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary"))
        call = pl.pallas_call(
            partial(kernel, **self.options),
            grid=self.grid,
            in_specs=[self.spec(x, side) for x, side in inputs],
            out_specs=[self.spec(x, side) for x, side in outputs],
            out_shape=[x for x, _ in outputs],
            scratch_shapes=list(scratch),
            compiler_params=params,
            name=name,
        )
        return call(*(x for x, _ in inputs))


def _dot(a: Array, b: Array, axes: tuple[int, int]) -> Array:
    """Return the product of two matrices over these axes, in float32; exactly, where they are float32."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    numbers = (((axes[0],), (axes[1],)), ((), ()))
    return jax.lax.dot_general(a, b.astype(a.dtype), numbers, precision=precision, preferred_element_type=jnp.float32)


def _without_padding(s: Array, axis: int, tile: Array, keys: int) -> Array:
    """Return logits with the lowest one for keys of padding; axis: of the keys; tile: the number of their tile."""
    key = tile * s.shape[axis] + jax.lax.broadcasted_iota(jnp.int32, s.shape, axis)
    return jnp.where(key < keys, s, LOWEST)


def _forward_kernel(*refs: Any, scale: float, keys: int) -> None:
    inputs, (o, tangent, *rows), (top, total, mean, sums, tangent_sums) = refs[:6], refs[6:-5], refs[-5:]
    tile = pl.program_id(2)

    @pl.when(tile == 0)
    def _() -> None:
        top[...] = jnp.full_like(top, LOWEST)
        for ref in (total, mean, sums, tangent_sums):
            ref[...] = jnp.zeros_like(ref)

    q, k, v, dq, dk, dv = (ref[0] for ref in inputs)
    s = _without_padding(scale * _dot(q, k, (1, 1)), 1, tile, keys)
    ds = scale * (_dot(dq, k, (1, 1)) + _dot(q, dk, (1, 1)))
    highest = jnp.maximum(top[...], jnp.max(s, axis=1, keepdims=True))
    keep, p = jnp.exp(top[...] - highest), jnp.exp(s - highest)
    moved = p * ds
    top[...] = highest
    total[...] = keep * total[...] + jnp.sum(p, axis=1, keepdims=True)
    mean[...] = keep * mean[...] + jnp.sum(moved, axis=1, keepdims=True)
    sums[...] = keep * sums[...] + _dot(p.astype(v.dtype), v, (1, 0))
    both = _dot(moved.astype(v.dtype), v, (1, 0)) + _dot(p.astype(v.dtype), dv, (1, 0))
    tangent_sums[...] = keep * tangent_sums[...] + both

    @pl.when(tile == pl.num_programs(2) - 1)
    def _() -> None:
        y, shift = sums[...] / total[...], mean[...] / total[...]
        o[0] = y.astype(o.dtype)
        tangent[0] = (tangent_sums[...] / total[...] - shift * y).astype(tangent.dtype)
        for ref, column in zip(rows, (top[...] + jnp.log(total[...]), shift), strict=False):
            ref[0] = jnp.broadcast_to(column, (column.shape[0], 128)).T[:1]


def _slopes(refs: Sequence[Any], tile: Array, scale: float, keys: int) -> dict[str, Array]:
    """Return what both backward kernels need: the tile's inputs, P, and the gradients of S and S'.

    These matrices have a row for each key, so that a number for each query is a row (1, queries) of the memory.
    """
    names = ("q", "k", "v", "dq", "dk", "dv", "slope", "tangent_slope", "lse", "delta", "gamma", "tau")
    x = {name: ref[0] for name, ref in zip(names, refs, strict=True)}
    s = _without_padding(scale * _dot(x["k"], x["q"], (1, 1)), 0, tile, keys)
    ds = scale * (_dot(x["k"], x["dq"], (1, 1)) + _dot(x["dk"], x["q"], (1, 1)))
    p = jnp.exp(s - x["lse"])
    g = _dot(x["v"], x["tangent_slope"], (1, 1))
    t = _dot(x["v"], x["slope"], (1, 1)) + _dot(x["dv"], x["tangent_slope"], (1, 1))
    t += ds * (g - x["gamma"]) - x["delta"] * g
    s_slope, ds_slope = scale * p * (t - x["tau"]), scale * p * (g - x["gamma"])
    dtype = x["q"].dtype
    return {**x, "p": p.astype(dtype), "moved": (p * (ds - x["delta"])).astype(dtype)} | {
        "s_slope": s_slope.astype(dtype),
        "ds_slope": ds_slope.astype(dtype),
    }


def _query_kernel(*refs: Any, scale: float, keys: int) -> None:
    inputs, outputs, sums = refs[:12], refs[12:14], refs[14:]
    x = _slopes(inputs, pl.program_id(2), scale, keys)
    of_query = _dot(x["s_slope"], x["k"], (0, 0)) + _dot(x["ds_slope"], x["dk"], (0, 0))
    _accumulate(sums, outputs, (of_query, _dot(x["ds_slope"], x["k"], (0, 0))))


def _key_kernel(*refs: Any, scale: float, keys: int) -> None:
    inputs, outputs, sums = refs[:12], refs[12:16], refs[16:]
    x = _slopes(inputs, pl.program_id(1), scale, keys)
    parts = (
        _dot(x["s_slope"], x["q"], (1, 0)) + _dot(x["ds_slope"], x["dq"], (1, 0)),
        _dot(x["ds_slope"], x["q"], (1, 0)),
        _dot(x["p"], x["slope"], (1, 0)) + _dot(x["moved"], x["tangent_slope"], (1, 0)),
        _dot(x["p"], x["tangent_slope"], (1, 0)),
    )
    _accumulate(sums, outputs, parts)


def _accumulate(sums: Sequence[Any], outputs: Sequence[Any], parts: Sequence[Array]) -> None:
    """Add the parts to their sums, and write these at the last tile."""
    tile = pl.program_id(2)
    for total, output, part in zip(sums, outputs, parts, strict=True):
        total[...] = jnp.where(tile == 0, 0.0, total[...]) + part

        @pl.when(tile == pl.num_programs(2) - 1)
        def _(total: Any = total, output: Any = output) -> None:
            output[0] = total[...].astype(output.dtype)


def _tile(x: Float[Array, "b l h d"]) -> int:
    """Return the rows of a tile: as many as its kernel has room for in 16 MiB, and the same for all tiles of x.

    A longer tile reads the other side less often.
    """
    _, length, _, width = x.shape
    row = -(-width // LANES) * LANES * x.dtype.itemsize  # bytes
    most = min(TILE, max(2**18 // row // LANES, 1) * LANES)
    return -(-length // (-(-length // most) * LANES)) * LANES


def _tiled(x: Float[Array, "b l h d"]) -> Float[Array, "bh n d"]:
    """Return the heads of all examples as rows, their lengths padded with zeros to whole tiles."""
    b, length, heads, width = x.shape
    padded = jnp.pad(x, ((0, 0), (0, -length % _tile(x)), (0, 0), (0, 0)))
    return padded.swapaxes(1, 2).reshape(b * heads, -1, width)


def _untiled(x: Float[Array, "bh n d"], like: Float[Array, "b l h d"]) -> Float[Array, "b l h d"]:
    b, length, heads, width = like.shape
    return x.reshape(b, heads, -1, width).swapaxes(1, 2)[:, :length]
