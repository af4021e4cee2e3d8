"""Group norm, and the SiLU after it, in one or two GPU kernels (Pallas on Triton) where XLA makes four to six.

For one image the evaluation of a UNet is hundreds of kernels of a few microseconds, and a third of them would be group
norms: the moments of channels (in a kernel that gives each processor 32 full columns and so leaves most processors
idle), the moments of groups, a scale and a shift, the multiply-add. Here each program takes some rows of some complete
groups. If all rows fit into one program it normalises them at once; else a first kernel sums parts of the rows, and a
second adds these sums up and writes the result.
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

CHANNELS = 64  # the fewest of a program
AT_ONCE, PART = 2**14, 2**13  # the most values of a program that takes all rows, and of one that takes some of them
PIXELS, LARGEST = 2**14, 2**24  # the most pixels of an image and values in all: beyond, XLA's kernels fill the GPU


def fits(x: Array) -> bool:
    """Return whether these kernels are faster than XLA's for x (b, h, w, c): bfloat16 and not too large."""
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
    """Return the group norm of x + offset (Wu & He 2018, eq. 1), then SiLU if `silu`, in x's dtype.

    y = (u - mean(u)) / sqrt(var(u) + epsilon) * scale + bias with u = x + offset, where mean and variance are those of
    each image's group of channels; moments are float32, about zero. interpret: run the kernels on a CPU, for tests.
    The batch may be sharded: each device normalises its own images.
    """
    b, h, w, c = x.shape
    call = _sharded_by_image(groups, epsilon, silu, interpret)
    return call(x.reshape(b, h * w, c), offset, scale, bias).reshape(x.shape)


@cache
def _sharded_by_image(groups: int, epsilon: float, silu: bool, interpret: bool) -> Any:
    """Return the kernels' call, which the partitioner may split along the batch."""

    def call(x: Array, offset: Array, scale: Array, bias: Array) -> Array:
        return _call(x, offset, scale, bias, groups=groups, epsilon=epsilon, silu=silu, interpret=interpret)

    def split(mesh: Any, shapes: Any, _: Any) -> Any:
        batch_spec = PartitionSpec(*(shapes[0].sharding.spec or (None,))[:1])
        by_image, replicated = NamedSharding(mesh, batch_spec), NamedSharding(mesh, PartitionSpec())
        return mesh, call, by_image, (by_image, by_image, replicated, replicated)

    partitioned = custom_partitioning(call)
    partitioned.def_partition(split, sharding_rule="b n c, b c, c, c -> b n c", need_replication_factors=("n", "c"))
    return partitioned


class _Block(NamedTuple):
    """The part of an image of one program: `rows` of n pixels and `groups` of all_groups groups of channels.

    Each group has `width` channels in `across` lanes, the next power of two.
    """

    n: int
    rows: int
    all_groups: int
    groups: int
    width: int
    across: int

    def at(self, part: Any, block: Any) -> tuple[Array, Array, Array, Array]:
        """Return indices of rows (rows,), groups (groups,) and channels (groups, across), and which channels exist."""
        group = block * self.groups + jnp.arange(self.groups)
        lane = jnp.arange(self.across)
        exists = (group < self.all_groups)[:, None] & (lane < self.width)[None]
        return part * self.rows + jnp.arange(self.rows), group, group[:, None] * self.width + lane[None], exists


def _call(
    x: Array, offset: Array, scale: Array, bias: Array, *, groups: int, epsilon: float, silu: bool, interpret: bool
) -> Array:
    b, n, c = x.shape
    across = pl.next_power_of_2(c // groups)
    all_rows = pl.next_power_of_2(n)
    at_once = all_rows * across <= AT_ONCE
    block_groups = 1 if at_once else max(CHANNELS // across, 1)
    rows = all_rows if at_once else max(PART // (block_groups * across), 1)
    block = _Block(n, rows, groups, block_groups, c // groups, across)
    parts, blocks = pl.cdiv(n, rows), pl.cdiv(groups, block_groups)
    size = rows * block_groups * across
    options: dict[str, Any] = {
        "grid": (b, parts, blocks),
        "compiler_params": triton.CompilerParams(num_warps=min(max(size // 1024, 2), 8)),
        "interpret": interpret,
    }
    sums: tuple[Array, ...] = ()
    if parts > 1:
        shape = jax.ShapeDtypeStruct((b, 2, parts, groups), jnp.float32)
        sum_kernel = pl.pallas_call(partial(_sum, block=block), out_shape=shape, name="group_norm_sums", **options)
        sums = (sum_kernel(x, offset),)
    write = partial(_write, block=block, parts=parts, epsilon=epsilon, silu=silu)
    shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
    return pl.pallas_call(write, out_shape=shape, name="group_norm", **options)(x, offset, scale, bias, *sums)


def _load(ref: Any, mask: Array) -> Array:
    return triton.load(ref, mask=mask, other=0.0).astype(jnp.float32)


def _values(x: Any, offset: Any, block: _Block) -> tuple[Array, tuple[Any, ...], Array]:
    """Return this program's x + offset (rows, groups, across), 0 where nothing exists, its index in x, and the mask."""
    row, _, channel, exists = block.at(pl.program_id(1), pl.program_id(2))
    index = (pl.program_id(0), row[:, None, None], channel[None])
    mask = (row < block.n)[:, None, None] & exists[None]
    added = _load(offset.at[pl.program_id(0), channel], exists)
    return jnp.where(mask, _load(x.at[index], mask) + added[None], 0.0), index, mask


def _sums(values: Array) -> tuple[Array, Array]:
    """Return the sums (groups,) of the values and of their squares."""
    columns, squares = values.sum(0), (values * values).sum(0)
    return columns.sum(1), squares.sum(1)


def _sum(x: Any, offset: Any, sums: Any, *, block: _Block) -> None:
    """Write this program's sums: the kernel that runs first where an image has several parts."""
    _, group, _, _ = block.at(0, pl.program_id(2))
    for moment, values in enumerate(_sums(_values(x, offset, block)[0])):
        triton.store(sums.at[pl.program_id(0), moment, pl.program_id(1), group], values, mask=group < block.all_groups)


def _write(
    x: Any, offset: Any, scale: Any, bias: Any, *rest: Any, block: _Block, parts: int, epsilon: float, silu: bool
) -> None:
    """Normalise and write this program's values, from the first kernel's sums where there are any."""
    _, group, channel, exists = block.at(0, pl.program_id(2))
    values, index, mask = _values(x, offset, block)
    *sums, y = rest
    if sums:
        part = jnp.arange(pl.next_power_of_2(parts))
        inside = (part < parts)[:, None] & (group < block.all_groups)[None]
        refs = [sums[0].at[pl.program_id(0), moment, part[:, None], group[None]] for moment in range(2)]
        first, second = (_load(ref, inside).sum(0) for ref in refs)
    else:
        first, second = _sums(values)
    count = block.n * block.width
    mean = first / count
    deviation = jax.lax.rsqrt(jnp.maximum(second / count - mean * mean, 0.0) + epsilon)
    a = deviation[:, None] * _load(scale.at[channel], exists)
    result = values * a[None] + (_load(bias.at[channel], exists) - mean[:, None] * a)[None]
    if silu:
        result = result / (1.0 + jnp.exp(-result))
    triton.store(y.at[index], result.astype(y.dtype), mask=mask)
