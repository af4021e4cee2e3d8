"""The plan of a run: its real training step, compiled for a topology, and what the program says."""

from __future__ import annotations

import hashlib
import itertools
import math
import multiprocessing
import os
import re
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from lcm_jax.parallel.sharding import make_mesh, mesh_shape
from lcm_jax.plan.compiled_program import CompiledProgram
from lcm_jax.plan.topologies import Topology, check_compiler, open_topology, parse
from lcm_jax.runtime.atomic_files import write_json
from lcm_jax.runtime.cache import cache_dir
from lcm_jax.runtime.compiler_options import memory_of
from lcm_jax.runtime.flops import flops
from lcm_jax.runtime.hardware import GPUS
from lcm_jax.runtime.optional_deps import version_of
from lcm_jax.train.config import TrainConfig
from lcm_jax.train.loop import initial_shapes, optimizer_and_step
from lcm_jax.weights.safetensors_files import read_json
from mmdit.attention import lowering_for
from vae16 import portable

_VERSION = 5  # of what is kept
_POINTER = re.compile(r'(?<=backend_config = )"\d{9,}"')  # to this process's rules of a call's partitioning
_COMPILERS = ("jax", "jaxlib", "libtpu", "jax-cuda12-plugin", "jax-cuda13-plugin")
_TENSOR = (1, 2, 4)  # that a search tries


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Of one step, on one chip where nothing else is said. Bytes, FLOPs, seconds.

    arguments: state, frozen trees and batch. temporaries: activations and gradients. peak: both, as the compiler lays
    them out; of a step that does not fit, what it asked for. flops: that the program executes, recomputation too;
    model_flops: that the mathematics asks for, a chip's share. traffic: to and from the main memory. collectives:
    kind -> {"count", "bytes" sent, "seconds"}. compute: the roofline, of every operation the longer of its FLOPs' and
    its traffic's time. endless: loops whose length the program does not say, counted once. compiling: on this machine,
    whole: to its end, machine code too. A step that the compiler refuses for its size has no more than its memory.
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
    whole: bool = True

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
        task = config.task.outline() if hasattr(config.task, "outline") else config.task.build()
        tx, placement, step = optimizer_and_step(
            task, replace(config.loop, parallel="jit"), config.optimizer, self.mesh
        )
        batch = next(task.batches(config.loop.batch_size, config.loop.seed))
        shapes = jax.eval_shape(lambda *trees: trees, initial_shapes(task, tx), task.frozen, batch)
        return shapes, (placement.state, placement.frozen, placement.batch), step

    @cached_property
    def _traced(self) -> Any:
        shapes, _, step = self._parts
        with lowering_for(self.platform), portable():
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


def plan(config: TrainConfig, topology: str, name: str, *, whole: bool = False) -> Plan:
    """What a config's training step takes on its mesh, or what an earlier call kept of that.

    The compiler is stopped when it has scheduled the program and laid out its memory: what would follow is machine
    code, which takes nine tenths of the time and of which a plan says nothing. whole: it is run to its end.
    Raises ValueError for a mesh or a batch that does not fit the topology.
    """
    kind, sides = parse(topology)
    mesh_shape(config.loop.mesh, math.prod(sides), config.loop.batch_size)  # raises ValueError
    check_compiler(topology)
    if whole or kind in ("cpu", *GPUS):  # whose compilers write nothing before the end
        return _plan(config, topology, name, dump=None)
    with tempfile.TemporaryDirectory() as folder:  # a compiler is stopped with its process
        process = multiprocessing.get_context("spawn").Process(target=_alone, args=(config, topology, name, folder))
        with _environment(XLA_FLAGS=f"{os.environ.get('XLA_FLAGS', '')} {DUMP.format(folder=folder)}"):
            process.start()
        process.join()
        made = Path(folder) / "plan.json"
        if not made.is_file():
            raise RuntimeError(f"planning {name} ended with exit code {process.exitcode}; what it said stands above")
        return Plan(**read_json(made))


def search(config: TrainConfig, topology: str, name: str, *, whole: bool = False) -> list[Plan]:
    """The plans of all meshes of powers of two that the batch can be cut along, the best first: those that fit, by
    `step`."""
    meshes = candidates(math.prod(parse(topology)[1]), config.loop.batch_size)
    configs = [replace(config, loop=replace(config.loop, mesh=mesh)) for mesh in meshes]
    plans = [plan(each, topology, name, whole=whole) for each in configs]
    if not plans:
        raise ValueError(f"{name}: no mesh of {topology} cuts a batch of {config.loop.batch_size}; change --batch-size")
    return sorted(plans, key=lambda each: (not each.fits, each.step, each.peak))


DUMP = "--xla_dump_to={folder} --xla_dump_hlo_as_text --xla_dump_hlo_module_re=.*train_step.*"


def _alone(config: TrainConfig, topology: str, name: str, folder: str) -> None:
    """`_plan` as a process of its own, which ends while the compiler still runs."""
    jax.config.update("jax_platforms", "cpu")
    made = _plan(config, topology, name, dump=Path(folder))
    write_json(Path(folder) / "plan.json", asdict(made))
    sys.stderr.flush()
    os._exit(0)


