"""Finetuning and DreamBooth on tiny models: what learns, what is exported, and what the class pictures do."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lcm_jax
from lcm_jax import lora
from lcm_jax.data.array_cache import fingerprint
from lcm_jax.diffusion.schedules import DDPM
from lcm_jax.objectives import Diffusion
from lcm_jax.parallel.sharding import BatchedMap, make_mesh
from lcm_jax.train.loop import LoopConfig, fit
from lcm_jax.train.optimizer import OptimizerConfig
from lcm_jax.train.task import Task
from lcm_jax.train.tasks import finetune as finetune_task
from lcm_jax.train.tasks.common import DataConfig
from lcm_jax.train.tasks.conditioner import Conditioner
from lcm_jax.train.tasks.finetune import Beside, FinetuneTask
from lcm_jax.train.tasks.lora_config import LoraConfig
from lcm_jax.train.train_step import Progress
from lcm_jax.weights.safetensors_files import load_tensors, save_tensors

LOOP = LoopConfig(steps=2, batch_size=4, log_every=1, save_every=1, preview_every=2, ema=0.5)
# A high rate, so that two steps are seen in a picture of bytes.
OPTIMIZER = OptimizerConfig(warmup=0, learning_rate=0.05)
START = Progress(jnp.int32(0), jnp.int32(1))
KEY = jax.random.key(0)
PRIOR = {"class_prompt": "dog face", "class_pictures": 3, "class_steps": 2}
ADAPTED = {"unet": LoraConfig(rank=2), "sd3": LoraConfig(rank=2, targets=lora.MMDIT_TARGETS)}


def finetune(model: Path, data: DataConfig, **options: Any) -> FinetuneTask:
    return FinetuneTask(model=str(model), data=data, preview_steps=2, **options)


def gradient(task: Task, batch: dict[str, np.ndarray], part: str) -> Any:
    """The gradient of one network's parameters, at the beginning."""
    params = task.init(KEY)

    def loss(tree: Any) -> Any:
        trees = {**params, part: tree}
        return task.loss(trees, trees, task.frozen, jax.tree.map(jnp.asarray, batch), KEY, START)[0]

    return jax.jit(jax.grad(loss))(params[part])


def differ(a: Any, b: Any) -> bool:
    return any(not np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def check(name: str, model: Path, data: DataConfig, tmp_path: Path, **options: Any) -> None:
    """Train through a kill and export; what is loaded from the export is what was trained, and draws other pictures."""
    part = {"unet": "unet", "sd3": "transformer"}[name]
    config = finetune(model, data, **options)
    task = replace(config.build(), preview=lambda *_: {})
    state = fit(task, LOOP, OPTIMIZER, tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "killed")
    shutil.rmtree(tmp_path / "killed" / "checkpoints" / "2")
    resumed = fit(task, LOOP, OPTIMIZER, tmp_path / "killed")
    jax.tree.map(np.testing.assert_array_equal, state.params, resumed.params)

    before, export = lcm_jax.load(model), tmp_path / "whole" / "export"
    after = lcm_jax.load(export) if config.lora is None else lcm_jax.load(model, lora=export)
    for name, tree in state.ema.items():
        network = part if name == "net" else name
        want = tree if config.lora is None else lora.merge(before.params[network], tree)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), after.params[network], want)
        assert differ(after.params[network], before.params[network])
    assert set(state.ema) == ({"net"} | {n for n in before.params if n in ("text_encoder", "text_encoder_2")}
                              if config.train_text else {"net"})  # fmt: skip
    draw = {"steps": 2, "sampler": before.default_sampler, "guidance": 2.0}
    assert np.any(after("dog face", **draw) != before("dog face", **draw))


@pytest.mark.slow
def test_adapters_with_class_pictures_and_text(tiny_model: Path, data: DataConfig, tmp_path: Path) -> None:
    check("unet", tiny_model, data, tmp_path, lora=ADAPTED["unet"], train_text=True, **PRIOR)


