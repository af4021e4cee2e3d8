"""Reflow and its piecewise form: the student learns the straight lines between what its teacher joins."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Float

from lcm_jax.diffusion.parameterization import add_noise, expand, flow_map, output, target
from lcm_jax.objectives.few_step import FewStep, RandomKeys
from lcm_jax.objectives.terms import frozen
from lcm_jax.typing import Array, Image, Key, Nets


@dataclass(frozen=True, kw_only=True)
class PiecewiseReflow(FewStep):
    """PeRFlow (Yan et al. 2024, 2405.07510 eq. 6), and with one window reflow (2209.03003; InstaFlow, 2309.06380).

    The schedule's time is cut into `windows` of equal length. From the start of a window, which holds noised data, or
    in the first one noise alone, the guided teacher goes to its end in `solver_steps` DDIM steps. The student learns
    the straight line between the two: the one (x0, eps) with which start and end are alpha x0 + sigma eps at their
    times. So one DDIM step takes the whole window. ValueError for fewer than one window or step.

    >>> import jax
    >>> from lcm_jax.diffusion.schedules import RectifiedFlow
    >>> from lcm_jax.objectives import method, toy_batch, toy_nets
    >>> objective = method("perflow", schedule=RectifiedFlow(), kind="flow")
    >>> loss, metrics = objective(toy_nets(), toy_batch(), jax.random.key(0))
    >>> bool(loss >= 0.0), objective.windows, method("reflow", schedule=RectifiedFlow()).windows
    (True, 4, 1)
    """

    sampler: ClassVar[str] = "flow_map"

    embed_w: bool = False
    w_min: float = 6.5
    w_max: float = 6.5
    windows: int = 4
    solver_steps: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.windows < 1 or self.solver_steps < 1:
            raise ValueError(f"windows={self.windows} and solver_steps={self.solver_steps} must be positive")

    def ends(self, nets: Nets, batch: dict[str, Any], key: Key) -> tuple[Image, Image, Array, Array]:
        """Return the two ends of a window (x at its start, x at its end) and their times."""
        x0, eps, cond, _, w = self.draw(nets, batch, key)
        number = jax.random.randint(RandomKeys.of(key).end, w.shape, 0, self.windows)  # 0 ends at the clean time
        start, end = (self.at((number + i) / self.windows) for i in (1, 0))
        first = jnp.where(expand(number == self.windows - 1, x0), eps, add_noise(self.schedule, x0, eps, start))
        teacher = self.teacher(nets, cond, w)

        def step(i: Array | int, x: Image) -> Image:
            t, s = (start + (end - start) * ((i + j) / self.solver_steps) for j in (0, 1))
            return frozen(flow_map(teacher, self.schedule, x, t, s))

        return first, jax.lax.fori_loop(0, self.solver_steps, step, first), start, end

    def __call__(self, nets: Nets, batch: dict[str, Any], key: Key) -> tuple[Float[Array, ""], dict[str, Array]]:
        student_cond = self.draw(nets, batch, key).student_cond
        first, last, start, end = self.ends(nets, batch, key)
        (a, b), (c, d) = (
            (expand(self.schedule.alpha(t), first), expand(self.schedule.sigma(t), first)) for t in (start, end)
        )
        determinant = a * d - b * c
        x0, eps = (d * first - b * last) / determinant, (a * last - c * first) / determinant
        share = jax.random.uniform(RandomKeys.of(key).time, start.shape, minval=0.02)
        t = end + share * (start - end)
        z = add_noise(self.schedule, x0, eps, t)
        y = output(nets.apply, nets.student, z, t, student_cond, schedule=self.schedule, kind=self.kind)
        wanted = frozen(target(self.kind, x0, eps, self.schedule.alpha(t), self.schedule.sigma(t)))
        loss = jnp.mean((y.astype(jnp.float32) - wanted) ** 2)
        return loss, {"loss": loss, "error": jnp.mean(jnp.abs(y - wanted))}
