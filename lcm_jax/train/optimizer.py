"""The optimizer of a run, from a handful of numbers: AdamW with warm-up, decay and clipping, all of it optax."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import jax
import optax

from lcm_jax.typing import Params


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW (Loshchilov and Hutter, 2019)."""

    learning_rate: float = 1e-4
    warmup: int = 100  # steps from zero to the full rate
    decay: Literal["constant", "cosine"] = "constant"  # after the warm-up; cosine ends at zero at the last step
    weight_decay: float = 0.0  # on kernels and embeddings only, never on norms and biases
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    clip: float = 1.0  # largest global gradient norm; 0 turns clipping off

    def __post_init__(self) -> None:
        for name in ("learning_rate", "eps"):
            if getattr(self, name) <= 0:
                raise ValueError(f"optimizer.{name} is {getattr(self, name)}; it must be positive")


def learning_rate(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Linear warm-up, then constant or cosine to zero at `steps`."""
    warmup = optax.linear_schedule(0.0, config.learning_rate, max(config.warmup, 1))
    rest: optax.Schedule = optax.constant_schedule(config.learning_rate)
    if config.decay == "cosine":
        rest = optax.cosine_decay_schedule(config.learning_rate, max(steps - config.warmup, 1))
    return optax.join_schedules([warmup, rest], [config.warmup])


def _decays(params: Params) -> Params:
    """By name: in layers stacked by a scan norms and biases are matrices too, and a position grid is no weight."""
    names = ("kernel", "embedding", "down", "up")
    return jax.tree.map_with_path(lambda path, _: bool(path) and getattr(path[-1], "key", None) in names, params)


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """Clip, AdamW."""
    adam = optax.adamw(
        learning_rate(config, steps),
        b1=config.b1,
        b2=config.b2,
        eps=config.eps,
        weight_decay=config.weight_decay,
        mask=_decays,
    )
    return optax.chain(optax.clip_by_global_norm(config.clip), adam) if config.clip else adam