@pytest.mark.slow
@pytest.mark.parametrize("prior", [{}, PRIOR], ids=["plain", "dreambooth"])
@pytest.mark.parametrize("train_text", [False, True], ids=["net", "text"])
@pytest.mark.parametrize("adapted", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("name", ["unet", "sd3"])
def test_every_way(
    name: str, adapted: bool, train_text: bool, prior: dict[str, Any], tiny_model: Path, tiny_sd3: Path,
    data: DataConfig, tmp_path: Path,
) -> None:  # fmt: skip
    model = {"unet": tiny_model, "sd3": tiny_sd3}[name]
    check(name, model, data, tmp_path, lora=ADAPTED[name] if adapted else None, train_text=train_text, **prior)


def test_the_exported_folder_keeps_the_models_scheduler(small_model: Path, data: DataConfig, tmp_path: Path) -> None:
    task = finetune(small_model, data).build()
    task.export(task.init(KEY), tmp_path / "export")
    files = [folder / "scheduler" / "scheduler_config.json" for folder in (small_model, tmp_path / "export")]
    assert json.loads(files[0].read_text()) == json.loads(files[1].read_text())
    before, after = (lcm_jax.load(folder).params for folder in (small_model, tmp_path / "export"))
    for name in before:
        jax.tree.map(np.testing.assert_array_equal, before[name], after[name])


def test_class_pictures_of_no_weight_change_nothing(small_model: Path, data: DataConfig) -> None:
    plain, prior = (finetune(small_model, data, prior_weight=0.0, **options).build() for options in ({}, PRIOR))
    batch = next(prior.batches(4, 0))
    name = {name: leaf[:, :1] for name, leaf in batch.items()}
    a, b = gradient(plain, name, "net"), gradient(prior, batch, "net")
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6), a, b)


def test_class_pictures_of_a_flow_are_drawn_from_noise_of_its_own_size(small_sd3: Path, data: DataConfig) -> None:
    """Its sampler spreads the noise it begins with (`Sampler.init_noise_sigma`)."""
    batch = next(finetune(small_sd3, data, **PRIOR).build().batches(4, 0))
    assert np.isfinite(batch["mean"]).all()
    assert batch["mean"][:, 1].std() > 0.0


