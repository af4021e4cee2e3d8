"""Diffusion models trained for two tiny steps: exports, buckets and captions of the data, and what is refused."""

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
from PIL import Image

import lcm_jax
from lcm_jax import lora
from lcm_jax.diffusion.schedules import DDPM, RectifiedFlow
from lcm_jax.models.latent_diffusion import LatentDiffusion
from lcm_jax.nets import UNetConfig
from lcm_jax.objectives import Diffusion, LatentConsistencyDistillation
from lcm_jax.parallel.sharding import BatchedMap, make_mesh
from lcm_jax.train.loop import LoopConfig, fit
from lcm_jax.train.optimizer import OptimizerConfig
from lcm_jax.train.tasks.common import DataConfig
from lcm_jax.train.tasks.conditioner import ENCODE_BATCH, Conditioner
from lcm_jax.train.tasks.contrastive import ContrastiveTask
from lcm_jax.train.tasks.diffusion import DiffusionTask, build_net
from lcm_jax.train.tasks.distillation import DistillationTask
from lcm_jax.train.tasks.latent import preview
from lcm_jax.train.tasks.lora_config import LoraConfig
from lcm_jax.train.train_step import Progress
from lcm_jax.weights.diffusers_folder import Component
from mmdit import MMDiTConfig

SCHEDULE = DDPM(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
Train = Callable[[object, Path], Path]


def teacher_task(model: Path, net: object, data: DataConfig, **options: object) -> DiffusionTask:
    objective = Diffusion(schedule=SCHEDULE, kind="v_prediction")
    return DiffusionTask(
        vae=str(model),
        text=str(model),
        net=net,
        data=data,
        prompts=data,
        objective=objective,
        preview_steps=2,
        **options,
    )


def test_teacher_is_a_pipeline_that_keeps_its_parameterization(
    tiny_model: Path, small_net: UNetConfig, data: DataConfig, train: Train, tmp_path: Path
) -> None:
    pipe = lcm_jax.load(train(teacher_task(tiny_model, small_net, data), tmp_path))
    assert pipe.model.kind == "v_prediction"
    assert pipe.default_sampler == "ddim"
    assert pipe("dog face", steps=2, sampler="ddim", guidance=2.0).shape == (1, 16, 16, 3)


@pytest.mark.slow
def test_sd3_is_trained_and_drawn(
    tiny_sd3: Path, tiny_sd3_net: MMDiTConfig, data: DataConfig, train: Train, tmp_path: Path
) -> None:
    objective = Diffusion(schedule=RectifiedFlow(shift=3.0), kind="flow")
    task = replace(teacher_task(tiny_sd3, tiny_sd3_net, data), objective=objective)
    pipe = lcm_jax.load(train(task, tmp_path))
    assert pipe.model.kind == "flow"
    assert pipe.model.schedule == RectifiedFlow(shift=3.0)
    assert pipe.default_sampler == "euler"
    assert pipe("dog face", steps=2, sampler="euler", guidance=2.0).shape == (1, 16, 16, 3)


def test_previews_begin_with_the_noise_that_their_sampler_spreads(
    tiny_model: Path, small_net: UNetConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    conditioner = Conditioner.load(str(tiny_model), str(tiny_model))
    net = build_net(small_net, dtype="float32", remat=False)
    model = LatentDiffusion(net=net, vae=conditioner.vae.module, schedule=SCHEDULE, kind="epsilon")
    drawn = {}
    for sampler in ("euler", "ddim"):
        show = preview(model, conditioner, ["dog face"], sampler=sampler, steps=2, guidance=2.0)

        def listen(self: BatchedMap, function: Any, rows: Any, sampler: str = sampler, **_: Any) -> np.ndarray:
            drawn[sampler] = rows[2]
            return np.zeros((1, 16, 16, 3), np.uint8)

        with monkeypatch.context() as patch:
            patch.setattr(BatchedMap, "__call__", listen)
            show({}, {}, BatchedMap(mesh=make_mesh(), most=1))
    factor = float(SCHEDULE.sigma(999.0))
    assert factor != 1.0
    np.testing.assert_allclose(drawn["euler"], factor * drawn["ddim"], rtol=1e-6)


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    """Pictures lying, square and standing, with original and synthetic captions, in buckets of about 16 x 16."""
    folder, random = tmp_path_factory.mktemp("shapes"), np.random.default_rng(0)
    rows = []
    for i, (height, width) in enumerate([(24, 40), (20, 20), (40, 22)] * 2):
        Image.fromarray(random.integers(0, 255, (height, width, 3), np.uint8)).save(folder / f"{i}.png")
        rows.append({"file_name": f"{i}.png", "text": f"dog face {i}", "synthetic": f"cat {i}"})
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return DataConfig(name=f"folder:{folder}", size=16, buckets=True, multiple=4)


def shapes_task(model: Path, net: MMDiTConfig, shapes: DataConfig, prompts: DataConfig) -> DiffusionTask:
    task = teacher_task(model, net, shapes)
    return replace(task, prompts=prompts, objective=Diffusion(schedule=RectifiedFlow(), kind="flow"))


@pytest.mark.slow
def test_buckets_with_synthetic_captions_are_trained_and_resumed_exactly(
    tiny_sd3: Path, tiny_sd3_net: MMDiTConfig, shapes: DataConfig, data: DataConfig, tmp_path: Path
) -> None:
    task = shapes_task(tiny_sd3, tiny_sd3_net, shapes, data).build()
    task = replace(task, preview=lambda *_: {}, export=lambda *_: None)
    loop = LoopConfig(steps=4, batch_size=4, log_every=1, save_every=1, preview_every=2, keep=4)
    optimizer = OptimizerConfig(warmup=1)
    start = task.batches(loop.batch_size, loop.seed)
    assert {next(start)["mean"].shape for _ in range(4)} == {(4, 8, 8, 4), (4, 6, 10, 4), (4, 10, 6, 4)}

    uninterrupted = fit(task, loop, optimizer, tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "killed")
    for step in (3, 4):
        shutil.rmtree(tmp_path / "killed" / "checkpoints" / str(step))
    resumed = fit(task, loop, optimizer, tmp_path / "killed")
    jax.tree.map(np.testing.assert_array_equal, uninterrupted.params, resumed.params)
    assert np.any(uninterrupted.params["proj_out"]["kernel"])  # zero at first


def test_captions_are_mixed_at_the_rate(tiny_sd3: Path, shapes: DataConfig) -> None:
    conditioner = Conditioner.load(str(tiny_sd3), str(tiny_sd3))
    one = replace(shapes, buckets=False)

    def contexts(data: DataConfig) -> set[bytes]:
        task = DiffusionTask(data=data)
        sources = data.open_buckets()
        batches = task.batches(sources, task.encode(conditioner, sources))(6, 0)
        batch = [next(batches) for _ in range(3)]
        assert all(set(b) == {"mean", "std", "context", "pooled"} for b in batch)
        return {row.tobytes() for b in batch for row in np.concatenate([b["context"].sum(1), b["pooled"]], 1)}

    def encoded(text: str) -> set[bytes]:
        cond = conditioner.encode_text([text.format(i) for i in range(6)] + [""] * (ENCODE_BATCH - 6))
        cond = {name: np.asarray(leaf, np.float16)[:6] for name, leaf in cond.items()}
        return {row.tobytes() for row in np.concatenate([cond["context"].sum(1), cond["pooled"]], 1)}

    first, second = encoded("dog face {}"), encoded("cat {}")
    assert first.isdisjoint(second)
    assert contexts(replace(one, synthetic=0.0)) == first
    assert contexts(replace(one, synthetic=1.0)) == second
    assert contexts(one) == contexts(replace(one, synthetic=0.5)) <= first | second
    assert contexts(one) & first
    assert contexts(one) & second


def test_a_student_takes_buckets(tiny_sd3: Path, shapes: DataConfig, data: DataConfig) -> None:
    objective = LatentConsistencyDistillation(schedule=RectifiedFlow(), grid_points=8, skip=0.125)
    model = str(tiny_sd3)
    options = {"objective": objective, "lora": LoraConfig(rank=2, targets=lora.MMDIT_TARGETS), "prompts": data}
    task = DistillationTask(teacher=model, vae=model, text=model, data=shapes, **options).build()
    key = jax.random.key(0)
    params, batches, shapes_seen = jax.eval_shape(task.init, key), task.batches(4, 0), set()
    for batch in (next(batches) for _ in range(4)):
        shapes_seen.add(batch["mean"].shape)
        loss, _ = jax.eval_shape(task.loss, params, params, task.frozen, batch, key, Progress(np.int32(0), np.int32(1)))
        assert loss.shape == ()
    assert len(shapes_seen) == 3


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"aspect": 4.0}, "task.data.size .*: size 8x32: larger than the position grid, whose 6 patches .* 24 pixels"),
        ({"multiple": 2}, "task.data.size .*: size 14x18: height and width must be positive multiples of 4"),
        ({"multiple": 32}, "buckets: size=16 must be a positive multiple of multiple=32"),
        ({"synthetic": 1.5}, "data.synthetic is 1.5: the share of synthetic captions"),
        ({"name": "openmoji"}, "openmoji: its drawings are square and have one size; leave buckets out"),
    ],
)
def test_buckets_that_do_not_fit_are_refused(
    options: dict[str, object], words: str, tiny_sd3: Path, tiny_sd3_net: MMDiTConfig, shapes: DataConfig,
    data: DataConfig, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(Conditioner, "encode_source", None)
    with pytest.raises(ValueError, match=words):
        shapes_task(tiny_sd3, tiny_sd3_net, replace(shapes, **options), data).build()


def test_what_cannot_have_buckets_or_synthetic_captions_refuses_them(
    tiny_sd3: Path, tiny_sd3_net: MMDiTConfig, shapes: DataConfig, data: DataConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Conditioner, "encode_source", None)
    with pytest.raises(ValueError, match=r"folder.* with buckets=True, synthetic=None: only task.data of diffusion"):
        shapes_task(tiny_sd3, tiny_sd3_net, data, shapes).build()
    with pytest.raises(ValueError, match="with buckets=True"):
        ContrastiveTask(data=shapes, validation=data).build()
    with pytest.raises(ValueError, match=r"data.synthetic is 0.3, but folder:.* has no synthetic captions"):
        shapes_task(tiny_sd3, tiny_sd3_net, replace(data, synthetic=0.3), data).build()


def test_a_net_for_other_latents_is_refused(
    tiny_model: Path, tiny_components: dict[str, Component], data: DataConfig
) -> None:
    net = replace(tiny_components["unet"].module.config, in_channels=8, out_channels=8)
    with pytest.raises(ValueError, match="in_channels is 8, but the VAE has 4"):
        teacher_task(tiny_model, net, data).build()


@pytest.mark.parametrize("key", ["joint_attention_dim", "pooled_projection_dim"])
def test_a_net_for_other_texts_is_refused(
    key: str, tiny_sd3: Path, tiny_model: Path, tiny_sd3_net: MMDiTConfig, data: DataConfig
) -> None:
    asked, given = getattr(tiny_sd3_net, key) + 1, getattr(tiny_sd3_net, key)
    with pytest.raises(ValueError, match=f"task.net.{key} is {asked}, but the text encoders' width is {given}"):
        teacher_task(tiny_sd3, replace(tiny_sd3_net, **{key: asked}), data).build()
    with pytest.raises(ValueError, match="joint_attention_dim is 32, but the text encoders' width is 16"):
        teacher_task(tiny_model, tiny_sd3_net, data).build()
