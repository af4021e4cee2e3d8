"""Progressive and guided distillation: one step of the student learns two of its teacher."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Float

from lcm_jax.diffusion.parameterization import add_noise, expand, flow_map
from lcm_jax.objectives.few_step import FewStep, RandomKeys
from lcm_jax.objectives.terms import frozen
from lcm_jax.typing import Array, Denoiser, Image, Key, Nets


def truncated_snr(alpha: Float[Array, " b"], sigma: Float[Array, " b"]) -> Float[Array, " b"]:
    """Return max(alpha^2 / sigma^2, 1), the weight of x0's squared error (Salimans & Ho 2022, 2202.00512 sec. 4).

    >>> import jax.numpy as jnp
    >>> from lcm_jax.objectives.progressive import truncated_snr
    >>> truncated_snr(jnp.array([0.5, 0.5]), jnp.array([0.25, 1.0])).tolist()
    [4.0, 1.0]
    """
    return jnp.maximum(alpha**2 / jnp.maximum(sigma**2, 1e-8), 1.0)


@dataclass(frozen=True, kw_only=True)
class GuidedDistillation(FewStep):
    """Stage one of Meng et al. 2022 (2210.03142 sec. 3.1): a student with a w-embedding learns the guided teacher.

    The loss is E max(SNR, 1) |x0(z, w) - x0_w(z)|^2. The student draws in as many steps as its teacher, with half the
    evaluations.

    >>> import jax
    >>> from lcm_jax.diffusion.schedules import DDPM
    >>> from lcm_jax.objectives import method, toy_batch, toy_nets
    >>> objective = method("guided", schedule=DDPM())
    >>> loss, metrics = objective(toy_nets(), toy_batch(), jax.random.key(0))
    >>> bool(loss >= 0.0), objective.sampler
    (True, 'ddim')
    """

    needs_w: ClassVar[bool] = True
    sampler: ClassVar[str] = "ddim"

    def __call__(self, nets: Nets, batch: dict[str, Any], key: Key) -> tuple[Float[Array, ""], dict[str, Array]]:
        x0, eps, cond, student_cond, w = self.draw(nets, batch, key)
        t = self.at(jax.random.uniform(RandomKeys.of(key).time, x0.shape[:1], minval=1e-3))
        z = add_noise(self.schedule, x0, eps, t)
        target = frozen(self.teacher(nets, cond, w)(z, t).x0)
        return self.compare(self.student(nets, nets.student, student_cond)(z, t).x0 - target, t)

    def compare(self, difference: Image, t: Float[Array, " b"]) -> tuple[Float[Array, ""], dict[str, Array]]:
        """Return the weighted square of an error of x0, and its metrics."""
        weight = truncated_snr(self.schedule.alpha(t), self.schedule.sigma(t))
        loss = jnp.mean(weight * jnp.mean(difference**2, axis=(1, 2, 3)))
        return loss, {"loss": loss, "error": jnp.mean(jnp.abs(difference))}


@dataclass(frozen=True, kw_only=True)
class ProgressiveDistillation(GuidedDistillation):
    """Salimans & Ho 2022 (2202.00512, Alg. 2), with guidance as in stage two of Meng et al. 2022.

    Stage i has first_steps / 2^i steps: the student's one DDIM step goes where two of half its length by the last
    stage's student go, in the first stage those of the guided teacher. The run is cut into as many stages of equal
    length as lead to `last_steps` (None: those in which the student is drawn). The last stage's student is
    `nets.target`, which becomes the student at the end of a stage. It is drawn on even times, as it is trained.
    ValueError for a `first_steps` that is no power of two.

    >>> import jax
    >>> from lcm_jax.diffusion.schedules import DDPM
    >>> from lcm_jax.objectives import method, toy_batch, toy_nets
    >>> objective = method("progressive", schedule=DDPM())
    >>> loss, metrics = objective(toy_nets(), toy_batch(), jax.random.key(0))
    >>> bool(loss >= 0.0), objective.sampler
    (True, 'flow_map')
    """

    sampler: ClassVar[str] = "flow_map"

    first_steps: int = 16
    last_steps: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.first_steps < 1 or self.first_steps & (self.first_steps - 1):
            raise ValueError(f"first_steps={self.first_steps} must be a power of two")
        if self.last_steps is not None and self.last_steps < 1:
            raise ValueError(f"last_steps={self.last_steps} must be positive")

    @property
    def needs_target(self) -> bool:
        return True

    @property
    def moving_average(self) -> Mapping[str, Any]:
        return {"ema": 0.0}  # an average would hold students of the stage before

    def drawn_in(self, steps: int) -> ProgressiveDistillation:
        """Return it with a last stage of `steps` steps, where none is given."""
        return self if self.last_steps is not None else replace(self, last_steps=steps)

    @property
    def stages(self) -> int:
        """The number of stages."""
        return 1 + max(0, (self.first_steps // (self.last_steps or 1)).bit_length() - 1)

    def stage(self, step: Array | float, steps: Array | float) -> Float[Array, ""]:
        """Return the number of the stage of a step, from 0."""
        length = jnp.maximum(jnp.floor(jnp.float32(steps) / self.stages), 1.0)
        return jnp.minimum(jnp.floor(jnp.float32(step) / length), self.stages - 1.0)

    @property
    def target_decay(self) -> Callable[[Array | float, Array | float], Array]:
        """0 at the last step of a stage, where the teacher of the next becomes the student, and else 1."""
        return lambda step, steps: jnp.float32(self.stage(step, steps) == self.stage(step + 1, steps))

    def __call__(self, nets: Nets, batch: dict[str, Any], key: Key) -> tuple[Float[Array, ""], dict[str, Array]]:
        x0, eps, cond, student_cond, w = self.draw(nets, batch, key)
        stage = self.stage(nets.step, nets.steps)
        steps = jnp.maximum(self.first_steps / 2.0**stage, 1.0)
        number = jnp.floor(1.0 + jax.random.uniform(RandomKeys.of(key).time, x0.shape[:1]) * steps)
        t, middle, end = (self.at(jnp.maximum(number - part, 0.0) / steps) for part in (0.0, 0.5, 1.0))
        z = add_noise(self.schedule, x0, eps, t)

        def two_steps(denoise: Denoiser) -> Image:
            return flow_map(denoise, self.schedule, flow_map(denoise, self.schedule, z, t, middle), middle, end)

        reached = jax.lax.cond(
            stage == 0.0,
            lambda: two_steps(self.teacher(nets, cond, w)),
            lambda: two_steps(self.student(nets, nets.target, student_cond)),
        )
        (alpha_t, sigma_t), (alpha_s, sigma_s) = (
            (expand(self.schedule.alpha(u), z), expand(self.schedule.sigma(u), z)) for u in (t, end)
        )
        ratio = sigma_s / sigma_t
        target = frozen((reached - ratio * z) / (alpha_s - ratio * alpha_t))
        return self.compare(self.student(nets, nets.student, student_cond)(z, t).x0 - target, t)
