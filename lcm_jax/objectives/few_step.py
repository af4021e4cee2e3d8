"""The base of all few-step objectives: the draw of a batch, the guided teacher, the student and its discriminator."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float

from lcm_jax.diffusion.guidance import cfg
from lcm_jax.diffusion.parameterization import bind, noise_further
from lcm_jax.objectives.terms import check_choice, frozen, hinge, replace_captions, without_caption
from lcm_jax.typing import Array, Cond, Denoiser, Image, Key, Kind, Nets, Params, Schedule


class RandomKeys(NamedTuple):
    """The random keys of one loss, one for each kind of draw: the only rule by which a few-step objective splits a key.

    An objective calls `RandomKeys.of(key)` and takes each kind of draw from its own field, so that no two draws share
    random numbers, and a new kind of draw (a new field at the end) leaves all others as they were. Within a field an
    objective may split on.

    time: the training times. noise: eps. guidance: w. captions: which captions are dropped. end: the end of the step
    (TCD, PCM, CTM). denoising: CTM's denoising loss. student: simulated inputs of adversarial students.
    discriminator: the noise that a discriminator's inputs get. second: all draws of a second loss (rCM).

    >>> import jax
    >>> from lcm_jax.objectives import RandomKeys
    >>> RandomKeys.of(jax.random.key(0))._fields[:4]
    ('time', 'noise', 'guidance', 'captions')
    """

    time: Key
    noise: Key
    guidance: Key
    captions: Key
    end: Key
    denoising: Key
    student: Key
    discriminator: Key
    second: Key

    @classmethod
    def of(cls, key: Key) -> RandomKeys:
        """Split one key into all of them."""
        first = jax.random.split(key, 4)
        return cls(*first, *(jax.random.fold_in(key, i) for i in range(4, len(cls._fields))))


class Draw(NamedTuple):
    """A batch and the random draw for it, so that z_t = alpha x0 + sigma eps.

    student_cond: `cond`, with w where the student has a w-embedding.
    """

    x0: Image
    eps: Image
    cond: Cond
    student_cond: Cond
    w: Float[Array, " b"]


@dataclass(frozen=True, kw_only=True)
class FewStep(ABC):
    """An objective whose student draws in few steps. It trains `nets.student`, and `nets.others` where it has any.

    schedule, kind: the teacher's, which are also the student's.
    adversarial: weight of the adversarial loss, 0 for none; the task makes its heads, `nets.others["heads"]`.
    r1: weight of the approximate R1 penalty of the heads, |D(x) - D(x + 0.1 n)|^2 on real x with unit noise n
        (2501.08316 eq. 4), which keeps them smooth where the data are.
    w_min, w_max: w = guidance scale - 1, drawn uniformly per example; equal: fixed (LCM-LoRA: 7.5).
    embed_w: feed w to the student as cond["guidance"]; False for a network that has no w-embedding (LCM-LoRA).
    caption_dropout: the rate at which a caption becomes the empty prompt, `nets.null`.
    ValueError for an unknown kind or w_min above w_max.

    Its own facts are class attributes, which the task, the command line and the exported folder read:
    spans: the student receives the length of the step, cond["span"]. needs_teacher: it evaluates `nets.teacher`.
    builds_in_guidance: the student draws guided pictures in one evaluation, as what it learns from is guided.
    needs_w: a range of w is meaningful only if w is an input of the student. judges_pictures: the discriminator's input
    is clean pictures, not noised latents. sampler: the sampler that draws with the student. Random numbers come from
    `RandomKeys`.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> from dataclasses import dataclass
    >>> from lcm_jax.diffusion.parameterization import add_noise
    >>> from lcm_jax.diffusion.schedules import DDPM
    >>> from lcm_jax.objectives import FewStep, RandomKeys, toy_batch, toy_nets
    >>> @dataclass(frozen=True, kw_only=True)
    ... class OneStep(FewStep):
    ...     needs_teacher = False
    ...     def __call__(self, nets, batch, key):
    ...         x0, eps, cond, student_cond, w = self.draw(nets, batch, key)
    ...         t = self.at(jax.random.uniform(RandomKeys.of(key).time, w.shape, minval=0.02, maxval=0.98))
    ...         z = add_noise(self.schedule, x0, eps, t)
    ...         loss = jnp.mean((self.student(nets, nets.student, student_cond)(z, t).x0 - x0) ** 2)
    ...         return loss, {"loss": loss}
    >>> loss, metrics = OneStep(schedule=DDPM())(toy_nets(), toy_batch(), jax.random.key(0))
    >>> loss.shape
    ()
    """

    spans: ClassVar[bool] = False
    needs_teacher: ClassVar[bool] = True
    needs_w: ClassVar[bool] = False
    builds_in_guidance: ClassVar[bool] = True
    judges_pictures: ClassVar[bool] = False
    sampler: ClassVar[str] = "lcm"

    schedule: Schedule
    kind: Kind = "epsilon"
    w_min: float = 2.0
    w_max: float = 14.0
    embed_w: bool = True
    caption_dropout: float = 0.0
    adversarial: float = 0.0
    r1: float = 0.0

    def __post_init__(self) -> None:
        check_choice("kind", self.kind, Kind)
        if self.w_min > self.w_max:
            raise ValueError(f"w_min={self.w_min} is above w_max={self.w_max}")

    @abstractmethod
    def __call__(self, nets: Nets, batch: dict[str, Any], key: Key) -> tuple[Float[Array, ""], dict[str, Array]]:
        """Return the loss and scalar metrics of a batch: x0 (b, h, w, c) latents in the network's units, and cond."""

    @property
    def needs_target(self) -> bool:
        """True if it evaluates nets.target, the moving average of the student."""
        return False

    @property
    def target_decay(self) -> Callable[[Array | float, Array | float], Array] | None:
        """(step, steps) -> the decay of nets.target, where it is another average than the product; None: it is that."""
        return None

    @property
    def updates(self) -> Mapping[str, int]:
        """The number of steps between two updates of a tree ("student", "fake", "heads"), where that is not 1."""
        return {}

    @property
    def optimizers(self) -> Mapping[str, Mapping[str, Any]]:
        """The fields of a tree's optimizer ("heads": {"b1": 0.0}) that the method changes."""
        return {}

    @property
    def moving_average(self) -> Mapping[str, Any]:
        """The settings of the product's average ("ema") that the method requires, if any."""
        return {}

    def drawn_in(self, steps: int) -> FewStep:
        """Return the objective of a student that is to draw in `steps` steps, for what was left open until then."""
        return self

    def others(self, key: Key, teacher: Params) -> dict[str, Params]:
        """Return the trees that are trained beside the student, before the first step."""
        return {}

    def draw(self, nets: Nets, batch: dict[str, Any], key: Key) -> Draw:
        """Draw the noise, the dropped captions and the guidance of a batch."""
        keys, x0 = RandomKeys.of(key), batch["x0"]
        cond = batch["cond"]
        if self.caption_dropout:
            cond = replace_captions(self.dropped(keys, len(x0)), cond, nets.null)
        w = self.guidance(keys.guidance, len(x0))
        eps = jax.random.normal(keys.noise, x0.shape, x0.dtype)
        return Draw(x0, eps, cond, {**cond, "guidance": w} if self.embed_w else cond, w)

    def guidance(self, key: Key, n: int) -> Float[Array, " n"]:
        """Draw w of n examples."""
        return jax.random.uniform(key, (n,), minval=self.w_min, maxval=self.w_max)

    def dropped(self, keys: RandomKeys, n: int) -> Bool[Array, " n"]:
        """Return for which of n examples `draw` gives the empty prompt."""
        return jax.random.bernoulli(keys.captions, self.caption_dropout, (n,))

    def student(self, nets: Nets, params: Params, student_cond: Cond) -> Denoiser:
        """Return the student's denoiser with the given parameters (trained, averaged or without gradient)."""
        return bind(nets.apply, params, student_cond, self.schedule, self.kind, spans=self.spans)

    def teacher(self, nets: Nets, cond: Cond, w: Float[Array, " b"] | None = None) -> Denoiser:
        """Return the teacher's denoiser, guided by eps(null) + (1 + w) (eps(c) - eps(null)); w None: not guided."""
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
        """Return the logits of latents at the time `since` (None: clean), or of clean pictures.

        Latents are noised first, to a time of `critic_times`.
        """
        assert nets.critic is not None
        if self.judges_pictures:
            return nets.critic(heads, base, x, jnp.zeros(x.shape[:1]), cond)
        first, second = jax.random.split(key)
        start = jnp.broadcast_to(jnp.float32(self.schedule.t_min if since is None else since), x.shape[:1])
        t = self.critic_times(first, start)
        noised = noise_further(self.schedule, x, jax.random.normal(second, x.shape), start, t)
        return nets.critic(heads, base, noised, self.schedule.network_time(t), cond)

    def critic_times(self, key: Key, since: Float[Array, " b"]) -> Float[Array, " b"]:
        """Draw the times of the discriminator's inputs: 2 % to 98 % of the way from `since` to pure noise."""
        share = jax.random.uniform(key, since.shape, minval=0.02, maxval=0.98)
        return since + share * (self.schedule.t_max - since)

    def adversarial_losses(
        self,
        nets: Nets,
        real: Image,
        fake: Image,
        cond: Cond,
        key: Key,
        since: Float[Array, "*b"] | float | None = None,
    ) -> tuple[Float[Array, ""], Float[Array, ""]]:
        """Return the hinge losses of the student, whose samples are `fake`, and of the discriminator's heads.

        The heads' has the penalty `r1`, for which real samples and these a little noisier share time and noise.
        """
        first, second = jax.random.split(key)

        def logits(x: Image, heads: Params, key: Key) -> Array:
            return self.discriminator_logits(nets, heads, nets.teacher, x, cond, key, since)

        heads = nets.others["heads"]
        student = -jnp.mean(logits(fake, frozen(heads), first))
        of_real, of_fake = (logits(frozen(x), heads, second) for x in (real, fake))
        critic = hinge(of_real, of_fake)
        if self.r1:
            near = frozen(real) + 0.1 * jax.random.normal(jax.random.fold_in(second, 1), real.shape)
            critic = critic + self.r1 * jnp.mean((of_real - logits(near, heads, second)) ** 2)
        return student, critic

    def at(self, share: Float[Array, "*b"] | float) -> Float[Array, "*b"]:
        """Return the schedule's time at a share in [0, 1] of the way from clean to noise."""
        return self.schedule.t_min + jnp.asarray(share) * (self.schedule.t_max - self.schedule.t_min)

    def position(self, t: Float[Array, "*b"]) -> Float[Array, "*b"]:
        """Return the share of the way at a time: the inverse of `at`."""
        return (t - self.schedule.t_min) / (self.schedule.t_max - self.schedule.t_min)