def test_class_pictures_are_known_by_all_that_draws_them(
    small_model: Path, data: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Found(Exception):
        pass

    def found(_: Path, produced_by: dict[str, Any], *__: Any, **___: Any) -> None:
        raise Found(fingerprint(produced_by))

    monkeypatch.setattr(Conditioner, "encode_source", lambda *_, **__: [{}])
    monkeypatch.setattr(finetune_task, "cached", found)
    model = shutil.copytree(small_model, tmp_path / "model")

    def key(data: DataConfig = data, **options: Any) -> str:
        with pytest.raises(Found) as raised:
            finetune(model, data, **PRIOR | options).build()
        return str(raised.value)

    keys = [key()]
    assert key(prior_weight=7.0, preview_guidance=3.0) == keys[0], "what does not draw them does not count"
    changes = {"class_prompt": "a cat", "class_pictures": 5, "class_steps": 7, "class_guidance": 1.5}
    keys += [key(**{name: value}) for name, value in {**changes, "dtype": "bfloat16"}.items()]
    keys.append(key(data=replace(data, size=8)))
    for name, field, value in (
        ("unet/config.json", "flip_sin_to_cos", False),
        ("vae/config.json", "scaling_factor", 0.5),
        ("text_encoder/config.json", "hidden_act", "gelu"),
        ("scheduler/scheduler_config.json", "timestep_spacing", "leading"),
    ):
        config = json.loads((model / name).read_text())
        assert config.get(field) != value
        (model / name).write_text(json.dumps(config | {field: value}))
        keys.append(key())
    for name in ("unet", "vae", "text_encoder"):
        (file,) = (model / name).glob("*.safetensors")
        tensors = load_tensors(file)
        first = next(key for key in sorted(tensors) if tensors[key].dtype == np.float32)
        save_tensors(file, tensors | {first: tensors[first] + 1.0})
        keys.append(key())
    assert len(set(keys)) == len(keys)


def test_the_loss_is_the_weighted_sum_of_both_kinds(small_model: Path, data: DataConfig) -> None:
    """Equation 2 of 2208.12242: own + weight times prior."""
    task = finetune(small_model, data, prior_weight=3.0, **PRIOR).build()
    params, batch = task.init(KEY), next(task.batches(4, 0))
    total, metrics = jax.jit(task.loss)(params, params, task.frozen, batch, KEY, START)
    assert float(total) == pytest.approx(float(metrics["own"] + 3.0 * metrics["prior"]))
    assert float(metrics["own"]) != float(metrics["prior"])


def test_every_picture_stands_beside_a_class_picture(small_model: Path, data: DataConfig) -> None:
    for train_text in (False, True):
        task = finetune(small_model, data, train_text=train_text, **{**PRIOR, "class_pictures": 18}).build()
        batches = task.batches(18, 0)
        batch = next(batches)  # the six pictures three times, each of the eighteen class pictures once
        assert all(leaf.shape[:2] == (18, 2) for leaf in batch.values())
        rows = {name: [{row.tobytes() for row in leaf[:, i]} for i in (0, 1)] for name, leaf in batch.items()}
        assert [len(kind) for kind in rows["mean"]] == [6, 18]
        assert not np.any(batch["std"][:, 1])
        text = "tokens_0" if train_text else "context"
        assert [len(kind) for kind in rows[text]] == [6, 1]
        assert ("context" in batch) != train_text
        if train_text:
            conditioner = Conditioner.load(str(small_model), str(small_model))
            np.testing.assert_array_equal(batch[text][0, 1], conditioner.prompts.tokenize(["dog face"])[0][0])


def test_the_shorter_list_is_gone_through_again() -> None:
    name, prior = ([{"mean": np.float32(i)} for i in range(n)] for n in (2, 5))
    pairs = Beside(kinds=[name, prior])
    assert [pairs[i]["mean"].tolist() for i in range(len(pairs))] == [[0, 0], [1, 1], [0, 2], [1, 3], [0, 4]]


def test_class_pictures_are_drawn_once_and_are_the_models(
    small_model: Path, data: DataConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = finetune(small_model, data, class_guidance=1.0, **PRIOR).build()
    drawn = {row.tobytes(): row for row in next(task.batches(6, 0))["mean"][:, 1]}
    assert len(drawn) == 3
    monkeypatch.setattr("lcm_jax.models.latent_diffusion.LatentDiffusion.latents", None)
    again = next(finetune(small_model, data, class_guidance=1.0, **PRIOR).build().batches(6, 0))["mean"][:, 1]
    assert {row.tobytes() for row in again} == set(drawn)
    monkeypatch.undo()
    # the pipeline from the same noise
    pipe, noise = lcm_jax.load(small_model), jax.random.split(jax.random.fold_in(jax.random.key(0), 0))[0]
    noise = jax.random.normal(noise, (16, 8, 8, 4))
    want = pipe(["dog face"] * 16, steps=2, guidance=1.0, sampler=pipe.default_sampler, latents=noise)[:3]
    latents = np.stack(list(drawn.values())).astype(np.float32)
    made = np.asarray(pipe.model.decode(pipe.params["vae"], jnp.asarray(latents)))
    assert all(np.min(np.abs(want - picture.astype(np.int16)).max(axis=(1, 2, 3))) <= 2 for picture in made)


def test_the_empty_prompt_follows_the_text_encoder(small_model: Path, data: DataConfig) -> None:
    """With every caption dropped the text encoder still learns, by the empty prompt."""
    objective = Diffusion(schedule=DDPM(), caption_dropout=1.0)
    task = finetune(small_model, data, objective=objective, train_text=True).build()
    grads = gradient(task, next(task.batches(4, 0)), "text_encoder")
    assert any(np.any(leaf) for leaf in jax.tree.leaves(grads))


def test_previews_show_the_text_encoder_that_learned(small_model: Path, data: DataConfig) -> None:
    task = finetune(small_model, data, train_text=True, preview_prompts=("dog face",)).build()
    params = task.init(KEY)
    other = {**params, "text_encoder": jax.tree.map(lambda leaf: 2 * leaf, params["text_encoder"])}
    (a,), (b,) = (
        task.preview(tree, task.frozen, BatchedMap(mesh=make_mesh(), most=4)).values() for tree in (params, other)
    )
    assert a.shape == (16, 16, 3)
    assert np.any(a != b)


def test_adapters_start_as_the_model(small_model: Path, data: DataConfig) -> None:
    full, adapted = (finetune(small_model, data, lora=choice).build() for choice in (None, ADAPTED["unet"]))
    batch = next(full.batches(4, 0))
    losses = []
    for task in (full, adapted):
        params = task.init(KEY)
        losses.append(float(jax.jit(task.loss)(params, params, task.frozen, batch, KEY, START)[0]))
    assert losses[0] == pytest.approx(losses[1])
    assert set(full.frozen["networks"]) == set()
    assert set(adapted.frozen["networks"]) == {"net"}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"prior_weight": -1.0}, "task.prior_weight is -1.0; it must not be negative"),
        ({"class_pictures": 0}, "task.class_pictures is 0; it must be at least 1"),
        ({"class_steps": 0}, "task.class_steps is 0; it must be at least 1"),
        ({"lora": LoraConfig(rank=0)}, "rank must be at least 1, got 0"),
        ({"lora": LoraConfig(targets="nowhere")}, "targets 'nowhere' match none of"),
        ({"model": "nowhere"}, "model 'nowhere': no such file or folder"),
        ({"model": "openmoji"}, "task.model openmoji is a distilled student with a w-embedding: finetune its teacher"),
        ({"data": DataConfig(name="folder:nowhere")}, "nowhere: no such folder"),
        ({"data": DataConfig(size=15)}, "task.data.size .*: size 15x15"),
    ],
)
def test_what_cannot_be_is_said_before_any_work(
    options: dict[str, Any], words: str, tiny_model: Path, data: DataConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Conditioner, "encode_source", None)
    monkeypatch.setattr(FinetuneTask, "class_records", None)
    with pytest.raises((ValueError, FileNotFoundError), match=words) as error:
        replace(finetune(tiny_model, data, class_prompt="dog face"), **options).build()
    assert "\n" not in str(error.value)
