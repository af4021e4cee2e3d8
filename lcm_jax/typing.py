"""Shared types: the protocols of a schedule, a solver and a denoiser, and the trees that objectives take.

The forward process is x_t = alpha(t) x0 + sigma(t) eps. Everything here is float32, and a time `t` or `s` is a scalar
or one value for each example, shape (b,), in the schedule's own units.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

__all__ = [
    "AnyTime",
    "Apply",
    "Array",
    "Carry",
    "Cond",
    "Critic",
    "Denoiser",
    "Image",
    "Key",
    "Keys",
    "Kind",
    "Nets",
    "Params",
    "Prediction",
]
__all__ += ["Schedule", "Shapes", "Solver", "Time"]

Key = PRNGKeyArray
Keys = jaxtyping.Key[Array, " b"]  # one for each example
Params = PyTree[jax.Array | np.ndarray]
Shapes = PyTree[jax.ShapeDtypeStruct]  # of parameters
Cond = Mapping[str, Array]
Carry = PyTree[jax.Array]
Image = Float[Array, "b h w c"]
Time = Float[Array | np.ndarray, "*b"] | np.floating | float  # all times of one call have the same shape
AnyTime = Float[Array | np.ndarray, "..."] | np.floating | float  # each may have its own

Kind = Literal["epsilon", "v_prediction", "sample", "flow", "edm"]

Apply = Callable[[Params, Image, Time, Cond], Image]
"""apply(params, x, network_time, cond) -> raw output."""


class Prediction(NamedTuple):
    """A denoiser's estimate of the clean sample and of the noise in x_t, with x_t = alpha x0 + sigma eps."""

    x0: Image
    eps: Image


@runtime_checkable
class Denoiser(Protocol):
    """A function (x_t, t) -> Prediction, with parameters and conditioning already bound."""

    def __call__(self, x: Image, t: Time, s: Time | None = None, /) -> Prediction:
        """Predict x0 and eps from x at time t. s: end time of the step, for networks with a span embedding; None: t."""


@runtime_checkable
class Schedule(Protocol):
    """The coefficients of x_t = alpha(t) x0 + sigma(t) eps: a frozen hashable value, so it can be static under jit."""

    @property
    def timesteps(self) -> int | None:
        """The number of entries of a discrete table, whose times are integers; None in continuous time."""

    @property
    def keeps_partial_step(self) -> bool:
        """True if image-to-image counts the fraction of a step that `strength` leaves as a whole step."""

    @property
    def usual_kind(self) -> Kind:
        """The network output that models of this schedule usually have."""

    @property
    def usual_sampler(self) -> str:
        """The sampler that models of this schedule are usually drawn with."""

    @property
    def t_min(self) -> float:
        """The clean time: alpha 1, sigma 0."""

    @property
    def t_max(self) -> float:
        """The time of (almost) pure noise."""

    @property
    def gauge(self) -> float:
        """k of the variable x / (alpha + k sigma) in which ODE solvers average: 0 Karras', 1 the flow's."""

    def alpha(self, t: Time) -> Float[Array, "*b"]: ...

    def sigma(self, t: Time) -> Float[Array, "*b"]: ...

    def network_time(self, t: Time) -> Float[Array, "*b"]:
        """The number that the network receives for t."""

    def time_at(self, log_snr: Time) -> Float[Array, "*b"]:
        """The t whose log(alpha / sigma) is log_snr (nats); +-inf give t_min and t_max."""

    def grid(self, steps: int, spacing: Any) -> Float[np.ndarray, " n_plus_1"]:
        """The N + 1 descending times of N deterministic steps; spacing: a `diffusion.time_grids.Spacing`."""


@runtime_checkable
class Solver(Protocol):
    """One step of the reverse process from time t to time s. A frozen value without arrays; its memory is the carry."""

    @property
    def order(self) -> int:
        """The order of the global error in the step length; 0 for a step that has no ODE behind it."""

    @property
    def evaluations(self) -> int:
        """The number of network evaluations in a step."""

    @property
    def stochastic(self) -> bool:
        """True if a step draws noise."""

    def init(self, x: Image) -> Carry:
        """The carry before the first step."""

    def step(
        self, denoise: Denoiser, schedule: Schedule, x: Image, t: Time, s: Time, carry: Carry, key: Key | Image
    ) -> tuple[Image, Carry]:
        """Return x at time s, and the carry. `key` is a random key, or the unit noise itself, of x's shape."""


Critic = Callable[[Params, Params, Image, Time, Cond], Float[Array, "b k"]]
"""critic(heads, base, x, network_time, cond) -> logits of heads on the features of the network with parameters base."""


class Nets(NamedTuple):
    """One pure function and its parameter trees; `null` is the conditioning of the empty prompt, batch 1.

    others: trees that are trained beside the student (a fake score, a discriminator's heads), by name. critic: see
    `Critic`. step: the number of steps trained so far, of `steps` in all, for objectives that change with them.
    """

    apply: Apply
    student: Params
    target: Params = None
    teacher: Params = None
    null: Any = None
    others: Any = None
    critic: Critic | None = None
    step: Array | float = 0.0
    steps: Array | float = 1000.0

    @property
    def progress(self) -> Array:
        """The share of the run that is done: 0 at its first step."""
        return jnp.asarray(self.step, jnp.float32) / jnp.asarray(self.steps, jnp.float32)
