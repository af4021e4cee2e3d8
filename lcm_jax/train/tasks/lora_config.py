"""The config of low-rank adapters, for tasks that train them instead of all weights."""

from __future__ import annotations

from dataclasses import dataclass

from lcm_jax import lora


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Low-rank adapters that are trained instead of all weights; see `lcm_jax.lora`."""

    rank: int = 64
    alpha: float | None = None  # None: the rank
    targets: str = lora.DEFAULT_TARGETS  # regex on parameter paths
    dropout: float = 0.0  # share of the adapters' inputs that is zeroed in training

    def __post_init__(self) -> None:
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"lora.dropout is {self.dropout}: give the share of zeroed inputs, at least 0 and below 1")
