"""The formulations that the Stable Diffusion 3 paper ranks (Esser et al. 2024, arXiv:2403.03206, table 1).

Each is a path from data to noise, the quantity that the network predicts and the density of the training times: one
`Diffusion`. It comes with the grid of times on which it is sampled, with Euler steps.

EDM's variants need no separate path. Karras' x0 + s eps is the straight path divided by 1 - t, with noise level
s = t / (1 - t), so log s = logit t: log s ~ N(m, d^2) is the logit-normal density, the density with the log-SNR of "rf"
is the uniform one, and that of the cosine schedule, s = tan(pi u / 2), is CosMap. The kind "edm" does the rest: unit
weight on F is Karras' loss weight. The network's time input is 1000 t, where Karras has log(s) / 4.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from lcm_jax.diffusion.sampling import sample
from lcm_jax.diffusion.schedules import DDPM, Cosine, RectifiedFlow, log_snr
from lcm_jax.diffusion.solvers import Euler
from lcm_jax.diffusion.time_grids import even_grid, karras_grid, pad
from lcm_jax.objectives.diffusion import Density, Diffusion
from lcm_jax.objectives.time_densities import CosMap, LogitNormal, Mode
from lcm_jax.typing import Denoiser, Image, Kind, Schedule


def cosine_grid(steps: int, schedule: Schedule) -> Float[np.ndarray, " n_plus_1"]:
    """Return the n + 1 times at which `schedule` has the log-SNR of n even steps of the cosine schedule."""
    return np.asarray(schedule.time_at(log_snr(Cosine(), jnp.asarray(even_grid(steps, Cosine())))))


@dataclass(frozen=True, kw_only=True)
class Formulation:
    """An objective, and the grid of times on which its result is sampled: (steps, schedule) -> grid."""

    objective: Diffusion
    grid: Callable[[int, Schedule], np.ndarray] = even_grid

    def sample(self, denoise: Denoiser, noise: Image, steps: int) -> Image:
        """Return samples from unit noise after `steps` Euler steps.

        denoise: for the objective's schedule. noise: (b, h, w, c).
        """
        schedule = self.objective.schedule
        times = self.grid(steps, schedule)
        x = schedule.sigma(times[0]) * noise
        return sample(denoise, schedule, Euler(), pad(times), x, jax.random.key(0))


LINEAR = DDPM(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")  # latent diffusion's "linear"
FLOW = RectifiedFlow()


def _straight(times: Density | None = None, kind: Kind = "flow") -> Diffusion:
    return Diffusion(schedule=FLOW, kind=kind, times=times)


FORMULATIONS: Mapping[str, Formulation] = {
    "rf": Formulation(objective=_straight()),
    "rf/lognorm(0,1)": Formulation(objective=_straight(LogitNormal(mean=0.0, std=1.0))),
    "rf/lognorm(1,0.6)": Formulation(objective=_straight(LogitNormal(mean=1.0, std=0.6))),
    "rf/lognorm(0.5,0.6)": Formulation(objective=_straight(LogitNormal(mean=0.5, std=0.6))),
    "rf/mode(1.29)": Formulation(objective=_straight(Mode(scale=1.29))),
    "rf/cosmap": Formulation(objective=_straight(CosMap())),
    "eps/linear": Formulation(objective=Diffusion(schedule=LINEAR, kind="epsilon")),
    "v/linear": Formulation(objective=Diffusion(schedule=LINEAR, kind="v_prediction")),
    "v/cos": Formulation(objective=Diffusion(schedule=Cosine(), kind="v_prediction")),
    "edm(0,0.6)": Formulation(objective=_straight(LogitNormal(mean=0.0, std=0.6), "edm"), grid=karras_grid),
    "edm(-1.2,1.2)": Formulation(objective=_straight(LogitNormal(mean=-1.2, std=1.2), "edm"), grid=karras_grid),
    "edm/rf": Formulation(objective=_straight(None, "edm")),
    "edm/cos": Formulation(objective=_straight(CosMap(), "edm"), grid=cosine_grid),
}
