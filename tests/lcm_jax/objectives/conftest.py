"""Networks in closed form. For x0 ~ N(m, v^2) per element every quantity of diffusion is affine in x:

    x_t ~ N(alpha m, S^2), S^2 = alpha^2 v^2 + sigma^2;  E[eps | x] = sigma (x - alpha m) / S^2;
    the probability-flow ODE keeps (x - alpha m) / S, so its map t -> 0 is alpha_0 m + (S_0 / S_t) (x - alpha_t m).

The mean is m + context, so that conditions differ; guiding two such Gaussians with w gives the Gaussian of the mean
(1 + w) m_c - w m_null, whose ODE is again known.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from lcm_jax.diffusion.parameterization import SIGMA_DATA, expand, target
from lcm_jax.diffusion.schedules import DDPM
from lcm_jax.typing import Apply, Array, Cond, Image, Kind, Nets, Params, Schedule

V = 0.7


class Gaussian:
    """The closed forms on one schedule; a network takes params {"m", "v", "exact"} and cond {"context": (b, 1, 1)}."""

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule

    def time(self, network_time: Array) -> Array:
        """The schedule's time of the number that the network is given."""
        return network_time * self.schedule.t_max / self.schedule.network_time(self.schedule.t_max)

    def teacher(self, m: float = 0.3, v: float = V) -> Params:
        return {"m": jnp.float32(m), "v": jnp.float32(v), "exact": jnp.float32(0.0)}

    def student(self, m: float = 0.3, v: float = V) -> Params:
        return {**self.teacher(m, v), "exact": jnp.float32(1.0)}

    def mean(self, params: Params, cond: Cond) -> Array:
        """(b, 1, 1, 1); with "guidance" the guided mean, the null context being 0."""
        w = cond.get("guidance", jnp.float32(0.0))
        return params["m"] + (1.0 + expand(w, cond["context"][..., None])) * cond["context"][..., None]

    def scales(self, t: Array, x: Image) -> tuple[Array, Array]:
        return expand(self.schedule.alpha(t), x), expand(self.schedule.sigma(t), x)

    def solution(self, params: Params, x: Image, t: Array, cond: Cond) -> Image:
        """The exact consistency function, to time 0."""
        (a, s), (a0, s0) = self.scales(t, x), self.scales(jnp.float32(0.0), x)
        m, v = self.mean(params, cond), params["v"]
        return a0 * m + jnp.sqrt((a0**2 * v**2 + s0**2) / (a**2 * v**2 + s**2)) * (x - a * m)

    def network(self, kind: Kind) -> Apply:
        """The output of `kind` whose x0 is the posterior mean (teacher), or makes f the exact solution (exact = 1)."""

        def apply(params: Params, x: Image, t: Array, cond: Cond) -> Image:
            t = self.time(t)
            a, s = self.scales(t, x)
            if kind == "edm":  # it is given x / S
                x = x * jnp.sqrt((a * SIGMA_DATA) ** 2 + s**2)
            m, v = self.mean(params, cond), params["v"]
            posterior = m + a * v**2 / (a**2 * v**2 + s**2) * (x - a * m)
            u = 10.0 * expand(t, x)
            c_skip, c_out = 0.25 / (u**2 + 0.25), u / jnp.sqrt(u**2 + 0.25)
            exact = (self.solution(params, x, t, cond) - c_skip * x) / jnp.maximum(c_out, 1e-3)
            x0 = jnp.where(params["exact"] > 0, exact, posterior)
            return target(kind, x0, (x - a * x0) / s, self.schedule.alpha(t), self.schedule.sigma(t))

        return apply

    def nets(self, kind: Kind = "sample", **trees: Params) -> Nets:
        default = {"student": self.student(), "target": self.student(), "teacher": self.teacher()}
        return Nets(apply=self.network(kind), null={"context": jnp.zeros((1, 1, 1))}, **(default | trees))


@pytest.fixture(scope="session")
def gaussian() -> Gaussian:
    return Gaussian(DDPM(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"))


@pytest.fixture(scope="session")
def gaussian_on() -> type[Gaussian]:
    return Gaussian


@pytest.fixture(scope="session")
def make_batch() -> Callable[..., dict[str, Any]]:

    def make(n: int, seed: int = 1, m: float = 0.3, channels: int = 4) -> dict[str, Any]:
        """x0 ~ N(m + context, V^2), context ~ N(0, 0.2^2)."""
        random = np.random.default_rng(seed)  # numpy's, which compiles nothing
        context = 0.2 * random.standard_normal((n, 1, 1), np.float32)
        x0 = m + context[..., None] + V * random.standard_normal((n, 2, 2, channels), np.float32)
        return {"x0": jnp.asarray(x0, jnp.float32), "cond": {"context": jnp.asarray(context, jnp.float32)}}

    return make


class Recorder:
    """An apply that keeps its (concrete) arguments; params is {name: net}."""

    def __init__(self, inner: Callable[..., Image]) -> None:
        self.inner = inner
        self.calls: dict[str, list[tuple[Any, Any, Cond]]] = {}

    def __call__(self, params: Params, x: Image, t: Array, cond: Cond) -> Image:
        ((name, net),) = params.items()
        self.calls.setdefault(name, []).append((x, t, cond))
        return self.inner(net, x, t, cond)


@pytest.fixture(scope="session")
def recorder() -> type[Recorder]:
    return Recorder
