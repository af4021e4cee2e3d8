"""Sampling: time grids, made on the host with numpy, and the loop that walks a solver along one.

A grid is the list of times t_0 > t_1 > ... > t_N of N steps. Its last entry is where the sample is delivered: the clean
time, or the first trained timestep if the scheduler config says so (set_alpha_to_one, final_sigmas_type).
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lcm_jax.diffusion.time_grids import (
    Grid,
)
from lcm_jax.typing import Denoiser, Image, Key, Schedule, Solver


def sample(
    denoise: Denoiser,
    schedule: Schedule,
    solver: Solver,
    grid: Grid,
    x: Image,
    key: Key,
    *,
    noise: Float[Array, "n b h w c"] | None = None,
) -> Image:
    """Walk x from grid.times[0] to grid.times[grid.steps]. Under jit, grids of any length share one compilation.

    Step i draws its noise from fold_in(key, i), or takes noise[i] where unit noise is given (for parity with others).
    """

    def body(i: Array, state: tuple[Image, Any]) -> tuple[Image, Any]:
        x, carry = state
        source = jax.random.fold_in(key, i) if noise is None else noise[i]
        return solver.step(denoise, schedule, x, grid.times[i], grid.times[i + 1], carry, source)

    x = jnp.asarray(x, jnp.float32)
    return jax.lax.fori_loop(0, grid.steps, body, (x, solver.init(x)))[0]


def trajectory(
    denoise: Denoiser,
    schedule: Schedule,
    solver: Solver,
    grid: Float[np.ndarray, " n_plus_1"],
    x: Image,
    key: Key,
    *,
    noise: Float[Array, "n b h w c"] | None = None,
) -> Float[Array, "n_plus_1 b h w c"]:
    """All states of `sample`, the first being x; a scan over the unpadded grid, so each length compiles anew."""
    times = jnp.asarray(grid, jnp.float32)
    steps = jnp.arange(len(times) - 1)
    sources = jax.vmap(lambda i: jax.random.fold_in(key, i))(steps) if noise is None else noise

    def body(state: tuple[Image, Any], inputs: tuple[Array, Array, Array]) -> tuple[tuple[Image, Any], Image]:
        x, carry = state
        t, s, source = inputs
        x, carry = solver.step(denoise, schedule, x, t, s, carry, source)
        return (x, carry), x

    x = jnp.asarray(x, jnp.float32)
    states = jax.lax.scan(body, (x, solver.init(x)), (times[:-1], times[1:], sources))[1]
    return jnp.concatenate([x[None], states])
