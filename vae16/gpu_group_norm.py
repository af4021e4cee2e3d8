"""Group norm, and the SiLU behind it, in one or two GPU kernels (Pallas, by Triton) where XLA makes four to six.

For one picture a UNet's evaluation is hundreds of kernels of a few microseconds, and a third of them would be group
norms: the moments of channels, in a kernel that gives a processor 32 whole columns and so most of them nothing to do,
those of groups, a scale and a shift, the multiply-add. Here a program takes some rows of some whole groups. What fits
into it is normalised at once; of more rows a first kernel sums parts, and a second sums those and writes.
"""

from __future__ import annotations

from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.custom_partitioning import custom_partitioning
from jax.experimental.pallas import triton
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float

CHANNELS = 64  # of a program, at least
AT_ONCE, PART = 2**14, 2**13  # numbers of a program that takes all rows, and of one that takes a part of them
PIXELS, LARGEST = 2**14, 2**24  # of a picture, and numbers in all: beyond, XLA's kernels have rows enough


def fits(x: Array) -> bool:
    """Whether these kernels are the faster ones, for pictures (b, h, w, c) of half precision."""
    return x.dtype == jnp.bfloat16 and x.shape[1] * x.shape[2] <= PIXELS and x.size <= LARGEST


def group_norm(
    x: Float[Array, "b h w c"],
    offset: Float[Array, "b c"],
    scale: Float[Array, " c"],
    bias: Float[Array, " c"],
    *,
    groups: int,
    epsilon: float,
    silu: bool,
    interpret: bool = False,
) -> Float[Array, "b h w c"]:
    """(x + offset) normalised by groups of channels, times `scale`, plus `bias`, then SiLU if asked for, in x's dtype.

    Moments are float32, about zero. A batch may be sharded; every device does its own pictures.
    """
    b, h, w, c = x.shape
    call = _by_pictures(groups, epsilon, silu, interpret)
    return call(x.reshape(b, h * w, c), offset, scale, bias).reshape(x.shape)


@cache
def _by_pictures(groups: int, epsilon: float, silu: bool, interpret: bool) -> Any:
    """The kernels' call, which the partitioner may split by pictures."""

    def call(x: Array, offset: Array, scale: Array, bias: Array) -> Array:
        return _call(x, offset, scale, bias, groups=groups, epsilon=epsilon, silu=silu, interpret=interpret)

    def split(mesh: Any, shapes: Any, _: Any) -> Any:
        pictures = PartitionSpec(*(shapes[0].sharding.spec or (None,))[:1])
        of_pictures, whole = NamedSharding(mesh, pictures), NamedSharding(mesh, PartitionSpec())
        return mesh, call, of_pictures, (of_pictures, of_pictures, whole, whole)

    own = custom_partitioning(call)
    own.def_partition(split, sharding_rule="b n c, b c, c, c -> b n c", need_replication_factors=("n", "c"))
    return own


class _Block(NamedTuple):
    """What a program takes: `rows` of n pixels, `groups` of all groups, each of `width` channels in `across` lanes."""

    n: int
    rows: int
    all_groups: int
    groups: int
    width: int
    across: int

    def at(self, part: Any, block: Any) -> tuple[Array, Array, Array, Array]:
        """Indices of rows, groups and channels, (rows,), (groups,) and (groups, across), and which channels exist."""
        group = block * self.groups + jnp.arange(self.groups)
        lane = jnp.arange(self.across)
        there = (group < self.all_groups)[:, None] & (lane < self.width)[None]
        return part * self.rows + jnp.arange(self.rows), group, group[:, None] * self.width + lane[None], there


def _call(
    x: Array, offset: Array, scale: Array, bias: Array, *, groups: int, epsilon: float, silu: bool, interpret: bool
) -> Array:
    b, n, c = x.shape
    across = pl.next_power_of_2(c // groups)
    every = pl.next_power_of_2(n)
    together = every * across <= AT_ONCE
    of_block = 1 if together else max(CHANNELS // across, 1)
    rows = every if together else max(PART // (of_block * across), 1)
    block = _Block(n, rows, groups, of_block, c // groups, across)
    parts, blocks = pl.cdiv(n, rows), pl.cdiv(groups, of_block)
    size = rows * of_block * across
    options: dict[str, Any] = {
        "grid": (b, parts, blocks),
        "compiler_params": triton.CompilerParams(num_warps=min(max(size // 1024, 2), 8)),
        "interpret": interpret,
    }
    sums: tuple[Array, ...] = ()
    if parts > 1:
        shape = jax.ShapeDtypeStruct((b, 2, parts, groups), jnp.float32)
        summing = pl.pallas_call(partial(_sum, block=block), out_shape=shape, name="group_norm_sums", **options)
        sums = (summing(x, offset),)
    writing = partial(_write, block=block, parts=parts, epsilon=epsilon, silu=silu)
    shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
    return pl.pallas_call(writing, out_shape=shape, name="group_norm", **options)(x, offset, scale, bias, *sums)


def _load(ref: Any, mask: Array) -> Array:
    return triton.load(ref, mask=mask, other=0.0).astype(jnp.float32)


def _values(x: Any, offset: Any, block: _Block) -> tuple[Array, tuple[Any, ...], Array]:
    """x + offset of a program, (rows, groups, across), 0 where there is nothing; its place in x, and where it is."""
    row, _, channel, there = block.at(pl.program_id(1), pl.program_id(2))
    place = (pl.program_id(0), row[:, None, None], channel[None])
    mask = (row < block.n)[:, None, None] & there[None]
    added = _load(offset.at[pl.program_id(0), channel], there)
    return jnp.where(mask, _load(x.at[place], mask) + added[None], 0.0), place, mask


def _sums(values: Array) -> tuple[Array, Array]:
    """Of values and of their squares, (groups,)."""
    columns, squares = values.sum(0), (values * values).sum(0)
    return columns.sum(1), squares.sum(1)


def _sum(x: Any, offset: Any, sums: Any, *, block: _Block) -> None:
    _, group, _, _ = block.at(0, pl.program_id(2))
    for moment, found in enumerate(_sums(_values(x, offset, block)[0])):
        triton.store(sums.at[pl.program_id(0), moment, pl.program_id(1), group], found, mask=group < block.all_groups)


def _write(
    x: Any, offset: Any, scale: Any, bias: Any, *rest: Any, block: _Block, parts: int, epsilon: float, silu: bool
) -> None:
    _, group, channel, there = block.at(0, pl.program_id(2))
    values, place, mask = _values(x, offset, block)
    *sums, y = rest
    if sums:
        part = jnp.arange(pl.next_power_of_2(parts))
        inside = (part < parts)[:, None] & (group < block.all_groups)[None]
        found = [sums[0].at[pl.program_id(0), moment, part[:, None], group[None]] for moment in range(2)]
        first, second = (_load(ref, inside).sum(0) for ref in found)
    else:
        first, second = _sums(values)
    count = block.n * block.width
    mean = first / count
    deviation = jax.lax.rsqrt(jnp.maximum(second / count - mean * mean, 0.0) + epsilon)
    a = deviation[:, None] * _load(scale.at[channel], there)
    result = values * a[None] + (_load(bias.at[channel], there) - mean[:, None] * a)[None]
    if silu:
        result = result / (1.0 + jnp.exp(-result))
    triton.store(y.at[place], result.astype(y.dtype), mask=mask)
