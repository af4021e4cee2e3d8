"""Objectives that match distributions rather than trajectories: DMD2, and the adversarial ADD and LADD.

A fake score or a discriminator's heads are trained beside the student, in `nets.others`. Each part of the loss uses the
other parts' trees without gradient, so one gradient of the sum trains them all.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from lcm_jax.diffusion.consistency_function import consistency
from lcm_jax.diffusion.parameterization import add_noise, bind, expand, output, target
from lcm_jax.diffusion.samplers import SAMPLERS, time_grid
from lcm_jax.diffusion.schedules import RectifiedFlow, log_snr
from lcm_jax.diffusion.time_grids import Spacing
from lcm_jax.objectives.few_step import FewStep, RandomKeys
from lcm_jax.objectives.terms import check_choice, frozen
from lcm_jax.objectives.time_densities import LogitNormal
from lcm_jax.typing import Array, Cond, Image, Key, Nets, Params

Divergence = Literal["reverse_kl", "kl", "js", "jeffreys", "hellinger"]


@dataclass(frozen=True, kw_only=True)
class AdversarialStudent(FewStep):
    """A student that is trained at the very times, and from the very starting noise, at which `sampler` draws with it.

    Its picture from z at a time t is f(z, t) = c_skip z + c_out x0. steps: the number of times. ValueError for fewer
    than one step.
    """

    steps: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps < 1:
            raise ValueError(f"steps={self.steps} must be positive")

    @property
    def times(self) -> Float[np.ndarray, " steps"]:
        """The times at which the student draws, from noise on: those of the sampler's grid but the clean end."""
        return time_grid(SAMPLERS[self.sampler], self.schedule, self.steps)[:-1].astype(np.float32)

    def start(self, noise: Image) -> Image:
        """Return the sampler's first latent, made of unit noise alone."""
        return noise * SAMPLERS[self.sampler].init_noise_sigma(self.schedule, self.times, Spacing())

    def picture(self, nets: Nets, params: Params, student_cond: Cond, z: Image, t: Array) -> Image:
        """Return the student's clean latents from z at time t."""
        return consistency(self.student(nets, params, student_cond), self.schedule)(z, t).x0


