"""Consistency along the trajectory, not only with its end: TCD, PCM and CTM.

Both points of a pair are mapped to a time `end`, at which they must agree, by `flow_map`: the straight line of a
prediction, which is DDIM's step. With the clean time as the end all three are LCM, but for its c_skip (at t > 0
less than 1e-5).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from lcm_jax.diffusion.parameterization import add_noise, expand, flow_map
from lcm_jax.diffusion.schedules import floor_to_timestep
from lcm_jax.objectives.consistency import LatentConsistencyDistillation, Target
from lcm_jax.objectives.few_step import RandomKeys
from lcm_jax.objectives.terms import Distance, distance, frozen
from lcm_jax.objectives.time_pairs import KarrasPairs
from lcm_jax.typing import Array, Cond, Image, Key, Nets, Params, Schedule, Solver


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

    def end(
        self, key: Key, t: Float[Array, " n"], s: Float[Array, " n"], progress: Array | float = 0.0
    ) -> Float[Array, " n"]:
        """Draw it uniformly between the clean time and s."""
        start = self.schedule.t_min
        return floor_to_timestep(self.schedule, start + jax.random.uniform(key, t.shape) * (s - start))

    def solution(
        self, nets: Nets, params: Params, student_cond: Cond, z: Image, t: Array, end: Float[Array, " n"]
    ) -> Image:
        """Return alpha_end x0 + sigma_end eps, the flow map to the end."""
        return flow_map(self.student(nets, params, student_cond), self.schedule, z, t, end)


def edges(schedule: Schedule, grid_points: int, parts: int) -> Float[Array, " parts_plus_1"]:
    """Return the times between which `parts` of a grid lie, from the clean time to noise; all are times of the grid.

    >>> from lcm_jax.diffusion.schedules import DDPM
    >>> from lcm_jax.objectives.trajectory import edges
    >>> edges(DDPM(), 50, 4).tolist()
    [-1.0, 239.0, 499.0, 739.0, 999.0]
    """
    number = np.arange(parts + 1) * grid_points // parts
    share = jnp.asarray(number / grid_points, jnp.float32)
    return floor_to_timestep(schedule, schedule.t_min + share * (schedule.t_max - schedule.t_min))


def edge_below(edges: Float[Array, " k"], schedule: Schedule, t: Float[Array, " n"]) -> Float[Array, " n"]:
    """Return the largest edge below each time; an edge itself belongs to the part below it.

    >>> import jax.numpy as jnp
    >>> from lcm_jax.diffusion.schedules import RectifiedFlow
    >>> from lcm_jax.objectives.trajectory import edge_below
    >>> edge_below(jnp.array([0.0, 0.5, 1.0]), RectifiedFlow(), jnp.array([0.2, 0.5, 0.7])).tolist()
    [0.0, 0.0, 0.5]
    """
    shortest = 1e-5 * (schedule.t_max - schedule.t_min)
    return edges[jnp.clip(jnp.searchsorted(edges, t - shortest) - 1, 0, len(edges) - 2)]


@dataclass(frozen=True, kw_only=True)
class PhasedConsistency(TrajectoryConsistencyDistillation):
    """PCM (Wang et al. 2024, 2405.18407 eq. 5): the grid is cut into `phases` parts, and each maps to its own edge.

    The edges are times of the grid, of 4 phases and 50 points on a table of 1000 steps -1, 239, 499 and 739.
    Deterministic sampling from edge to edge has no error but the student's. adversarial: 0.1 in sec. 4.3, whose
    discriminator compares the student's points with their targets, both noised on from the edge to a time of the same
    phase, and has no momentum (b1 = 0). ValueError for fewer than one phase, or more than grid points.

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
    def optimizers(self) -> Mapping[str, Mapping[str, Any]]:
        return {"heads": {"b1": 0.0}}

    @property
    def edges(self) -> Float[Array, " phases_plus_1"]:
        """The times between which the phases lie, from the clean time to noise."""
        return edges(self.schedule, self.grid_points, self.phases)

    def edge(self, t: Float[Array, " n"]) -> Float[Array, " n"]:
        """Return the largest edge below t."""
        return edge_below(self.edges, self.schedule, t)

    def critic_times(self, key: Key, since: Float[Array, " b"]) -> Float[Array, " b"]:
        """Draw them uniformly from the edge `since` to the next one."""
        following = self.edges[jnp.searchsorted(self.edges, since, side="right")]
        return since + jax.random.uniform(key, since.shape) * (following - since)

    def times(self, key: Key, n: int, progress: Array | float = 0.0) -> tuple[Float[Array, " n"], Float[Array, " n"]]:
        """Draw the pairs; none crosses an edge."""
        t, s = super().times(key, n, progress)
        return t, jnp.maximum(s, self.edge(t))

    def end(
        self, key: Key, t: Float[Array, " n"], s: Float[Array, " n"], progress: Array | float = 0.0
    ) -> Float[Array, " n"]:
        """Return the edge of t's phase."""
        return self.edge(t)


