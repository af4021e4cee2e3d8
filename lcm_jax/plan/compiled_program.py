"""The work of a compiled program, read from its HLO text: FLOPs, memory traffic and collectives of one device.

XLA's own cost analysis counts the body of a loop once; here a loop counts as often as it runs. Of a conditional only
the branch with the most FLOPs counts. The inputs and outputs of a fusion are memory traffic; values inside it are not.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from lcm_jax.plan.hlo import Computation, Instruction, read_module
from lcm_jax.plan.matmul_flops import flops_of

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute")
_FREE = (  # operations without memory traffic: they name or arrange the results of others
    *("parameter", "constant", "iota", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call"),
    *("after-all", "partition-id", "replica-id", "opt-barrier", "async-start", "async-update", "async-done"),
)
_CARRIERS = (*COLLECTIVES, "custom-call", "parameter", "tuple", "get-tuple-element")


@dataclass(frozen=True, kw_only=True)
class Collective:
    """A collective operation of the program.

    bytes: sent by one device. group: one group of devices that take part, by their numbers in the program. channel: its
    number in the program; a collective that is fused with other work in several steps has the same one in all of them.
    """

    kind: str
    bytes: float
    group: tuple[int, ...]
    channel: str = ""


@dataclass(frozen=True, kw_only=True)
class Work:
    """An operation that runs `times` times: its FLOPs and bytes of memory traffic, or the collective that it is."""

    times: int
    flops: float = 0.0
    bytes: float = 0.0
    collective: Collective | None = None


class CompiledProgram:
    """A compiled module, read from its HLO text, and the work that it gives to one of its devices.

    endless: names of the loops whose length the text does not give; they count once. It is filled when `work` is read.
    """

    def __init__(self, text: str, devices: int) -> None:
        """Read a module that runs on so many devices; raise ValueError if the text is not an HLO module."""
        self.devices = devices
        self.computations, self.entry = read_module(text)
        self.endless: list[str] = []

    @cached_property
    def work(self) -> list[Work]:
        """The operations of one execution."""
        return list(self._run(self.entry, 1))

    @property
    def flops(self) -> float:
        """The FLOPs of matrix products, convolutions and attention; a multiplication and an addition are two."""
        return sum(work.times * work.flops for work in self.work)

    @property
    def bytes(self) -> float:
        """The bytes read from and written to the main memory."""
        return sum(work.times * work.bytes for work in self.work)

    @property
    def arguments(self) -> int:
        """The bytes of the program's arguments."""
        entry = self.computations[self.entry].values()
        return sum(shape.bytes for op in entry if op.opcode == "parameter" for shape in op.shapes)

    def _run(self, name: str, times: int) -> Iterator[Work]:
        """Yield the work of a computation, each collective once, however many operations continue it."""
        channels: set[str] = set()
        for work in self._all_work(name, times):
            channel = "" if work.collective is None else work.collective.channel
            if not channel or channel not in channels:
                yield work
            channels.add(channel)

    def _all_work(self, name: str, times: int) -> Iterator[Work]:
        computation = self.computations[name]
        for op in computation.values():
            if op.opcode == "while":
                (body,) = op.called("body")
                yield from self._run(body, times * self._trips(op, computation))
            elif op.opcode == "conditional":
                branches = [
                    list(self._run(branch, times))
                    for branch in op.called("branch_computations", "true_computation", "false_computation")
                ]
                yield from max(branches, key=lambda branch: sum(work.times * work.flops for work in branch))
            elif op.opcode in ("call", "async-start"):
                for called in op.called("to_apply", "calls"):
                    yield from self._run(called, times)
            elif op.opcode == "fusion":
                (inside,) = op.called("calls")
                yield from self._fused(op, computation, inside, times)
            else:
                yield from self._single(op, computation, times)

    def _single(self, op: Instruction, computation: Computation, times: int) -> Iterator[Work]:
        collective = self._collective(op, computation)
        if collective is not None:
            yield Work(times=times, collective=collective)
        elif op.opcode not in _FREE and not op.opcode.endswith("-done"):
            yield Work(times=times, flops=flops_of(op, computation), bytes=_traffic(op, computation))

    def _fused(self, op: Instruction, computation: Computation, inside: str, times: int) -> Iterator[Work]:
        """Yield the work of a fusion: its traffic and FLOPs, and the collectives inside it."""
        body = self.computations[inside]
        flops, collectives = 0.0, []
        for inner in body.values():
            if inner.opcode == "fusion":
                nested = [work for called in inner.called("calls") for work in self._fused(inner, body, called, 1)]
                flops += sum(work.flops for work in nested)
                collectives += [work.collective for work in nested if work.collective is not None]
            collective = self._collective(inner, body)
            if collective is None:
                flops += flops_of(inner, body)
                continue
            # XLA writes a reduce-scatter for TPUs as an all-reduce in a fusion of that name.
            if collective.kind == "all-reduce" and "reduce-scatter" in inside:
                collective = replace(collective, kind="reduce-scatter", bytes=collective.bytes / 2)
            collectives.append(collective)
        yield from (Work(times=times, collective=collective) for collective in collectives)
        yield Work(times=times, flops=flops, bytes=_fusion_traffic(op, computation, body))

    def _collective(self, op: Instruction, computation: Computation) -> Collective | None:
        kind = op.opcode.removesuffix("-start")
        if kind not in COLLECTIVES:
            return None
        size = sum(shape.bytes for name in op.operands for shape in computation[name].shapes)
        group = self._group(op)
        n = len(group)
        sent = {"all-gather": n - 1, "all-reduce": 2 * (n - 1) / n, "collective-permute": 1}.get(kind, (n - 1) / n)
        channel = re.search(r"channel_id=(\d+)", op.attributes)
        return Collective(kind=kind, bytes=size * sent, group=group, channel=channel[1] if channel else "")

    def _group(self, op: Instruction) -> tuple[int, ...]:
        """Return the first group of devices, or the pair whose numbers are farthest apart."""
        if op.opcode.startswith("collective-permute"):
            pairs = re.findall(r"\{(\d+),(\d+)\}", op.attributes)
            return max(((int(a), int(b)) for a, b in pairs), key=lambda pair: abs(pair[0] - pair[1]), default=(0, 0))
        mesh_axes = re.search(r"replica_groups=mesh\[([^\]]*)\] ?\{([^}]*)\}", op.attributes)
        if mesh_axes:
            return _along(mesh_axes[1], mesh_axes[2])
        iota = re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", op.attributes)
        if iota:
            groups, axes, order = ([int(i) for i in part.split(",")] if part else [] for part in iota.groups())
            ids = np.arange(math.prod(axes)).reshape(axes)
            ids = ids.transpose(order) if order else ids
            return tuple(map(int, ids.reshape(groups)[0]))
        listed = re.search(r"replica_groups=\{\{([\d,]*)\}", op.attributes)
        return tuple(map(int, listed[1].split(","))) if listed else tuple(range(self.devices))

    def _trips(self, op: Instruction, computation: Computation) -> int:
        """Return how often a loop runs: XLA's known trip count, or one from a counter compared with a constant."""
        known = re.search(r'"?known_trip_count"?:\{"n":"(\d+)"\}', op.attributes)
        if known:
            return int(known[1])
        condition, body = (self.computations[op.called(key)[0]] for key in ("condition", "body"))
        check, end = (next(i for i in part.values() if i.root) for part in (condition, body))
        if check.opcode == "compare" and "direction=LT" in check.attributes and end.opcode == "tuple":
            counter, limit = (condition[name] for name in check.operands)
            index = re.search(r"index=(\d+)", counter.attributes)
            if index and limit.opcode == "constant":
                step = body[end.operands[int(index[1])]]
                first = _origin(computation, computation[op.operands[0]].operands[int(index[1])])
                strides = [body[name].literal for name in step.operands if body[name].opcode == "constant"]
                if step.opcode == "add" and len(strides) == 1 and first.opcode == "constant":
                    return -(-(int(limit.literal) - int(first.literal)) // int(strides[0]))
        self.endless.append(op.name)
        return 1


def _origin(computation: Computation, name: str) -> Instruction:
    """Return the instruction behind copies and bitcasts."""
    while computation[name].opcode in ("copy", "bitcast"):
        (name,) = computation[name].operands
    return computation[name]


def _traffic(op: Instruction, computation: Computation) -> float:
    """Return the bytes read and written by an operation outside of a fusion."""
    if op.opcode in ("dynamic-slice", "gather", "slice"):
        return 2.0 * sum(shape.traffic for shape in op.shapes)
    if op.opcode == "dynamic-update-slice":
        return 2.0 * sum(shape.traffic for shape in computation[op.operands[1]].shapes)
    if op.opcode == "copy-start":
        return float(op.shapes[0].traffic + sum(shape.traffic for shape in computation[op.operands[0]].shapes))
    read = sum(shape.traffic for name in dict.fromkeys(op.operands) for shape in computation[name].shapes)
    written = op.shapes
    if op.target.startswith(("__cublas$", "__cudnn$")):  # their results include workspaces, which have one dimension
        written = (written[0], *(shape for shape in written[1:] if len(shape.dims) > 1))
    return float(read + sum(shape.traffic for shape in written))


def _fusion_traffic(op: Instruction, computation: Computation, body: Computation) -> float:
    """Return the bytes read and written by a fusion.

    Of an operand that is only sliced inside, the slices count; of one that is updated in place, the update; an operand
    that a collective only passes on does not count.
    """
    total = 0.0
    users: dict[str, list[Instruction]] = {name: [] for name in body}
    for inner in body.values():
        for name in inner.operands:
            users[name].append(inner)
    for inner in body.values():
        if inner.opcode != "parameter":
            continue
        shapes = computation[op.operands[int(inner.literal)]].shapes
        using = users[inner.name]
        if using and all(user.opcode in ("dynamic-slice", "gather", "slice") for user in using):
            full = sum(shape.traffic for shape in shapes)
            total += min(full, sum(shape.bytes for user in using for shape in user.shapes))
        elif not all(_updated(user, inner) or user.opcode in _CARRIERS for user in using):
            total += sum(shape.traffic for shape in shapes)
    (root,) = (inner for inner in body.values() if inner.root)
    for output in [body[name] for name in root.operands] if root.opcode == "tuple" else [root]:
        if output.opcode == "dynamic-update-slice":
            total += sum(shape.bytes for shape in body[output.operands[1]].shapes)
        elif output.opcode not in _CARRIERS:
            total += sum(shape.traffic for shape in output.shapes)
    return total


def _updated(user: Instruction, operand: Instruction) -> bool:
    return user.opcode == "dynamic-update-slice" and user.operands[0] == operand.name


def _along(mesh: str, axes: str) -> tuple[int, ...]:
    """Return the first group of devices along some axes of a mesh, such as "'b'" of the mesh "'a'=4,'b'=2".

    An axis may be a part of a mesh axis: "'a':(2)2" is the factor of two that follows a factor of two.
    """
    sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", mesh)}
    strides, stride = {}, 1
    for name, size in reversed(sizes.items()):
        strides[name], stride = stride, stride * size
    group = [0]
    for name, before, part in re.findall(r"'(\w+)'(?::\((\d+)\)(\d+))?", axes):
        size = int(part) if part else sizes[name]
        step = strides[name] * (sizes[name] // (int(before) * size) if part else 1)
        group = [device + step * i for device in group for i in range(size)]
    return tuple(group)
