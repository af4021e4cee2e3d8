"""Published figures of accelerators and of the links between them.

TPUs: cloud.google.com/tpu/docs (system architecture of each version), and Austin et al., "How to Scale Your Model"
(2025), part 2, for the bandwidth of a link. GPUs: NVIDIA's data sheets of the A100 80GB SXM, H100 SXM and H200.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import jax

GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Chip:
    """The figures of one accelerator.

    flops: bfloat16 operations a second. memory: bytes of HBM; bandwidth: bytes a second from it.
    link: bytes a second one way to a neighbour. wraps: an axis of the torus closes to a ring where its length is a
    multiple of this; others are lines. GPUs have no torus: the `node` GPUs of one node reach each other at `link`, and
    those of other nodes at `network` bytes a second.
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
        # NVLink one way, and eight network cards of 200 or 400 Gb/s for a node of eight GPUs.
        "a100": Chip(flops=312e12, memory=80 * GIB, bandwidth=2.04e12, link=300e9, network=25e9, node=8),
        "h100": Chip(flops=989e12, memory=80 * GIB, bandwidth=3.35e12, link=450e9, network=50e9, node=8),
        "h200": Chip(flops=989e12, memory=141 * 10**9, bandwidth=4.8e12, link=450e9, network=50e9, node=8),
        # No machine to plan for: about one core of a CPU, to try programs and their collectives on.
        "cpu": Chip(flops=0.1e12, memory=16 * GIB, bandwidth=0.01e12, link=1e9, network=1e9, node=8),
    }
)
GPUS = ("a100", "h100", "h200")

_KINDS = {"v4": "v4", "v5 lite": "v5e", "v5e": "v5e", "v5p": "v5p", "v5": "v5p", "v6 lite": "v6e", "v6e": "v6e"}


def chip_of(kind: str) -> Chip | None:
    """Return the chip of a device's `device_kind`, None if it is unknown.

    >>> chip_of("TPU v5 lite") == CHIPS["v5e"], chip_of("NVIDIA H100 80GB HBM3") == CHIPS["h100"], chip_of("cpu")
    (True, True, None)
    """
    maker, _, model = kind.partition(" ")
    if maker == "TPU":
        return CHIPS.get(_KINDS.get(model, ""))
    return next((CHIPS[name] for name in GPUS if maker == "NVIDIA" and name in model.lower()), None)


def memory_of(device: jax.Device) -> int | None:
    """Return the bytes of memory that a program on a device can use at most; None if nobody says.

    Of a CPU it is the machine's memory, or the limit of the container or job if that is less.
    """
    if device.platform != "cpu":
        return (device.memory_stats() or {}).get("bytes_limit")
    limits = []
    with contextlib.suppress(OSError, ValueError, AttributeError):  # no such names outside of POSIX
        limits.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):  # "max" where there is no limit
            limits.append(int(Path(path).read_text()))
    return min(limits, default=None)


def check_platform() -> None:
    """Raise ValueError, in one line, if JAX was told to run on a platform (JAX_PLATFORMS) that is not here.

    >>> from lcm_jax.runtime.hardware import check_platform
    >>> check_platform()
    """
    asked = jax.config.values["jax_platforms"]
    if not asked:
        return  # JAX takes what there is
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:  # the second, without a text, where a plug-in is not installed
        why = " ".join(str(error).partition(" (set JAX_PLATFORMS")[0].split()) or "no plug-in for it is installed"
        raise ValueError(
            f"JAX_PLATFORMS is {asked}, and JAX finds no such device ({why:.200}): unset it, or install what it needs"
        ) from None
