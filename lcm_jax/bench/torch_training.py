"""The peer of a training step: latent consistency distillation of diffusers' UNet in PyTorch.

Luo et al. 2023 (arXiv:2310.04378), algorithm 1. It does what diffusers' published script does
(examples/consistency_distillation), with two differences that make the peer faster: the teacher is evaluated once, on
twice the batch, and the moving average is updated by one call for all parameters.
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
    """The random draws for a batch, as tensors: latents and noise (b, c, h, w), times t > s and guidance w (b,)."""

    x0: Any
    eps: Any
    t: Any
    s: Any
    w: Any


class Distillation:
    """The training of a student, which is a network or adapters on the teacher, from a teacher that predicts noise.

    The loss is the objective's l2. The target is the moving average of a network; adapters are their own target.
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
        """Build the peer's networks with the weights of ours.

        cond, null: "context" of the batch (b, l, d) and of the empty prompt (1, l, d). dtype: the precision of the
        computation. peer: one of `peers.PEERS`.
        """
        torch = self._torch = peers.pytorch()
        self._objective = objective
        schedule = objective.schedule
        times = jnp.arange(schedule.t_max + 1)
        self._alpha, self._sigma = (peers.tensor(level(times), "float32") for level in (schedule.alpha, schedule.sigma))
        self._context = peers.tensor(cond["context"], "float32")
        self._both = torch.cat([peers.tensor(null["context"], "float32").expand_as(self._context), self._context])
        self._embeds_w = isinstance(student, Component)  # adapters are trained for one w, so it is no input
        if isinstance(student, Component):
            self.teacher = peers.network(teacher, dtype, peer).requires_grad_(False)
            self.student, self.target = (peers.network(student, "float32", peer) for _ in range(2))
            self.target.requires_grad_(False)
        else:
            self.student = self.target = self.teacher = peers.network(teacher, dtype, peer, student)
            for name, parameter in self.student.named_parameters():
                parameter.requires_grad_("lora_" in name)
        named = self.student.named_parameters()
        self.trained = {name: parameter for name, parameter in named if parameter.requires_grad}
        for parameter in self.trained.values():
            parameter.data = parameter.data.float()
        self._tx = torch.optim.AdamW(self.trained.values(), lr=1e-5)
        half = dtype != "float32"
        self._precision = (
            (lambda: torch.autocast(peers.put_on_device(), getattr(torch, dtype))) if half else nullcontext
        )

    def __call__(self, mean: Any, std: Any) -> float:
        """Take a step on latents of this mean and deviation: loss, gradient, AdamW, moving average; return the loss."""
        torch = self._torch
        with torch.enable_grad(), self._precision():
            loss = self.loss(self.draw(mean, std))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.trained.values(), 1.0)
        self._tx.step()
        self._tx.zero_grad(set_to_none=True)
        if self._embeds_w:
            torch._foreach_lerp_(list(self.target.parameters()), list(self.student.parameters()), 1.0 - DECAY)
        return float(loss)

    def draw(self, mean: Any, std: Any) -> Draw:
        """Draw latents, noise, times and guidance from the distributions that the objective uses."""
        torch, objective = self._torch, self._objective
        (n, *_), device = mean.shape, mean.device
        index = torch.randint(1, objective.grid_points + 1, (n,), device=device)
        skip = (round(objective.schedule.t_max) + 1) // objective.grid_points
        t = index * skip - 1
        w = objective.w_min + (objective.w_max - objective.w_min) * torch.rand(n, device=device)
        return Draw(mean + std * torch.randn_like(mean), torch.randn_like(mean), t, (t - skip).clamp(min=0), w)

    def loss(self, draw: Draw) -> Any:
        """Return the loss |f(z_t, w, c, t) - f^-(z_s, w, c, s)|^2, where f^- is the target."""
        z = self._level(self._alpha, draw.t) * draw.x0 + self._level(self._sigma, draw.t) * draw.eps
        with self._torch.no_grad():
            z_s = self._earlier(z, draw)
            target = self._solution(self.target, z_s, draw.s, draw.w)
        return ((self._solution(self.student, z, draw.t, draw.w) - target) ** 2).mean()

    def _level(self, table: Any, t: Any) -> Any:
        return table[t][:, None, None, None]

    def _earlier(self, z: Any, draw: Draw) -> Any:
        """Return z_s by one DDIM step of the guided teacher."""
        inputs = self._torch.cat([z, z]), self._torch.cat([draw.t, draw.t])
        if not self._embeds_w:
            self.teacher.disable_adapters()
        null, eps = self.teacher(*inputs, encoder_hidden_states=self._both).sample.float().chunk(2)
        if not self._embeds_w:
            self.teacher.enable_adapters()
        eps = eps + draw.w[:, None, None, None] * (eps - null)
        x0 = (z - self._level(self._sigma, draw.t) * eps) / self._level(self._alpha, draw.t)
        return self._level(self._alpha, draw.s) * x0 + self._level(self._sigma, draw.s) * eps

    def _solution(self, net: Any, z: Any, t: Any, w: Any) -> Any:
        """Return f(z, w, c, t) = c_skip z + c_out x0 (equation 9)."""
        objective = self._objective
        embedded = {"timestep_cond": self._embedded(w)} if self._embeds_w else {}
        eps = net(z, t, encoder_hidden_states=self._context, **embedded).sample.float()
        x0 = (z - self._level(self._sigma, t) * eps) / self._level(self._alpha, t)
        u = (objective.timestep_scaling * t.float())[:, None, None, None]
        square = u**2 + objective.sigma_data**2
        return objective.sigma_data**2 / square * z + u / square.sqrt() * x0

    def _embedded(self, w: Any) -> Any:
        """Return the sinusoidal embedding of 1000 w (section 4.3)."""
        half = self.student.config.time_cond_proj_dim // 2
        angle = 1000.0 * w[:, None] * peers.tensor(1e4 ** (-np.arange(half) / (half - 1)), "float32")
        return self._torch.cat([angle.sin(), angle.cos()], dim=1)
