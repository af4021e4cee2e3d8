"""Where arrays lie: one mesh of all devices, and for every tree shardings derived from its shapes.

    data     copies of the parameters, each with its part of the batch
    fsdp     parts of the batch too, and every large array is cut along its largest axis (ZeRO-3, 1910.02054)
    tensor   the kernels before an attention or inside a feed-forward are cut by columns, those behind by rows
             (Megatron-LM, 1909.08053); the devices along it have the same part of the batch

Nothing else knows the mesh: `jit` is told where its arguments and results lie, and XLA places the collectives.
"""

from __future__ import annotations

import contextlib
import math
import re
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from mmdit.attention import attention_mesh

AXES = ("data", "fsdp", "tensor")
ROWS = ("data", "fsdp")  # the axes along which a batch is cut
SMALLEST = 1024  # elements; smaller arrays, and vectors, are on every device: to gather them costs more than it saves

Rules = Sequence[tuple[str, int]]
"""(regex searched in a parameter's path, axis that `tensor` cuts); the first that fits counts."""

_COLUMNS = r"(to_[qkv]|add_[qkv]_proj|[qkv]_proj|net_0/proj|fc1|wi|wi_[01])"
_ROWS = r"(to_out_0|to_add_out|out_proj|net_2|fc2|wo)"
RULES: Rules = (
    (rf"(^|/){_COLUMNS}/kernel(/up)?$", -1),
    (rf"(^|/){_ROWS}/kernel(/down)?$", -2),
)
"""For UNet, MMDiT, CLIP and T5; /up and /down are those of LoRA adapters."""


@dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Devices along each axis; one of them may be -1, which is what the others leave."""

    data: int = -1
    fsdp: int = 1
    tensor: int = 1

    @classmethod
    def parse(cls, text: str) -> MeshConfig:
        """From "data=4,fsdp=2"; without data that axis is what the others leave, so "" is all devices along data."""
        sizes: dict[str, int] = {}
        for part in filter(None, text.replace(" ", "").split(",")):
            name, _, number = part.partition("=")
            if name not in AXES or name in sizes or not re.fullmatch(r"-1|[1-9]\d*", number):
                raise ValueError(
                    f"mesh {text!r}: {part!r} is not AXIS=NUMBER; write each of {', '.join(AXES)} at most once, "
                    "such as data=4,fsdp=2"
                )
            sizes[name] = int(number)
        config = cls(**sizes)
        if [config.data, config.fsdp, config.tensor].count(-1) > 1:
            raise ValueError(f"mesh {text!r}: only one axis can be what the others leave; give the rest their sizes")
        return config

    def shape(self, devices: int) -> tuple[int, int, int]:
        """Sizes of AXES. ValueError where their product is not the number of devices."""
        sizes = (self.data, self.fsdp, self.tensor)
        known = math.prod(size for size in sizes if size > 0)
        data, fsdp, tensor = (devices // known if size < 0 else size for size in sizes)
        if data * fsdp * tensor != devices:
            raise ValueError(
                f"mesh data={self.data},fsdp={self.fsdp},tensor={self.tensor} does not fit {devices} devices: the "
                "product must be their number; leave one axis out, or set it to -1"
            )
        return data, fsdp, tensor


def mesh_shape(text: str, devices: int, batch_size: int | None = None) -> tuple[int, int, int]:
    """Sizes of AXES of a --mesh option. ValueError where it does not fit the devices, or them the batch."""
    shape = MeshConfig.parse(text).shape(devices)
    parts = shape[0] * shape[1]
    if batch_size is not None and batch_size % parts:
        raise ValueError(
            f"batch_size {batch_size} is no multiple of the {parts} parts that the mesh cuts it in (data={shape[0]} x "
            f"fsdp={shape[1]}): change it, or --mesh"
        )
    return shape


def make_mesh(text: str = "", *, batch_size: int | None = None, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh of a --mesh option over all devices, or those given. ValueError as `mesh_shape` says."""
    devices = jax.devices() if devices is None else devices
    shape = mesh_shape(text, len(devices), batch_size)
    return jax.make_mesh(shape, AXES, devices=devices, axis_types=(AxisType.Auto,) * len(AXES))


