"""Data parallelism by `jax.pmap`: the same pure step, with means over devices. Nothing else here depends on it.

The losses draw noise for the examples that they are given, which under pmap are those of one device. So that a run has
the same noise as under `jit`, its keys have another implementation: they draw the bits of the full batch and keep those
of the device's examples.
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


def device_key(key: Key, parts: int) -> Key:
    """Return a key whose draws of shape (n, ...) are this device's n rows of what `key` draws for (parts * n, ...).

    Scalar draws are the same on all devices. parts: the number of devices along AXIS.
    """
    index = jax.lax.axis_index(AXIS).astype(jnp.uint32)
    return jax.random.wrap_key_data(jnp.append(jax.random.key_data(key), index), impl=_row_prng(parts))


@cache
def _row_prng(parts: int) -> Hashable:
    """Return the implementation of keys that consist of threefry's two words and the device's index."""

    def threefry_key(data: Array) -> Key:
        return jax.random.wrap_key_data(data[:2], impl="threefry2x32")

    def with_device_index(keys: Array, data: Array) -> Array:
        words = jax.random.key_data(keys)
        return jnp.concatenate([words, jnp.broadcast_to(data[2:], (*words.shape[:-1], 1))], axis=-1)

    def random_bits(data: Array, width: int, shape: tuple[int, ...]) -> Array:
        if not shape:
            return jax.random.bits(threefry_key(data), shape, _BITS[width])
        batch_bits = jax.random.bits(threefry_key(data), (parts * shape[0], *shape[1:]), _BITS[width])
        return jax.lax.dynamic_slice_in_dim(batch_bits, data[2] * shape[0], shape[0])

    def seed(number: Array) -> Array:
        raise TypeError("a device's key is derived from one that all devices share: use device_key")

    return jax.extend.random.define_prng_impl(
        key_shape=(3,),
        seed=seed,
        split=lambda data, shape: with_device_index(jax.random.split(threefry_key(data), shape), data),
        random_bits=random_bits,
        fold_in=lambda data, number: with_device_index(jax.random.fold_in(threefry_key(data), number), data),
        name=f"device_key_of_{parts}",
        tag=f"rows{parts}",
    )


def pmap_placement(state: Any, frozen: Any, mesh: Mesh) -> Placement:
    """Return the placement of pmap: state and frozen trees copied to every device, the batch (b, ...) sharded."""
    line = Mesh(mesh.devices.reshape(-1), (AXIS,))
    copied, sharded = NamedSharding(line, PartitionSpec()), NamedSharding(line, PartitionSpec(AXIS))
    return Placement(line, jax.tree.map(lambda _: copied, state), jax.tree.map(lambda _: copied, frozen), sharded)


class PmappedStep:
    """The pmapped function (state, frozen, batch, *data) -> (state, metrics) of a step with means over AXIS.

    The state's buffers are donated. line: a mesh with the one axis AXIS.
    """

    def __init__(self, step: Callable[..., Any], line: Mesh) -> None:
        self._devices = list(line.devices.flat)
        options: Any = {"out_axes": None, "donate_argnums": 0, "devices": self._devices}
        # one mapped function for each number of further arguments, which are the same on all devices
        self._mapped = cache(
            lambda data: jax.pmap(step, axis_name=AXIS, in_axes=(None, None, 0, *(None,) * data), **options)
        )

    def __call__(self, state: Any, frozen: Any, batch: Any, *data: Any) -> Any:
        parts = jax.tree.map(lambda a: a.reshape(len(self._devices), -1, *a.shape[1:]), batch)
        return self._mapped(len(data))(state, frozen, parts, *data)

    def trace(self, *arguments: Any) -> Any:
        """Return the trace of the step, like that of a jitted function."""
        return jax.jit(self.__call__).trace(*arguments)
