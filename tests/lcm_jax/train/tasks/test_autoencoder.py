"""Autoencoders trained for two tiny steps, with a discriminator, and what is exported."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import jax.numpy as jnp
import pytest

import lcm_jax
from lcm_jax.train.tasks.autoencoder import AutoencoderTask, TinyAutoencoderTask
from lcm_jax.train.tasks.common import DataConfig
from lcm_jax.weights.diffusers_folder import Component, load_component
from vae16 import DiscriminatorConfig, LossConfig, PictureLossConfig, TinyConfig

Train = Callable[[object, Path], Path]


def test_autoencoder_with_a_discriminator(
    tiny_components: dict[str, Component], data: DataConfig, train: Train, tmp_path: Path
) -> None:
    config = replace(tiny_components["vae"].module.config, block_out_channels=(8,), mid_block_add_attention=False)
    task = AutoencoderTask(
        model=config,
        data=data,
        validation=data,
        loss=LossConfig(perceptual_weight=0.0, gan_start=0),
        discriminator=DiscriminatorConfig(ndf=8, n_layers=1, group_size=4),
    )
    vae = load_component(train(task, tmp_path), "vae")
    mean, _ = vae.module.apply({"params": vae.params}, jnp.zeros((1, 16, 16, 3)), method="encode")
    assert mean.shape == (1, 16, 16, 4)
    assert vae.module.config.scaling_factor != task.model.scaling_factor


def test_a_perceptual_term_without_weights_is_refused(data: DataConfig) -> None:
    with pytest.raises(ValueError, match=r"perceptual_weight is 1.0 and task.lpips is None"):
        AutoencoderTask(data=data, validation=data, loss=LossConfig(perceptual_weight=1.0)).build()


def test_a_tiny_autoencoder_for_the_latents_of_another(
    tiny_model: Path, data: DataConfig, train: Train, tmp_path: Path
) -> None:
    shape = {"encoder_block_out_channels": (6, 6), "decoder_block_out_channels": (8, 8)}
    task = TinyAutoencoderTask(
        model=TinyConfig(**shape, num_encoder_blocks=(0, 1), num_decoder_blocks=(1, 0)),
        vae=str(tiny_model),
        data=data,
        validation=data,
        loss=PictureLossConfig(perceptual_weight=0.0, gan_start=0),
        discriminator=DiscriminatorConfig(ndf=8, n_layers=1, group_size=4),
    )
    pipe = lcm_jax.load(str(tiny_model), tiny_vae=train(task, tmp_path))
    drawn = pipe.model.decode(pipe.params["vae"], jnp.zeros((1, 8, 8, 4)))
    assert drawn.shape == (1, 16, 16, 3)
    deep = replace(task, model=TinyConfig(latent_channels=4))
    with pytest.raises(ValueError, match=r"task.model has downsample_factor 8, that of .* 2: make them equal"):
        deep.build()
