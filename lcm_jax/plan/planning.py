"""The plan of a run: its real training step, compiled for a topology, and what the program says."""

from __future__ import annotations

import hashlib
import itertools
import math
import re
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import jax
from jax.sharding import Mesh

from lcm_jax.places import cache_dir
from lcm_jax.plan.chips import Topology
from lcm_jax.plan.flops import flops
from lcm_jax.plan.hlo import Program
from lcm_jax.train.config import TrainConfig
from lcm_jax.train.loop import initial_shapes, optimizer_and_step
from lcm_jax.train.sharding import make_mesh
from lcm_jax.weights.files import read_json, write_json
from mmdit.attention import lowering_for

_VERSION = 1  # of what is kept
_TENSOR = (1, 2, 4)  # that a search tries


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Of one step, on one chip where nothing else is said. Bytes, FLOPs, seconds.

    arguments: state, frozen trees and batch. temporaries: activations and gradients. peak: both, as the compiler lays
    them out; of a step that does not fit, what it asked for. flops: that the program executes, recomputation too;
    model_flops: that the mathematics asks for, a chip's share. traffic: to and from the main memory. collectives:
    kind -> {"count", "bytes" sent, "seconds"}. compute: the roofline, of every operation the longer of its FLOPs' and
    its traffic's time. endless: loops whose length the program does not say, counted once. compiling: on this machine.
    """

    config: str
    topology: str
    chips: int
    mesh: Mapping[str, int]
    batch_size: int
    parameters: int  # that are trained
    arguments: int
    temporaries: int
    peak: int
    capacity: int
    peak_flops: float
    fits: bool
    compiling: float
    model_flops: float = 0.0
    flops: float = 0.0
    traffic: float = 0.0
    collectives: Mapping[str, Mapping[str, float]]
    compute: float = 0.0
    communication: float = 0.0
    endless: int = 0

    @property
    def step(self) -> float:
        """Seconds if no collective overlaps with compute: what meshes are ranked by."""
        return self.compute + self.communication

    @property
    def overlapped(self) -> float:
        """Seconds if all that can overlap does."""
        return max(self.compute, self.communication)

    @property
    def mfu(self) -> tuple[float, float]:
        """Model FLOPs utilisation, of `step` and of `overlapped`."""
        least = self.model_flops / self.peak_flops
        return (least / self.step, least / self.overlapped) if self.step else (0.0, 0.0)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return asdict(self) | {"step": self.step, "overlapped": self.overlapped, "mfu": self.mfu}


@dataclass(frozen=True, kw_only=True)
class Traced:
    """A config's training step, the one that `TrainConfig.run` takes, traced for a mesh.

    No weights are made, and none and no data are read where the task has an outline.
    """

    config: TrainConfig
    mesh: Mesh
    platform: str

    @cached_property
    def _parts(self) -> tuple[Any, Any, Any]:
        """Shapes of the arguments, where they lie, the step."""
        config = self.config
        task = getattr(config.task, "outline", config.task.build)()
        tx, placement, step = optimizer_and_step(task, replace(config.loop, parallel="jit"), config.optimizer, self.mesh)
        batch = next(task.batches(config.loop.batch_size, config.loop.seed))
        shapes = jax.eval_shape(lambda *trees: trees, initial_shapes(task, tx), task.frozen, batch)
        return shapes, (placement.state, placement.frozen, placement.batch), step

    @cached_property
    def _traced(self) -> Any:
        shapes, _, step = self._parts
        with lowering_for(self.platform):
            return step.trace(*shapes)

    @property
    def parameters(self) -> int:
        """That are trained."""
        return sum(leaf.size for leaf in jax.tree.leaves(self._parts[0][0].params))

    @property
    def arguments(self) -> int:
        """Bytes of state, frozen trees and batch on one device, whether or not the step reads them."""
        shapes, places, _ = self._parts
        return sum(_bytes_here(tree, place) for tree, place in zip(shapes, places, strict=True))

    @property
    def flops(self) -> float:
        """Of all devices together, without recomputation."""
        task = self.config.task
        if getattr(task, "remat", False):
            task = replace(task, remat=type(task).__dataclass_fields__["remat"].default)
            return flops(replace(self, config=replace(self.config, task=task))._traced.jaxpr)
        return flops(self._traced.jaxpr)

    @cached_property
    def lowered(self) -> Any:
        """To be compiled."""
        return self._traced.lower()


def plan(config: TrainConfig, topology: Topology, name: str) -> Plan:
    """Compile a config's training step on its mesh for a topology, or read what an earlier call kept of that.

    Raises ValueError for a mesh or a batch that does not fit the topology.
    """
    mesh = make_mesh(config.loop.mesh, batch_size=config.loop.batch_size, devices=topology.devices)
    traced = Traced(config=config, mesh=mesh, platform=topology.platform)
    with elapsed(f"tracing {name}"):
        kept = cache_dir() / "plans" / f"{_digest(traced, topology)}.json"
    if kept.is_file():
        return Plan(**read_json(kept) | {"config": name})
    start = time.perf_counter()
    with elapsed(f"compiling {name} for {topology.name}, {said(mesh.shape)}"):
        compiled, needed = _compile(traced.lowered)
    about: dict[str, Any] = {
        "config": name,
        "topology": topology.name,
        "chips": mesh.size,
        "mesh": dict(mesh.shape),
        "batch_size": config.loop.batch_size,
        "parameters": traced.parameters,
        "arguments": traced.arguments,
        "capacity": topology.chip.memory,
        "peak_flops": topology.chip.flops,
        "compiling": time.perf_counter() - start,
    }
    if compiled is None:
        made = Plan(
            **about, temporaries=max(needed - traced.arguments, 0), peak=needed, fits=False, collectives={}
        )
    else:
        made = Plan(**about, **_read(compiled, traced, topology))
    write_json(kept, asdict(made))
    return made


def search(config: TrainConfig, topology: Topology, name: str) -> list[Plan]:
    """The plans of all meshes of powers of two that the batch can be cut along, the best first: those that fit, by
    `step`. A mesh whose arguments alone do not fit is not compiled, and left out."""
    plans = []
    for text in candidates(len(topology.devices), config.loop.batch_size):
        tried = replace(config, loop=replace(config.loop, mesh=text))
        mesh = make_mesh(text, batch_size=config.loop.batch_size, devices=topology.devices)
        if Traced(config=tried, mesh=mesh, platform=topology.platform).arguments < topology.chip.memory:
            plans.append(plan(tried, topology, name))
    if not plans:
        raise ValueError(f"{name}: state and frozen trees alone do not fit {topology.name} on any mesh; take more chips")
    return sorted(plans, key=lambda p: (not p.fits, p.step))


def candidates(devices: int, batch_size: int) -> Iterator[str]:
    """Meshes to try, as --mesh takes them."""
    for tensor, power in itertools.product(_TENSOR, range(devices.bit_length())):
        rows, fsdp = devices // tensor, 2**power
        if devices % tensor == 0 and rows % fsdp == 0 and batch_size % rows == 0:
            yield f"data={rows // fsdp},fsdp={fsdp},tensor={tensor}"


def _read(compiled: Any, traced: Traced, topology: Topology) -> dict[str, Any]:
    """What a compiled step says of itself."""
    memory = compiled.memory_analysis()
    program = Program(compiled.as_text(), traced.mesh.size)
    devices, chip = list(traced.mesh.devices.flat), topology.chip
    idle = traced.arguments - memory.argument_size_in_bytes  # what lies on the chip and this step does not read
    total = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
    peak = int(total - memory.alias_size_in_bytes + max(idle, 0))
    collectives: dict[str, dict[str, float]] = {}
    for work in program.work:
        if work.collective is not None:
            moved = work.collective
            entry = collectives.setdefault(moved.kind, {"count": 0, "bytes": 0.0, "seconds": 0.0})
            entry["count"] += work.times
            entry["bytes"] += work.times * moved.bytes
            entry["seconds"] += work.times * moved.bytes / topology.rate([devices[i] for i in moved.group])
    return {
        "temporaries": int(memory.temp_size_in_bytes),
        "peak": peak,
        "fits": peak <= chip.memory,
        "model_flops": traced.flops / traced.mesh.size,
        "flops": program.flops,
        "traffic": program.bytes,
        "collectives": collectives,
        "compute": sum(w.times * max(w.flops / chip.flops, w.bytes / chip.bandwidth) for w in program.work),
        "communication": sum(entry["seconds"] for entry in collectives.values()),
        "endless": len(program.endless),
    }


def _compile(lowered: Any) -> tuple[Any, int]:
    """The program, or (None, the bytes that it would need) where the compiler finds that it does not fit."""
    try:
        return lowered.compile(), 0
    except jax.errors.JaxRuntimeError as error:
        used = re.search(r"Used ([\d.]+)([KMGT]?) of", str(error))
        if "RESOURCE_EXHAUSTED" not in str(error) or used is None:
            raise
        return None, int(float(used[1]) * 1024 ** " KMGT".index(used[2] or " "))


def _bytes_here(tree: Any, places: Any) -> int:
    """Of a tree of shapes on one device."""
    leaves, treedef = jax.tree.flatten(tree)
    placed = jax.tree.leaves(places) if not isinstance(places, jax.sharding.Sharding) else [places] * treedef.num_leaves
    pairs = zip(leaves, placed, strict=True)
    return sum(math.prod(place.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf, place in pairs)


def _digest(traced: Traced, topology: Topology) -> str:
    """Of all that a plan depends on: program, topology, mesh and its arguments, versions."""
    names = ("jax", "jaxlib", "libtpu")
    about = [_VERSION, topology.name, topology.chip, said(traced.mesh.shape), traced.arguments, *map(_version, names)]
    digest = hashlib.sha256("\n".join(map(str, about)).encode())
    digest.update(traced.lowered.as_text().encode())
    return digest.hexdigest()[:32]


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def said(mesh: Mapping[str, int]) -> str:
    """As --mesh takes it, without the axes of one."""
    return ",".join(f"{axis}={size}" for axis, size in mesh.items() if size > 1) or "data=1"


@contextmanager
def elapsed(what: str, every: float = 10.0) -> Iterator[None]:
    """Say on standard error what goes on and for how long, where it is long."""
    start, done = time.perf_counter(), threading.Event()

    def tell() -> None:
        while not done.wait(every):
            print(f"{what}: {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)

    thread = threading.Thread(target=tell, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
