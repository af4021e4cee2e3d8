"""The training step: one pure function, compiled once, for every task of the library."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lcm_jax.parallel.pmap import AXIS, PmappedStep, device_key
from lcm_jax.parallel.sharding import Placement, constrain_batch_sharding, replicated
from lcm_jax.runtime.compiler_options import compiler_options
from lcm_jax.typing import Array, Key, Params

Metrics = dict[str, Array]
# (params, average, frozen, batch, key, progress) -> (loss, metrics). `frozen` holds the trees that never change
# (teacher, VAE): arguments, not closed-over constants, so that compilation does not copy them into the program.
Loss = Callable[[Params, Params, Params, Any, Key, "Progress"], tuple[Array, Metrics]]

Parallel = Literal["jit", "pmap"]


class TrainState(NamedTuple):
    """The trees that change in training. A step's random key is `fold_in(key(seed), step)`, so none is stored."""

    step: Array  # () int32
    params: Params
    ema: Params  # the product: what previews show and the export holds
    opt_state: optax.OptState
    target: Params = None  # the average that the loss is given, where it is not the product

    @classmethod
    def create(cls, params: Params, optimizer: optax.GradientTransformation, *, own_target: bool = False) -> TrainState:
        """Return the state before the first step; the moving averages start as copies of the parameters.

        own_target: whether the average that the loss is given is another than the product.
        """
        target = jax.tree.map(jnp.copy, params) if own_target else None
        return cls(jnp.int32(0), params, jax.tree.map(jnp.copy, params), optimizer.init(params), target)


class Progress(NamedTuple):
    """The number of steps that are done, from 0, and the number that the run has in all."""

    step: Array  # () int32
    steps: Array | np.integer[Any]  # () int32


class RunData(NamedTuple):
    """The numbers of a run that its compiled step takes as data, so that runs which differ in them share a program."""

    steps: Array | np.integer[Any]  # () int32, the length of the run: learning rate and loss may depend on it
    seed: Array | np.integer[Any]  # () uint32


@runtime_checkable
class Step(Protocol):
    """A compiled training step; `trace` is that of a jitted function."""

    def __call__(self, state: TrainState, frozen: Params, batch: Any) -> tuple[TrainState, Metrics]: ...
    def trace(self, *arguments: Any) -> jax.stages.Traced: ...


def ema_decay(update: Array | int, decay: float, *, warmup: bool = False) -> Array:
    """Return the decay of the moving average's n-th update: `decay`, or with a warm-up min(decay, (1 + n) / (10 + n)).

    The warm-up forgets the start, which in a short run would make up most of an average of a long memory.

    update: n, from 0.

    >>> from lcm_jax.train.train_step import ema_decay
    >>> [round(float(ema_decay(n, 0.999, warmup=True)), 3) for n in (0, 10, 100, 10**6)]
    [0.1, 0.55, 0.918, 0.999]
    >>> round(float(ema_decay(0, 0.999)), 3)
    0.999
    """
    return jnp.minimum(decay, (1.0 + update) / (10.0 + update)) if warmup else jnp.float32(decay)


def _moved(average: Params, params: Params, rate: Array | float) -> Params:
    return jax.tree.map(lambda e, p: (e + rate * (p - e)).astype(e.dtype), average, params)