@dataclass(frozen=True, kw_only=True)
class SegmentedConsistency(TrajectoryConsistencyDistillation):
    """Hyper-SD (Ren et al. 2024, 2404.13686 sec. 3.1): TCD within segments of the grid, which grow as training goes on.

    The run is cut into equal stages, of 8, 4, 2 and 1 segments (`segments`): both points of a pair are mapped to an end
    between their segment's edge and s, so that what the first stages learn of short ways is carried on to long ones.
    ValueError for no stage, or for more segments than grid points.

    >>> import jax
    >>> from lcm_jax.diffusion.schedules import DDPM
    >>> from lcm_jax.objectives import method, toy_batch, toy_nets
    >>> objective = method("hyper-sd", schedule=DDPM())
    >>> loss, metrics = objective(toy_nets(), toy_batch(), jax.random.key(0))
    >>> bool(loss >= 0.0), [int(objective.stage(p)) for p in (0.0, 0.3, 0.9)]
    (True, [0, 1, 3])
    """

    segments: tuple[int, ...] = (8, 4, 2, 1)
    loss: Distance = "l2"
    target: Target = "online"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.segments or not all(1 <= n <= self.grid_points for n in self.segments):
            raise ValueError(f"segments={self.segments} must be from 1 to grid_points={self.grid_points}")

    def stage(self, progress: Array | float) -> Int[Array, ""]:
        """Return the number of the stage, from 0."""
        stages = len(self.segments)
        return jnp.minimum(jnp.floor(jnp.float32(progress) * stages), stages - 1).astype(jnp.int32)

    def edge(self, t: Float[Array, " n"], progress: Array | float) -> Float[Array, " n"]:
        """Return the lower edge of the segment of t."""
        lower = [edge_below(edges(self.schedule, self.grid_points, n), self.schedule, t) for n in self.segments]
        return jnp.stack(lower)[self.stage(progress)]

    def times(self, key: Key, n: int, progress: Array | float = 0.0) -> tuple[Float[Array, " n"], Float[Array, " n"]]:
        """Draw the pairs; none crosses an edge."""
        t, s = super().times(key, n, progress)
        return t, jnp.maximum(s, self.edge(t, progress))

    def end(
        self, key: Key, t: Float[Array, " n"], s: Float[Array, " n"], progress: Array | float = 0.0
    ) -> Float[Array, " n"]:
        """Draw it uniformly between the edge and s."""
        low = self.edge(t, progress)
        return jnp.maximum(floor_to_timestep(self.schedule, low + jax.random.uniform(key, t.shape) * (s - low)), low)


