"""Chips and how they are wired, in public figures.

TPUs: cloud.google.com/tpu/docs (system architecture of each version), and Austin et al., "How to Scale Your Model"
(2025), part 2, for what a link carries. GPUs: NVIDIA's data sheets of the A100 80GB SXM, H100 SXM and H200.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Chip:
    """flops: of bfloat16, a second. memory: bytes of HBM; bandwidth: of it, bytes a second.

    link: bytes a second one way to a neighbour. wraps: an axis of the torus closes to a ring where its length is a
    multiple of this; others are lines. GPUs have no torus: all that are in one node reach each other at `link`, and
    beyond a node at `network`.
    """

    flops: float
    memory: int
    bandwidth: float
    link: float
    wraps: int = 0
    network: float = 0.0
    node: int = 0


CHIPS: Mapping[str, Chip] = MappingProxyType(
    {
        "v4": Chip(flops=275e12, memory=32 * GIB, bandwidth=1.2e12, link=45e9, wraps=4),
        "v5e": Chip(flops=197e12, memory=16 * GIB, bandwidth=0.82e12, link=45e9, wraps=16),
        "v5p": Chip(flops=459e12, memory=95 * GIB, bandwidth=2.77e12, link=90e9, wraps=4),
        "v6e": Chip(flops=918e12, memory=32 * GIB, bandwidth=1.64e12, link=90e9, wraps=16),
        # NVLink of one way, and eight network cards of 200 or 400 Gb/s to a node of eight.
        "a100": Chip(flops=312e12, memory=80 * GIB, bandwidth=2.04e12, link=300e9, network=25e9, node=8),
        "h100": Chip(flops=989e12, memory=80 * GIB, bandwidth=3.35e12, link=450e9, network=50e9, node=8),
        "h200": Chip(flops=989e12, memory=141 * 10**9, bandwidth=4.8e12, link=450e9, network=50e9, node=8),
        # Not a machine to plan for: a core's worth of a CPU, on which programs and their collectives can be tried.
        "cpu": Chip(flops=0.1e12, memory=16 * GIB, bandwidth=0.01e12, link=1e9, network=1e9, node=8),
    }
)
GPUS = ("a100", "h100", "h200")

_KINDS = {"v4": "v4", "v5 lite": "v5e", "v5e": "v5e", "v5p": "v5p", "v5": "v5p", "v6 lite": "v6e", "v6e": "v6e"}


def chip_of(kind: str) -> Chip | None:
    """Of a device's `device_kind`, such as "TPU v5 lite" or "NVIDIA H100 80GB HBM3"; None for what is not known."""
    maker, _, model = kind.partition(" ")
    if maker == "TPU":
        return CHIPS.get(_KINDS.get(model, ""))
    return next((CHIPS[name] for name in GPUS if maker == "NVIDIA" and name in model.lower()), None)
