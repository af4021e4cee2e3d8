"""The optimizer of a run, made from a few numbers: warm-up, decay and clipping around an update rule, all by optax."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from types import MappingProxyType
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from jaxtyping import PyTree

from lcm_jax.typing import Array, Params


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """The optimizer's algorithm and its numbers.

    adamw (Loshchilov and Hutter 2019, 1711.05101) keeps two moments for each parameter. lion (Chen et al. 2023,
    2302.06675) keeps one, and needs a learning rate 3 to 10 times lower. adafactor (Shazeer and Stern 2018, 1804.04235)
    keeps, for a matrix, one row and one column of the second moment; the update is not scaled by the parameter's size.

    Raises ValueError for a value that cannot be used.
    """

    algorithm: Literal["adamw", "adafactor", "lion"] = "adamw"
    moment_dtype: Literal["float32", "bfloat16"] = "float32"  # of the first moment; the second stays float32
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
        for name in ("warmup", "weight_decay", "clip"):
            if getattr(self, name) < 0:
                raise ValueError(f"optimizer.{name} is {getattr(self, name)}; it must not be negative")
        for name in ("b1", "b2"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(f"optimizer.{name} is {getattr(self, name)}; it must be at least 0 and below 1")
        for name, known in (("algorithm", _RULES), ("moment_dtype", ("float32", "bfloat16"))):
            if getattr(self, name) not in known:
                raise ValueError(f"optimizer.{name} is {getattr(self, name)!r}; use one of {', '.join(known)}")
        if self.algorithm == "adafactor" and self.moment_dtype != "float32":
            raise ValueError(
                "optimizer.moment_dtype is for adamw and lion: adafactor has no first moment; leave it out"
            )


def learning_rate(config: OptimizerConfig, steps: int | Array) -> optax.Schedule:
    """Return the schedule step -> learning rate: a linear warm-up, then constant, or a cosine to zero at `steps`."""
    warmup = optax.linear_schedule(0.0, config.learning_rate, max(config.warmup, 1))

    def cosine(step: Array | int) -> Array:
        length = jnp.maximum(steps - config.warmup, 1).astype(jnp.float32)
        # In this order of products a length that is data gives the bits of one that is a constant, which XLA folds.
        angle = jnp.minimum(step, length) * (jnp.pi * (1.0 / length))
        return config.learning_rate * (0.5 * (1.0 + jnp.cos(angle)))

    after = cosine if config.decay == "cosine" else optax.constant_schedule(config.learning_rate)
    return optax.join_schedules([warmup, after], [config.warmup])


def _decays(params: Params) -> PyTree[bool]:
    """Return a tree of bools: which leaves decay, by name, since a scan stacks norms and biases into matrices too."""
    names = ("kernel", "embedding", "down", "up")
    return jax.tree.map_with_path(lambda path, _: bool(path) and getattr(path[-1], "key", None) in names, params)


def _adamw(config: OptimizerConfig) -> optax.GradientTransformation:
    return optax.scale_by_adam(config.b1, config.b2, config.eps, mu_dtype=config.moment_dtype)


def _lion(config: OptimizerConfig) -> optax.GradientTransformation:
    return optax.scale_by_lion(config.b1, config.b2, mu_dtype=config.moment_dtype)


def _adafactor(config: OptimizerConfig) -> optax.GradientTransformation:
    return optax.chain(optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0))


def _scale_by_learning_rate(config: OptimizerConfig, length: int) -> optax.GradientTransformationExtraArgs:
    """Return optax.scale_by_learning_rate of the schedule, whose `update` takes the number of steps."""

    def update(
        updates: Params,
        state: optax.ScaleByScheduleState,
        params: Params | None = None,
        *,
        steps: Array | None = None,
        **_: Any,
    ) -> tuple[Params, optax.ScaleByScheduleState]:
        schedule = learning_rate(config, length if steps is None else steps)
        return optax.scale_by_learning_rate(schedule).update(updates, state, params)

    return optax.GradientTransformationExtraArgs(optax.scale_by_schedule(lambda _: 0.0).init, update)


_RULES = {"adamw": _adamw, "lion": _lion, "adafactor": _adafactor}


MakeOptimizer = Callable[..., optax.GradientTransformation]
"""make(field=value, ...) -> the run's optimizer, with these fields of its `OptimizerConfig` changed."""


def make_optimizer(config: OptimizerConfig, steps: int, **changes: Any) -> optax.GradientTransformation:
    """Return the optimizer of `config`: clip, scale by the rule, decay the weights, times the learning rate.

    steps: the length of the run. Its `update` takes another one as `steps=`, which may be data of a compiled program:
    then the program is the same for every length. changes: fields of `config` to replace.
    """
    config = replace(config, **changes)
    rule = optax.chain(
        _RULES[config.algorithm](config),
        optax.add_decayed_weights(config.weight_decay, _decays),
        _scale_by_learning_rate(config, steps),
    )
    return optax.chain(optax.clip_by_global_norm(config.clip), rule) if config.clip else rule


def partitioned(
    make: MakeOptimizer,
    names: Sequence[str],
    *,
    periods: Mapping[str, int] = MappingProxyType({}),
    changes: Mapping[str, Mapping[str, Any]] = MappingProxyType({}),
    rates: Mapping[str, float] = MappingProxyType({}),
) -> optax.GradientTransformation:
    """Return an optimizer that gives each of several trees its own moments, clipping and learning rate.

    So no tree's gradient, however large, changes the step of another.

    names: the keys of the trees, in the parameters or in a dict in them. periods: tree -> k: it is updated in every
    k-th step, and its learning rate counts its own updates, of which there are a k-th part of the run's steps. changes:
    tree -> fields of its `OptimizerConfig`. rates: tree -> its learning rate, divided by the run's.

    >>> import jax.numpy as jnp
    >>> from functools import partial
    >>> from lcm_jax.train.optimizer import OptimizerConfig, make_optimizer, partitioned
    >>> make = partial(make_optimizer, OptimizerConfig(warmup=0, learning_rate=1.0), 10)
    >>> params = {"student": jnp.zeros(1), "others": {"critic": jnp.zeros(1)}}
    >>> tx = partitioned(make, ("student", "critic"), rates={"critic": 0.5})
    >>> gradients = {"student": jnp.ones(1), "others": {"critic": jnp.ones(1)}}
    >>> updates, _ = tx.update(gradients, tx.init(params), params)
    >>> float(updates["student"][0].round(4)), float(updates["others"]["critic"][0].round(4))
    (-1.0, -0.5)
    """

    def optimizer_of(name: str) -> optax.GradientTransformation:
        tx = make(**changes.get(name, {}))
        tx = optax.chain(tx, optax.scale(rates[name])) if name in rates else tx
        return _every(tx, periods[name]) if periods.get(name, 1) > 1 else tx

    def label(path: Any, _: Any) -> str:
        return next(key.key for key in path if key.key in names)

    return optax.partition({n: optimizer_of(n) for n in names}, partial(jax.tree.map_with_path, label))


def _every(tx: optax.GradientTransformation, period: int) -> optax.GradientTransformation:
    """Return `tx` for a tree that is updated in every `period`-th step, the first one included."""
    inner = optax.with_extra_args_support(tx)

    def update(grads: Params, state: Any, params: Params | None = None, *, steps: Any = None, **extra: Any) -> Any:
        length = {} if steps is None else {"steps": (steps + period - 1) // period}
        return inner.update(grads, state, params, **length, **extra)

    own_clock = optax.GradientTransformationExtraArgs(inner.init, update)
    return optax.conditionally_mask(own_clock, lambda step: step % period == 0)
