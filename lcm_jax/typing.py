"""Shared types: what a schedule, a solver and a denoiser are.

The forward process is x_t = alpha(t) x0 + sigma(t) eps. Everything here is float32, and a time `t` or `s` is a scalar
or one value per row, shape (b,), in the schedule's own units.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, Protocol

import jax
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

__all__ = [
    "Apply",
    "Array",
    "Carry",
    "Cond",
    "Critic",
    "Denoiser",
    "Image",
    "Key",
    "Kind",
    "Nets",
    "Params",
    "Prediction",
]
__all__ += ["Schedule", "Solver", "Time"]

Key = PRNGKeyArray
Params = PyTree[jax.Array]
Cond = Mapping[str, Array]
Carry = PyTree[jax.Array]
Image = Float[Array, "b h w c"]
Time = Float[Array, "*b"] | float

Kind = Literal["epsilon", "v_prediction", "sample", "flow", "edm"]

Apply = Callable[[Params, Image, Time, Cond], Image]
"""apply(params, x, network_time, cond) -> raw output."""


class Prediction(NamedTuple):
    """What a denoiser believes about x_t: the clean sample and the noise, with x_t = alpha x0 + sigma eps."""

    x0: Image
    eps: Image


class Denoiser(Protocol):
    """(x_t, t) -> Prediction, with parameters and conditioning already bound."""

    def __call__(self, x: Image, t: Time, s: Time | None = None, /) -> Prediction:
        """s: where the step will end, for a network that is told (None: at t itself); others do not look at it."""


class Schedule(Protocol):
    """x_t = alpha(t) x0 + sigma(t) eps; a frozen hashable value, so it can be static under jit."""

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
        """The number the network is given for t."""

    def time_at(self, log_snr: Time) -> Float[Array, "*b"]:
        """The t whose log(alpha / sigma) is log_snr (nats); +-inf give t_min and t_max."""


class Solver(Protocol):
    """One step of the reverse process from time t to time s. A frozen value without arrays; its memory is the carry."""

    def init(self, x: Image) -> Carry:
        """The carry before the first step."""

    def step(
        self, denoise: Denoiser, schedule: Schedule, x: Image, t: Time, s: Time, carry: Carry, key: Key | Image
    ) -> tuple[Image, Carry]:
        """x at time s, and the carry. `key` is a random key, or the unit noise itself, of x's shape."""


Critic = Callable[[Params, Params, Image, Time, Cond], Float[Array, "b k"]]
"""critic(heads, base, x, network_time, cond) -> logits of heads on the features of the network with parameters base."""


class Nets(NamedTuple):
    """One pure function and its parameter trees; `null` is the conditioning of the empty prompt, batch 1.

    others: trees that are trained beside the student (a fake score, a discriminator's heads), by name. critic: see
    `Critic`. step: how many steps have been trained, for what changes on the way.
    """

    apply: Apply
    student: Params
    target: Params = None
    teacher: Params = None
    null: Any = None
    others: Any = None
    critic: Critic | None = None
    step: Array | float = 0.0
