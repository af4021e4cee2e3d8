"""A study of DiT, UViT, CrossDiT and MMDiT of one width and depth on the same data: figure 4 of arXiv:2403.03206.

python experiments/sd3/architectures.py --scale tiny --seeds 0 1 2
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
from training import TRAININGS, score

from lcm_jax.configs.sd3_formulations import FORMULATIONS
from lcm_jax.evaluation.study import Cells, Column, Scores, Study, curves, main, points
from lcm_jax.train.config import TrainConfig
from lcm_jax.weights.safetensors_files import read_json
from mmdit import CrossDiTConfig, DiTConfig, MMDiTConfig, UViTConfig

RECTIFIED_FLOW = FORMULATIONS["rf/lognorm(0,1)"]
NETWORKS = {"DiT": DiTConfig, "UViT": UViTConfig, "CrossDiT": CrossDiTConfig, "MMDiT": MMDiTConfig}
ORDER = ("MMDiT", "CrossDiT", "UViT", "DiT")  # the paper's order by validation loss, best first
SETTING = (25, 5.0)  # steps and guidance scale


def variant(kind: type[MMDiTConfig], scale: str) -> TrainConfig:
    """Return the training of a network of this kind on a rectified flow."""
    return TRAININGS[scale](kind, RECTIFIED_FLOW.objective)


def measure(name: str, config: TrainConfig, workdir: Path) -> Scores:
    """Return the last validation loss, Frechet distance and CLIP score."""
    previews = read_json(workdir / "previews.json")
    last = max(previews, key=int)
    scores = score(config, workdir, RECTIFIED_FLOW, [SETTING])
    return {"validation_loss": previews[last]["validation_loss"], **scores}


def plot(study: Study, cells: Cells) -> None:
    """Plot the validation loss over training, and the two scores at its end."""
    _, panels = plt.subplots(1, 3, figsize=(14, 4), layout="constrained")
    curves(panels[0], cells, "validation_loss")
    panels[0].legend()
    for axes, column in zip(panels[1:], study.columns[1:], strict=True):
        points(axes, cells, column)


NAME = "{}/{:g}".format(*SETTING)
STUDY = Study(
    name="architectures",
    about=__doc__ or "",
    variants={name: partial(variant, kind) for name, kind in NETWORKS.items()},
    measure=measure,
    columns=[
        Column(key="validation_loss", title="validation loss", paper=ORDER),
        Column(key=f"frechet/{NAME}", title="Frechet distance", paper=None),
        Column(key=f"clip_score/{NAME}", title="CLIP score", best="highest", paper=None),
    ],
    plot=plot,
)

if __name__ == "__main__":
    sys.exit(main(STUDY))
