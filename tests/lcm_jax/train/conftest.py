"""Shared by the tests of training: a cache of their own, pictures of 16 pixels, and models that compile fast."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import mmdit
from lcm_jax.nets import UNet, UNetConfig, example_inputs
from lcm_jax.runtime.atomic_files import write_json
from lcm_jax.train.config import TrainConfig
from lcm_jax.train.loop import LoopConfig
from lcm_jax.train.optimizer import OptimizerConfig
from lcm_jax.train.tasks.common import DataConfig
from lcm_jax.weights.diffusers_folder import Component, save_component
from mmdit import MMDiT, MMDiTConfig


@pytest.fixture(scope="module", autouse=True)
def _own_cache(own_cache: None) -> None:
    """Every module of these tests has a cache of its own."""


@pytest.fixture
def data(pictures: Path) -> DataConfig:
    return DataConfig(name=f"folder:{pictures}", size=16)


@pytest.fixture(scope="session")
def train() -> Callable[[Any, Path], Path]:
    """Trains a task for two steps, with a preview and a checkpoint, and returns the folder of its export."""

    def run(task: Any, workdir: Path) -> Path:
        loop = LoopConfig(steps=2, batch_size=4, log_every=1, save_every=2, preview_every=2)
        TrainConfig(task=task, loop=loop, optimizer=OptimizerConfig(warmup=1)).run(workdir)
        return workdir / "export"

    return run


def random_params(module: Any, inputs: tuple[Any, ...]) -> Any:
    """Parameters as a trained network has them, without zeros; `init` is traced and not compiled."""
    shapes = jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"]
    random = np.random.default_rng(0)

    def leaf(path: Any, shape: jax.ShapeDtypeStruct) -> np.ndarray:
        mean = 1.0 if path[-1].key == "scale" else 0.0
        return (mean + 0.2 * random.standard_normal(shape.shape)).astype(shape.dtype)

    return jax.tree.map_with_path(leaf, shapes)


def with_denoiser(model: Path, folder: Path, part: Component, name: str) -> Path:
    """A copy of a model with another denoiser."""
    shutil.copytree(model, folder, ignore=shutil.ignore_patterns(name))
    save_component(folder, name, part)
    return folder


@pytest.fixture(scope="session")
def with_scheduler() -> Callable[..., Path]:
    """Copies a model and changes values of its scheduler."""

    def copy(model: Path, folder: Path, **keys: object) -> Path:
        shutil.copytree(model, folder)
        path = folder / "scheduler" / "scheduler_config.json"
        write_json(path, {**json.loads(path.read_text()), **keys})
        return folder

    return copy


@pytest.fixture(scope="session")
def small_net(tiny_components: dict[str, Component]) -> UNetConfig:
    """A UNet of one attention and three residual blocks, for the latents and the text encoder of `tiny_model`."""
    tiny = tiny_components["unet"].module.config
    return replace(tiny, block_out_channels=(8,), mid_block_type=None, up_block_types=("UpBlock2D",))


@pytest.fixture(scope="session")
def small_model(tiny_model: Path, small_net: UNetConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tiny_model` with the network of `small_net`."""
    part = Component(UNet(small_net), random_params(UNet(small_net), example_inputs(small_net)))
    return with_denoiser(tiny_model, tmp_path_factory.mktemp("small") / "model", part, "unet")


@pytest.fixture(scope="session")
def small_v(small_model: Path, with_scheduler: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_scheduler(small_model, tmp_path_factory.mktemp("small_v") / "model", prediction_type="v_prediction")


@pytest.fixture(scope="session")
def small_sd3_net(tiny_sd3_net: MMDiTConfig) -> MMDiTConfig:
    return replace(tiny_sd3_net, num_layers=1)


@pytest.fixture(scope="session")
def small_sd3(tiny_sd3: Path, small_sd3_net: MMDiTConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tiny_sd3` with an MMDiT of one block."""
    net = MMDiT(small_sd3_net)
    part = Component(net, random_params(net, mmdit.example_inputs(small_sd3_net)))
    return with_denoiser(tiny_sd3, tmp_path_factory.mktemp("small_sd3") / "model", part, "transformer")
