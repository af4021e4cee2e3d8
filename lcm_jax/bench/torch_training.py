"""The peer of a training step: latent consistency distillation of diffusers' UNet in PyTorch (2310.04378, alg. 1).

It does what diffusers' published script does (examples/consistency_distillation), but that the teacher is asked once,
of twice the rows, and the average is moved by one call for all parameters, which is to the peer's advantage.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from lcm_jax.bench import peers
from lcm_jax.lora import Adapters
from lcm_jax.objectives import LatentConsistencyDistillation
from lcm_jax.typing import Cond
from lcm_jax.weights.diffusers_folder import Component

DECAY = 0.95


class Draw(NamedTuple):
    """What is drawn for a batch, as tensors: latents and noise (b, c, h, w), times t > s and guidance w (b,)."""

    x0: Any
    eps: Any
    t: Any
    s: Any
    w: Any


class Distillation:
    """A student of a teacher that predicts noise: a network, or adapters on the teacher.

    cond, null: "context" of the batch (b, l, d) and of the empty prompt (1, l, d). The loss is the objective's l2; the
    target is the average, of adapters the student itself.
    """

    def __init__(
        self,
        teacher: Component,
        student: Component | Adapters,
        objective: LatentConsistencyDistillation,
        cond: Cond,
        null: Cond,
        *,
        dtype: str = "float32",
        peer: str = "diffusers",
    ) -> None:
        torch = self._torch = peers.pytorch()
        self._objective = objective
        schedule = objective.schedule
        times = jnp.arange(schedule.t_max + 1)
        self._alpha, self._sigma = (peers.tensor(level(times), "float32") for level in (schedule.alpha, schedule.sigma))
        self._context = peers.tensor(cond["context"], "float32")
        self._both = torch.cat([peers.tensor(null["context"], "float32").expand_as(self._context), self._context])
        self._told = isinstance(student, Component)
        if isinstance(student, Component):
            self.teacher = peers.network(teacher, dtype, peer).requires_grad_(False)
            self.student, self.target = (peers.network(student, "float32", peer) for _ in range(2))
            self.target.requires_grad_(False)
        else:
            self.student = self.target = self.teacher = peers.network(teacher, dtype, peer, student)
            for name, own in self.student.named_parameters():
                own.requires_grad_("lora_" in name)
        self.trained = {name: own for name, own in self.student.named_parameters() if own.requires_grad}
        for own in self.trained.values():
            own.data = own.data.float()
        self._tx = torch.optim.AdamW(self.trained.values(), lr=1e-5)
        half = dtype != "float32"
        self._precision = (
            (lambda: torch.autocast(peers.put_on_device(), getattr(torch, dtype))) if half else nullcontext
        )

    def __call__(self, mean: Any, std: Any) -> float:
        """A step on pictures of these latents: loss, gradient, AdamW, and the moving average."""
        torch = self._torch
        with torch.enable_grad(), self._precision():
            loss = self.loss(self.draw(mean, std))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.trained.values(), 1.0)
        self._tx.step()
        self._tx.zero_grad(set_to_none=True)
        if self._told:
            torch._foreach_lerp_(list(self.target.parameters()), list(self.student.parameters()), 1.0 - DECAY)
        return float(loss)

    def draw(self, mean: Any, std: Any) -> Draw:
        """As the objective draws."""
        torch, own = self._torch, self._objective
        (n, *_), where = mean.shape, mean.device
        index = torch.randint(1, own.grid_points + 1, (n,), device=where)
        skip = (round(own.schedule.t_max) + 1) // own.grid_points
        t = index * skip - 1
        w = own.w_min + (own.w_max - own.w_min) * torch.rand(n, device=where)
        return Draw(mean + std * torch.randn_like(mean), torch.randn_like(mean), t, (t - skip).clamp(min=0), w)

    def loss(self, draw: Draw) -> Any:
        """|f(z_t, w, c, t) - f^-(z_s, w, c, s)|^2."""
        z = self._level(self._alpha, draw.t) * draw.x0 + self._level(self._sigma, draw.t) * draw.eps
        with self._torch.no_grad():
            z_s = self._earlier(z, draw)
            target = self._solution(self.target, z_s, draw.s, draw.w)
        return ((self._solution(self.student, z, draw.t, draw.w) - target) ** 2).mean()

    def _level(self, table: Any, t: Any) -> Any:
        return table[t][:, None, None, None]

    def _earlier(self, z: Any, draw: Draw) -> Any:
        """z_s by one DDIM step of the guided teacher."""
        twice = self._torch.cat([z, z]), self._torch.cat([draw.t, draw.t])
        if not self._told:
            self.teacher.disable_adapters()
        null, eps = self.teacher(*twice, encoder_hidden_states=self._both).sample.float().chunk(2)
        if not self._told:
            self.teacher.enable_adapters()
        eps = eps + draw.w[:, None, None, None] * (eps - null)
        x0 = (z - self._level(self._sigma, draw.t) * eps) / self._level(self._alpha, draw.t)
        return self._level(self._alpha, draw.s) * x0 + self._level(self._sigma, draw.s) * eps

    def _solution(self, net: Any, z: Any, t: Any, w: Any) -> Any:
        """f(z, w, c, t) = c_skip z + c_out x0 (equation 9)."""
        own = self._objective
        told = {"timestep_cond": self._embedded(w)} if self._told else {}
        eps = net(z, t, encoder_hidden_states=self._context, **told).sample.float()
        x0 = (z - self._level(self._sigma, t) * eps) / self._level(self._alpha, t)
        u = (own.timestep_scaling * t.float())[:, None, None, None]
        square = u**2 + own.sigma_data**2
        return own.sigma_data**2 / square * z + u / square.sqrt() * x0

    def _embedded(self, w: Any) -> Any:
        """The sinusoid of 1000 w (section 4.3)."""
        half = self.student.config.time_cond_proj_dim // 2
        angle = 1000.0 * w[:, None] * peers.tensor(1e4 ** (-np.arange(half) / (half - 1)), "float32")
        return self._torch.cat([angle.sin(), angle.cos()], dim=1)
