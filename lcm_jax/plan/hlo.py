"""A reader of HLO, the text of a compiled program: its computations and their instructions."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache

_WIDTHS = {"pred": 1, "token": 0, "opaque": 0, "tuple": 0}  # bytes; other types have their bits in their name
_SHAPE = re.compile(r"([a-z]\w*)\[([\d,<=]*)\](?:\{([^{}]*)\})?")
_HEAD = re.compile(r"(\(.*?\)|\S+) ([\w\-]+)\(")  # shape, opcode
_NAME = re.compile(r"%?([\w.\-]+)$")
_COMPUTATION_LINE = re.compile(r"(ENTRY )?%?([\w.\-]+) .*\{$")


@dataclass(frozen=True)
class Shape:
    """The shape of an array. hbm: whether it is in the device's main memory, not in a scratchpad or on the host."""

    dtype: str
    dims: tuple[int, ...]
    hbm: bool = True

    @property
    def bytes(self) -> int:
        """The size in bytes, rounded up."""
        bits = re.search(r"\d+", self.dtype)
        width = _WIDTHS[self.dtype] if self.dtype in _WIDTHS else int(bits[0]) / 8 if bits else 1
        return math.ceil(math.prod(self.dims) * width)

    @property
    def traffic(self) -> int:
        """The bytes to or from the main memory when the array is written or read."""
        return self.bytes if self.hbm else 0


@dataclass(frozen=True, kw_only=True)
class Instruction:
    """An instruction, `name = shapes opcode(operands), attributes`."""

    name: str
    opcode: str
    shapes: tuple[Shape, ...]
    operands: tuple[str, ...]
    attributes: str
    literal: str  # the text in the parentheses
    root: bool

    @property
    def target(self) -> str:
        """The function that a custom-call calls; empty for other instructions."""
        match = re.search(r'custom_call_target="([^"]*)"', self.attributes)
        return match[1] if match else ""

    def called(self, *keys: str) -> list[str]:
        """Return the names of the computations in some attributes."""
        names = []
        for key in keys:
            match = re.search(rf"\b{key}=(\{{[^}}]*\}}|%?[\w.\-]+)", self.attributes)
            names += re.findall(r"[\w.\-]+", match[1]) if match else []
        return names


Computation = Mapping[str, Instruction]


def read_module(text: str) -> tuple[Mapping[str, Computation], str]:
    """Return the computations of a module, name -> instruction name -> instruction, and the name of the entry.

    Raises ValueError if the text has no ENTRY computation or a line cannot be read.
    """
    computations: dict[str, dict[str, Instruction]] = {}
    entry, current = None, dict[str, Instruction]()
    for line in text.splitlines():
        header = _COMPUTATION_LINE.match(line)
        if header:
            current = computations.setdefault(header[2], {})
            entry = header[2] if header[1] else entry
        elif " = " in line and not line.startswith("HloModule"):
            instruction = _parse(line)
            current[instruction.name] = instruction
    if entry is None:
        raise ValueError("not an HLO module: the text has no ENTRY computation")
    return computations, entry


def _parse(line: str) -> Instruction:
    left, _, right = line.strip().partition(" = ")
    head = _HEAD.match(right)
    if head is None:
        raise ValueError(f"HLO: this line is not an instruction: {line:.100}")
    start = head.end()
    stop = right.index(")", start)
    if "(" in right[start:stop]:
        stop = _closing(right, start - 1)
    inside, opcode = right[start:stop], head[2]
    return Instruction(
        name=left.removeprefix("ROOT ").strip().removeprefix("%"),
        opcode=opcode,
        shapes=_shapes(head[1]),
        operands=tuple(_operands(inside)) if opcode not in ("parameter", "constant") else (),
        attributes=right[stop + 1 :],
        literal=inside,
        root=left.startswith("ROOT "),
    )


def _closing(text: str, start: int) -> int:
    """Return the index of the parenthesis that closes the one at `start`."""
    depth = 0
    for i in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[i], 0)
        if depth == 0:
            return i
    raise ValueError(f"HLO: a parenthesis is not closed in {text:.100}")


def _operands(inside: str) -> Iterator[str]:
    """Yield the names of the operands, with or without shapes before them."""
    if "%" in inside:
        yield from re.findall(r"%([\w.\-]+)", inside)
        return
    depth, part = 0, ""
    for letter in re.sub(r"/\*.*?\*/", "", inside) + ",":
        depth += {"(": 1, "{": 1, "[": 1, ")": -1, "}": -1, "]": -1}.get(letter, 0)
        if letter == "," and depth == 0:
            match = _NAME.search(part.strip())
            if match:
                yield match[1]
            part = ""
        else:
            part += letter


@lru_cache(maxsize=65536)
def _shapes(text: str) -> tuple[Shape, ...]:
    shapes = []
    for dtype, dims, layout in _SHAPE.findall(text):
        sizes = tuple(int(size.removeprefix("<=")) for size in dims.split(",") if size)
        space = re.search(r"S\((\d+)\)", layout)
        shapes.append(Shape(dtype, sizes, hbm=space is None or space[1] == "0"))
    return tuple(shapes)
