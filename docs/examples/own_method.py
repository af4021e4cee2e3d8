"""A few-step method in a file of your own: knowledge distillation, a student that draws its teacher's picture at once.

Luhman and Luhman 2021 (2101.02388, eq. 4): the student, given the noise at the first time, learns the picture that the
guided teacher draws from the same noise in several DDIM steps.

    lcm-jax distill --config docs/examples/own_method.py:kd_openmoji
    lcm-jax distill --config openmoji_lcm --import docs/examples/own_method.py --objective kd
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

import jax.numpy as jnp

from lcm_jax import configs
from lcm_jax.diffusion.parameterization import flow_map
from lcm_jax.objectives import FewStep, register
from lcm_jax.objectives.terms import frozen
from lcm_jax.train.config import TrainConfig
from lcm_jax.typing import Array, Key, Nets


@register("kd")
@dataclass(frozen=True, kw_only=True)
class KnowledgeDistillation(FewStep):
    """E |x0(eps, t_max) - x|^2, where x is the teacher's picture from the noise eps.

    solver_steps: DDIM steps of the teacher, from pure noise to the clean end.
    """

    sampler: ClassVar[str] = "flow_map"  # the sampler that draws with the student, in one step

    solver_steps: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.solver_steps < 1:
            raise ValueError(f"solver_steps={self.solver_steps} must be positive")

    def __call__(self, nets: Nets, batch: dict[str, Any], key: Key) -> tuple[Array, dict[str, Array]]:
        """Return the loss and scalar metrics of a batch; of its images only the shape is used."""
        _, eps, cond, student_cond, w = self.draw(nets, batch, key)
        teacher, x = self.teacher(nets, cond, w), eps
        times = [self.at(jnp.full(w.shape, 1.0 - i / self.solver_steps)) for i in range(self.solver_steps + 1)]
        for t, s in pairwise(times):
            x = flow_map(teacher, self.schedule, x, t, s)
        difference = self.student(nets, nets.student, student_cond)(eps, times[0]).x0 - frozen(x)
        loss = jnp.mean(jnp.square(difference))
        return loss, {"loss": loss, "error": jnp.mean(jnp.abs(difference))}


def kd_openmoji() -> TrainConfig:
    """Knowledge distillation of the bundled teacher: the networks, data and loop of `openmoji_lcm`."""
    return configs.with_method(configs.get("openmoji_lcm"), "kd", "openmoji_lcm")
