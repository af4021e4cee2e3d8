"""A task in a file of your own: a small network that learns to count the dark pixels of a picture.

Its config is named on the command line:

    lcm-jax train --config docs/examples/own_task.py:count_dark --steps 100
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from lcm_jax.train.config import TrainConfig
from lcm_jax.train.loop import LoopConfig
from lcm_jax.train.task import Task
from lcm_jax.train.tasks.common import DataConfig, loader
from lcm_jax.typing import Array, Params


class Counter(nn.Module):
    """Images (b, h, w, 3) in [0, 1] -> the share of dark pixels (b,)."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = nn.relu(nn.Conv(8, (1, 1))(x))
        return nn.Dense(1)(x.mean((1, 2)))[:, 0]


@dataclass(frozen=True, kw_only=True)
class CountTask:
    """The fields are keys of the command line: `--task.data.name folder:my-pictures`."""

    data: DataConfig = DataConfig()

    def build(self) -> Task:
        """Return what the loop needs. Raise every error here, before any long work starts."""
        net, source = Counter(), self.data.open()

        def loss(
            params: Params, ema: Params, frozen: Params, batch: Any, key: Array, progress: Any
        ) -> tuple[Array, dict[str, Array]]:
            images = batch["image"].astype(jnp.float32) / 255.0
            dark = (images.mean(-1) < 0.5).mean((1, 2))
            value = jnp.mean(jnp.square(net.apply({"params": params}, images) - dark))
            return value, {"loss": value}

        def export(ema: Params, path: Path) -> None:
            path.mkdir(parents=True, exist_ok=True)
            flat = {"/".join(k.key for k in keys): np.asarray(leaf) for keys, leaf in jax.tree.leaves_with_path(ema)}
            save_file(flat, path / "model.safetensors")

        return Task(
            init=lambda key: net.init(key, jnp.zeros((1, self.data.size, self.data.size, 3)))["params"],
            loss=loss,
            frozen={},
            batches=loader(source, transform=lambda record: {"image": record["image"]}),
            preview=lambda ema, frozen, batched_map: {},
            export=export,
        )


count_dark = TrainConfig(task=CountTask(), loop=LoopConfig(steps=200, batch_size=8, ema=0.95))
