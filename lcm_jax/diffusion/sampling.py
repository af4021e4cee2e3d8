"""Sampling: the loop that walks a solver along a time grid. It knows no network and no schedule.

A grid is the list of times t_0 > t_1 > ... > t_N of N steps. Its last entry is where the sample is delivered: the clean
time, or the first trained timestep if the scheduler config says so (set_alpha_to_one, final_sigmas_type).
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lcm_jax.diffusion.schedules import OnGrid
from lcm_jax.diffusion.time_grids import Grid
from lcm_jax.typing import Denoiser, Image, Key, Schedule, Solver


def sample(
    denoise: Denoiser,
    schedule: Schedule,
    solver: Solver,
    grid: Grid,
    x: Image,
    key: Key,
    *,
    noise: Float[Array, "n ..."] | None = None,
) -> Image:
    """Walk x from grid.times[0] to grid.times[grid.steps]. Under jit, grids of any length share one compilation.

    Step i draws its noise from fold_in(key, i), or takes noise[i] where unit noise is given (for parity with others),
    of x's shape or as the solver wants it.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> from lcm_jax.diffusion.sampling import sample
    >>> from lcm_jax.diffusion.schedules import RectifiedFlow
    >>> from lcm_jax.diffusion.solvers import Heun
    >>> from lcm_jax.diffusion.time_grids import pad
    >>> from lcm_jax.typing import Prediction
    >>> flow = RectifiedFlow()
    >>> to_seven = lambda x, t, s=None: Prediction(7.0 + 0.0 * x, (x - (1.0 - t) * 7.0) / t)  # every image is 7
    >>> noise = jax.random.normal(jax.random.key(0), (1, 2, 2, 1))
    >>> x = sample(to_seven, flow, Heun(), pad(flow.grid(3)), noise, jax.random.key(1))
    >>> bool(jnp.allclose(x, 7.0))
    True
    """

    def body(i: Array, state: tuple[Image, Any]) -> tuple[Image, Any]:
        x, carry = state
        source = jax.random.fold_in(key, i) if noise is None else noise[i]
        return solver.step(denoise, schedule, x, grid.times[i], grid.times[i + 1], carry, source)

    x = jnp.asarray(x, jnp.float32)
    if grid.orders is not None:
        schedule = OnGrid(schedule, grid)  # tells a multistep solver the order of each step
    return jax.lax.fori_loop(0, grid.steps, body, (x, solver.init(x)))[0]


def trajectory(
    denoise: Denoiser,
    schedule: Schedule,
    solver: Solver,
    grid: Float[Array | np.ndarray, " n_plus_1"],
    x: Image,
    key: Key,
    *,
    noise: Float[Array, "n ..."] | None = None,
) -> Float[Array, "n_plus_1 b h w c"]:
    """Return all states of `sample`, the first being x: a scan over the unpadded grid, so each length compiles anew.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> from lcm_jax.diffusion.sampling import trajectory
    >>> from lcm_jax.diffusion.schedules import RectifiedFlow
    >>> from lcm_jax.diffusion.solvers import Euler
    >>> from lcm_jax.typing import Prediction
    >>> denoise = lambda x, t, s=None: Prediction(0.0 * x, 4.0 + 0.0 * x)
    >>> x = jnp.full((1, 1, 1, 1), 4.0)
    >>> trajectory(denoise, RectifiedFlow(), Euler(), jnp.array([1.0, 0.5, 0.0]), x, jax.random.key(0)).ravel().tolist()
    [4.0, 2.0, 0.0]
    """
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