@contextmanager
def _environment(**values: str) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _plan(config: TrainConfig, topology: str, name: str, *, dump: Path | None) -> Plan:
    opened = open_topology(topology)
    mesh = make_mesh(config.loop.mesh, batch_size=config.loop.batch_size, devices=opened.devices)
    traced = Traced(config=config, mesh=mesh, platform=opened.platform)
    with elapsed(f"tracing {name}"):
        kept = cache_dir() / "plans" / f"{_digest(traced, opened)}.json"
    if kept.is_file():
        found = Plan(**read_json(kept) | {"config": name})
        if found.whole or dump is not None:
            return found
    start = time.perf_counter()
    with elapsed(f"compiling {name} for {topology}, {said(mesh.shape)}"):
        program = compile_step(traced.lowered, mesh.size, dump)
    made = Plan(
        config=name,
        topology=topology,
        chips=mesh.size,
        mesh=dict(mesh.shape),
        batch_size=config.loop.batch_size,
        parameters=traced.parameters,
        arguments=traced.arguments,
        capacity=opened.chip.memory,
        peak_flops=opened.chip.flops,
        compiling=time.perf_counter() - start,
        whole=dump is None,
        **_read(program, traced, opened),
    )
    write_json(kept, asdict(made))
    return made


class _Program(NamedTuple):
    """What the compiler made. total: bytes of the main memory that it takes; arguments: those of them that are its
    arguments; both without what lies on the chip and this step does not read. program: none if it does not fit."""

    total: int
    arguments: int
    program: CompiledProgram | None


def compile_step(lowered: Any, devices: int, dump: Path | None) -> _Program:
    """Until it is done, or until the compiler has dumped the scheduled program and its memory."""
    found: list[Any] = []

    def run() -> None:
        try:
            found.append(lowered.compile())
        except Exception as error:
            found.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(0.5)
        program = None if dump is None else _dumped(dump, devices)
        if program is not None:
            return program
    (compiled,) = found
    if isinstance(compiled, Exception):
        needed = bytes_needed(str(compiled))
        if needed is None:
            raise compiled
        return _Program(needed, 0, None)
    arguments = int(compiled.memory_analysis().argument_size_in_bytes)
    return _Program(memory_of(compiled), arguments, CompiledProgram(compiled.as_text(), devices))


def _dumped(folder: Path, devices: int) -> _Program | None:
    """What a TPU's compiler writes before it makes machine code, once it is there."""
    for file in folder.glob("*.after_optimizations_after_buffer_assignment.txt"):
        text, report = file.read_text(), Path(str(file).replace("_after_buffer_assignment.", "-memory-usage-report."))
        if not text.endswith("}\n\n"):  # it is being written
            return None
        total = re.search(r"Memory Space: default .*\nTotal bytes: (\d+)", report.read_text())
        if total is None:
            raise ValueError(f"{report.name}: says nothing of the default memory space")
        program = CompiledProgram(text, devices)
        return _Program(int(total[1]), program.arguments, program)
    return None


def candidates(devices: int, batch_size: int) -> Iterator[str]:
    """Meshes to try, as --mesh takes them."""
    for tensor, power in itertools.product(_TENSOR, range(devices.bit_length())):
        rows, fsdp = devices // tensor, 2**power
        if devices % tensor == 0 and rows % fsdp == 0 and batch_size % rows == 0:
            yield f"data={rows // fsdp},fsdp={fsdp},tensor={tensor}"


def _read(made: _Program, traced: Traced, topology: Topology) -> dict[str, Any]:
    """What a program says of itself."""
    idle = max(traced.arguments - made.arguments, 0)  # what lies on the chip and this step does not read
    peak = made.total + (idle if made.program is not None else 0)
    memory = {"temporaries": max(peak - traced.arguments, 0), "peak": peak, "fits": peak <= topology.chip.memory}
    if made.program is None:
        return memory | {"fits": False, "collectives": {}}
    program = made.program
    devices, chip = list(traced.mesh.devices.flat), topology.chip
    collectives: dict[str, dict[str, float]] = {}
    for work in program.work:
        if work.collective is not None:
            moved = work.collective
            entry = collectives.setdefault(moved.kind, {"count": 0, "bytes": 0.0, "seconds": 0.0})
            entry["count"] += work.times
            entry["bytes"] += work.times * moved.bytes
            entry["seconds"] += work.times * topology.seconds(moved.bytes, [devices[i] for i in moved.group])
    return memory | {
        "model_flops": traced.flops / traced.mesh.size,
        "flops": program.flops,
        "traffic": program.bytes,
        "collectives": collectives,
        "compute": sum(w.times * max(w.flops / chip.flops, w.bytes / chip.bandwidth) for w in program.work),
        "communication": sum(entry["seconds"] for entry in collectives.values()),
        "endless": len(program.endless),
    }


def _bytes_here(tree: Any, places: Any) -> int:
    """Of a tree of shapes on one device. places: beside its leaves, or one for all."""
    leaves = jax.tree.leaves(tree)
    placed = [places] * len(leaves) if isinstance(places, jax.sharding.Sharding) else jax.tree.leaves(places)
    pairs = zip(leaves, placed, strict=True)
    return sum(math.prod(place.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf, place in pairs)


def _digest(traced: Traced, topology: Topology) -> str:
    """Of all that a plan depends on: program, topology, mesh and its arguments, versions."""
    about = [_VERSION, topology.name, topology.chip, said(traced.mesh.shape), traced.arguments]
    about += [version_of(name) or "" for name in _COMPILERS]
    digest = hashlib.sha256("\n".join(map(str, about)).encode())
    digest.update(_POINTER.sub("", traced.lowered.as_text()).encode())
    return digest.hexdigest()[:32]


def compilers() -> str:
    """Names and versions of what compiles, as far as it is installed: another may send more, or hold less."""
    return ", ".join(f"{name} {found}" for name in _COMPILERS if (found := version_of(name)))


def bytes_needed(error: str) -> int | None:
    """What a compiler that ran out of a chip's memory says the program takes; None of any other error."""
    found = re.search(r"(?:Used |\()([\d.]+)([KMGT]?)(?: of|\) exceeds)", error)
    if "RESOURCE_EXHAUSTED" not in error or found is None:
        return None
    return int(float(found[1]) * 1024 ** " KMGT".index(found[2] or " "))


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
