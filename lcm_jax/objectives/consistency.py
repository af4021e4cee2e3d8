"""Latent consistency distillation and finetuning (Luo et al. 2023, LCM, arXiv:2310.04378; LCM-LoRA, arXiv:2311.05556).

Both are d(f(z_t, w, c, t), f^-(z_s, w, c, s)) for a pair of times t > s and differ in one thing: where z_s comes from.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Float

from lcm_jax.diffusion.consistency_function import consistency
from lcm_jax.diffusion.parameterization import add_noise, bind, expand
from lcm_jax.diffusion.solvers import DDIM, DPMpp2S, DPMSolver2, Heun
from lcm_jax.objectives.few_step import FewStep, RandomKeys
from lcm_jax.objectives.terms import Distance, by_quarter, check_choice, distance, without_caption
from lcm_jax.objectives.time_pairs import CTPairs, ECTPairs, ICTPairs, KarrasPairs, level
from lcm_jax.typing import Array, Cond, Image, Key, Kind, Nets, Params, Schedule, Solver

Target = Literal["ema", "online"]
Weight = Literal["one", "gap"]
TEACHER_SOLVERS: Mapping[str, Solver] = MappingProxyType(
    {"ddim": DDIM(), "dpm": DPMSolver2(), "dpm++": DPMpp2S(), "heun": Heun()}
)


def augmented_step(
    solver: Solver, nets: Nets, schedule: Schedule, kind: Kind, z: Image, t: Array, s: Array, cond: Cond, w: Array
) -> Image:
    """Take one step t -> s of the teacher along the augmented PF-ODE (LCM Eq. 17): z + (1 + w) Psi(c) - w Psi(null).

    Psi is the solver's increment. Both are taken in one call of 2n rows per evaluation, [null; cond]. For DDIM, affine
    in the prediction, this is DDIM with the guided prediction eps(null) + (1 + w) (eps(c) - eps(null)), in any
    parameterization. For a second-order solver it is the paper's form: each Psi evaluates its midpoint on its own
    branch, so for w != 0 the pair is no longer of second order in the guided ODE (at w = 0 it is).
    """
    twice = {k: jnp.concatenate([without, cond[k]]) for k, without in without_caption(nets.null, cond).items()}
    teacher = bind(nets.apply, nets.teacher, twice, schedule, kind)
    zz, tt, ss = jnp.concatenate([z, z]), jnp.concatenate([t, t]), jnp.concatenate([s, s])
    stepped, _ = solver.step(teacher, schedule, zz, tt, ss, solver.init(zz), jax.random.key(0))
    uncond, conditional = jnp.split(stepped, 2)
    return conditional + expand(w, z) * (conditional - uncond)


@dataclass(frozen=True, kw_only=True)
class LatentConsistency(FewStep):
    """The loss d(f(z_t, w, c, t), f^-(z_s, w, c, s)); subclasses differ in z_s. The defaults are the paper's.

    grid_points: t is one of N points that end at t_max: of a 1000-step table 50 -> {19, 39, ..., 999}, 1000 -> any.
    skip: s = max(t - skip, 0), in the schedule's time (table steps for DDPM): the paper's k. It need not be the grid's.
        None: a fiftieth of the way, the paper's 20 of 1000.
    pairs: another rule for (t, s); None is that of grid_points and skip.
    target: f^- is `nets.target`, a moving average ("ema"), or the student behind a stop_gradient ("online").
    target_ema: the decay of that average, where it is not to be the product's (CD); None: that of `pairs` (CT), if it
        has one, or the product.
    loss, huber_c: see `terms.distance`; the paper has l2, the released scripts l2 or huber.
    weight: "gap" divides by the difference of the two noise levels sigma / alpha (iCT, ECT).
    """

    grid_points: int = 50
    skip: float | None = None
    pairs: KarrasPairs | CTPairs | ICTPairs | ECTPairs | None = None
    target: Target = "ema"
    target_ema: float | None = None
    loss: Distance = "l2"
    huber_c: float = 1e-3
    weight: Weight = "one"
    sigma_data: float = 0.5
    timestep_scaling: float = 10.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("loss", self.loss, Distance)
        check_choice("target", self.target, Target)
        check_choice("weight", self.weight, Weight)
        if self.target_ema is not None and not 0.0 <= self.target_ema <= 1.0:
            raise ValueError(f"target_ema={self.target_ema} must be from 0 to 1")
        if self.grid_points < 1 or (self.skip is not None and self.skip <= 0):
            raise ValueError(f"grid_points={self.grid_points} and skip={self.skip} must be positive")
        length = self.schedule.t_max - self.schedule.t_min
        if self.skip is not None and self.skip > length:
            raise ValueError(f"skip={self.skip} is longer than the schedule, whose time is {length:g} long")

    @property
    def needs_target(self) -> bool:
        return self.target == "ema"

    @property
    def target_decay(self) -> Callable[[Array | float, Array | float], Array] | None:
        if not self.needs_target:
            return None
        if self.target_ema is not None:
            return lambda step, steps: jnp.float32(self.target_ema)
        pairs = self.pairs
        return (lambda step, steps: pairs.target_decay(step / steps)) if isinstance(pairs, CTPairs) else None

    @abstractmethod
    def earlier(self, nets: Nets, x0: Image, eps: Image, z: Image, t: Array, s: Array, cond: Cond, w: Array) -> Image:
        """Return the point z_s whose solution z_t's must equal."""

    def times(self, key: Key, n: int, progress: Array | float = 0.0) -> tuple[Float[Array, " n"], Float[Array, " n"]]:
        """Return the pairs of times (t, s)."""
        if self.pairs is not None:
            return self.pairs(self.schedule, key, n, progress)
        start, end = self.schedule.t_min, self.schedule.t_max
        index = jax.random.randint(key, (n,), 1, self.grid_points + 1).astype(jnp.float32)
        t = start + index * ((end - start) / self.grid_points)
        skip = (end - start) / 50 if self.skip is None else self.skip
        return t, jnp.maximum(t - skip, 0.0)

    def end(
        self, key: Key, t: Float[Array, " n"], s: Float[Array, " n"], progress: Array | float = 0.0
    ) -> Float[Array, " n"]:
        """Return the time to which both points are mapped, s at the latest: here the clean time."""
        return jnp.full_like(t, self.schedule.t_min)

    def real(self, x0: Image, target: Image, end: Float[Array, " n"]) -> tuple[Image, Float[Array, " n"]]:
        """Return the discriminator's real samples, and the time of these and of the student's."""
        return target, end

    def __call__(self, nets: Nets, batch: dict[str, Any], key: Key) -> tuple[Float[Array, ""], dict[str, Array]]:
        loss, student, critic, metrics = self.parts(nets, batch, key)
        if self.adversarial:
            loss, metrics = loss + self.adversarial * student + critic, {**metrics, "critic": critic}
        return loss, {"loss": loss, **metrics}

    def parts(
        self, nets: Nets, batch: dict[str, Any], key: Key
    ) -> tuple[Float[Array, ""], Float[Array, ""], Float[Array, ""], dict[str, Array]]:
        """Return the consistency loss, the adversarial losses of student and critic (0 where unused), and metrics."""
        x0, eps, cond, student_cond, w = self.draw(nets, batch, key)
        keys = RandomKeys.of(key)
        t, s = self.times(keys.time, len(x0), nets.progress)
        end = self.end(keys.end, t, s, nets.progress)
        z = add_noise(self.schedule, x0, eps, t)
        z_s = self.earlier(nets, x0, eps, z, t, s, cond, w)
        slow = nets.student if self.target == "online" else nets.target
        target = jax.lax.stop_gradient(self.solution(nets, slow, student_cond, z_s, s, end))
        prediction = self.solution(nets, nets.student, student_cond, z, t, end)
        difference = prediction - target
        per_example = distance(self.loss, difference, self.huber_c)
        if self.weight == "gap":
            per_example = per_example / (level(self.schedule, t) - level(self.schedule, s))
        loss = jnp.mean(per_example)
        metrics = {
            "error": jnp.mean(jnp.abs(difference.astype(jnp.float32))),
            **by_quarter(per_example, self.position(t)),
        }
        student = critic = jnp.float32(0.0)
        if self.adversarial:
            real, there = self.real(x0, target, end)
            student, critic = self.adversarial_losses(nets, real, prediction, cond, keys.discriminator, there)
        return loss, student, critic, metrics

    def solution(
        self, nets: Nets, params: Params, student_cond: Cond, z: Image, t: Array, end: Float[Array, " n"]
    ) -> Image:
        """Return f(z, w, c, t) = c_skip(t) z + c_out(t) x0hat (LCM Eq. 9), the map to the start of the trajectory."""
        scalings = {"sigma_data": self.sigma_data, "timestep_scaling": self.timestep_scaling}
        return consistency(self.student(nets, params, student_cond), self.schedule, **scalings)(z, t).x0


