"""What a compiled program does, read from its HLO text: FLOPs, memory traffic and collectives of one device.

XLA's own cost analysis counts the body of a loop once; here a loop counts as often as it runs. Of a conditional the
branch with more FLOPs counts. What a fusion reads and writes is memory traffic, what happens inside of it is not.
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
_FREE = (  # of memory traffic: they name or arrange what others made
    *("parameter", "constant", "iota", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call"),
    *("after-all", "partition-id", "replica-id", "opt-barrier", "async-start", "async-update", "async-done"),
)
_CARRIERS = (*COLLECTIVES, "custom-call", "parameter", "tuple", "get-tuple-element")


@dataclass(frozen=True, kw_only=True)
class Collective:
    """bytes: that one device sends. group: some devices that take part in one, by their numbers in the program.

    channel: its name in the program; what is fused with other work in steps has one through all of them.
    """

    kind: str
    bytes: float
    group: tuple[int, ...]
    channel: str = ""


@dataclass(frozen=True, kw_only=True)
class Work:
    """An operation that is executed `times`: its FLOPs, its bytes of memory traffic, or the collective that it is."""

    times: int
    flops: float = 0.0
    bytes: float = 0.0
    collective: Collective | None = None


class CompiledProgram:
    """A module's text, and what it makes one of `devices` do."""

    def __init__(self, text: str, devices: int) -> None:
        """devices: that it runs on."""
        self.devices = devices
        self.computations, self.entry = read_module(text)
        self.endless: list[str] = []  # loops of a length that the text does not say, which count once

    @cached_property
    def work(self) -> list[Work]:
        """Of one execution."""
        return list(self._run(self.entry, 1))

    @property
    def flops(self) -> float:
        """Of matrix products and convolutions, one multiplication and addition being two."""
        return sum(work.times * work.flops for work in self.work)

    @property
    def bytes(self) -> float:
        """Read from and written to the main memory."""
        return sum(work.times * work.bytes for work in self.work)

    @property
    def arguments(self) -> int:
        """Bytes of them."""
        entry = self.computations[self.entry].values()
        return sum(shape.bytes for op in entry if op.opcode == "parameter" for shape in op.shapes)

    def _run(self, name: str, times: int) -> Iterator[Work]:
        """Of a computation, each collective once however many operations carry it on."""
        seen: set[str] = set()
        for work in self._all(name, times):
            channel = "" if work.collective is None else work.collective.channel
            if not channel or channel not in seen:
                yield work
            seen.add(channel)

    def _all(self, name: str, times: int) -> Iterator[Work]:
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
                yield from self._one(op, computation, times)

    def _one(self, op: Instruction, computation: Computation, times: int) -> Iterator[Work]:
        moved = self._collective(op, computation)
        if moved is not None:
            yield Work(times=times, collective=moved)
        elif op.opcode not in _FREE and not op.opcode.endswith("-done"):
            yield Work(times=times, flops=flops_of(op, computation), bytes=_traffic(op, computation))

    def _fused(self, op: Instruction, computation: Computation, inside: str, times: int) -> Iterator[Work]:
        """A fusion: what it reads and writes, and the FLOPs and the collectives inside."""
        body = self.computations[inside]
        flops, collectives = 0.0, []
        for inner in body.values():
            if inner.opcode == "fusion":
                nested = [work for called in inner.called("calls") for work in self._fused(inner, body, called, 1)]
                flops += sum(work.flops for work in nested)
                collectives += [work.collective for work in nested if work.collective is not None]
            moved = self._collective(inner, body)
            if moved is None:
                flops += flops_of(inner, body)
                continue
            scattered = moved.kind == "all-reduce" and "reduce-scatter" in inside  # as XLA writes one for TPUs
            if scattered:
                moved = replace(moved, kind="reduce-scatter", bytes=moved.bytes / 2)
            collectives.append(moved)
        yield from (Work(times=times, collective=moved) for moved in collectives)
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
        """The first group of devices, or the pair that is farthest apart in number."""
        if op.opcode.startswith("collective-permute"):
            pairs = re.findall(r"\{(\d+),(\d+)\}", op.attributes)
            return max(((int(a), int(b)) for a, b in pairs), key=lambda pair: abs(pair[0] - pair[1]), default=(0, 0))
        named = re.search(r"replica_groups=mesh\[([^\]]*)\] ?\{([^}]*)\}", op.attributes)
        if named:
            return _along(named[1], named[2])
        iota = re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", op.attributes)
        if iota:
            groups, axes, order = ([int(i) for i in part.split(",")] if part else [] for part in iota.groups())
            ids = np.arange(math.prod(axes)).reshape(axes)
            ids = ids.transpose(order) if order else ids
            return tuple(map(int, ids.reshape(groups)[0]))
        listed = re.search(r"replica_groups=\{\{([\d,]*)\}", op.attributes)
        return tuple(map(int, listed[1].split(","))) if listed else tuple(range(self.devices))

    def _trips(self, op: Instruction, computation: Computation) -> int:
        """How often a loop runs: as XLA says, or as a counter does that is compared with a constant."""
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
                by = [body[name].literal for name in step.operands if body[name].opcode == "constant"]
                if step.opcode == "add" and len(by) == 1 and first.opcode == "constant":
                    return -(-(int(limit.literal) - int(first.literal)) // int(by[0]))
        self.endless.append(op.name)
        return 1


def _origin(computation: Computation, name: str) -> Instruction:
    """What was copied, or is known under another shape."""
    while computation[name].opcode in ("copy", "bitcast"):
        (name,) = computation[name].operands
    return computation[name]


def _traffic(op: Instruction, computation: Computation) -> float:
    """Bytes read and written by an operation by itself."""
    if op.opcode in ("dynamic-slice", "gather", "slice"):
        return 2.0 * sum(shape.traffic for shape in op.shapes)
    if op.opcode == "dynamic-update-slice":
        return 2.0 * sum(shape.traffic for shape in computation[op.operands[1]].shapes)
    if op.opcode == "copy-start":
        return float(op.shapes[0].traffic + sum(shape.traffic for shape in computation[op.operands[0]].shapes))
    read = sum(shape.traffic for name in dict.fromkeys(op.operands) for shape in computation[name].shapes)
    made = op.shapes
    if op.target.startswith(("__cublas$", "__cudnn$")):  # whose workspaces are among their results
        made = (made[0], *(shape for shape in made[1:] if len(shape.dims) > 1))
    return float(read + sum(shape.traffic for shape in made))


def _fusion_traffic(op: Instruction, computation: Computation, body: Computation) -> float:
    """Of an operand that is only sliced inside, the slices are read; of one that is updated in place, the update; what
    a collective carries through is not."""
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
            whole = sum(shape.traffic for shape in shapes)
            total += min(whole, sum(shape.bytes for user in using for shape in user.shapes))
        elif not all(_updated(user, inner) or user.opcode in _CARRIERS for user in using):
            total += sum(shape.traffic for shape in shapes)
    (root,) = (inner for inner in body.values() if inner.root)
    for made in [body[name] for name in root.operands] if root.opcode == "tuple" else [root]:
        if made.opcode == "dynamic-update-slice":
            total += sum(shape.bytes for shape in body[made.operands[1]].shapes)
        elif made.opcode not in _CARRIERS:
            total += sum(shape.traffic for shape in made.shapes)
    return total


def _updated(user: Instruction, operand: Instruction) -> bool:
    return user.opcode == "dynamic-update-slice" and user.operands[0] == operand.name


def _along(mesh: str, axes: str) -> tuple[int, ...]:
    """The first group of devices along some axes of a mesh: "'a'=4,'b'=2" and "'b'"; an axis may be a part of one,
    "'a':(2)2", the two that follow a factor of two."""
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