def parts_of(mesh: Mesh) -> int:
    """In how many a batch is cut."""
    return int(math.prod(mesh.shape[axis] for axis in ROWS))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Cut along the first axis."""
    return NamedSharding(mesh, PartitionSpec(ROWS))


def tree_shardings(tree: Any, mesh: Mesh, rules: Rules = RULES) -> Any:
    """Of a tree of arrays or of their shapes. An optimizer's moments have the parameters' names and shapes, and so lie
    as these do.
    """

    of = by_path(mesh, rules)
    return jax.tree.map_with_path(
        lambda path, leaf: of(jax.tree_util.keystr(path, simple=True, separator="/"), leaf.shape), tree
    )


def by_path(mesh: Mesh, rules: Rules = RULES) -> Callable[[str, tuple[int, ...]], NamedSharding]:
    """(path, shape) of a parameter to where it lies."""
    return lambda path, shape: NamedSharding(mesh, _spec(path, shape, mesh, rules))


def _spec(path: str, shape: tuple[int, ...], mesh: Mesh, rules: Rules) -> PartitionSpec:
    axes: list[str | None] = [None] * len(shape)
    if len(shape) < 2 or math.prod(shape) < SMALLEST:
        return PartitionSpec()
    cut = next((axis for pattern, axis in rules if re.search(pattern, path)), None)
    if cut is not None and mesh.shape["tensor"] > 1 and shape[cut] % mesh.shape["tensor"] == 0:
        axes[cut] = "tensor"
    fsdp = mesh.shape["fsdp"]
    free = [i for i, size in enumerate(shape) if axes[i] is None and size % fsdp == 0]
    if fsdp > 1 and free:
        axes[max(free, key=lambda i: shape[i])] = "fsdp"
    return PartitionSpec(*axes)


class Placement(NamedTuple):
    """Where the trees of a training step lie."""

    mesh: Mesh
    state: Any  # shardings beside the leaves
    frozen: Any
    batch: NamedSharding

    @property
    def micro(self) -> NamedSharding:
        """Of micro-batches stacked along a first axis: each is cut over all devices."""
        return NamedSharding(self.mesh, PartitionSpec(None, ROWS))


@contextlib.contextmanager
def constrain_batch_sharding(mesh: Mesh) -> Iterator[None]:
    """Within it what flax modules give stays cut along its rows, as the batch is, and attention may rely on that.

    Left to itself XLA gathers whole batches of activations to spare the gathering of a kernel. The networks know
    nothing of it.
    """
    parts = parts_of(mesh)

    def keep(leaf: Any) -> Any:
        if not isinstance(leaf, jax.Array) or leaf.ndim < 2 or leaf.shape[0] % parts:
            return leaf
        free = (PartitionSpec.UNCONSTRAINED,) * (leaf.ndim - 1)
        return jax.lax.with_sharding_constraint(leaf, NamedSharding(mesh, PartitionSpec(ROWS, *free)))

    def call(next_function: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        given = next_function(*args, **kwargs)
        return jax.tree.map(keep, given) if context.method_name == "__call__" else given

    with attention_mesh(mesh, ROWS, "tensor"), nn.intercept_methods(call) if parts > 1 else contextlib.nullcontext():
        yield


def put_on_mesh(tree: Any, shardings: Any) -> Any:
    """Arrays that every process has whole, as global ones; each device is given its part alone."""
    if jax.process_count() == 1:
        return jax.device_put(tree, shardings)

    def put(leaf: Any, sharding: NamedSharding) -> jax.Array:
        host = np.asarray(leaf)
        return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

    return jax.tree.map(put, tree, shardings)


def local_batch_indices(sharding: NamedSharding, batch_size: int) -> tuple[int, ...]:
    """The rows of a batch that lie on this process's devices; processes along a tensor axis share theirs."""
    parts = sharding.addressable_devices_indices_map((batch_size,)).values()
    return tuple(sorted({row for part in parts for row in range(batch_size)[part[0]]}))  # type: ignore[index]