@dataclass(frozen=True, kw_only=True)
class LatentConsistencyDistillation(LatentConsistency):
    """LCD (LCM Sec. 4.3, Alg. 1): z_s is one step of the teacher from z_t (see `augmented_step`).

    solver: "ddim", "dpm" (DPM-Solver-2), "dpm++" (DPM-Solver++ 2S), both with the midpoint, "heun", or a deterministic
    Solver. With `KarrasPairs`, heun and w = 0 this is CD (2303.01469). ValueError for an unknown solver.

    >>> import jax
    >>> from lcm_jax.diffusion.schedules import DDPM
    >>> from lcm_jax.objectives import method, toy_batch, toy_nets
    >>> objective = method("lcm", schedule=DDPM(), skip=20)
    >>> loss, metrics = objective(toy_nets(), toy_batch(), jax.random.key(0))
    >>> bool(loss >= 0.0), objective.sampler
    (True, 'lcm')
    """

    solver: Solver | str = "ddim"

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.solver, str) and self.solver not in TEACHER_SOLVERS:
            raise ValueError(f"solver={self.solver!r} is unknown; use one of {', '.join(TEACHER_SOLVERS)} or a Solver")

    def earlier(self, nets: Nets, x0: Image, eps: Image, z: Image, t: Array, s: Array, cond: Cond, w: Array) -> Image:
        """Take the teacher's step."""
        solver = TEACHER_SOLVERS[self.solver] if isinstance(self.solver, str) else self.solver
        return augmented_step(solver, nets, self.schedule, self.kind, z, t, s, cond, w)


@dataclass(frozen=True, kw_only=True)
class LatentConsistencyFinetuning(LatentConsistency):
    """LCF (LCM Sec. 4.4, Alg. 4): no teacher; z_s is the same latent noised to s with the same noise.

    w is drawn and embedded as in distillation, so that a distilled student keeps its input; it has no other use here.
    With `CTPairs` this is CT (2303.01469), with `ICTPairs` iCT (2310.14189), with `ECTPairs` ECT (2406.14548).

    >>> import jax
    >>> from lcm_jax.diffusion.schedules import DDPM
    >>> from lcm_jax.objectives import method, toy_batch, toy_nets
    >>> objective = method("ict", schedule=DDPM())
    >>> loss, metrics = objective(toy_nets(), toy_batch(), jax.random.key(0))
    >>> bool(loss >= 0.0), objective.sampler
    (True, 'lcm')
    """

    needs_teacher: ClassVar[bool] = False
    builds_in_guidance: ClassVar[bool] = False

    def earlier(self, nets: Nets, x0: Image, eps: Image, z: Image, t: Array, s: Array, cond: Cond, w: Array) -> Image:
        """Noise x0 to s with the same noise."""
        return add_noise(self.schedule, x0, eps, s)
