"""Sharding: one mesh of all devices, and for every tree of arrays shardings derived from its shapes.

    data     copies of the parameters; each copy has its part of the batch
    fsdp     parts of the batch too, and every large array is sharded along its largest axis (ZeRO-3, 1910.02054)
    tensor   the kernels that enter an attention or a feed-forward are sharded by columns, those that leave it by rows
             (Megatron-LM, 1909.08053); the devices along it have the same part of the batch

Nothing else knows the mesh: `jit` gets the shardings of its arguments and results, and XLA places the collectives.
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
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from lcm_jax.runtime.progress import progress
from mmdit.attention import attention_mesh

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")  # the mesh axes over which a batch is sharded
SMALLEST = (
    1024  # elements; smaller arrays, and vectors, are on every device: sharding them saves less than gathering costs
)

Rules = Sequence[tuple[str, int]]
"""(regex searched in a parameter's path, axis that `tensor` shards); the first match counts."""

_COLUMNS = r"(to_[qkv]|add_[qkv]_proj|[qkv]_proj|net_0/proj|fc1|wi|wi_[01])"
_ROWS = r"(to_out_0|to_add_out|out_proj|net_2|fc2|wo)"
RULES: Rules = (
    (rf"(^|/){_COLUMNS}/kernel(/up)?$", -1),
    (rf"(^|/){_ROWS}/kernel(/down)?$", -2),
)
"""The rules of UNet, MMDiT, CLIP and T5; /up and /down are those of LoRA adapters."""


@dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """The number of devices along each axis of the mesh; one of them may be -1: all that remain."""

    data: int = -1
    fsdp: int = 1
    tensor: int = 1

    @classmethod
    def parse(cls, text: str) -> MeshConfig:
        """Return the config of a text such as "data=4,fsdp=2"; raise ValueError if it is none.

        An axis that is left out has size 1, but `data` takes the devices that remain, so "" is all devices along data.

        >>> from lcm_jax.parallel.sharding import MeshConfig
        >>> MeshConfig.parse("fsdp=2,tensor=4")
        MeshConfig(data=-1, fsdp=2, tensor=4)
        >>> MeshConfig.parse("fsdp=2,tensor=4").shape(16)
        (2, 2, 4)
        >>> MeshConfig.parse("data:4")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ValueError: mesh 'data:4': 'data:4' is not AXIS=NUMBER; ...
        """
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
            raise ValueError(
                f"mesh {text!r}: only one axis can be -1 or left to the remaining devices; give sizes for the rest"
            )
        return config

    def shape(self, devices: int) -> tuple[int, int, int]:
        """Return the sizes of AXES on so many devices; raise ValueError if their product is another number."""
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
    """Return the sizes of AXES of a --mesh option on so many devices.

    Raises ValueError if the text is no mesh, does not fit the devices, or does not divide the batch:

    >>> from lcm_jax.parallel.sharding import mesh_shape
    >>> mesh_shape("fsdp=2", 8)
    (4, 2, 1)
    >>> mesh_shape("", 8, batch_size=12)  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ValueError: batch_size 12 is no multiple of the 8 parts that the mesh cuts it in ...
    """
    shape = MeshConfig.parse(text).shape(devices)
    parts = shape[0] * shape[1]
    if batch_size is not None and batch_size % parts:
        raise ValueError(
            f"batch_size {batch_size} is no multiple of the {parts} parts that the mesh cuts it in (data={shape[0]} x "
            f"fsdp={shape[1]}): change it, or --mesh"
        )
    return shape


def make_mesh(text: str = "", *, batch_size: int | None = None, devices: Sequence[Any] | None = None) -> Mesh:
    """Return the mesh of a --mesh option over all devices, or those given; raise ValueError as `mesh_shape` does."""
    devices = jax.devices() if devices is None else devices
    shape = mesh_shape(text, len(devices), batch_size)
    return jax.make_mesh(shape, AXES, devices=devices, axis_types=(AxisType.Auto,) * len(AXES))


def batch_parts(mesh: Mesh) -> int:
    """Return the number of parts that the mesh splits a batch into."""
    return int(math.prod(mesh.shape[axis] for axis in BATCH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """Return the sharding of an array with a full copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Return the sharding of a batch: over data and fsdp, along the first axis."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def tree_shardings(tree: Any, mesh: Mesh | AbstractMesh, rules: Rules = RULES) -> Any:
    """Return the shardings of a tree of arrays or of shapes.

    An optimizer's moments have the names and shapes of the parameters, and so the same shardings.
    """

    sharding_of = param_sharding(mesh, rules)
    return jax.tree.map_with_path(
        lambda path, leaf: sharding_of(jax.tree_util.keystr(path, simple=True, separator="/"), leaf.shape), tree
    )


def param_sharding(mesh: Mesh | AbstractMesh, rules: Rules = RULES) -> Callable[[str, tuple[int, ...]], NamedSharding]:
    """Return a function (path, shape) -> sharding of a parameter."""
    return lambda path, shape: NamedSharding(mesh, _spec(path, shape, mesh, rules))


def _spec(path: str, shape: tuple[int, ...], mesh: Mesh | AbstractMesh, rules: Rules) -> PartitionSpec:
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
    """The mesh of a training step, and the shardings of its trees."""

    mesh: Mesh
    state: Any  # a tree like the state, of shardings
    frozen: Any
    batch: NamedSharding

    @property
    def micro(self) -> NamedSharding:
        """The sharding of micro-batches stacked along a first axis: each of them is sharded as a batch is."""
        return NamedSharding(self.mesh, PartitionSpec(None, BATCH_AXES))


@contextlib.contextmanager
def constrain_batch_sharding(mesh: Mesh) -> Iterator[None]:
    """A context in which the outputs of flax modules stay sharded along the batch, which attention may rely on.

    Otherwise XLA may all-gather a batch's activations rather than a kernel. The networks know nothing of the mesh.
    """
    parts = batch_parts(mesh)

    def keep(leaf: Any) -> Any:
        if not isinstance(leaf, jax.Array) or leaf.ndim < 2 or leaf.shape[0] % parts:
            return leaf
        free = (PartitionSpec.UNCONSTRAINED,) * (leaf.ndim - 1)
        return jax.lax.with_sharding_constraint(leaf, NamedSharding(mesh, PartitionSpec(BATCH_AXES, *free)))

    def call(next_function: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        output = next_function(*args, **kwargs)
        return jax.tree.map(keep, output) if context.method_name == "__call__" else output

    with (
        attention_mesh(mesh, BATCH_AXES, "tensor"),
        nn.intercept_methods(call) if parts > 1 else contextlib.nullcontext(),
    ):
        yield


def put_on_mesh(tree: Any, shardings: Any) -> Any:
    """Return global arrays from arrays that every process has in full; each device gets only its part."""
    if jax.process_count() == 1:
        return jax.device_put(tree, shardings)

    def put(leaf: Any, sharding: NamedSharding) -> jax.Array:
        host = np.asarray(leaf)
        return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

    return jax.tree.map(put, tree, shardings)


def local_batch_indices(sharding: NamedSharding, batch_size: int) -> tuple[int, ...]:
    """Return the indices of a batch that are on this process's devices; processes along `tensor` share theirs."""
    parts = sharding.addressable_devices_indices_map((batch_size,)).values()
    return tuple(sorted({row for part in parts for row in range(batch_size)[part[0]]}))  # type: ignore[index]


def make_global_batch(batch: Any, sharding: NamedSharding, rows: Sequence[int], batch_size: int) -> Any:
    """Return a global batch, of which this process gives its part.

    batch: arrays of the examples `rows` alone, (len(rows), ...). rows: see `local_batch_indices`. batch_size: of the
    global batch.
    """
    if jax.process_count() == 1:
        return jax.device_put(batch, sharding)

    def put(local: np.ndarray) -> jax.Array:
        def part(index: Any) -> np.ndarray:
            indices = range(batch_size)[index[0]]
            first = bisect_left(rows, indices.start)
            return local[first : first + len(indices)]

        return jax.make_array_from_callback((batch_size, *local.shape[1:]), sharding, part)

    return jax.tree.map(put, batch)


def shard_batch(tree: Any, mesh: Mesh, rows: int = 0) -> Any:
    """Return arrays (n, ...), which every process has, sharded along n over the mesh.

    They are padded with copies of the last row, to `rows` rows or to the next multiple of the mesh's parts.
    """
    parts = batch_parts(mesh)

    def fill(leaf: np.ndarray) -> np.ndarray:
        return np.concatenate([leaf, np.repeat(leaf[-1:], max(rows - len(leaf), -len(leaf) % parts), axis=0)])

    filled = jax.tree.map(fill, gather_to_host(tree))
    return put_on_mesh(filled, jax.tree.map(lambda _: batch_sharding(mesh), filled))


@dataclass(frozen=True, kw_only=True)
class BatchedMap:
    """A map of a function over the rows of arrays, in batches that are sharded over a mesh.

    All processes must call it. most: rows on a device at a time.
    """

    mesh: Mesh
    most: int

    def __call__(
        self, function: Callable[[Any], Any], rows: Any, *, most: int | None = None, title: str | None = None
    ) -> Any:
        """Return function(rows) as numpy arrays, computed batch by batch; every batch has the same number of rows.

        function: a compiled function of trees of arrays (b, ...), row by row. rows: the tree of arrays (n, ...). most:
        a smaller number of rows on a device at a time. title: of a bar that shows how far it is; None: no bar.
        """
        n, parts = len(jax.tree.leaves(rows)[0]), batch_parts(self.mesh)
        size = parts * min(self.most, most or self.most, -(-n // parts))
        outputs = []
        is_silent = title is None or jax.process_index() > 0
        for start in progress(range(0, n, size), title or "", "batch", disable=is_silent):
            batch = jax.tree.map(lambda leaf, at=slice(start, start + size): leaf[at], rows)
            with constrain_batch_sharding(self.mesh):
                output = function(shard_batch(batch, self.mesh, size))
            outputs.append(jax.tree.map(lambda leaf, left=n - start: leaf[:left], gather_to_host(output)))
        return jax.tree.map(lambda *leaves: np.concatenate(leaves), *outputs)


def gather_to_host(tree: Any) -> Any:
    """Return the arrays as numpy arrays on every process, gathered one by one; all processes must call it."""

    def fetch(leaf: Any) -> np.ndarray:
        gather = isinstance(leaf, jax.Array) and not (leaf.is_fully_addressable or leaf.is_fully_replicated)
        return multihost_utils.process_allgather(leaf, tiled=True) if gather else np.asarray(leaf)

    return jax.tree.map(fetch, tree)


def init_sharded(make: Callable[[Any], Any], key: Any, shardings: Any) -> Any:
    """Return make(key), of which each device computes its part.

    Arrays that `make` closes over (a teacher's weights) become arguments, sharded over the devices, and not constants
    of the program, which cannot be larger than 2 GiB. shardings: those of the result.
    """
    closed, shapes = jax.make_jaxpr(make, return_shape=True)(key)
    mesh = jax.tree.leaves(shardings)[0].mesh
    consts = put_on_mesh(
        closed.consts, tree_shardings(closed.consts, mesh) if "fsdp" in mesh.shape else replicated(mesh)
    )

    def run(consts: Any, key: Any) -> Any:
        return jax.tree.unflatten(jax.tree.structure(shapes), jax.core.eval_jaxpr(closed.jaxpr, consts, key))

    return jax.jit(run, out_shardings=shardings)(consts, key)
