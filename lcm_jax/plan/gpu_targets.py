"""Descriptions of GPUs with which XLA compiles for one that is not present."""

from __future__ import annotations

from typing import NamedTuple

from lcm_jax.runtime.hardware import CHIPS
from lcm_jax.runtime.optional_deps import version_of

KIB, MIB = 2**10, 2**20


class _Multiprocessors(NamedTuple):
    """The multiprocessors of a GPU, from NVIDIA's papers on the architectures.

    major: the first number of the compute capability. cores: the number of multiprocessors. lanes: float32 units in
    each. shared: bytes of shared memory in each. cache: bytes of the L2 cache. clock: GHz.
    """

    major: int
    cores: int
    lanes: int
    shared: int
    cache: int
    clock: float


_MULTIPROCESSORS = {
    "a100": _Multiprocessors(8, 108, 64, 164 * KIB, 40 * MIB, 1.41),
    "h100": _Multiprocessors(9, 132, 128, 228 * KIB, 50 * MIB, 1.98),
    "h200": _Multiprocessors(9, 132, 128, 228 * KIB, 50 * MIB, 1.98),
}


def gpu_target_config(kind: str) -> str:
    """Return the description of a GPU that XLA needs to compile without one: its GpuTargetConfigProto, as text.

    kind: "a100", "h100" or "h200".
    """
    gpu, chip = _MULTIPROCESSORS[kind], CHIPS[kind]
    accelerated = "feature_extension: ACCELERATED_FEATURES" if gpu.major >= 9 else ""
    limits = {f"block_dim_limit_{axis}": 2**31 - 1 if axis == "x" else 2**16 - 1 for axis in "xyz"}
    limits |= {f"thread_dim_limit_{axis}": 64 if axis == "z" else 1024 for axis in "xyz"}
    info = {
        "threads_per_block_limit": 1024,
        "threads_per_warp": 32,
        "threads_per_core_limit": 2048,
        "registers_per_core_limit": 2**16,
        "registers_per_block_limit": 2**16,
        "shared_memory_per_block": 48 * KIB,
        "shared_memory_per_block_optin": gpu.shared - KIB,  # the system reserves one KiB
        "shared_memory_per_core": gpu.shared,
        "core_count": gpu.cores,
        "fpus_per_core": gpu.lanes,
        "l2_cache_size": gpu.cache,
        "clock_rate_ghz": gpu.clock,
        "memory_bandwidth": int(chip.bandwidth),
        "device_memory_size": chip.memory,
    }
    fields = "\n".join(f"{key}: {value}" for key, value in (info | limits).items())
    major, minor, *_ = _cudnn().split(".")
    return f"""
        gpu_device_info {{ {fields}
            cuda_compute_capability {{ major: {gpu.major} {accelerated} }} }}
        platform_name: "CUDA"
        dnn_version_info {{ major: {major} minor: {minor} }}
        device_description_str: "NVIDIA {kind.upper()}"
    """


def _cudnn() -> str:
    """Return the version of cuDNN installed with JAX's CUDA plugin; without one, the oldest that JAX supports."""
    return version_of("nvidia-cudnn-cu13") or version_of("nvidia-cudnn-cu12") or "9.8"
