"""The plan of a run: its real training step is compiled for a topology, and the compiled program is read."""

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

_VERSION = 5  # of the cached plans
_POINTER = re.compile(r'(?<=backend_config = )"\d{9,}"')  # an address in this process: how a call is partitioned
_COMPILERS = ("jax", "jaxlib", "libtpu", "jax-cuda12-plugin", "jax-cuda13-plugin")
_TENSOR = (1, 2, 4)  # the sizes of the axis "tensor" that a search tries


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The plan of one training step: bytes, FLOPs and seconds, on one chip unless something else is said.

    arguments: bytes of state, frozen trees and batch. temporaries: bytes of activations and gradients. peak: bytes of
    both as the compiler lays them out; for a step that does not fit, the bytes it asked for. capacity: bytes of a chip.
    model_flops: FLOPs of the mathematics, a chip's share. flops: FLOPs that the program executes, with recomputation.
    traffic: bytes to and from the main memory. collectives: kind -> {"count", "bytes" (sent), "seconds"}. compute:
    seconds by a roofline: for every operation the longer time, that of its FLOPs or that of its traffic. communication:
    seconds of all collectives. endless: the number of loops whose length the program does not give; they count once.
    compiling: seconds on this machine. machine_code: whether the compiler ran to its end, machine code included. The
    plan of a step that the compiler refuses for its size has only memory.
    """

    config: str
    topology: str
    chips: int
    mesh: Mapping[str, int]
    batch_size: int
    parameters: int  # the trained ones
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
    machine_code: bool = True

    @property
    def step(self) -> float:
        """The seconds of a step if no collective overlaps with compute; meshes are ranked by it."""
        return self.compute + self.communication

    @property
    def overlapped(self) -> float:
        """The seconds of a step if all communication overlaps with compute."""
        return max(self.compute, self.communication)

    @property
    def mfu(self) -> tuple[float, float]:
        """The model FLOPs utilisation for `step` and for `overlapped`; zeros if the compiler refused the step."""
        ideal = self.model_flops / self.peak_flops
        return (ideal / self.step, ideal / self.overlapped) if self.step else (0.0, 0.0)

    def to_dict(self) -> dict[str, Any]:
        """Return all fields, `step`, `overlapped` and `mfu` as a dict for JSON."""
        return asdict(self) | {"step": self.step, "overlapped": self.overlapped, "mfu": self.mfu}


@dataclass(frozen=True, kw_only=True)
class Traced:
    """A config's training step, the same one that `TrainConfig.run` takes, traced for a mesh.

    No weights are allocated. If the task has a method `abstract`, no weights and no data are read either.
    """

    config: TrainConfig
    mesh: Mesh
    platform: str

    @cached_property
    def _parts(self) -> tuple[Any, Any, Any]:
        """The shapes of the arguments, their shardings, and the step."""
        config = self.config
        task = config.task.abstract() if hasattr(config.task, "abstract") else config.task.build()
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
        """The number of trained parameters."""
        return sum(leaf.size for leaf in jax.tree.leaves(self._parts[0][0].params))

    @property
    def arguments(self) -> int:
        """The bytes of state, frozen trees and batch on one device, whether or not the step reads them."""
        shapes, shardings, _ = self._parts
        return sum(_bytes_per_device(tree, sharding) for tree, sharding in zip(shapes, shardings, strict=True))

    @property
    def flops(self) -> float:
        """The FLOPs of a step on all devices together, without recomputation."""
        task = self.config.task
        if getattr(task, "remat", False):
            task = replace(task, remat=type(task).__dataclass_fields__["remat"].default)
            return flops(replace(self, config=replace(self.config, task=task))._traced.jaxpr)
        return flops(self._traced.jaxpr)

    @cached_property
    def lowered(self) -> Any:
        """The lowered step, ready to be compiled."""
        return self._traced.lower()


def plan(config: TrainConfig, topology: str, name: str, *, machine_code: bool = False) -> Plan:
    """Return the plan of a config's training step on its mesh, from the cache if an earlier call made the same one.

    The compiler is stopped when it has scheduled the program and laid out its memory: next it would make machine code,
    which takes nine tenths of the time and which a plan does not need. machine_code: run the compiler to its end; for
    GPUs and CPUs it always is. name: of the config, for the plan and the messages.

    Raises ValueError for a mesh or a batch that does not fit the topology, ModuleNotFoundError if the compiler is not
    installed, RuntimeError if the compiler's process ends without a plan.
    """
    kind, sides = parse(topology)
    mesh_shape(config.loop.mesh, math.prod(sides), config.loop.batch_size)  # raises ValueError
    check_compiler(topology)
    if machine_code or kind in ("cpu", *GPUS):  # their compilers write nothing before the end
        return _plan(config, topology, name, dump=None)
    with tempfile.TemporaryDirectory() as folder:  # only the end of its process stops a compiler
        arguments = (config, topology, name, folder)
        process = multiprocessing.get_context("spawn").Process(target=_plan_in_process, args=arguments)
        with _environment(XLA_FLAGS=f"{os.environ.get('XLA_FLAGS', '')} {DUMP.format(folder=folder)}"):
            process.start()
        process.join()
        file = Path(folder) / "plan.json"
        if not file.is_file():
            raise RuntimeError(f"planning {name} ended with exit code {process.exitcode}; its messages are above")
        return Plan(**read_json(file))


def search(config: TrainConfig, topology: str, name: str, *, machine_code: bool = False) -> list[Plan]:
    """Return the plans of all meshes of powers of two that divide the batch, the best first.

    Plans that fit come first, each group sorted by `step`. Raises ValueError if no mesh divides the batch, and as
    `plan` does.
    """
    meshes = candidates(math.prod(parse(topology)[1]), config.loop.batch_size)
    configs = [replace(config, loop=replace(config.loop, mesh=mesh)) for mesh in meshes]
    plans = [plan(candidate, topology, name, machine_code=machine_code) for candidate in configs]
    if not plans:
        raise ValueError(
            f"{name}: no mesh of {topology} divides a batch of {config.loop.batch_size}; change --batch-size"
        )
    return sorted(plans, key=lambda entry: (not entry.fits, entry.step, entry.peak))


DUMP = "--xla_dump_to={folder} --xla_dump_hlo_as_text --xla_dump_hlo_module_re=.*train_step.*"


def _plan_in_process(config: TrainConfig, topology: str, name: str, folder: str) -> None:
    """Run `_plan` as the only work of a process, which ends while the compiler still runs."""
    jax.config.update("jax_platforms", "cpu")
    write_json(Path(folder) / "plan.json", asdict(_plan(config, topology, name, dump=Path(folder))))
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
        cache_file = cache_dir() / "plans" / f"{_digest(traced, opened)}.json"
    if cache_file.is_file():
        cached = Plan(**read_json(cache_file) | {"config": name})
        if cached.machine_code or dump is not None:
            return cached
    start = time.perf_counter()
    with elapsed(f"compiling {name} for {topology}, {format_mesh(mesh.shape)}"):
        program = compile_step(traced.lowered, mesh.size, dump)
    result = Plan(
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
        machine_code=dump is None,
        **_summarize(program, traced, opened),
    )
    write_json(cache_file, asdict(result))
    return result


class _Program(NamedTuple):
    """The result of a compilation.

    total: bytes of the main memory that the program takes. arguments: those of them that are its arguments. Both are
    without the arguments that this step does not read. program: None if it does not fit.
    """

    total: int
    arguments: int
    program: CompiledProgram | None


def compile_step(lowered: Any, devices: int, dump: Path | None) -> _Program:
    """Compile a lowered step for so many devices, to the end or until the scheduled program and its memory are dumped.

    dump: the folder to which XLA_FLAGS let the compiler write (`DUMP`); None to compile to the end. Raises the
    compiler's error, except for one that says that the memory does not suffice.
    """
    outcome: list[Any] = []  # the compiled program or the error

    def run() -> None:
        try:
            outcome.append(lowered.compile())
        except Exception as error:
            outcome.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(0.5)
        program = None if dump is None else _dumped(dump, devices)
        if program is not None:
            return program
    (compiled,) = outcome
    if isinstance(compiled, Exception):
        needed = bytes_needed(str(compiled))
        if needed is None:
            raise compiled
        return _Program(needed, 0, None)
    arguments = int(compiled.memory_analysis().argument_size_in_bytes)
    return _Program(memory_of(compiled), arguments, CompiledProgram(compiled.as_text(), devices))


def _dumped(folder: Path, devices: int) -> _Program | None:
    """Return what a TPU's compiler writes before it makes machine code, or None as long as it is not complete."""
    for file in folder.glob("*.after_optimizations_after_buffer_assignment.txt"):
        text, report = file.read_text(), Path(str(file).replace("_after_buffer_assignment.", "-memory-usage-report."))
        if not text.endswith("}\n\n"):  # the compiler is still writing it
            return None
        total = re.search(r"Memory Space: default .*\nTotal bytes: (\d+)", report.read_text())
        if total is None:
            raise ValueError(f"{report.name}: no size of the default memory space; this libtpu writes another format")
        program = CompiledProgram(text, devices)
        return _Program(int(total[1]), program.arguments, program)
    return None


