"""The training step: one pure function, compiled once, for every task of the library."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import optax

from lcm_jax.parallel.pmap import AXIS, OverDevices, own_rows
from lcm_jax.parallel.sharding import Placement, constrain_batch_sharding, replicated
from lcm_jax.runtime.compiler_options import compiler_options
from lcm_jax.typing import Array, Key, Params

Metrics = dict[str, Array]
# (params, ema, frozen, batch, key, step) -> (loss, metrics). `frozen` are the trees that never change (teacher, VAE):
# arguments rather than closed-over constants, so that compilation does not copy them into the program.
Loss = Callable[[Params, Params, Params, Any, Key, Array], tuple[Array, Metrics]]

Parallel = Literal["jit", "pmap"]


class TrainState(NamedTuple):
    """What changes while training. The random stream is `fold_in(key(seed), step)`: the step number restores it."""

    step: Array  # () int32
    params: Params
    ema: Params
    opt_state: optax.OptState

    @classmethod
    def create(cls, params: Params, optimizer: optax.GradientTransformation) -> TrainState:
        """The state before the first step; the moving average starts as a copy of the parameters."""
        return cls(jnp.int32(0), params, jax.tree.map(jnp.copy, params), optimizer.init(params))


class Step(Protocol):
    """A compiled step."""

    def __call__(self, state: TrainState, frozen: Params, batch: Any) -> tuple[TrainState, Metrics]: ...
    def trace(self, *arguments: Any) -> jax.stages.Traced: ...


def ema_decay(update: Array, decay: float) -> Array:
    """Decay of the moving average's n-th update: min(decay, (1 + n) / (10 + n)), so that the start is forgotten."""
    return jnp.minimum(decay, (1.0 + update) / (10.0 + update))


def make_train_step(
    loss: Loss,
    optimizer: optax.GradientTransformation,
    *,
    decay: float,
    seed: int,
    accumulate: int = 1,
    ema_every: int = 1,
    placement: Placement | None = None,
    parallel: Parallel = "jit",
) -> Step:
    """Compiled `(state, frozen, batch) -> (state, metrics)`; the state's buffers are donated.

    placement: where all of it lies, and the new state as the old; None: where the arguments do.
    parallel: "pmap" has the same result on a mesh of one axis, for losses that are means over examples.

    With `accumulate` = m the batch is cut into m micro-batches whose gradients are averaged by a scan: the same update
    as the whole batch at once (for losses that are means over examples), at 1/m of the activation memory.

    The moving average is updated after every `ema_every`-th step: SD3 (2403.03206) has a decay of 0.99 every 100.
    """

    def gradients(state: TrainState, frozen: Params, batch: Any, key: Key) -> tuple[Params, Metrics]:
        grad = jax.grad(loss, has_aux=True)
        if accumulate == 1:
            return grad(state.params, state.ema, frozen, batch, key, state.step)

        def micro(total: Any, part: Any) -> tuple[Any, None]:
            one = grad(state.params, state.ema, frozen, part[0], part[1], state.step)
            return jax.tree.map(lambda a, b: a + b / accumulate, total, one), None

        parts = jax.tree.map(lambda a: a.reshape(accumulate, -1, *a.shape[1:]), batch)
        if placement is not None:  # else a micro-batch would lie on some of the devices, and the rest be idle
            parts = jax.lax.with_sharding_constraint(parts, placement.micro)
        keys = jax.random.split(key, accumulate)
        first = (jax.tree.map(lambda a: a[0], parts), keys[0])
        shapes = jax.eval_shape(grad, state.params, state.ema, frozen, *first, state.step)
        zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes)
        return jax.lax.scan(micro, zeros, (parts, keys))[0]

    def train_step(state: TrainState, frozen: Params, batch: Any) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        if parallel == "pmap" and placement is not None:
            key = own_rows(key, placement.mesh.size)
            grads, metrics = jax.lax.pmean(gradients(state, frozen, batch, key), AXIS)
        else:
            with contextlib.nullcontext() if placement is None else constrain_batch_sharding(placement.mesh):
                grads, metrics = gradients(state, frozen, batch, key)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        due = (state.step + 1) % ema_every == 0
        rate = jnp.where(due, 1.0 - ema_decay(state.step // ema_every, decay), 0.0)
        ema = jax.tree.map(lambda e, p: (e + rate * (p - e)).astype(e.dtype), state.ema, params)
        return TrainState(state.step + 1, params, ema, opt_state), metrics | {"grad_norm": optax.tree.norm(grads)}

    if placement is None:
        return jax.jit(train_step, donate_argnums=0, compiler_options=compiler_options())
    if parallel == "pmap":
        return OverDevices(train_step, placement.mesh)
    lie = (placement.state, placement.frozen, placement.batch)
    results = (placement.state, replicated(placement.mesh))
    options = compiler_options(platform=placement.mesh.devices.flat[0].platform)
    return jax.jit(train_step, donate_argnums=0, in_shardings=lie, out_shardings=results, compiler_options=options)
