"""A study of autoencoders of 4, 8 and 16 channels, trained alike: table 3 of arXiv:2403.03206.

python experiments/sd3/vae_channels.py --scale tiny --seeds 0 1 2
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from lcm_jax import configs
from lcm_jax.evaluation.evaluate import ClipMetric, captioned, reconstruct, reconstruction
from lcm_jax.evaluation.study import Cells, Column, Scores, Study, main, statistics
from lcm_jax.metrics.bootstrap import RESAMPLES
from lcm_jax.train.config import TrainConfig
from lcm_jax.train.loop import LoopConfig
from lcm_jax.train.optimizer import OptimizerConfig
from lcm_jax.train.tasks.autoencoder import AutoencoderTask
from lcm_jax.train.tasks.common import DataConfig
from lcm_jax.weights.diffusers_folder import load_component
from vae16 import AutoencoderConfig, DiscriminatorConfig, LossConfig

CHANNELS = (4, 8, 16)
PAPER = {
    "frechet": (2.41, 1.56, 1.06),
    "clip_distance": (0.85, 0.68, 0.45),  # the paper has LPIPS
    "ssim": (0.75, 0.79, 0.86),
    "psnr": (25.12, 26.40, 28.62),
}
TITLES = {
    "frechet": "Frechet distance",
    "clip_distance": "CLIP distance (paper: LPIPS)",
    "ssim": "SSIM",
    "psnr": "PSNR",
}


def tiny() -> TrainConfig:
    """Return the bundled autoencoder's training on pictures of half the size, where a step costs a quarter."""
    config = configs.get("openmoji_vae")
    data = {"data": DataConfig(size=32), "validation": DataConfig(split="validation", size=32)}
    task = replace(config.task, **data, model=replace(config.task.model, sample_size=32))
    return replace(config, task=task, loop=replace(config.loop, steps=1500, preview_every=500, save_every=250))


def gpu() -> TrainConfig:
    """Return a longer training of a wider network on the same pictures."""
    config = configs.get("openmoji_vae")
    model = replace(config.task.model, block_out_channels=(64, 128, 256, 256), layers_per_block=2, norm_num_groups=32)
    loop = LoopConfig(steps=20_000, batch_size=64, ema=0.999, save_every=1000, preview_every=2000)
    optimizer = replace(config.optimizer, learning_rate=3e-4, warmup=500)
    return replace(config, task=replace(config.task, model=model), loop=loop, optimizer=optimizer)


def paper() -> TrainConfig:
    """Return CompVis' training of the published geometry; it needs --task.data.name and --task.lpips."""
    model = AutoencoderConfig(
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        use_quant_conv=False,
        use_post_quant_conv=False,
        sample_size=256,
    )
    task = AutoencoderTask(
        model=model,
        data=DataConfig(name="folder:imagenet", size=256),
        validation=DataConfig(name="folder:coco", split="validation", size=256),
        loss=LossConfig(),
        discriminator=DiscriminatorConfig(),
    )
    loop = LoopConfig(steps=250_000, batch_size=32, save_every=5000, preview_every=10_000)
    return TrainConfig(task=task, loop=loop, optimizer=OptimizerConfig(learning_rate=4.5e-6, b1=0.5, b2=0.9))


def variant(channels: int) -> Callable[[str], TrainConfig]:
    """Return a function from a scale to the config with so many latent channels."""

    def make(scale: str) -> TrainConfig:
        config = {"tiny": tiny, "gpu": gpu, "paper": paper}[scale]()
        model = replace(config.task.model, latent_channels=channels)
        return replace(config, task=replace(config.task, model=model))

    return make


def measure(name: str, config: TrainConfig, workdir: Path) -> Scores:
    """Return the scores of the validation pictures against their reconstructions."""
    images, _ = captioned(config.task.resolved.validation.open())
    vae = load_component(workdir / "export", "vae")
    return reconstruction(images, reconstruct(vae, images), ClipMetric.load("openmoji"), resamples=RESAMPLES)


def plot(study: Study, cells: Cells) -> None:
    """Plot each score against the number of channels, with the paper's on the right-hand axis."""
    _, panels = plt.subplots(1, len(study.columns), figsize=(4 * len(study.columns), 3.2), layout="constrained")
    for axes, column in zip(panels, study.columns, strict=True):
        measured = statistics(cells, column.key)
        means, errors = zip(*measured.values(), strict=True)
        axes.errorbar(list(measured), means, yerr=np.nan_to_num(errors), marker="o", capsize=3, label="here")
        right = axes.twinx()
        paper_values = [column.paper[name] for name in measured]
        right.plot(list(measured), paper_values, "C1s--", alpha=0.6, label="paper (right axis)")
        axes.set_title(f"{column.title}, {column.best} is best", fontsize=9)
        axes.grid(alpha=0.3)
    handles = [line for ax in (axes, right) for line in ax.get_legend_handles_labels()[0]]
    panels[0].legend(handles=handles, fontsize=8)


STUDY = Study(
    name="vae_channels",
    about=__doc__ or "",
    variants={f"{n} channels": variant(n) for n in CHANNELS},
    measure=measure,
    columns=[
        Column(
            key=key,
            title=TITLES[key],
            best="highest" if key in ("ssim", "psnr") else "lowest",
            paper=dict(zip((f"{n} channels" for n in CHANNELS), numbers, strict=True)),
        )
        for key, numbers in PAPER.items()
    ],
    plot=plot,
)

if __name__ == "__main__":
    sys.exit(main(STUDY))
