"""Multistep solvers: one network evaluation a step, and a carry that remembers the steps before.

What is remembered of a step is a value (x0, eps or another output) and its node on the axis on which the solver
interpolates. A node that is not there yet is infinite, and the order of a step is the number of nodes that are there:
so a sample starts at first order and grows. Rows of a batch may be at different steps.

Where a grid says which order a step may have (`schedules.OnGrid`), as diffusers lowers it at the end of few steps, the
solver goes by it; the grid is data, so that no other number of steps compiles anew.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from lcm_jax.diffusion.parameterization import expand, prediction_coefficients, to_prediction
from lcm_jax.diffusion.schedules import OnGrid
from lcm_jax.diffusion.solver_steps import finite_log_snr, highest_order, move, phi, scales, unit_noise
from lcm_jax.typing import Carry, Denoiser, Image, Key, Kind, Schedule, Time

Node = tuple[Image, Float[Array, " b"]]
"""One step that is remembered: a value, and its place on the axis of interpolation; infinite where there is none."""


def _nodes(x: Image, count: int) -> tuple[Node, ...]:
    return tuple((jnp.zeros_like(x), jnp.full(x.shape[:1], jnp.inf, jnp.float32)) for _ in range(count))


def _there(node: Node) -> Bool[Array, " b"]:
    return jnp.isfinite(node[1])


def _safe(value: Array, where: Array) -> Array:
    """Return a value that nothing is divided by where it means nothing."""
    return jnp.where(where, value, 1.0)


def _difference(h: Float[Array, " b"], newer: Node, older: Node, where: Bool[Array, " b"]) -> Image:
    """Return the change of the value per h between two nodes, for the rows that have both."""
    return expand(h / _safe(newer[1] - older[1], where), newer[0]) * (newer[0] - older[0])


def _second_differences(
    h: Float[Array, " b"],
    now: Node,
    before: tuple[Node, ...],
    d_0: Image,
    second: Bool[Array, " b"],
    third: Bool[Array, " b"],
) -> tuple[Image, Image]:
    """Return D1 and D2 of the parabola through three nodes; d_0: the difference of the newer two."""
    h_0, h_1 = _safe(now[1] - before[0][1], second), _safe(before[0][1] - before[1][1], third)
    change = d_0 - _difference(h, before[0], before[1], third)
    return d_0 + expand(h_0 / (h_0 + h_1), d_0) * change, expand(h / (h_0 + h_1), d_0) * change


def _check_order(order: int, most: int) -> None:
    if order not in range(1, most + 1):
        raise ValueError(f"solver_order is {order}: it must be between 1 and {most}")


def _check_type(name: str, known: tuple[str, ...]) -> None:
    if name not in known:
        raise ValueError(f"solver_type {name!r} is unknown: use {' or '.join(known)}")


@dataclass(frozen=True, kw_only=True)
class DPMppMultistep:
    """DPM-Solver++ multistep (Lu 2022b, 2211.01095, Alg. 2), and its SDE: the data prediction, extrapolated.

    With h = lambda_s - lambda_t, k = h (2 h for the SDE) and a = 1 - e^-k, one evaluation a step:

        x_s = (sigma_s / sigma_t) e^(h - k) x + alpha_s (a x0 + c_1 D1 + c_2 D2) + sigma_s sqrt(1 - e^-2h) z,

    z for the SDE alone. D1 and D2 are differences of the last solver_order data predictions over h. At second order c_1
    is a / 2 ("midpoint") or 1 - a / k ("heun"); at third c_1 = 1 - a / k and c_2 = 1/2 - (k - a) / k^2. For the SDE
    diffusers has c_2 - 1 in place of c_2, which keeps the noise's third order from being one; k-diffusion does not, and
    this is diffusers', of which a folder's scheduler config speaks.

    The first step and a step to sigma_s = 0 are of first order, which is exact there in the limit. The third-order step
    leaves an error of second order, with a smaller constant. ValueError for another solver_order or solver_type.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> from lcm_jax.diffusion.schedules import RectifiedFlow
    >>> from lcm_jax.diffusion.solvers import DPMppMultistep
    >>> from lcm_jax.typing import Prediction
    >>> x = jnp.full((1, 1, 1, 1), 2.0)
    >>> perfect = lambda x, t, s=None: Prediction(jnp.ones_like(x), 3.0 * jnp.ones_like(x))  # x0 1, eps 3
    >>> solver = DPMppMultistep(solver_order=3)
    >>> x, carry = solver.step(perfect, RectifiedFlow(), x, 0.5, 0.25, solver.init(x), jax.random.key(0))
    >>> round(float(x.squeeze()), 4)
    1.5
    """

    evaluations: ClassVar[int] = 1

    solver_order: int = 2
    solver_type: str = "midpoint"
    sde: bool = False

    def __post_init__(self) -> None:
        _check_order(self.solver_order, 3)
        _check_type(self.solver_type, ("midpoint", "heun"))

    @property
    def order(self) -> int:
        return 1 if self.sde else min(self.solver_order, 2)

    @property
    def stochastic(self) -> bool:
        return self.sde

    def init(self, x: Image) -> Carry:
        return _nodes(x, self.solver_order - 1)

    def step(
        self, denoise: Denoiser, schedule: Schedule, x: Image, t: Time, s: Time, carry: Carry, key: Key | Image
    ) -> tuple[Image, Carry]:
        prediction = denoise(x, t)
        (alpha_t, sigma_t), (alpha_s, sigma_s) = scales(schedule, t, x), scales(schedule, s, x)
        lambda_t, lambda_s = finite_log_snr(schedule, t, x), finite_log_snr(schedule, s, x)
        bend = self._bend(carry, (prediction.x0, lambda_t), lambda_s, highest_order(schedule, t, x, self.solver_order))
        carry = ((prediction.x0, lambda_t), *carry)[: self.solver_order - 1]
        if not self.sde:
            return move(prediction, alpha_s, sigma_s) + alpha_s * bend, carry
        shrink = jnp.clip(alpha_t * sigma_s / (alpha_s * sigma_t), 0.0, 1.0)  # e^-h
        drift = move(prediction, alpha_s, sigma_s * shrink) + alpha_s * bend
        return drift + sigma_s * jnp.sqrt(1.0 - shrink**2) * unit_noise(key, x), carry

    def _bend(self, carry: Carry, now: Node, lambda_s: Float[Array, " b"], order: Float[Array, " b"]) -> Image:
        """Return c_1 D1 + c_2 D2, and 0 at first order."""
        x0, lambda_t = now
        bend = jnp.zeros_like(x0)
        if self.solver_order == 1:
            return bend
        second = _there(carry[0]) & jnp.isfinite(lambda_s) & (order >= 2)
        h = jnp.where(second, lambda_s - lambda_t, 1.0)
        k = 2.0 * h if self.sde else h
        d_0 = _difference(h, now, carry[0], second)
        curved = k * phi(2, -k)  # 1 - a / k
        slope = -0.5 * jnp.expm1(-k) if self.solver_type == "midpoint" else curved
        bend = jnp.where(expand(second, x0), expand(slope, x0) * d_0, bend)
        if self.solver_order == 2:
            return bend
        third = second & _there(carry[1]) & (order >= 3)
        d1, d2 = _second_differences(h, now, carry, d_0, second, third)
        curvature = k * phi(3, -k) - (1.0 if self.sde else 0.0)
        return jnp.where(expand(third, x0), expand(curved, x0) * d1 + expand(curvature, x0) * d2, bend)


DPMpp2M = partial(DPMppMultistep, solver_order=2)
"""DPM-Solver++(2M)."""


@dataclass(frozen=True, kw_only=True)
class DPMppSinglestep:
    """DPM-Solver++ singlestep (Lu 2022b, 2211.01095, Alg. 1), as diffusers walks it: order n takes n steps of the grid.

    The grid's times are the inner points too, so that each step is one evaluation and any number of them will do. The
    first of a group goes on in first order from x, which it remembers; the others start from that x again:

        x_s = (sigma_s / sigma_u) x_u + alpha_s ((1 - e^-h) x0_u + c (x0_t - x0_u) h / (lambda_t - lambda_u)),

    where u is the time at which the group began, h = lambda_s - lambda_u, and c is (1 - e^-h) / 2 in the second step
    and 1 - (1 - e^-h) / h in the third. The carry is x_u with its scales, what was predicted there and the number of
    steps in the group. Where the grid does not name the orders, they go 1, 2, 1, 2 (1, 2, 3). A step to sigma_s = 0 is
    of first order. ValueError for a solver_order beyond 3.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> from lcm_jax.diffusion.schedules import RectifiedFlow
    >>> from lcm_jax.diffusion.solvers import DPMppSinglestep
    >>> from lcm_jax.typing import Prediction
    >>> x = jnp.full((1, 1, 1, 1), 2.0)
    >>> perfect = lambda x, t, s=None: Prediction(jnp.ones_like(x), 3.0 * jnp.ones_like(x))  # x0 1, eps 3
    >>> solver = DPMppSinglestep()
    >>> x, carry = solver.step(perfect, RectifiedFlow(), x, 0.5, 0.25, solver.init(x), jax.random.key(0))
    >>> round(float(x.squeeze()), 4)
    1.5
    """

    order: ClassVar[int] = 2
    evaluations: ClassVar[int] = 1
    stochastic: ClassVar[bool] = False

    solver_order: int = 2

    def __post_init__(self) -> None:
        _check_order(self.solver_order, 3)

    def init(self, x: Image) -> Carry:
        start = (x, jnp.ones(x.shape[:1]), jnp.ones(x.shape[:1]))  # x_u, alpha_u, sigma_u
        return start, _nodes(x, 1)[0], jnp.zeros(x.shape[:1])

    def step(
        self, denoise: Denoiser, schedule: Schedule, x: Image, t: Time, s: Time, carry: Carry, key: Key | Image
    ) -> tuple[Image, Carry]:
        (x_u, alpha_u, sigma_u), first, done = carry
        prediction = denoise(x, t)
        (alpha_t, sigma_t), (alpha_s, sigma_s) = scales(schedule, t, x), scales(schedule, s, x)
        lambda_t, lambda_s = finite_log_snr(schedule, t, x), finite_log_snr(schedule, s, x)
        named = highest_order(schedule, t, x, self.solver_order)
        in_turn = jnp.where(done >= self.solver_order, 0.0, done) + 1.0
        order = jnp.minimum(named, done + 1.0) if isinstance(schedule, OnGrid) else in_turn
        order = jnp.where(jnp.isfinite(lambda_s), order, 1.0)
        fresh = expand(order == 1.0, x)

        h = jnp.where(order > 1.0, lambda_s - first[1], 1.0)
        second = expand(h / _safe(lambda_t - first[1], order > 1.0), x) * (prediction.x0 - first[0])
        slope = jnp.where(order > 2.0, h * phi(2, -h), -0.5 * jnp.expm1(-h))
        ratio = sigma_s / expand(sigma_u, x)
        base = ratio * x_u + (alpha_s - ratio * expand(alpha_u, x)) * first[0]
        further = base + alpha_s * expand(slope, x) * second
        moved = jnp.where(fresh, move(prediction, alpha_s, sigma_s), further)

        began = order == 1.0
        start = (jnp.where(fresh, x, x_u), _row(began, alpha_t, alpha_u), _row(began, sigma_t, sigma_u))
        first = (jnp.where(fresh, prediction.x0, first[0]), jnp.where(began, lambda_t, first[1]))
        return moved, (start, first, order)


def _row(where: Bool[Array, " b"], new: Array, old: Float[Array, " b"]) -> Float[Array, " b"]:
    """Return for each row the new scale, or the old one where it stays."""
    return jnp.where(where, jnp.broadcast_to(jnp.ravel(new), old.shape), old)


@dataclass(frozen=True, kw_only=True)
class DEIS:
    """DEIS in log-rho (Zhang & Chen, 2204.13902): the integral of the noise prediction, a polynomial in the log-SNR.

    With h = lambda_s - lambda_t and eps, D1, D2 the polynomial through the last solver_order noise predictions,

        x_s = (alpha_s / alpha_t) x - sigma_s h (phi_1(h) eps + phi_2(h) D1 + 2 phi_3(h) D2).

    One evaluation a step; first order at the start and where sigma_s = 0. ValueError for a solver_order beyond 3.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> from lcm_jax.diffusion.schedules import RectifiedFlow
    >>> from lcm_jax.diffusion.solvers import DEIS
    >>> from lcm_jax.typing import Prediction
    >>> x = jnp.full((1, 1, 1, 1), 2.0)
    >>> perfect = lambda x, t, s=None: Prediction(jnp.ones_like(x), 3.0 * jnp.ones_like(x))  # x0 1, eps 3
    >>> solver = DEIS()
    >>> x, carry = solver.step(perfect, RectifiedFlow(), x, 0.5, 0.25, solver.init(x), jax.random.key(0))
    >>> round(float(x.squeeze()), 4)
    1.5
    """

    evaluations: ClassVar[int] = 1
    stochastic: ClassVar[bool] = False

    solver_order: int = 2

    def __post_init__(self) -> None:
        _check_order(self.solver_order, 3)

    @property
    def order(self) -> int:
        return min(self.solver_order, 2)  # the first step is of first order

    def init(self, x: Image) -> Carry:
        return _nodes(x, self.solver_order - 1)

    def step(
        self, denoise: Denoiser, schedule: Schedule, x: Image, t: Time, s: Time, carry: Carry, key: Key | Image
    ) -> tuple[Image, Carry]:
        prediction = denoise(x, t)
        alpha_s, sigma_s = scales(schedule, s, x)
        lambda_t, lambda_s = finite_log_snr(schedule, t, x), finite_log_snr(schedule, s, x)
        eps, straight = prediction.eps, move(prediction, alpha_s, sigma_s)
        after = ((eps, lambda_t), *carry)[: self.solver_order - 1]
        if self.solver_order == 1:
            return straight, after
        order = highest_order(schedule, t, x, self.solver_order)
        second = _there(carry[0]) & jnp.isfinite(lambda_s) & (order >= 2)
        h = jnp.where(second, lambda_s - lambda_t, 1.0)
        now = (eps, lambda_t)
        d_0 = _difference(h, now, carry[0], second)
        bend = expand(h * phi(2, h), x) * d_0
        if self.solver_order == 3:
            third = second & _there(carry[1]) & (order >= 3)
            d1, d2 = _second_differences(h, now, carry, d_0, second, third)
            curved = expand(h * phi(2, h), x) * d1 + expand(2.0 * h * phi(3, h), x) * d2
            bend = jnp.where(expand(third, x), curved, bend)
        return jnp.where(expand(second, x), straight - sigma_s * bend, straight), after


@dataclass(frozen=True, kw_only=True)
class UniPC:
    """UniPC (Zhao et al. 2023, 2302.04867), B(h) version: a predictor of order p, and a corrector that costs nothing.

    A step evaluates the network once, at x. The corrector takes that prediction to mend x, from the step before; the
    predictor goes on from the mended x. With h = lambda_s - lambda_t and D_i = (x0_i - x0) / r_i, r_i h the distance in
    log-SNR to an earlier x0_i (to the new one, r = 1, in the corrector), both are

        x_s = (sigma_s / sigma_t) x + alpha_s ((1 - e^-h) x0 + sum_i w_i D_i),

    the w_i such that polynomials of x0 are integrated exactly: sum_i w_i r_i^(n-1) = h n! phi_(n+1)(-h). A single D
    has weight B(h) / 2 with B(h) = 1 - e^-h ("bh2") or h ("bh1"). The carry is the mended x with its scales and order,
    and the last solver_order data predictions. ValueError for another solver_order or solver_type.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> from lcm_jax.diffusion.schedules import RectifiedFlow
    >>> from lcm_jax.diffusion.solvers import UniPC
    >>> from lcm_jax.typing import Prediction
    >>> x = jnp.full((1, 1, 1, 1), 2.0)
    >>> perfect = lambda x, t, s=None: Prediction(jnp.ones_like(x), 3.0 * jnp.ones_like(x))  # x0 1, eps 3
    >>> solver = UniPC()
    >>> x, carry = solver.step(perfect, RectifiedFlow(), x, 0.5, 0.25, solver.init(x), jax.random.key(0))
    >>> round(float(x.squeeze()), 4)
    1.5
    """

    evaluations: ClassVar[int] = 1
    stochastic: ClassVar[bool] = False

    solver_order: int = 2
    solver_type: str = "bh2"

    def __post_init__(self) -> None:
        _check_order(self.solver_order, 3)
        _check_type(self.solver_type, ("bh1", "bh2"))

    @property
    def order(self) -> int:
        return max(self.solver_order, 2)  # the corrector's, where a single D has half a weight

    def init(self, x: Image) -> Carry:
        last = (x, jnp.ones(x.shape[:1]), jnp.ones(x.shape[:1]), jnp.ones(x.shape[:1]))  # x, alpha, sigma, order
        return last, _nodes(x, self.solver_order)

    def step(
        self, denoise: Denoiser, schedule: Schedule, x: Image, t: Time, s: Time, carry: Carry, key: Key | Image
    ) -> tuple[Image, Carry]:
        (x_r, alpha_r, sigma_r, order_r), nodes = carry
        (alpha_t, sigma_t), (alpha_s, sigma_s) = scales(schedule, t, x), scales(schedule, s, x)
        lambda_t, lambda_s = finite_log_snr(schedule, t, x), finite_log_snr(schedule, s, x)
        x0 = denoise(x, t).x0

        began = _there(nodes[0])
        h = jnp.where(began, lambda_t - nodes[0][1], 1.0)
        bend = self._bend(h, nodes[0], ((x0, lambda_t), *nodes[1:]), order_r)
        mended = _first_order((x_r, expand(alpha_r, x), expand(sigma_r, x)), (alpha_t, sigma_t), nodes[0][0])
        x = jnp.where(expand(began, x), mended + alpha_t * bend, x)

        there = sum((jnp.where(_there(node), 1.0, 0.0) for node in nodes), jnp.ones_like(lambda_t))
        order = jnp.minimum(highest_order(schedule, t, x, self.solver_order), there)
        finite = jnp.isfinite(lambda_s)
        order = jnp.where(finite, order, 1.0)
        h = jnp.where(finite, lambda_s - lambda_t, 1.0)
        bend = self._bend(h, (x0, lambda_t), nodes[: self.solver_order - 1], order - 1.0)
        moved = _first_order((x, alpha_t, sigma_t), (alpha_s, sigma_s), x0) + alpha_s * bend

        row = (jnp.broadcast_to(jnp.ravel(value), order.shape) for value in (alpha_t, sigma_t))
        return moved, ((x, *row, order), ((x0, lambda_t), *nodes)[: self.solver_order])

    def _bend(self, h: Float[Array, " b"], base: Node, others: tuple[Node, ...], count: Float[Array, " b"]) -> Image:
        """Return sum_i w_i D_i over the first `count` of the other nodes, by row."""
        h = jnp.where(h == 0.0, 1e-6, h)
        bend = jnp.zeros_like(base[0])
        moments = [h * math.factorial(n) * phi(n + 1, -h) for n in range(1, len(others) + 1)]
        half = 0.5 * (-jnp.expm1(-h) if self.solver_type == "bh2" else h)
        for n in range(1, len(others) + 1):
            used = (count == n) & _all_there(others[:n])
            r = [jnp.where(used, (node[1] - base[1]) / h, float(i + 1)) for i, node in enumerate(others[:n])]
            weights = [half] if n == 1 else _vandermonde(r, moments[:n])
            bends = [
                expand(w / r_i, base[0]) * (node[0] - base[0])
                for w, r_i, node in zip(weights, r, others[:n], strict=True)
            ]
            bend = jnp.where(expand(used, base[0]), sum(bends[1:], bends[0]), bend)
        return bend


def _first_order(start: tuple[Image, Array, Array], end: tuple[Array, Array], x0: Image) -> Image:
    """Return (sigma_s / sigma_t) x + alpha_s (1 - e^-h) x0 from (x, alpha_t, sigma_t) to (alpha_s, sigma_s)."""
    (x, alpha_t, sigma_t), (alpha_s, sigma_s) = start, end
    ratio = sigma_s / sigma_t
    return ratio * x + (alpha_s - ratio * alpha_t) * x0


def _all_there(nodes: tuple[Node, ...]) -> Bool[Array, " b"]:
    there = _there(nodes[0])
    for node in nodes[1:]:
        there &= _there(node)
    return there


def _vandermonde(r: list[Array], moments: list[Array]) -> list[Array]:
    """Return the weights w of two or three nodes r with sum_i w_i r_i^(n - 1) = moments[n - 1]."""
    if len(r) == 2:
        (a, b), (m_1, m_2) = r, moments
        return [(m_1 * b - m_2) / (b - a), (m_2 - m_1 * a) / (b - a)]
    m_1, m_2, m_3 = moments
    weights = []
    for i in range(3):
        a, b = (r[j] for j in range(3) if j != i)
        weights.append((m_3 - m_2 * (a + b) + m_1 * a * b) / ((r[i] - a) * (r[i] - b)))
    return weights


@dataclass(frozen=True, kw_only=True)
class LMS:
    """The linear multistep method (Katherine Crowson's k-diffusion): Adams-Bashforth on a grid that is not even.

    In y = x / (alpha + k sigma) over tau = sigma / (alpha + k sigma), where k is the schedule's gauge (see `Heun`), the
    derivative eps - k x0 is the polynomial through the last solver_order of them, integrated exactly. One evaluation a
    step, finite at the clean end. The first steps are of a lower order. ValueError for a solver_order beyond 4.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> from lcm_jax.diffusion.schedules import RectifiedFlow
    >>> from lcm_jax.diffusion.solvers import LMS
    >>> from lcm_jax.typing import Prediction
    >>> x = jnp.full((1, 1, 1, 1), 2.0)
    >>> perfect = lambda x, t, s=None: Prediction(jnp.ones_like(x), 3.0 * jnp.ones_like(x))  # x0 1, eps 3
    >>> solver = LMS()
    >>> x, carry = solver.step(perfect, RectifiedFlow(), x, 0.5, 0.25, solver.init(x), jax.random.key(0))
    >>> round(float(x.squeeze()), 4)
    1.5
    """

    order: ClassVar[int] = 2  # of the first steps; from then on the error falls with solver_order
    evaluations: ClassVar[int] = 1
    stochastic: ClassVar[bool] = False

    solver_order: int = 4

    def __post_init__(self) -> None:
        _check_order(self.solver_order, 4)

    def init(self, x: Image) -> Carry:
        return _nodes(x, self.solver_order - 1)

    def step(
        self, denoise: Denoiser, schedule: Schedule, x: Image, t: Time, s: Time, carry: Carry, key: Key | Image
    ) -> tuple[Image, Carry]:
        k = schedule.gauge
        prediction = denoise(x, t)
        (alpha_t, sigma_t), (alpha_s, sigma_s) = scales(schedule, t, x), scales(schedule, s, x)
        rows = x.shape[:1]
        tau_t, tau_s = (
            jnp.broadcast_to(jnp.ravel(sigma / (alpha + k * sigma)), rows)
            for alpha, sigma in ((alpha_t, sigma_t), (alpha_s, sigma_s))
        )
        now = (prediction.eps - k * prediction.x0, tau_t)
        nodes = (now, *carry)
        weights = _lagrange_weights([tau for _, tau in nodes], tau_t, tau_s)
        change = sum((expand(w, x) * (d - now[0]) for w, (d, _) in zip(weights[1:], carry, strict=True)), 0.0 * x)
        moved = move(prediction, alpha_s, sigma_s) + (alpha_s + k * sigma_s) * change
        return moved, nodes[: self.solver_order - 1]


def _lagrange_weights(nodes: list[Array], start: Array, end: Array) -> list[Array]:
    """Return the integrals from start to end of the Lagrange polynomials of the nodes that are there, 0 for the others.

    Two Gauss points are exact up to cubics, so up to four nodes. A node that is not apart from the one after it counts
    as absent, with all before it.
    """
    there = [jnp.isfinite(nodes[0])]
    for newer, node in pairwise(nodes):
        there.append(there[-1] & jnp.isfinite(node) & (node != newer))
    weights = []
    for i, node in enumerate(nodes):
        integral = jnp.zeros_like(start)
        for place in (0.5 - math.sqrt(3.0) / 6.0, 0.5 + math.sqrt(3.0) / 6.0):
            point, product = start + place * (end - start), jnp.ones_like(start)
            for j, other in enumerate(nodes):
                if j != i:
                    used = there[i] & there[j]
                    product *= jnp.where(used, point - other, 1.0) / jnp.where(used, node - other, 1.0)
            integral += 0.5 * product
        weights.append(jnp.where(there[i], (end - start) * integral, 0.0))
    return weights


@dataclass(frozen=True, kw_only=True)
class PLMS:
    """The pseudo linear multistep method (Liu et al. 2022, 2202.09778) without Runge-Kutta steps, SD 1's own (PNDM).

    The network's last four outputs, with the weights of Adams-Bashforth on an even grid, take the place of its output
    in DDIM's step. kind: what is averaged, the output itself; to DDIM's step it then means what it means at x.

    A step of no length after the first (t = s) takes the first again, with the mean of both outputs: the grid of the
    sampler repeats its second time for it. The carry is the first x with its scales, the number of steps and the last
    three outputs.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> from lcm_jax.diffusion.schedules import RectifiedFlow
    >>> from lcm_jax.diffusion.solvers import PLMS
    >>> from lcm_jax.typing import Prediction
    >>> x = jnp.full((1, 1, 1, 1), 2.0)
    >>> perfect = lambda x, t, s=None: Prediction(jnp.ones_like(x), 3.0 * jnp.ones_like(x))  # x0 1, eps 3
    >>> solver = PLMS()
    >>> x, carry = solver.step(perfect, RectifiedFlow(), x, 0.5, 0.25, solver.init(x), jax.random.key(0))
    >>> round(float(x.squeeze()), 4)
    1.5
    """

    order: ClassVar[int] = 2  # the weights are of order 4 where sigma / alpha is even in time, which it is not
    evaluations: ClassVar[int] = 1
    stochastic: ClassVar[bool] = False

    kind: Kind = "epsilon"

    def init(self, x: Image) -> Carry:
        first = (x, jnp.ones(x.shape[:1]), jnp.ones(x.shape[:1]))  # x, alpha, sigma
        return first, jnp.zeros(x.shape[:1]), (jnp.zeros_like(x),) * 3

    def step(
        self, denoise: Denoiser, schedule: Schedule, x: Image, t: Time, s: Time, carry: Carry, key: Key | Image
    ) -> tuple[Image, Carry]:
        (x_0, alpha_0, sigma_0), count, outputs = carry
        alpha_s, sigma_s = scales(schedule, s, x)
        rows = count.shape
        alpha_t, sigma_t, t_rows, s_rows = (
            jnp.broadcast_to(jnp.asarray(value, jnp.float32), rows)
            for value in (schedule.alpha(t), schedule.sigma(t), t, s)
        )
        prediction = denoise(x, t)
        a, b = prediction_coefficients(self.kind, expand(alpha_t, x), expand(sigma_t, x))
        y, (y_1, y_2, y_3) = a * prediction.x0 + b * prediction.eps, outputs

        again = (count == 1.0) & (t_rows == s_rows)
        means = (
            y,
            (3.0 * y - y_1) / 2.0,
            (23.0 * y - 16.0 * y_1 + 5.0 * y_2) / 12.0,
            (55.0 * y - 59.0 * y_1 + 37.0 * y_2 - 9.0 * y_3) / 24.0,
        )
        mean = means[3]
        for i in range(3):
            mean = jnp.where(expand(count == i, x), means[i], mean)
        mean = jnp.where(expand(again, x), 0.5 * (y + y_1), mean)
        start, alpha, sigma = (
            jnp.where(expand(again, new), old, new) for old, new in ((x_0, x), (alpha_0, alpha_t), (sigma_0, sigma_t))
        )
        began = count == 0.0
        averaged = move(to_prediction(self.kind, mean, start, alpha, sigma), alpha_s, sigma_s)
        moved = jnp.where(expand(began, x), move(prediction, alpha_s, sigma_s), averaged)
        first = tuple(
            jnp.where(expand(began, new), new, old) for old, new in ((x_0, x), (alpha_0, alpha_t), (sigma_0, sigma_t))
        )
        kept = tuple(jnp.where(expand(again, x), old, new) for old, new in zip(outputs, (y, y_1, y_2), strict=True))
        return moved, (first, jnp.where(again, count, count + 1.0), kept)
