"""A few-step method in a file of your own: reflow, which straightens a teacher's trajectories.

Liu et al. 2022 (2209.03003, Alg. 1) and InstaFlow (2309.06380): the student learns the diffusion (or flow) loss on
pairs of a noise and the sample that the guided teacher draws from it, in place of independent noise and data.

    lcm-jax distill --config docs/examples/own_method.py:reflow_openmoji
    lcm-jax distill --config openmoji_lcm --import docs/examples/own_method.py --objective reflow
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from lcm_jax import configs
from lcm_jax.diffusion.parameterization import add_noise, flow_map, output, target
from lcm_jax.objectives import FewStep, RandomKeys, register
from lcm_jax.objectives.terms import frozen
from lcm_jax.train.config import TrainConfig
from lcm_jax.typing import Array, Key, Nets


@register("reflow")
@dataclass(frozen=True, kw_only=True)
class Reflow(FewStep):
    """E |net(z_t) - y_t|^2 with z_t = alpha x + sigma eps, where x is the teacher's sample from eps.

    solver_steps: DDIM steps of the teacher, from pure noise to the clean end.
    """

    sampler: ClassVar[str] = "ddim"  # the sampler that draws with the student

    solver_steps: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.solver_steps < 1:
            raise ValueError(f"solver_steps={self.solver_steps} must be positive")

    def __call__(self, nets: Nets, batch: dict[str, Any], key: Key) -> tuple[Array, dict[str, Array]]:
        """Return the loss and scalar metrics of a batch; of its images only the shape is used."""
        _, eps, cond, student_cond, w = self.draw(nets, batch, key)
        teacher = self.teacher(nets, cond, w)
        x = self.schedule.sigma(self.schedule.t_max) * eps
        times = [self.at(jnp.full(w.shape, 1.0 - i / self.solver_steps)) for i in range(self.solver_steps + 1)]
        for t, s in pairwise(times):
            x = flow_map(teacher, self.schedule, x, t, s)
        x = frozen(x)
        t = self.at(jax.random.uniform(RandomKeys.of(key).time, w.shape, minval=0.02, maxval=0.98))
        z = add_noise(self.schedule, x, eps, t)
        y = output(nets.apply, nets.student, z, t, student_cond, schedule=self.schedule, kind=self.kind)
        wanted = target(self.kind, x, eps, self.schedule.alpha(t), self.schedule.sigma(t))
        loss = jnp.mean(jnp.square(y - wanted))
        return loss, {"loss": loss, "error": jnp.mean(jnp.abs(y - wanted))}


def reflow_openmoji() -> TrainConfig:
    """Reflow of the bundled teacher: the networks, data and loop of `openmoji_lcm`."""
    return configs.with_method(configs.get("openmoji_lcm"), "reflow", "openmoji_lcm")