def make_global_batch(batch: Any, sharding: NamedSharding, rows: Sequence[int], batch_size: int) -> Any:
    """The `rows` of a batch (`local_batch_indices`) as this process's part of the global arrays."""
    if jax.process_count() == 1:
        return jax.device_put(batch, sharding)

    def put(local: np.ndarray) -> jax.Array:
        def part(index: Any) -> np.ndarray:
            own = range(batch_size)[index[0]]
            first = bisect_left(rows, own.start)
            return local[first : first + len(own)]

        return jax.make_array_from_callback((batch_size, *local.shape[1:]), sharding, part)

    return jax.tree.map(put, batch)


def shard_batch(tree: Any, mesh: Mesh, rows: int = 0) -> Any:
    """Arrays (n, ...) that every process has, cut along n over the mesh, filled up with copies of the last row: to
    `rows`, or to what the mesh cuts.
    """
    parts = parts_of(mesh)

    def fill(leaf: np.ndarray) -> np.ndarray:
        return np.concatenate([leaf, np.repeat(leaf[-1:], max(rows - len(leaf), -len(leaf) % parts), axis=0)])

    filled = jax.tree.map(fill, gather_to_host(tree))
    return put_on_mesh(filled, jax.tree.map(lambda _: batch_sharding(mesh), filled))


@dataclass(frozen=True, kw_only=True)
class BatchedMap:
    """Functions of rows, some at a time, every device of a mesh taking its own. All processes must ask.

    most: rows on a device at a time.
    """

    mesh: Mesh
    most: int

    def __call__(self, function: Callable[[Any], Any], rows: Any, *, most: int | None = None) -> Any:
        """What a compiled function of trees (n, ...) gives for each row, as numpy; it sees one number of rows alone.

        most: where that is less.
        """
        n, parts = len(jax.tree.leaves(rows)[0]), parts_of(self.mesh)
        size = parts * min(self.most, most or self.most, -(-n // parts))
        made = []
        for start in range(0, n, size):
            some = jax.tree.map(lambda leaf, at=slice(start, start + size): leaf[at], rows)
            with constrain_batch_sharding(self.mesh):
                given = function(shard_batch(some, self.mesh, size))
            made.append(jax.tree.map(lambda leaf, left=n - start: leaf[:left], gather_to_host(given)))
        return jax.tree.map(lambda *leaves: np.concatenate(leaves), *made)


def gather_to_host(tree: Any) -> Any:
    """The arrays as numpy on every process, gathered one after another; all processes must ask."""

    def fetch(leaf: Any) -> np.ndarray:
        gather = isinstance(leaf, jax.Array) and not (leaf.is_fully_addressable or leaf.is_fully_replicated)
        return multihost_utils.process_allgather(leaf, tiled=True) if gather else np.asarray(leaf)

    return jax.tree.map(fetch, tree)


def create(make: Callable[[Any], Any], key: Any, shardings: Any) -> Any:
    """make(key), each device computing its part.

    What `make` closes over (a teacher's weights) becomes an argument, cut over the devices, and not a constant of the
    program, which cannot be larger than 2 GiB.
    """
    closed, shapes = jax.make_jaxpr(make, return_shape=True)(key)
    mesh = jax.tree.leaves(shardings)[0].mesh
    consts = put_on_mesh(
        closed.consts, tree_shardings(closed.consts, mesh) if "fsdp" in mesh.shape else replicated(mesh)
    )

    def run(consts: Any, key: Any) -> Any:
        return jax.tree.unflatten(jax.tree.structure(shapes), jax.core.eval_jaxpr(closed.jaxpr, consts, key))

    return jax.jit(run, out_shardings=shardings)(consts, key)