@dataclass(frozen=True, kw_only=True)
class DistributionMatching(AdversarialStudent):
    """DMD2 (Yin et al. 2024, 2405.14867): the student follows the difference of its own pictures' score and real ones'.

    The gradient of its picture x, noised to x_t, is (x0_fake(x_t) - x0_real(x_t)) / mean |x - x0_real| (Yin et al.
    2023, 2311.18828 eq. 7, 8). x0_real is the guided teacher's; x0_fake that of a copy of the teacher,
    `others["fake"]`, trained on the student's pictures. The student's input is what its own earlier steps leave
    (backward simulation, sec. 4.5). The student learns in one of `every` steps, the fake score in all (sec. 4.2).
    adversarial: sec. 4.3, heads on the fake score's features, with the non-saturating loss; the fake score learns
    through them too. critic: the weight of the heads' loss. The defaults are those of the released SDXL students; those
    of SD1.5 have a guidance of 1.75 (w = 0.75), every = 10 and adversarial = 0.001.

    >>> import jax
    >>> from lcm_jax.diffusion.schedules import DDPM
    >>> from lcm_jax.objectives import method, toy_batch, toy_nets
    >>> objective = method("dmd2", schedule=DDPM())
    >>> loss, metrics = objective(toy_nets(), toy_batch(), jax.random.key(0))
    >>> bool(loss >= 0.0), objective.sampler
    (True, 'lcm')
    """

    embed_w: bool = False
    w_min: float = 7.0
    w_max: float = 7.0
    adversarial: float = 5e-3
    critic: float = 1e-2
    every: int = 5

    def others(self, key: Key, teacher: Params) -> dict[str, Params]:
        """Return the fake score, which starts as the teacher."""
        return {"fake": teacher}

    @property
    def updates(self) -> Mapping[str, int]:
        return {"student": self.every}

    def simulate(self, nets: Nets, student_cond: Cond, noise: Image, number: Array, key: Key) -> Image:
        """Return the student's input at step `number`, one number for each example, by its own earlier steps."""
        still, z, times = frozen(nets.student), self.start(noise), self.times
        for i in range(self.steps - 1):
            again = jax.random.normal(jax.random.fold_in(key, i), z.shape)
            there = jnp.full(number.shape, times[i])
            following = add_noise(self.schedule, self.picture(nets, still, student_cond, z, there), again, times[i + 1])
            z = jnp.where(expand(i < number, z), following, z)
        return jax.lax.stop_gradient(z)

    def weigh(self, nets: Nets, x_t: Image, t: Array, cond: Cond) -> Float[Array, "b 1 1 1"] | float:
        """Return the factor of each example's gradient: 1, which is that of the reverse KL divergence."""
        return 1.0

    def __call__(self, nets: Nets, batch: dict[str, Any], key: Key) -> tuple[Float[Array, ""], dict[str, Array]]:
        real, noise, cond, student_cond, w = self.draw(nets, batch, key)
        keys = jax.random.split(RandomKeys.of(key).student, 8)
        number = jax.random.randint(keys[0], real.shape[:1], 0, self.steps)
        z, t_z = self.simulate(nets, student_cond, noise, number, keys[1]), jnp.asarray(self.times)[number]
        fake, learns = nets.others["fake"], jnp.asarray(nets.step) % self.every == 0

        def score(params: Params) -> Any:
            return bind(nets.apply, params, cond, self.schedule, self.kind)

        def of_student() -> tuple[Array, Array]:
            x = self.picture(nets, nets.student, student_cond, z, t_z)
            t = self.at(jax.random.uniform(keys[2], real.shape[:1], minval=0.02, maxval=0.98))
            x_t = add_noise(self.schedule, frozen(x), jax.random.normal(keys[3], x.shape), t)
            x0_real = self.teacher(nets, cond, w)(x_t, t).x0
            x0_fake = score(frozen(fake))(x_t, t).x0
            size = jnp.mean(jnp.abs(x - x0_real), axis=(1, 2, 3), keepdims=True)
            direction = frozen(self.weigh(nets, x_t, t, cond) * (x0_fake - x0_real) / (size + 1e-6))
            loss = 0.5 * jnp.mean((x - frozen(x - direction)) ** 2)
            if self.adversarial:
                logits = self.discriminator_logits(nets, frozen(nets.others["heads"]), frozen(fake), x, cond, keys[4])
                loss = loss + self.adversarial * jnp.mean(jax.nn.softplus(-logits))
            return loss, jnp.mean(jnp.abs(direction))

        student, direction = jax.lax.cond(learns, of_student, lambda: (jnp.float32(0.0), jnp.float32(0.0)))
        made = frozen(self.picture(nets, frozen(nets.student), student_cond, z, t_z))
        t = self.at(jax.random.uniform(keys[5], real.shape[:1], minval=1e-3))
        eps = jax.random.normal(keys[6], made.shape)
        x_t = add_noise(self.schedule, made, eps, t)
        y = output(nets.apply, fake, x_t, t, cond, schedule=self.schedule, kind=self.kind)
        guess = jnp.mean((y - target(self.kind, made, eps, self.schedule.alpha(t), self.schedule.sigma(t))) ** 2)
        total = student + guess
        metrics = {"student": student, "fake": guess, "error": direction}
        if self.adversarial:
            verdict = [
                self.discriminator_logits(nets, nets.others["heads"], fake, x, cond, keys[7]) for x in (real, made)
            ]
            critic = jnp.mean(jax.nn.softplus(-verdict[0])) + jnp.mean(jax.nn.softplus(verdict[1]))
            total, metrics = total + self.critic * critic, {**metrics, "critic": critic}
        return total, {"loss": total, **metrics}


@dataclass(frozen=True, kw_only=True)
class DivergenceDistillation(DistributionMatching):
    """f-distill (Xu et al. 2025, 2502.15681 eq. 4): DMD2 for any f-divergence, whose gradient is DMD2's times h(r).

    r is the ratio of the densities of real and student's noised pictures, the exponential of the heads' logit, cut to
    0.1 ... 20 and divided by its mean over the examples of a like time (ten bins). h is r^2 f''(r), whose mean over a
    batch is made 1: r for "kl", 1 for "reverse_kl" (DMD2), r / (1 + r) for "js", 1 + r for "jeffreys", sqrt(r) for
    "hellinger". ValueError for another divergence, or without a discriminator.

    >>> import jax
    >>> from lcm_jax.diffusion.schedules import DDPM
    >>> from lcm_jax.objectives import method, toy_batch, toy_nets
    >>> objective = method("f-distill", schedule=DDPM())
    >>> loss, metrics = objective(toy_nets(), toy_batch(), jax.random.key(0))
    >>> bool(loss >= 0.0), objective.divergence
    (True, 'js')
    """

    divergence: Divergence = "js"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("divergence", self.divergence, Divergence)
        if not self.adversarial:
            raise ValueError("adversarial=0: f-distill weighs by its discriminator, so give it a weight")

    def weigh(self, nets: Nets, x_t: Image, t: Array, cond: Cond) -> Float[Array, "b 1 1 1"]:
        """Return h(r)."""
        assert nets.critic is not None
        heads, fake = frozen(nets.others["heads"]), frozen(nets.others["fake"])
        logits = jnp.mean(nets.critic(heads, fake, x_t, self.schedule.network_time(t), cond), axis=1)
        ratio = jnp.clip(jnp.exp(jnp.clip(logits, -10.0, 10.0)), 0.1, 20.0)
        bins = jax.nn.one_hot(jnp.clip(10 * self.position(t), 0, 9).astype(jnp.int32), 10)
        ratio = ratio / (bins @ (ratio @ bins / jnp.maximum(jnp.sum(bins, axis=0), 1.0)))
        h = {
            "reverse_kl": jnp.ones_like(ratio),
            "kl": ratio,
            "js": ratio / (1.0 + ratio),
            "jeffreys": 1.0 + ratio,
            "hellinger": jnp.sqrt(ratio),
        }[self.divergence]
        return expand(h / jnp.mean(h), x_t)


