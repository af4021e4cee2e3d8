"""The diffusion (denoising score matching, flow matching) objective: how a teacher is trained or a model finetuned."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Float

from lcm_jax.diffusion.parameterization import add_noise, output, prediction_coefficients, target
from lcm_jax.diffusion.schedules import DDPM, Cosine, RectifiedFlow
from lcm_jax.objectives.terms import (
    Distance,
    TextEncoders,
    by_quarter,
    check_choice,
    distance,
    drop_captions,
    drop_encoders,
)
from lcm_jax.objectives.time_densities import (
    CosMap,
    LogitNormal,
    Mode,
    TimeDensity,
    Times,
    Uniform,
    even_times,
    uniform_times,
)
from lcm_jax.typing import Array, Cond, Image, Key, Keys, Kind, Nets, Schedule

# Named one by one, so that their numbers can be set from the command line.
Density = Uniform | LogitNormal | Mode | CosMap


def min_snr_weight(
    kind: Kind, alpha: Float[Array, " b"], sigma: Float[Array, " b"], gamma: float
) -> Float[Array, " b"]:
    """Return the weight of the squared error of a `kind` output that equals min(SNR, gamma) on that of x0.

    Hang et al. 2023 (arXiv:2303.09556) Eq. 8, for any output y = a x0 + b eps: at a given x an error e of x0 is
    an error (a - b alpha / sigma) e of y, so the weight is min(SNR, gamma) / (a - b alpha / sigma)^2, where
    SNR = alpha^2 / sigma^2. epsilon: min(SNR, gamma) / SNR; v: min(SNR, gamma) / (SNR + 1); sample: min(SNR, gamma).
    Multiplied out by sigma^2, so that sigma = 0 is no division; at alpha = 0 (zero terminal SNR) epsilon has the limit
    1.

    >>> import jax.numpy as jnp
    >>> from lcm_jax.objectives.diffusion import min_snr_weight
    >>> alpha, sigma = jnp.sqrt(jnp.array([0.9])), jnp.sqrt(jnp.array([0.1]))  # SNR 9
    >>> round(float(min_snr_weight("epsilon", alpha, sigma, 5.0)[0]), 4)
    0.5556
    """
    a, b = prediction_coefficients(kind, alpha, sigma)
    tiny = jnp.finfo(jnp.float32).tiny
    return (jnp.minimum(alpha**2, gamma * sigma**2) + tiny) / ((a * sigma - b * alpha) ** 2 + tiny)


@dataclass(frozen=True, kw_only=True)
class Diffusion:
    """The loss E d(net(x_t, t, c), y_t), with x_t = alpha x0 + sigma eps and y the target of `kind`.

    Ho et al. 2020 Eq. 14; Salimans & Ho 2022 for v; Lipman et al. 2023 for flow. It trains `nets.student` and uses no
    other tree but `nets.null`.

    times: the density of the training times, `(key, n) -> (n,)`; None: uniform (see `uniform_times`).
    weight: a density pi(t) by which the loss is multiplied. Uniform times with weight=pi have the expected loss of
        times=pi, where SD3 (2403.03206) sec. 3.1 makes one the other; what differs is the variance.
    min_snr_gamma: None weighs every time by 1; Hang et al. use 5.
    caption_dropout: the rate at which a caption becomes the empty prompt, `nets.null`, so that CFG has its branch.
    encoders: where each text encoder's part of the conditioning is, to zero it at the rate encoder_dropout (SD3, which
        has no caption dropout: all three are dropped often enough); None: encoders are not dropped.

    >>> import jax
    >>> from lcm_jax.diffusion.schedules import RectifiedFlow
    >>> from lcm_jax.objectives import Diffusion, LogitNormal, toy_batch, toy_nets
    >>> objective = Diffusion(schedule=RectifiedFlow(), kind="flow", times=LogitNormal())
    >>> loss, metrics = objective(toy_nets(), toy_batch(), jax.random.key(0))
    >>> sorted(metrics)
    ['error', 'loss', 'loss_t1', 'loss_t2', 'loss_t3', 'loss_t4']
    """

    schedule: DDPM | RectifiedFlow | Cosine | Schedule
    kind: Kind = "epsilon"
    caption_dropout: float = 0.1
    min_snr_gamma: float | None = None
    loss: Distance = "l2"
    huber_c: float = 1e-3
    times: Density | Times | None = None
    weight: Density | None = None
    encoders: TextEncoders | None = None
    encoder_dropout: float = 0.464

    def __post_init__(self) -> None:
        check_choice("kind", self.kind, Kind)
        check_choice("loss", self.loss, Distance)
        for name, density in (("times", self.times), ("weight", self.weight)):
            if isinstance(density, TimeDensity) and (self.schedule.t_min, self.schedule.t_max) != (0.0, 1.0):
                raise ValueError(
                    f"{name}={type(density).__name__} is a density on [0, 1], but the times of "
                    f"{type(self.schedule).__name__} end at {self.schedule.t_max:g}: use a rectified flow"
                )

    def __call__(self, nets: Nets, batch: dict[str, Any], key: Key) -> tuple[Float[Array, ""], dict[str, Array]]:
        """Return the loss and scalar metrics of a batch: x0 (b, h, w, c) latents in the network's units, and cond."""
        time_key, noise_key, drop_key = jax.random.split(key, 3)
        x0, n = batch["x0"], batch["x0"].shape[0]
        cond = drop_captions(drop_key, batch["cond"], nets.null, self.caption_dropout)
        if self.encoders is not None:
            cond = drop_encoders(jax.random.fold_in(drop_key, 1), cond, self.encoders, self.encoder_dropout)
        t = uniform_times(self.schedule, time_key, n) if self.times is None else self.times(time_key, n)
        eps = jax.random.normal(noise_key, x0.shape, x0.dtype)
        per_example, difference = self.at(nets, x0, eps, t, cond)
        loss = jnp.mean(per_example)
        error = jnp.mean(jnp.abs(difference.astype(jnp.float32)))
        position = (t - self.schedule.t_min) / (self.schedule.t_max - self.schedule.t_min)
        return loss, {"loss": loss, "error": error, **by_quarter(per_example, position)}

    def at(self, nets: Nets, x0: Image, eps: Image, t: Float[Array, " b"], cond: Cond) -> tuple[Array, Image]:
        """Return each example's weighted loss (b,) at its time and noise, and the error of the network's output."""
        alpha, sigma = self.schedule.alpha(t), self.schedule.sigma(t)
        x = add_noise(self.schedule, x0, eps, t)
        y = output(nets.apply, nets.student, x, t, cond, schedule=self.schedule, kind=self.kind)
        difference = y - target(self.kind, x0, eps, alpha, sigma)
        per_example = distance(self.loss, difference, self.huber_c)
        if self.min_snr_gamma is not None:
            per_example = per_example * min_snr_weight(self.kind, alpha, sigma, self.min_snr_gamma)
        if self.weight is not None:
            per_example = per_example * self.weight.pdf(t)
        return per_example, difference


