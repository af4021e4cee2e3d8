"""Latent consistency distillation of an SDXL: two text encoders, sizes as conditioning, blocks stacked by a scan."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

import lcm_jax
from lcm_jax.diffusion.schedules import DDPM
from lcm_jax.nets import UNet, example_inputs
from lcm_jax.objectives import LatentConsistencyDistillation
from lcm_jax.train.config import TrainConfig
from lcm_jax.train.loop import LoopConfig
from lcm_jax.train.optimizer import OptimizerConfig
from lcm_jax.train.tasks.common import DataConfig
from lcm_jax.train.tasks.conditioner import Conditioner
from lcm_jax.train.tasks.distillation import DistillationTask
from lcm_jax.train.tasks.lora_config import LoraConfig
from lcm_jax.weights.diffusers_folder import Component, Folder, save_folder
from lcm_jax.weights.safetensors_files import read_json
from mmdit.text import CLIPTextModel, Tokenizer

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def sdxl(tiny_model: Path, tiny_components: dict[str, Component], tmp_path_factory: pytest.TempPathFactory) -> Path:
    text, vae = tiny_components["text_encoder"], tiny_components["vae"]
    second = CLIPTextModel(replace(text.module.config, hidden_size=12), projection=True)
    config = replace(
        tiny_components["unet"].module.config,
        cross_attention_dim=16 + 12,
        transformer_layers_per_block=2,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 8,
    )
    net, key = UNet(config), jax.random.key(1)
    components = {
        "unet": Component(net, jax.jit(net.init)(key, *example_inputs(config))["params"]),
        "vae": vae,
        "text_encoder": Component(
            text.module.clone(projection=False), {k: v for k, v in text.params.items() if k != "text_projection"}
        ),
        "text_encoder_2": Component(second, jax.jit(second.init)(key, jax.numpy.zeros((1, 12), "int32"))["params"]),
    }
    tokenizer = Tokenizer.load(tiny_model / "tokenizer")
    scheduler = read_json(tiny_model / "scheduler" / "scheduler_config.json")
    folder = tmp_path_factory.mktemp("sdxl") / "model"
    tokenizers = {"text_encoder": tokenizer, "text_encoder_2": tokenizer}
    save_folder(folder, Folder(components=components, tokenizers=tokenizers, scheduler=scheduler))
    return folder


def test_the_empty_prompt_is_zeros_and_says_nothing_of_sizes(sdxl: Path) -> None:
    conditioner = Conditioner.load(str(sdxl), str(sdxl))
    cond = conditioner.encode_text(["dog face"], (16, 24))
    assert {name: leaf.shape for name, leaf in cond.items()} == {
        "context": (1, 12, 28), "pooled": (1, 8), "time_ids": (1, 6)
    }  # fmt: skip
    np.testing.assert_array_equal(cond["time_ids"], [[16, 24, 0, 0, 16, 24]])
    assert set(conditioner.null) == {"context", "pooled"}
    assert not any(np.any(leaf) for leaf in conditioner.null.values())


@pytest.mark.parametrize("adapted", [False, True])
def test_a_student_of_an_sdxl(adapted: bool, sdxl: Path, data: DataConfig, tmp_path: Path) -> None:
    objective = LatentConsistencyDistillation(schedule=DDPM(), w_min=3.0, w_max=3.0)
    task = DistillationTask(
        vae=str(sdxl), text=str(sdxl), teacher=str(sdxl), data=data, prompts=data, objective=objective,
        lora=LoraConfig(rank=2) if adapted else None, scan=not adapted, remat=True,
    )  # fmt: skip
    loop = LoopConfig(steps=2, batch_size=4, log_every=1, save_every=2, preview_every=2)
    TrainConfig(task=task, loop=loop, optimizer=OptimizerConfig(warmup=1)).run(tmp_path)
    export = tmp_path / "export"
    pipe = lcm_jax.load(sdxl, lora=export) if adapted else lcm_jax.load(export)
    assert pipe.folder.is_sdxl
    assert pipe.model.embeds_guidance == (not adapted)
    assert pipe("dog face", steps=2, guidance=1.0 if adapted else 3.0).shape == (1, 16, 16, 3)
