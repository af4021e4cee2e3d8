"""Data parallelism by `jax.pmap`: the same pure step, with means over devices. Nothing else here depends on it.

Noise is drawn inside of the losses for the rows that they see, and under pmap these are a device's own. So that a run
is the one that `jit` makes of it, its keys are of another kind: they draw the whole batch's bits and keep the device's
rows.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import cache
from typing import Any

import jax
import jax.extend.random
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lcm_jax.parallel.sharding import Placement
from lcm_jax.typing import Array, Key

AXIS = "devices"
_BITS = {8: jnp.uint8, 16: jnp.uint16, 32: jnp.uint32, 64: jnp.uint64}


def own_rows(key: Key, parts: int) -> Key:
    """A key whose draws (n, ...) are this device's n rows of what `key` draws for (parts * n, ...).

    Numbers without a row axis are the same on all devices.
    """
    index = jax.lax.axis_index(AXIS).astype(jnp.uint32)
    return jax.random.wrap_key_data(jnp.append(jax.random.key_data(key), index), impl=_rows_of(parts))


@cache
def _rows_of(parts: int) -> Hashable:
    """Keys that are threefry's two words and the device's number."""

    def plain(data: Array) -> Key:
        return jax.random.wrap_key_data(data[:2], impl="threefry2x32")

    def own(keys: Key, data: Array) -> Array:
        words = jax.random.key_data(keys)
        return jnp.concatenate([words, jnp.broadcast_to(data[2:], (*words.shape[:-1], 1))], axis=-1)

    def random_bits(data: Array, width: int, shape: tuple[int, ...]) -> Array:
        if not shape:
            return jax.random.bits(plain(data), shape, _BITS[width])
        whole = jax.random.bits(plain(data), (parts * shape[0], *shape[1:]), _BITS[width])
        return jax.lax.dynamic_slice_in_dim(whole, data[2] * shape[0], shape[0])

    def seed(number: Array) -> Array:
        raise TypeError("a device's key is made of one that all have: own_rows")

    return jax.extend.random.define_prng_impl(
        key_shape=(3,),
        seed=seed,
        split=lambda data, shape: own(jax.random.split(plain(data), shape), data),
        random_bits=random_bits,
        fold_in=lambda data, number: own(jax.random.fold_in(plain(data), number), data),
        name=f"own_rows_of_{parts}",
        tag=f"rows{parts}",
    )


def pmap_placement(state: Any, frozen: Any, mesh: Mesh) -> Placement:
    """State and frozen trees whole on every device, the batch (b, ...) cut over them."""
    line = Mesh(mesh.devices.reshape(-1), (AXIS,))
    whole, cut = NamedSharding(line, PartitionSpec()), NamedSharding(line, PartitionSpec(AXIS))
    return Placement(line, jax.tree.map(lambda _: whole, state), jax.tree.map(lambda _: whole, frozen), cut)


class OverDevices:
    """(state, frozen, batch) -> (state, metrics) of a step that takes its means over AXIS; the state is donated."""

    def __init__(self, step: Callable[..., Any], line: Mesh) -> None:
        self._devices = list(line.devices.flat)
        options: Any = {"in_axes": (None, None, 0), "out_axes": None, "donate_argnums": 0, "devices": self._devices}
        self._mapped = jax.pmap(step, axis_name=AXIS, **options)

    def __call__(self, state: Any, frozen: Any, batch: Any) -> Any:
        parts = jax.tree.map(lambda a: a.reshape(len(self._devices), -1, *a.shape[1:]), batch)
        return self._mapped(state, frozen, parts)

    def trace(self, *arguments: Any) -> Any:
        """As a jitted function's."""
        return jax.jit(self.__call__).trace(*arguments)