@dataclass(frozen=True, kw_only=True)
class ConsistencyTrajectory(LatentConsistencyDistillation):
    """CTM (Kim et al. 2023, 2310.02279 eq. 12, 14, 16): a network with a span embedding, G(x, t, s) = `flow_map`.

    t is a point of Karras' grid. The teacher goes from t to u in 1 to `solver_steps` steps of the grid, as many for all
    of a batch; from u to an `end` below it the student without gradient (`target` "online"). Both ends are then mapped
    to the clean time by the moving average, where they are compared. denoising: weight of the loss of x0 at s = t,
    which makes G(., t, t) the denoiser: with guidance the mean of x0 + w (E[x0 | x, c] - E[x0 | x]). adversarial:
    against pictures. adaptive: both weights are multiplied by the gradient norm of the consistency loss at the last
    layer, divided by that of the loss they weigh, within 0.01 to 10. ValueError for fewer than one solver step.

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

    pairs: KarrasPairs = KarrasPairs(points=18)
    solver: Solver | str = "heun"
    solver_steps: int = 17
    target: Target = "online"
    target_ema: float | None = 0.999
    denoising: float = 1.0
    adaptive: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.solver_steps < 1:
            raise ValueError(f"solver_steps={self.solver_steps} must be positive")

    @property
    def needs_target(self) -> bool:
        return True

    def times(self, key: Key, n: int, progress: Array | float = 0.0) -> tuple[Float[Array, " n"], Float[Array, " n"]]:
        """Draw t on the grid, and u that many points below it, at the clean time at the lowest."""
        first, second = jax.random.split(key)
        index = jax.random.randint(first, (n,), 1, self.pairs.points)
        steps = jax.random.randint(second, (), 1, self.solver_steps + 1)
        return self.time(index), self.time(jnp.maximum(index - steps, 0))

    def time(self, index: Array) -> Float[Array, " n"]:
        """Return the time of a point of the grid; number 0 is the clean time."""
        return self.pairs.time(self.schedule, index, self.pairs.points)

    def end(
        self, key: Key, t: Float[Array, " n"], s: Float[Array, " n"], progress: Array | float = 0.0
    ) -> Float[Array, " n"]:
        """Draw it uniformly below u."""
        start = self.schedule.t_min
        return floor_to_timestep(self.schedule, start + jax.random.uniform(key, t.shape) * (s - start))

    def earlier(self, nets: Nets, x0: Image, eps: Image, z: Image, t: Array, s: Array, cond: Cond, w: Array) -> Image:
        """Take the teacher's steps, along the grid."""
        first, last = (self.pairs.index(self.schedule, u, self.pairs.points) for u in (t, s))

        def step(i: Array | int, z: Image) -> Image:
            here = jnp.maximum(first - i, last)
            following = jnp.maximum(here - 1, last)
            a, b = self.time(here), self.time(following)
            stepped = super(ConsistencyTrajectory, self).earlier(nets, x0, eps, z, a, b, cond, w)
            return jnp.where(expand(here > last, z), frozen(stepped), z)

        return jax.lax.fori_loop(0, jnp.max(first - last), step, z)

    def solution(
        self, nets: Nets, params: Params, student_cond: Cond, z: Image, t: Array, end: Float[Array, " n"]
    ) -> Image:
        """Return G^-(G(z, t, end), end, clean), where G^- has the average's parameters."""
        point = flow_map(self.student(nets, params, student_cond), self.schedule, z, t, end)
        clean = jnp.full_like(end, self.schedule.t_min)
        return flow_map(self.student(nets, frozen(nets.target), student_cond), self.schedule, point, end, clean)

    def real(self, x0: Image, target: Image, end: Float[Array, " n"]) -> tuple[Image, Float[Array, " n"]]:
        """Return the data as the real samples, at the clean time."""
        return x0, jnp.full_like(end, self.schedule.t_min)

    def denoising_loss(self, nets: Nets, batch: dict[str, Any], key: Key) -> Float[Array, ""]:
        """Return the loss of G(., t, t) as a denoiser."""
        x0, eps, cond, student_cond, w = self.draw(nets, batch, key)
        t = self.at(jax.random.uniform(RandomKeys.of(key).denoising, x0.shape[:1], minval=1e-3))
        x = add_noise(self.schedule, x0, eps, t)
        target = x0
        if self.w_max > 0.0:
            target = x0 + frozen(self.teacher(nets, cond, w)(x, t).x0 - self.teacher(nets, cond)(x, t).x0)
        guess = self.student(nets, nets.student, student_cond)(x, t, t).x0
        return jnp.mean(distance(self.loss, guess - target, self.huber_c))

    def __call__(self, nets: Nets, batch: dict[str, Any], key: Key) -> tuple[Float[Array, ""], dict[str, Array]]:
        consistent, student, critic, metrics = self.parts(nets, batch, key)
        denoising = self.denoising_loss(nets, batch, key) if self.denoising else jnp.float32(0.0)
        balance = jnp.ones(2)
        if self.adaptive and (self.denoising or self.adversarial):

            def losses(params: Params) -> Array:
                still = nets._replace(student=params, others=frozen(nets.others))
                guess = self.denoising_loss(still, batch, key) if self.denoising else jnp.float32(0.0)
                return jnp.stack([*self.parts(still, batch, key)[:2], guess])

            sizes = last_layer_gradients(losses, frozen(nets.student))
            balance = frozen(jnp.clip(sizes[0] / jnp.maximum(sizes[1:], 1e-12), 0.01, 10.0))
        total = consistent + self.denoising * balance[1] * denoising + self.adversarial * balance[0] * student + critic
        metrics |= {"denoising": denoising, **({"critic": critic} if self.adversarial else {})}
        return total, {"loss": total, **metrics}


def last_layer_gradients(losses: Callable[[Params], Float[Array, " k"]], params: Params) -> Float[Array, " k"]:
    """Return the norms of the gradients of several losses with respect to a network's last layer (2012.09841 eq. 7).

    That is "conv_out" of a UNet, "proj_out" of an MMDiT, and all of the parameters of any other network.

    >>> import jax.numpy as jnp
    >>> from lcm_jax.objectives.trajectory import last_layer_gradients
    >>> def losses(params):
    ...     return jnp.stack([jnp.sum(params["conv_in"] * params["conv_out"]), 4.0 * params["conv_out"][0]])
    >>> last_layer_gradients(losses, {"conv_in": jnp.array([3.0]), "conv_out": jnp.array([1.0])}).tolist()
    [3.0, 4.0]
    """
    last = {n: params[n] for n in ("conv_out", "proj_out") if isinstance(params, Mapping) and n in params} or params

    def of_layer(layer: Params) -> Float[Array, " k"]:
        return losses({**params, **layer} if isinstance(params, Mapping) and layer is not params else layer)

    rows = jax.jacrev(of_layer)(last)
    return jnp.sqrt(sum(jnp.sum(leaf.reshape(leaf.shape[0], -1) ** 2, axis=1) for leaf in jax.tree.leaves(rows)))
