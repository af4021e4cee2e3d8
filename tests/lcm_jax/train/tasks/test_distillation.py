"""Students distilled in a few tiny steps: what is exported, what each method asks for, and what is refused."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import lcm_jax
from lcm_jax import lora
from lcm_jax.cli import main as cli
from lcm_jax.diffusion.schedules import DDPM, RectifiedFlow
from lcm_jax.objectives import METHODS, FewStep, LatentConsistencyDistillation, LatentConsistencyFinetuning, method
from lcm_jax.parallel.sharding import BatchedMap, make_mesh
from lcm_jax.train.loop import LoopConfig, create_state, fit
from lcm_jax.train.optimizer import OptimizerConfig, make_optimizer
from lcm_jax.train.tasks.common import DataConfig
from lcm_jax.train.tasks.conditioner import Conditioner
from lcm_jax.train.tasks.distillation import DistillationTask, merge_pretrained
from lcm_jax.train.tasks.lora_config import LoraConfig
from lcm_jax.train.train_step import Progress, TrainState, make_train_step
from lcm_jax.weights.diffusers_folder import load_component

Train = Callable[[object, Path], Path]


def distillation(model: Path, data: DataConfig, objective: FewStep, **options: object) -> DistillationTask:
    given = {"image_encoder": "nowhere", **options}
    around = dict.fromkeys(("teacher", "vae", "text"), str(model))
    return DistillationTask(data=data, prompts=data, objective=objective, **around, **given)


@pytest.mark.parametrize(
    "objective", [LatentConsistencyDistillation, pytest.param(LatentConsistencyFinetuning, marks=pytest.mark.slow)]
)
def test_student_embeds_guidance(
    objective: type, small_v: Path, data: DataConfig, train: Train, tmp_path: Path
) -> None:
    task = distillation(small_v, data, objective(schedule=DDPM(), w_min=0.0, w_max=4.0))
    export = train(task, tmp_path)
    pipe = lcm_jax.load(export)
    assert pipe.model.embeds_guidance
    assert pipe.model.kind == "v_prediction"
    assert pipe.default_sampler == "lcm"
    assert pipe("dog face", steps=4, guidance=3.0).shape == (1, 16, 16, 3)
    if objective is LatentConsistencyDistillation:
        again = jax.jit(replace(task, start=str(export)).build().init)(jax.random.key(1))
        jax.tree.map(np.testing.assert_array_equal, again, pipe.params["unet"])


def test_student_starts_as_its_teacher(small_model: Path) -> None:
    trained = load_component(small_model, "unet").params
    fresh = jax.tree.map(np.zeros_like, trained) | {"new": {"kernel": np.zeros(3)}}
    grafted = merge_pretrained(fresh, trained)
    assert set(grafted) == set(trained) | {"new"}
    for a, b in zip(jax.tree.leaves(trained), jax.tree.leaves({k: grafted[k] for k in trained}), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.slow
def test_lora_goes_onto_its_teacher(small_v: Path, data: DataConfig, train: Train, tmp_path: Path) -> None:
    objective = LatentConsistencyDistillation(schedule=DDPM(), w_min=2.0, w_max=2.0, target="online")
    adapters = train(distillation(small_v, data, objective, lora=LoraConfig(rank=2, dropout=0.3)), tmp_path)
    pipe = lcm_jax.load(small_v, lora=adapters)
    assert not pipe.model.embeds_guidance
    assert pipe("dog face", steps=4).shape == (1, 16, 16, 3)


@pytest.mark.parametrize(
    "adapted",
    [pytest.param(None, marks=pytest.mark.slow), LoraConfig(rank=2, targets=lora.MMDIT_TARGETS)],
    ids=["full", "lora"],
)
def test_students_of_a_flow(
    adapted: LoraConfig | None, small_sd3: Path, data: DataConfig, train: Train, tmp_path: Path
) -> None:
    objective = LatentConsistencyDistillation(
        schedule=RectifiedFlow(), grid_points=8, skip=0.125, w_min=0.0, w_max=4.0, target="online"
    )
    export = train(distillation(small_sd3, data, objective, lora=adapted), tmp_path)
    pipe = lcm_jax.load(export) if adapted is None else lcm_jax.load(small_sd3, lora=export)
    assert pipe.model.embeds_guidance == (adapted is None)
    assert pipe.model.schedule == RectifiedFlow(shift=3.0)
    assert pipe("dog face", steps=4, guidance=3.0 if adapted is None else 1.0).shape == (1, 16, 16, 3)
    assert adapted is not None or pipe.default_sampler == "lcm"


@pytest.mark.slow
def test_dropout_is_for_training_alone(tiny_model: Path, data: DataConfig) -> None:
    objective = LatentConsistencyDistillation(schedule=DDPM(), w_min=2.0, w_max=2.0, target="online")
    losses, shown = [], []
    for rate in (0.0, 0.5):
        adapted = LoraConfig(rank=2, dropout=rate)
        task = distillation(tiny_model, data, objective, lora=adapted, preview_steps=1).build()
        params = jax.tree.map(lambda leaf: leaf + 0.1, task.init(jax.random.key(0)))
        batch, key = next(task.batches(4, 0)), jax.random.key(1)
        losses += [jax.jit(task.loss)(params, params, task.frozen, batch, key, Progress(np.int32(0), np.int32(1)))[0]]
        shown += [next(iter(task.preview(params, task.frozen, BatchedMap(mesh=make_mesh(), most=4)).values()))]
    assert abs(losses[0] - losses[1]) > 1e-3 * losses[0]
    np.testing.assert_array_equal(*shown)


ADAPTED = LoraConfig(rank=2)


@pytest.mark.parametrize(
    ("model", "name", "options", "adapted", "words"),
    [
        ("tiny_model", "ctm", {}, ADAPTED, "tells the student how far a step reaches, which a LoRA's network cannot"),
        ("tiny_model", "meanflow", {}, ADAPTED, "tells the student how far a step reaches"),
        ("tiny_model", "guided", {}, ADAPTED, "tells the student its guidance, w from 2.0 to 14.0, which a network"),
        ("tiny_model", "lcm", {}, LoraConfig(rank=2, targets="no_such_layer"), "targets 'no_such_layer' match none"),
        ("tiny_model", "add", {}, None, "nowhere"),
        ("tiny_sd3", "lcm", {"skip": 20.0}, None, "skip=20.0 is longer than the schedule, whose time is 1 long"),
        ("no_snr", "lcm", {}, None, "predicts epsilon, which at the end of a schedule of zero terminal SNR"),
    ],
)
def test_what_a_method_needs_is_asked_before_pictures_are_encoded(
    model: str, name: str, options: dict[str, float], adapted: LoraConfig | None, words: str, data: DataConfig,
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(Conditioner, "encode_source", None)
    task = distillation(request.getfixturevalue(model), data, method(name, schedule=DDPM(), **options), lora=adapted)
    with pytest.raises((ValueError, OSError), match=re.escape(words)) as caught:
        task.build()
    assert "\n" not in str(caught.value)


def test_the_command_line_says_so_too(
    tiny_model: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = [text for key in ("data", "prompts") for text in (f"--task.{key}.name", f"folder:{pictures}")]
    folder += ["--task.prompts.split", "train", "--task.data.size", "16", "--task.prompts.size", "16"]
    models = [text for key in ("teacher", "vae", "text") for text in (f"--task.{key}", str(tiny_model))]
    command = ["distill", "--config", "openmoji_lcm_lora", "--objective", "ctm", "--workdir", str(tmp_path / "run")]
    assert cli.main([*command, *folder, *models]) == 2
    error = capsys.readouterr().err
    assert "which a LoRA's network cannot take" in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def no_snr(tiny_model: Path, with_scheduler: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_scheduler(tiny_model, tmp_path_factory.mktemp("no_snr") / "model", rescale_betas_zero_snr=True)


@pytest.fixture(scope="module")
def tiny_v(tiny_model: Path, with_scheduler: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_scheduler(tiny_model, tmp_path_factory.mktemp("tiny_v") / "model", prediction_type="v_prediction")


@pytest.mark.parametrize(
    ("name", "model"),
    [
        ("scm", "small_v"),
        ("tcd", "small_sd3"),
        *(
            pytest.param(name, model, marks=pytest.mark.slow)
            for name in METHODS
            for model in ("tiny_model", "tiny_v", "tiny_sd3")
        ),
    ],
)
def test_every_method_takes_a_step(
    name: str, model: str, tiny_model: Path, data: DataConfig, request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("lcm_jax.train.tasks.distillation.preview", lambda *_, **__: None)  # takes long to compile
    task = distillation(
        request.getfixturevalue(model), data, method(name, schedule=DDPM()), image_encoder=str(tiny_model)
    ).build()
    optimizer = task.optimizer(partial(make_optimizer, OptimizerConfig(learning_rate=1e-3, warmup=0), 100))
    step = make_train_step(task.loss, optimizer, decay=0.9, seed=0, target_decay=task.target_decay, steps=100)
    state = jax.jit(lambda key: create_state(task, optimizer, key))(jax.random.key(0))
    before = jax.tree.map(np.array, state.params)  # a copy: the step is given the state's memory
    after, metrics = step(state, task.frozen, next(task.batches(4, 0)))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((after.params, metrics)))
    trees = [after.params, before]
    if "others" in before:
        moved = {name: moves(*(tree["others"][name] for tree in trees)) for name in before["others"]}
        assert all(moved.values()), moved
        trees = [tree["student"] for tree in trees]
    assert moves(*trees)


def moves(after: object, before: object) -> bool:
    return any(np.any(a != b) for a, b in zip(jax.tree.leaves(after), jax.tree.leaves(before), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options"), [("pcm", {"adversarial": 0.1}), ("ctm", {"adversarial": 0.1}), ("dmd2", {"every": 2})]
)
def test_critics_and_second_averages_resume_exactly(
    name: str, options: dict[str, Any], tiny_model: Path, data: DataConfig, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Killed in the middle and started again, every tree of the state has the bits of a run that was not."""
    monkeypatch.setattr("lcm_jax.train.tasks.distillation.preview", lambda *_, **__: lambda *_: {})
    loop = LoopConfig(steps=5, batch_size=4, log_every=5, save_every=2, preview_every=5)
    objective = method(name, schedule=DDPM(), **options)

    def state(workdir: Path, stop_at: int | None = None) -> TrainState:
        task = distillation(tiny_model, data, objective).build()

        def batches(*arguments: Any) -> Any:
            made = task.batches(*arguments)
            following, count = type(made).__next__, itertools.count(1)

            def stop(self: Any) -> Any:
                if next(count) == stop_at:
                    raise KeyboardInterrupt
                return following(self)

            monkeypatch.setattr(type(made), "__next__", stop)
            return made

        try:
            return fit(replace(task, batches=batches), loop, OptimizerConfig(warmup=1), workdir)
        finally:
            monkeypatch.undo()
            monkeypatch.setattr("lcm_jax.train.tasks.distillation.preview", lambda *_, **__: lambda *_: {})

    uninterrupted = state(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        state(tmp_path / "killed", stop_at=4)
    again = state(tmp_path / "killed")
    for (path, one), other in zip(jax.tree.leaves_with_path(uninterrupted), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(one, other, err_msg=jax.tree_util.keystr(path))
    assert (again.target is not None) == (name == "ctm")