def make_train_step(
    loss: Loss,
    optimizer: optax.GradientTransformation,
    *,
    decay: float,
    seed: int,
    accumulate: int = 1,
    ema_every: int = 1,
    ema_warmup: bool = False,
    target_decay: Callable[[Progress], Array] | None = None,
    placement: Placement | None = None,
    parallel: Parallel = "jit",
    steps: int | None = None,
) -> Step:
    """Return the compiled step `(state, frozen, batch) -> (state, metrics)`; the state's buffers are donated.

    decay: of the moving average of the parameters; ema_warmup: see `ema_decay`.
    seed: the step's key is fold_in(key(seed), state.step).
    accumulate: m cuts the batch into m micro-batches whose gradients are averaged by a scan: the same update as with
        the full batch (for losses that are means over examples), with 1/m of the activation memory.
    ema_every: the moving average is updated after every `ema_every`-th step. SD3 (2403.03206) uses a decay of 0.99
        every 100 steps.
    target_decay: the decay of a second average, `state.target`, which the loss is given in place of `state.ema`.
    placement: shardings of the arguments; the new state has the old one's. None: those of the arrays given.
    parallel: "pmap" has the same result on a mesh with devices along one axis, for losses that are means over examples.
    steps: the length of the run, for the loss, and an optimizer whose `update` takes it. It and the seed are then data
        of the program. None: the run has no end, the optimizer is not told, and the seed is a constant.
    """

    def gradients(
        state: TrainState, frozen: Params, batch: Any, key: Key, progress: Progress
    ) -> tuple[Params, Metrics]:
        grad = jax.grad(loss, has_aux=True)
        average = state.ema if target_decay is None else state.target
        if accumulate == 1:
            return grad(state.params, average, frozen, batch, key, progress)

        def micro(total: Any, part: Any) -> tuple[Any, None]:
            summand = grad(state.params, average, frozen, part[0], part[1], progress)
            return jax.tree.map(lambda a, b: a + b / accumulate, total, summand), None

        parts = jax.tree.map(lambda a: a.reshape(accumulate, -1, *a.shape[1:]), batch)
        if placement is not None:  # else a micro-batch would be on some devices, and the rest idle
            parts = jax.lax.with_sharding_constraint(parts, placement.micro)
        keys = jax.random.split(key, accumulate)
        first = (jax.tree.map(lambda a: a[0], parts), keys[0])
        shapes = jax.eval_shape(grad, state.params, average, frozen, *first, progress)
        zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes)
        return jax.lax.scan(micro, zeros, (parts, keys))[0]

    def train_step(
        state: TrainState, frozen: Params, batch: Any, run: RunData | None = None
    ) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(jax.random.key(seed if run is None else run.seed), state.step)
        progress = Progress(state.step, np.int32(2**31 - 1) if run is None else run.steps)
        if parallel == "pmap" and placement is not None:
            key = device_key(key, placement.mesh.size)
            grads, metrics = jax.lax.pmean(gradients(state, frozen, batch, key, progress), AXIS)
        else:
            with contextlib.nullcontext() if placement is None else constrain_batch_sharding(placement.mesh):
                grads, metrics = gradients(state, frozen, batch, key, progress)
        extra = {} if run is None else {"steps": run.steps}
        updates, opt_state = optax.with_extra_args_support(optimizer).update(
            grads, state.opt_state, state.params, **extra
        )
        params = optax.apply_updates(state.params, updates)
        due = (state.step + 1) % ema_every == 0
        rate = jnp.where(due, 1.0 - ema_decay(state.step // ema_every, decay, warmup=ema_warmup), 0.0)
        ema = _moved(state.ema, params, rate)
        slow = None if target_decay is None else _moved(state.target, params, 1.0 - target_decay(progress))
        state = TrainState(state.step + 1, params, ema, opt_state, slow)
        return state, metrics | {"grad_norm": optax.tree.norm(grads)}

    data = () if steps is None else (RunData(np.int32(steps), np.uint32(seed)),)
    step: Any
    if placement is None:
        step = jax.jit(train_step, donate_argnums=0, compiler_options=compiler_options())
    elif parallel == "pmap":
        step = PmappedStep(train_step, placement.mesh)
    else:
        inputs = (placement.state, placement.frozen, placement.batch, *(replicated(placement.mesh) for _ in data))
        results = (placement.state, replicated(placement.mesh))
        options = compiler_options(platform=placement.mesh.devices.flat[0].platform)
        step = jax.jit(
            train_step, donate_argnums=0, in_shardings=inputs, out_shardings=results, compiler_options=options
        )
    return _WithData(step, data) if data else step


@dataclass(frozen=True)
class _WithData:
    """A compiled step, and its last arguments."""

    step: Any
    data: tuple[RunData, ...]

    def __call__(self, state: TrainState, frozen: Params, batch: Any) -> tuple[TrainState, Metrics]:
        return self.step(state, frozen, batch, *self.data)

    def trace(self, *arguments: Any) -> jax.stages.Traced:
        """Return the trace of the step, like that of a jitted function."""
        return self.step.trace(*arguments, *self.data)
