"""Consistency along the trajectory, not only with its end: TCD, PCM and CTM.

Both points of a pair are mapped to a time `end`, at which they must agree, by `flow_map`: the straight line of a
prediction, which is DDIM's step. With the clean time as the end all three are LCM, but for its c_skip (at t > 0
less than 1e-5).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from lcm_jax.diffusion.parameterization import add_noise, flow_map
from lcm_jax.diffusion.schedules import floor_to_timestep
from lcm_jax.objectives.consistency import LatentConsistencyDistillation, Target
from lcm_jax.objectives.few_step import RandomKeys
from lcm_jax.objectives.terms import Distance, distance, frozen
from lcm_jax.typing import Array, Cond, Image, Key, Nets, Params


@dataclass(frozen=True, kw_only=True)
class TrajectoryConsistencyDistillation(LatentConsistencyDistillation):
    """TCD (Zheng et al. 2024, 2402.19159 eq. 17): the end is uniform between the clean time and s.

    The network is the teacher's: its prediction at t serves every end. The solver of the same name draws with it.

    >>> import jax
    >>> from lcm_jax.diffusion.schedules import DDPM
    >>> from lcm_jax.objectives import method, toy_batch, toy_nets
    >>> objective = method("tcd", schedule=DDPM())
    >>> loss, metrics = objective(toy_nets(), toy_batch(), jax.random.key(0))
    >>> bool(loss >= 0.0), objective.sampler
    (True, 'tcd')
    """

    sampler: ClassVar[str] = "tcd"

    loss: Distance = "huber"

    def end(self, key: Key, t: Float[Array, " n"], s: Float[Array, " n"]) -> Float[Array, " n"]:
        """Draw it uniformly between the clean time and s."""
        start = self.schedule.t_min
        return floor_to_timestep(self.schedule, start + jax.random.uniform(key, t.shape) * (s - start))

    def solution(
        self, nets: Nets, params: Params, student_cond: Cond, z: Image, t: Array, end: Float[Array, " n"]
    ) -> Image:
        """Return alpha_end x0 + sigma_end eps, the flow map to the end."""
        return flow_map(self.student(nets, params, student_cond), self.schedule, z, t, end)


@dataclass(frozen=True, kw_only=True)
class PhasedConsistency(TrajectoryConsistencyDistillation):
    """PCM (Wang et al. 2024, 2405.18407 eq. 5): the grid is cut into `phases` parts, and each maps to its own edge.

    The edges are times of the grid, of 4 phases and 50 points on a table of 1000 steps -1, 239, 499 and 739.
    Deterministic sampling from edge to edge has no error but the student's. adversarial: 0.1 in sec. 4.3, whose
    discriminator compares the student's points with their targets, both noised on from the edge to a time of the same
    phase. ValueError for fewer than one phase, or more than grid points.

    >>> import jax
    >>> from lcm_jax.diffusion.schedules import DDPM
    >>> from lcm_jax.objectives import method, toy_batch, toy_nets
    >>> objective = method("pcm", schedule=DDPM())
    >>> loss, metrics = objective(toy_nets(), toy_batch(), jax.random.key(0))
    >>> bool(loss >= 0.0), objective.sampler
    (True, 'flow_map')
    """

    sampler: ClassVar[str] = "flow_map"  # noise, as TCD's sampler adds it, needs steps beyond the edge

    phases: int = 4
    target: Target = "online"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.phases <= self.grid_points:
            raise ValueError(f"phases={self.phases} must be between 1 and grid_points={self.grid_points}")

    @property
    def edges(self) -> Float[Array, " phases_plus_1"]:
        """The times between which the phases lie, from the clean time to noise."""
        number = np.arange(self.phases + 1) * self.grid_points // self.phases
        return floor_to_timestep(self.schedule, self.at(jnp.asarray(number / self.grid_points, jnp.float32)))

    def edge(self, t: Float[Array, " n"]) -> Float[Array, " n"]:
        """Return the largest edge below t."""
        shortest = 1e-5 * (self.schedule.t_max - self.schedule.t_min)  # an edge itself belongs to the phase below it
        return self.edges[jnp.clip(jnp.searchsorted(self.edges, t - shortest) - 1, 0, self.phases - 1)]

    def critic_times(self, key: Key, since: Float[Array, " b"]) -> Float[Array, " b"]:
        """Draw them uniformly from the edge `since` to the next one."""
        following = self.edges[jnp.searchsorted(self.edges, since, side="right")]
        return since + jax.random.uniform(key, since.shape) * (following - since)

    def times(self, key: Key, n: int, progress: Array | float = 0.0) -> tuple[Float[Array, " n"], Float[Array, " n"]]:
        """Draw the pairs; none crosses an edge."""
        t, s = super().times(key, n, progress)
        return t, jnp.maximum(s, self.edge(t))

    def end(self, key: Key, t: Float[Array, " n"], s: Float[Array, " n"]) -> Float[Array, " n"]:
        """Return the edge of t's phase."""
        return self.edge(t)