def candidates(devices: int, batch_size: int) -> Iterator[str]:
    """Yield the meshes to try, as --mesh takes them: those of all devices whose axes data x fsdp divide the batch."""
    for tensor, power in itertools.product(_TENSOR, range(devices.bit_length())):
        parts, fsdp = devices // tensor, 2**power
        if devices % tensor == 0 and parts % fsdp == 0 and batch_size % parts == 0:
            yield f"data={parts // fsdp},fsdp={fsdp},tensor={tensor}"


def _summarize(compiled: _Program, traced: Traced, topology: Topology) -> dict[str, Any]:
    """Return the fields of a plan that the program gives: memory, FLOPs, traffic, collectives and times."""
    unread = max(traced.arguments - compiled.arguments, 0)  # arguments on the chip that this step does not read
    peak = compiled.total + (unread if compiled.program is not None else 0)
    memory = {"temporaries": max(peak - traced.arguments, 0), "peak": peak, "fits": peak <= topology.chip.memory}
    if compiled.program is None:
        return memory | {"fits": False, "collectives": {}}
    program = compiled.program
    devices, chip = list(traced.mesh.devices.flat), topology.chip
    collectives: dict[str, dict[str, float]] = {}
    for work in program.work:
        if work.collective is not None:
            collective = work.collective
            members = [devices[i] for i in collective.group]
            entry = collectives.setdefault(collective.kind, {"count": 0, "bytes": 0.0, "seconds": 0.0})
            entry["count"] += work.times
            entry["bytes"] += work.times * collective.bytes
            entry["seconds"] += work.times * topology.seconds(collective.bytes, members)
    return memory | {
        "model_flops": traced.flops / traced.mesh.size,
        "flops": program.flops,
        "traffic": program.bytes,
        "collectives": collectives,
        "compute": sum(w.times * max(w.flops / chip.flops, w.bytes / chip.bandwidth) for w in program.work),
        "communication": sum(entry["seconds"] for entry in collectives.values()),
        "endless": len(program.endless),
    }


