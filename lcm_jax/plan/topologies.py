"""Topologies to compile for, and the time of collectives on their links."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies

from lcm_jax.plan.gpu_targets import gpu_target_config
from lcm_jax.runtime.hardware import CHIPS, GPUS, Chip

HOP = 1e-6  # seconds from a chip to its neighbour


@dataclass(frozen=True, kw_only=True)
class Topology:
    """Chips of one kind and their wiring.

    shape: the sides of the torus. devices: those to compile for, with their coordinates in the torus.
    """

    name: str
    chip: Chip
    shape: tuple[int, ...]
    devices: Sequence[Any]

    @property
    def platform(self) -> str:
        """The platform of the chips: "tpu", "gpu" or "cpu"."""
        kind = self.name.partition(":")[0]
        return "gpu" if kind in GPUS else "cpu" if kind == "cpu" else "tpu"

    def seconds(self, sent: float, members: Sequence[Any]) -> float:
        """Return the seconds of a collective in which each device of a group sends `sent` bytes, all groups at once.

        On a torus the group's rings use both directions of every axis along which it extends. An axis that does not
        close to a ring is a line, in which each link carries what two links of a ring would carry.
        """
        chip = self.chip
        if chip.node:
            link = chip.link if len(members) <= chip.node else chip.network
            return sent / link + HOP * (len(members) - 1)
        coordinates = np.asarray([member.coords for member in members])[:, : len(self.shape)]
        links, hops = 0, 0
        for axis, side in zip(coordinates.T, self.shape, strict=True):
            length = len(set(axis))
            ring = length == side and side % chip.wraps == 0
            links += (2 if ring else 1) if length > 1 else 0
            hops += length // 2 if ring else length - 1
        return sent / (chip.link * max(links, 1)) + HOP * hops


def parse(name: str) -> tuple[str, tuple[int, ...]]:
    """Return chip and sides of a topology's name: ("v5e", (8, 8)) for "v5e:8x8"; raise ValueError for another form."""
    kind, _, sides = name.partition(":")
    if kind not in CHIPS or not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", sides):
        raise ValueError(f"--topology {name}: write CHIP:SIDES, such as v5e:8x8; chips are {', '.join(CHIPS)}")
    return kind, tuple(map(int, sides.split("x")))


def check_compiler(name: str) -> None:
    """Raise ModuleNotFoundError, which says what to install, if the compiler of a topology is missing."""
    kind, _ = parse(name)
    if kind in GPUS and not any(find_spec(f"jax_cuda{version}_plugin") for version in (12, 13)):
        raise ModuleNotFoundError(f"--topology {name} needs JAX's CUDA plugin: pip install 'lcm-jax[cuda]'")
    if kind not in (*GPUS, "cpu") and find_spec("libtpu") is None:
        raise ModuleNotFoundError(f"--topology {name} needs the package libtpu, and no TPU: pip install libtpu")


def open_topology(name: str) -> Topology:
    """Return a topology to compile for.

    name: "v5e:8x8" or "v5p:4x4x4" are TPUs, which libtpu compiles for; "h100:8" are GPUs in nodes of eight, which JAX's
    CUDA plugin compiles for; "cpu:8" are eight CPU devices of this process.

    Raises ModuleNotFoundError if the compiler of that platform is missing, ValueError for a topology that it does not
    know.
    """
    kind, shape = parse(name)
    chip = CHIPS[kind]
    check_compiler(name)
    if kind in GPUS:
        number = math.prod(shape)
        if number > chip.node and number % chip.node:
            raise ValueError(
                f"--topology {name}: {number} GPUs are no whole nodes of {chip.node}; give a multiple of {chip.node}"
            )
        per_node = min(number, chip.node)
        target = {"target_config": gpu_target_config(kind), "topology": f"1x{number // per_node}x{per_node}"}
        devices = _described(name, "cuda", name, **target)
    elif kind == "cpu":
        devices = jax.devices("cpu")
        if len(devices) != math.prod(shape):
            raise ValueError(f"--topology {name}: this process has {len(devices)} CPU devices (JAX_NUM_CPU_DEVICES)")
    else:
        options: dict[str, Any] = {"chip_config_name": "megacore"} if kind == "v4" else {}  # one device a chip
        # Small slices are one host; without this the compiler expects hosts of four chips.
        hosts = {"chips_per_host_bounds": [*shape, 1, 1][:3]} if math.prod(shape) <= 4 or shape == (2, 4) else {}
        os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # libtpu would ask the cloud's metadata server, and wait
        os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # no TPU is used, so another process may use it
        devices = _described(name, "tpu", name, **options, **hosts)
    if len(devices) != math.prod(shape):
        raise ValueError(f"--topology {name}: {len(devices)} devices, not {math.prod(shape)}; expected one a chip")
    return Topology(name=name, chip=chip, shape=shape, devices=devices)


def _described(name: str, platform: str, description: str, **options: Any) -> Sequence[Any]:
    try:
        return topologies.get_topology_desc(description, platform=platform, **options).devices
    except (RuntimeError, NotImplementedError, ValueError) as error:
        raise ValueError(f"--topology {name}: {' '.join(str(error).split()):.300}") from error