@dataclass(frozen=True, kw_only=True)
class LatentAdversarialDistillation(AdversarialStudent):
    """LADD (Sauer et al. 2024, 2403.12015): the student denoises latents of one of `steps` times in one step.

    At the first time the latents are pure noise, as where it draws. The discriminator's heads read the teacher's
    features of the result, noised again (hinge loss), to a time whose logit on the flow is N(mean, std^2) (sec. 3.2).
    Student and heads have no momentum (b1 = 0, b2 = 0.99), as StyleGAN-T's, whose heads these are (2301.09515).
    distillation: weight of alpha(t) |x - x0_teacher(x_t)|^2, the loss against the teacher's prediction, which LADD
    leaves out.

    >>> import jax
    >>> from lcm_jax.diffusion.schedules import DDPM
    >>> from lcm_jax.objectives import method, toy_batch, toy_nets
    >>> objective = method("ladd", schedule=DDPM())
    >>> loss, metrics = objective(toy_nets(), toy_batch(), jax.random.key(0))
    >>> bool(loss == loss), objective.sampler
    (True, 'lcm')
    """

    embed_w: bool = False
    w_min: float = 3.0
    w_max: float = 3.0
    adversarial: float = 1.0
    r1: float = 1.0
    mean: float = 1.0
    std: float = 1.0
    distillation: float = 0.0

    @property
    def optimizers(self) -> Mapping[str, Mapping[str, Any]]:
        return {"student": {"b1": 0.0, "b2": 0.99}, "heads": {"b1": 0.0, "b2": 0.99}}

    def critic_times(self, key: Key, since: Float[Array, " b"]) -> Float[Array, " b"]:
        """Draw the logit-normal times of the flow, on the schedule."""
        t = LogitNormal(mean=self.mean, std=self.std)(key, len(since))
        return self.schedule.time_at(log_snr(RectifiedFlow(), t))

    def __call__(self, nets: Nets, batch: dict[str, Any], key: Key) -> tuple[Float[Array, ""], dict[str, Array]]:
        real, noise, cond, student_cond, w = self.draw(nets, batch, key)
        keys = jax.random.split(RandomKeys.of(key).student, 6)
        number = jax.random.randint(keys[0], real.shape[:1], 0, self.steps)
        t_z = jnp.asarray(self.times)[number]
        z = jnp.where(expand(number == 0, real), self.start(noise), add_noise(self.schedule, real, noise, t_z))
        x = self.picture(nets, nets.student, student_cond, z, t_z)
        student, critic = self.adversarial_losses(nets, real, x, cond, keys[1])
        loss, metrics = self.adversarial * student, {"student": student, "critic": critic}
        if self.distillation:
            t = self.at(jax.random.uniform(keys[3], real.shape[:1], minval=0.02, maxval=0.98))
            x_t = add_noise(self.schedule, frozen(x), jax.random.normal(keys[4], x.shape), t)
            target = frozen(self.teacher(nets, cond, w)(x_t, t).x0)
            per_example = self.schedule.alpha(t) * jnp.mean((x - target) ** 2, axis=(1, 2, 3))
            loss, metrics = (
                loss + self.distillation * jnp.mean(per_example),
                {**metrics, "error": jnp.mean(jnp.abs(x - target))},
            )
        total = loss + critic
        return total, {"loss": total, **metrics}


@dataclass(frozen=True, kw_only=True)
class AdversarialDistillation(LatentAdversarialDistillation):
    """ADD (Sauer et al. 2023, 2311.17042 eq. 1): LADD whose heads read a frozen image tower's features of pictures.

    The loss against the teacher's prediction has a weight of 2.5.

    >>> import jax
    >>> from lcm_jax.diffusion.schedules import DDPM
    >>> from lcm_jax.objectives import method, toy_batch, toy_nets
    >>> objective = method("add", schedule=DDPM())
    >>> loss, metrics = objective(toy_nets(), toy_batch(), jax.random.key(0))
    >>> bool(loss == loss), objective.sampler
    (True, 'lcm')
    """

    judges_pictures: ClassVar[bool] = True

    distillation: float = 2.5