@dataclass(frozen=True, kw_only=True)
class ConsistencyTrajectory(LatentConsistencyDistillation):
    """CTM (Kim et al. 2023, 2310.02279 eq. 12, 14): a network with a span embedding, G(x, t, s) = `flow_map`.

    The teacher goes from t to a u between s and t in `solver_steps` steps; from there to s the student without
    gradient. Both ends are then mapped to the clean time by the student without gradient, where they are compared.
    denoising: weight of the loss of x0 at s = t, which makes G(., t, t) the denoiser: with guidance the mean of
    x0 + w (E[x0 | x, c] - E[x0 | x]). adversarial: against pictures. `target` is the student without gradient or the
    moving average.

    >>> import jax
    >>> from lcm_jax.diffusion.schedules import DDPM
    >>> from lcm_jax.objectives import method, toy_batch, toy_nets
    >>> objective = method("ctm", schedule=DDPM())
    >>> loss, metrics = objective(toy_nets(), toy_batch(), jax.random.key(0))
    >>> bool(loss >= 0.0), objective.sampler
    (True, 'tcd')
    """

    spans: ClassVar[bool] = True
    sampler: ClassVar[str] = "tcd"

    solver_steps: int = 2
    target: Target = "online"
    denoising: float = 1.0

    def times(self, key: Key, n: int, progress: Array | float = 0.0) -> tuple[Float[Array, " n"], Float[Array, " n"]]:
        """Draw t on the grid, and u uniformly below it, at least one grid step away."""
        first, second = jax.random.split(key)
        t, below = super().times(first, n, progress)
        start = self.schedule.t_min
        return t, floor_to_timestep(self.schedule, start + jax.random.uniform(second, t.shape) * (below - start))

    def end(self, key: Key, t: Float[Array, " n"], s: Float[Array, " n"]) -> Float[Array, " n"]:
        """Draw it uniformly below u."""
        start = self.schedule.t_min
        return floor_to_timestep(self.schedule, start + jax.random.uniform(key, t.shape) * (s - start))

    def earlier(self, nets: Nets, x0: Image, eps: Image, z: Image, t: Array, s: Array, cond: Cond, w: Array) -> Image:
        """Take the teacher's steps, of equal length in the schedule's time."""
        for i in range(self.solver_steps):
            a, b = (t + (s - t) * (j / self.solver_steps) for j in (i, i + 1))
            z = super().earlier(nets, x0, eps, z, a, b, cond, w)
        return z

    def solution(
        self, nets: Nets, params: Params, student_cond: Cond, z: Image, t: Array, end: Float[Array, " n"]
    ) -> Image:
        """Return G(G(z, t, end), end, clean)."""
        point = flow_map(self.student(nets, params, student_cond), self.schedule, z, t, end)
        clean = jnp.full_like(end, self.schedule.t_min)
        return flow_map(self.student(nets, frozen(params), student_cond), self.schedule, point, end, clean)

    def real(self, x0: Image, target: Image, end: Float[Array, " n"]) -> tuple[Image, Float[Array, " n"]]:
        """Return the data as the real samples, at the clean time."""
        return x0, jnp.full_like(end, self.schedule.t_min)

    def __call__(self, nets: Nets, batch: dict[str, Any], key: Key) -> tuple[Float[Array, ""], dict[str, Array]]:
        loss, metrics = super().__call__(nets, batch, key)
        x0, eps, cond, student_cond, w = self.draw(nets, batch, key)
        t = self.at(jax.random.uniform(RandomKeys.of(key).denoising, x0.shape[:1], minval=1e-3))
        x = add_noise(self.schedule, x0, eps, t)
        target = x0
        if self.w_max > 0.0:
            target = x0 + frozen(self.teacher(nets, cond, w)(x, t).x0 - self.teacher(nets, cond)(x, t).x0)
        guess = self.student(nets, nets.student, student_cond)(x, t, t).x0
        denoising = jnp.mean(distance(self.loss, guess - target, self.huber_c))
        total = loss + self.denoising * denoising
        return total, {**metrics, "loss": total, "denoising": denoising}