def validation_losses(
    objective: Diffusion, nets: Nets, batch: dict[str, Any], keys: Keys, *, levels: int = 8
) -> Float[Array, "b levels"]:
    """Return each example's loss at `levels` evenly spaced times, from clean to noise (SD3, 2403.03206, section 5).

    Target and weight are the objective's; its density of times and its dropout are not used, so that runs which differ
    in these can be compared. keys: (b,), one for each example, so that its losses depend on the network alone and not
    on the rest of the batch.

    >>> import jax
    >>> from lcm_jax.diffusion.schedules import DDPM
    >>> from lcm_jax.objectives import Diffusion, toy_batch, toy_nets, validation_losses
    >>> keys = jax.random.split(jax.random.key(0), 2)
    >>> validation_losses(Diffusion(schedule=DDPM()), toy_nets(), toy_batch(), keys, levels=4).shape
    (2, 4)
    """
    x0, times = batch["x0"], even_times(objective.schedule, levels)

    def at_level(inputs: tuple[Array, Array]) -> Array:
        t, level = inputs
        eps = jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, level), x0.shape[1:], x0.dtype))(keys)
        return objective.at(nets, x0, eps, jnp.full(x0.shape[:1], t), batch["cond"])[0]

    return jax.lax.map(at_level, (times, jnp.arange(levels))).T
