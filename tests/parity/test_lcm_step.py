"""One training step of LCM against PyTorch, written from the equations of the paper (2310.04378): loss and gradient."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lcm_jax.diffusion.schedules import DDPM
from lcm_jax.objectives import LatentConsistencyDistillation
from lcm_jax.typing import Array, Cond, Image, Nets, Params

torch = pytest.importorskip("torch")

BETAS = np.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=np.float64) ** 2
SCHEDULE = DDPM(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
N, SHAPE, CONTEXT = 6, (3, 3, 2), 5
RNG = np.random.default_rng(0)
WEIGHTS = {
    "x": RNG.normal(size=(2, 2)) * 0.7,
    "c": RNG.normal(size=(CONTEXT, 2)) * 0.5,
    "w": RNG.normal(size=(2,)) * 0.2,
    "t": RNG.normal(size=(2,)) * 0.5,
}


def net(xp: Any, p: Any, x: Any, t: Any, context: Any, w: Any) -> Any:
    """A small nonlinear network of x (n, h, w, 2), t (n,), context (n, 5) and guidance w (n,) or 0."""
    shift = context @ p["c"] + (t / 500.0 - 1.0)[:, None] * p["t"] + w * p["w"]
    return xp.tanh(x @ p["x"] + shift[:, None, None])


def apply(params: Params, x: Image, t: Array, cond: Cond) -> Image:
    w = cond["guidance"][:, None] if "guidance" in cond else 0.0
    return net(jnp, params, x, jnp.broadcast_to(t, x.shape[:1]), cond["context"], w)


def oracle(kind: str, x0: Any, eps: Any, t: Any, s: Any, w: Any, context: Any, null: Any, huber: float | None) -> Any:
    """Loss and gradient of Algorithm 1 with DDIM as Psi (Eq. 9, 14, 17), in float64."""
    alpha_bar = torch.cumprod(1 - torch.tensor(BETAS), 0)
    student, target, teacher = (
        {k: torch.tensor(v * f, requires_grad=f == 1.1) for k, v in WEIGHTS.items()} for f in (1.1, 0.9, 1.0)
    )

    def scales(u: Any) -> Any:
        a = alpha_bar[u.long()].sqrt()[:, None, None, None]
        return a, (1 - a**2).sqrt()

    def both(y: Any, z: Any, u: Any) -> Any:
        a, b = scales(u)
        return ((z - b * y) / a, y) if kind == "epsilon" else (a * z - b * y, b * z + a * y)

    def f(p: Any, z: Any, u: Any) -> Any:
        c = (10.0 * u)[:, None, None, None]
        x0hat, _ = both(net(torch, p, z, u, context, w[:, None]), z, u)
        return 0.25 / (c**2 + 0.25) * z + c / (c**2 + 0.25).sqrt() * x0hat

    a, b = scales(t)
    z = a * x0 + b * eps
    cond, uncond = (both(net(torch, teacher, z, t, text, 0.0), z, t) for text in (context, null.expand(N, -1)))
    rows = w[:, None, None, None]
    x0_w, eps_w = (c + rows * (c - u) for c, u in zip(cond, uncond, strict=True))
    a_s, b_s = scales(s)
    z_s = a_s * x0_w + b_s * eps_w
    d = f(student, z, t) - f(target, z_s, s).detach()
    loss = (d**2).mean() if huber is None else ((d**2 + huber**2).sqrt() - huber).mean()
    loss.backward()
    return loss.item(), {k: v.grad.numpy() for k, v in student.items()}


@pytest.mark.parametrize("huber", [None, 1e-3])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_loss_and_gradient_of_a_training_step(kind: Any, huber: float | None) -> None:
    objective = LatentConsistencyDistillation(
        schedule=SCHEDULE, kind=kind, loss="l2" if huber is None else "huber", huber_c=huber or 1e-3
    )
    x0, context = RNG.normal(size=(N, *SHAPE)), RNG.normal(size=(N, CONTEXT))
    null = RNG.normal(size=(1, CONTEXT))
    trees = ({k: jnp.asarray(v * f, jnp.float32) for k, v in WEIGHTS.items()} for f in (1.1, 0.9, 1.0))
    student, target, teacher = trees
    batch = {"x0": jnp.asarray(x0, jnp.float32), "cond": {"context": jnp.asarray(context, jnp.float32)}}
    nets = Nets(apply, student, target, teacher, {"context": jnp.asarray(null, jnp.float32)})
    key = jax.random.key(3)
    draw, (t, s) = objective.draw(nets, batch, key), objective.times(jax.random.split(key, 4)[0], N)
    drawn = {name: torch.tensor(np.asarray(value, np.float64)) for name, value in (("eps", draw.eps), ("w", draw.w))}
    times = [torch.tensor(np.asarray(u, np.float64)) for u in (t, s)]
    want, wanted = oracle(
        kind, torch.tensor(x0), drawn["eps"], *times, drawn["w"], torch.tensor(context), torch.tensor(null), huber
    )
    loss, grads = jax.jit(jax.value_and_grad(lambda p: objective(nets._replace(student=p), batch, key)[0]))(student)
    np.testing.assert_allclose(loss, want, rtol=1e-4)
    for name, grad in grads.items():
        np.testing.assert_allclose(grad, wanted[name], rtol=1e-4, atol=1e-4 * np.abs(wanted[name]).max())
