"""What the objectives of few-step models share: the draw, the guided teacher, the student and what it is told."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Float

from lcm_jax.diffusion.guidance import cfg
from lcm_jax.diffusion.parameterization import bind, noise_further
from lcm_jax.objectives.terms import check, drop_captions, frozen, hinge, without_caption
from lcm_jax.typing import Array, Cond, Denoiser, Image, Key, Kind, Nets, Params, Schedule


class Draw(NamedTuple):
    """A batch and what was drawn for it. told: what the student is told, `cond` with w where it has an embedding."""

    x0: Image
    eps: Image
    cond: Cond
    student_cond: Cond
    w: Float[Array, " b"]


@dataclass(frozen=True, kw_only=True)
class FewStep(ABC):
    """An objective whose student draws in few steps. Trains `nets.student`, and `nets.others` where it has any.

    schedule, kind: of the teacher, which are also the student's.
    adversarial: weight of a discriminator's verdict, 0 for none; its heads, `nets.others["heads"]`, the task makes.
    w_min, w_max: w = guidance scale - 1, drawn uniformly per example; equal: fixed (LCM-LoRA: 7.5).
    embed_w: feed w to the student as cond["guidance"]; False for a network that has no w-embedding (LCM-LoRA).
    caption_dropout: the rate at which a caption becomes the empty prompt, `nets.null`.
    """

    spans: ClassVar[bool] = False  # the student is told how far a step reaches: cond["span"]
    needs_teacher: ClassVar[bool] = True
    needs_w: ClassVar[bool] = False  # a range of w is of use to a student alone that is told w
    forward_mode: ClassVar[bool] = False  # it takes a jvp of the network, which flash kernels do not have
    judges_pictures: ClassVar[bool] = False  # the discriminator looks at clean pictures, not at noised latents
    sampler: ClassVar[str] = "lcm"  # by which the student draws

    schedule: Schedule
    kind: Kind = "epsilon"
    w_min: float = 2.0
    w_max: float = 14.0
    embed_w: bool = True
    caption_dropout: float = 0.0
    adversarial: float = 0.0

    def __post_init__(self) -> None:
        check("kind", self.kind, Kind)
        if self.w_min > self.w_max:
            raise ValueError(f"w_min={self.w_min} is above w_max={self.w_max}")

    @abstractmethod
    def __call__(self, nets: Nets, batch: dict[str, Any], key: Key) -> tuple[Float[Array, ""], dict[str, Array]]:
        """batch: x0 (b, h, w, c) latents in the network's units, cond without "guidance" -> loss and scalar metrics."""

    @property
    def needs_target(self) -> bool:
        """Whether it looks at nets.target, the moving average of the student."""
        return False

    @property
    def updates(self) -> Mapping[str, int]:
        """Tree ("student", "others") -> one of how many steps it learns in, where that is not every step."""
        return {}

    def others(self, key: Key, teacher: Params) -> dict[str, Params]:
        """The trees that are trained beside the student, before the first step."""
        return {}

    def draw(self, nets: Nets, batch: dict[str, Any], key: Key) -> Draw:
        """Noise, dropped captions and guidance of a batch."""
        _, noise_key, w_key, drop_key = jax.random.split(key, 4)
        x0 = batch["x0"]
        cond = drop_captions(drop_key, batch["cond"], nets.null, self.caption_dropout)
        w = jax.random.uniform(w_key, x0.shape[:1], minval=self.w_min, maxval=self.w_max)
        eps = jax.random.normal(noise_key, x0.shape, x0.dtype)
        return Draw(x0, eps, cond, {**cond, "guidance": w} if self.embed_w else cond, w)

    def student(self, nets: Nets, params: Params, student_cond: Cond) -> Denoiser:
        """The student with some of its parameters (trained, averaged, without gradient)."""
        return bind(nets.apply, params, student_cond, self.schedule, self.kind, spans=self.spans)

    def teacher(self, nets: Nets, cond: Cond, w: Float[Array, " b"] | None = None) -> Denoiser:
        """The teacher, guided by eps(null) + (1 + w) (eps(c) - eps(null)); w None: as it is."""
        if w is None:
            return bind(nets.apply, nets.teacher, cond, self.schedule, self.kind)
        twice = {k: jnp.concatenate([without, cond[k]]) for k, without in without_caption(nets.null, cond).items()}
        return cfg(bind(nets.apply, nets.teacher, twice, self.schedule, self.kind), 1.0 + w)

    def discriminator_logits(
        self,
        nets: Nets,
        heads: Params,
        base: Params,
        x: Image,
        cond: Cond,
        key: Key,
        since: Float[Array, "*b"] | float | None = None,
    ) -> Float[Array, "b k"]:
        """Logits of latents at the time `since` (None: clean), noised to a time uniform between 2 % and 98 % of what is
        left of the way, or of clean pictures.
        """
        assert nets.critic is not None
        if self.judges_pictures:
            return nets.critic(heads, base, x, jnp.zeros(x.shape[:1]), cond)
        first, second = jax.random.split(key)
        start = jnp.asarray(self.schedule.t_min if since is None else since)
        t = start + jax.random.uniform(first, x.shape[:1], minval=0.02, maxval=0.98) * (self.schedule.t_max - start)
        noised = noise_further(self.schedule, x, jax.random.normal(second, x.shape), start, t)
        return nets.critic(heads, base, noised, self.schedule.network_time(t), cond)

    def adversarial_losses(
        self,
        nets: Nets,
        real: Image,
        fake: Image,
        cond: Cond,
        key: Key,
        since: Float[Array, "*b"] | float | None = None,
    ) -> tuple[Float[Array, ""], Float[Array, ""]]:
        """The hinge losses of the student, whose pictures are `fake`, and of the heads on the teacher's features."""
        heads = nets.others["heads"]
        first, second = jax.random.split(key)
        student = -jnp.mean(self.discriminator_logits(nets, frozen(heads), nets.teacher, fake, cond, first, since))
        verdicts = (
            self.discriminator_logits(nets, heads, nets.teacher, frozen(x), cond, second, since) for x in (real, fake)
        )
        return student, hinge(*verdicts)

    def at(self, share: Float[Array, "*b"] | float) -> Float[Array, "*b"]:
        """The schedule's time at a share of the way from clean to noise."""
        return self.schedule.t_min + jnp.asarray(share) * (self.schedule.t_max - self.schedule.t_min)

    def position(self, t: Float[Array, "*b"]) -> Float[Array, "*b"]:
        """The inverse of `at`."""
        return (t - self.schedule.t_min) / (self.schedule.t_max - self.schedule.t_min)