def _bytes_per_device(tree: Any, shardings: Any) -> int:
    """Return the bytes of a tree of shapes on one device; `shardings` is a tree of the same leaves, or one for all."""
    leaves = jax.tree.leaves(tree)
    one_for_all = isinstance(shardings, jax.sharding.Sharding)
    per_leaf = [shardings] * len(leaves) if one_for_all else jax.tree.leaves(shardings)
    pairs = zip(leaves, per_leaf, strict=True)
    return sum(math.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf, sharding in pairs)


def _digest(traced: Traced, topology: Topology) -> str:
    """Return a hash of all that a plan depends on: program, topology, mesh, size of the arguments, versions."""
    about = [_VERSION, topology.name, topology.chip, format_mesh(traced.mesh.shape), traced.arguments]
    about += [version_of(name) or "" for name in _COMPILERS]
    digest = hashlib.sha256("\n".join(map(str, about)).encode())
    digest.update(_POINTER.sub("", traced.lowered.as_text()).encode())
    return digest.hexdigest()[:32]


def compilers() -> str:
    """Return the names and versions of the installed compilers, as text; another version may make another plan."""
    return ", ".join(f"{name} {version}" for name in _COMPILERS if (version := version_of(name)))


def bytes_needed(error: str) -> int | None:
    """Return the bytes that a program needs, from the error of a compiler that ran out of a chip's memory.

    It is None for any other error.
    """
    match = re.search(r"(?:Used |\()([\d.]+)([KMGT]?)(?: of|\) exceeds)", error)
    if "RESOURCE_EXHAUSTED" not in error or match is None:
        return None
    return int(float(match[1]) * 1024 ** " KMGT".index(match[2] or " "))


def format_mesh(mesh: Mapping[str, int]) -> str:
    """Return a mesh as --mesh takes it, without axes of size one."""
    return ",".join(f"{axis}={size}" for axis, size in mesh.items() if size > 1) or "data=1"


@contextmanager
def elapsed(what: str, every: float = 10.0) -> Iterator[None]:
    """Print `what` and the seconds since the start to standard error, every `every` seconds while the block runs."""
    start, done = time.perf_counter(), threading.Event()

    def report_time() -> None:
        while not done.wait(every):
            print(f"{what}: {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)

    thread = threading.Thread(target=report_time, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
