"""Every task of the library, and every registered config, for a few tiny steps from pictures to an export."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import optax
import pytest
from PIL import Image

import lcm_jax
from lcm_jax import configs, lora
from lcm_jax.cli import main as cli
from lcm_jax.diffusion.schedules import DDPM, RectifiedFlow
from lcm_jax.objectives import (
    METHODS,
    Diffusion,
    FewStep,
    LatentConsistencyDistillation,
    LatentConsistencyFinetuning,
    method,
)
from lcm_jax.parallel.sharding import BatchedMap, make_mesh
from lcm_jax.runtime.atomic_files import write_json
from lcm_jax.train.config import WATCHING, TrainConfig
from lcm_jax.train.loop import LoopConfig, fit
from lcm_jax.train.optimizer import OptimizerConfig
from lcm_jax.train.overrides import flatten
from lcm_jax.train.tasks.autoencoder import AutoencoderTask, TinyAutoencoderTask
from lcm_jax.train.tasks.common import DataConfig
from lcm_jax.train.tasks.conditioner import ENCODE_BATCH, Conditioner
from lcm_jax.train.tasks.contrastive import ContrastiveTask, move
from lcm_jax.train.tasks.diffusion import DiffusionTask
from lcm_jax.train.tasks.distillation import DistillationTask, merge_pretrained
from lcm_jax.train.tasks.locked_image_tuning import LockedImageTask
from lcm_jax.train.tasks.lora_config import LoraConfig
from lcm_jax.train.tasks.masked_language_model import MaskedTask
from lcm_jax.train.train_step import TrainState, make_train_step
from lcm_jax.weights.diffusers_folder import Component, load_component
from mmdit import MMDiTConfig
from mmdit.text import Tokenizer
from vae16 import DiscriminatorConfig, LossConfig, PictureLossConfig, TinyConfig

LOOP = LoopConfig(steps=2, batch_size=4, log_every=1, save_every=2, preview_every=2)
SCHEDULE = DDPM(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")


def run(task: object, workdir: Path) -> Path:
    TrainConfig(task=task, loop=LOOP, optimizer=OptimizerConfig(warmup=1)).run(workdir)
    return workdir / "export"


def test_autoencoder_with_a_discriminator(
    tiny_components: dict[str, Component], data: DataConfig, tmp_path: Path
) -> None:
    task = AutoencoderTask(
        model=tiny_components["vae"].module.config,
        data=data,
        validation=data,
        loss=LossConfig(perceptual_weight=0.0, gan_start=0),
        discriminator=DiscriminatorConfig(ndf=8, n_layers=1, group_size=4),
    )
    vae = load_component(run(task, tmp_path), "vae")
    mean, _ = vae.module.apply({"params": vae.params}, np.zeros((1, 16, 16, 3), np.float32), method="encode")
    assert mean.shape == (1, 8, 8, 4)
    assert vae.module.config.scaling_factor != task.model.scaling_factor


def test_a_perceptual_term_without_weights_is_refused(data: DataConfig) -> None:
    with pytest.raises(ValueError, match=r"perceptual_weight is 1.0 and task.lpips is None"):
        AutoencoderTask(data=data, validation=data, loss=LossConfig(perceptual_weight=1.0)).build()


def test_a_tiny_autoencoder_for_the_latents_of_another(tiny_model: Path, data: DataConfig, tmp_path: Path) -> None:
    shape = {"encoder_block_out_channels": (6, 6), "decoder_block_out_channels": (8, 8)}
    task = TinyAutoencoderTask(
        model=TinyConfig(**shape, num_encoder_blocks=(0, 1), num_decoder_blocks=(1, 0)),
        vae=str(tiny_model),
        data=data,
        validation=data,
        loss=PictureLossConfig(perceptual_weight=0.0, gan_start=0),
        discriminator=DiscriminatorConfig(ndf=8, n_layers=1, group_size=4),
    )
    export = run(task, tmp_path)
    drawn = lcm_jax.load(str(tiny_model), tiny_vae=export)("red heart", steps=1)
    assert drawn.shape == (1, 16, 16, 3)
    deep = replace(task, model=TinyConfig(latent_channels=4))
    with pytest.raises(ValueError, match=r"task.model has downsample_factor 8, that of .* 2: make them equal"):
        deep.build()


def test_clip(tiny_components: dict[str, Component], data: DataConfig, tmp_path: Path) -> None:
    task = ContrastiveTask(
        text=tiny_components["text_encoder"].module.config,
        vision=tiny_components["image_encoder"].module.config,
        vocabulary=600,
        data=data,
        validation=data,
        shift=1,
    )
    export = run(task, tmp_path)
    text, tokenizer = load_component(export, "text_encoder"), Tokenizer.load(export / "tokenizer")
    assert text.module.config.eos_token_id == tokenizer.eos_token_id
    assert load_component(export, "image_encoder").module.config.image_size == 16


def test_a_text_tower_for_a_given_image_tower(
    tiny_model: Path, tiny_components: dict[str, Component], data: DataConfig, tmp_path: Path
) -> None:
    config = replace(tiny_components["text_encoder"].module.config, hidden_size=12)
    task = LockedImageTask(text=config, images=str(tiny_model), data=data, validation=data)
    export = run(task, tmp_path)
    tower, tokenizer = load_component(export, "text_encoder_2"), Tokenizer.load(export / "tokenizer_2")
    assert tower.module.config.hidden_size == 12
    assert tower.module.projection
    assert tower.module.config.vocab_size == tokenizer.vocab_size
    with pytest.raises(ValueError, match="projection_dim is 7, the image tower's is 8"):
        replace(task, text=replace(config, projection_dim=7)).build()


def test_t5_on_captions(tiny_sd3: Path, data: DataConfig, tmp_path: Path) -> None:
    net = load_component(tiny_sd3, "text_encoder_3").module.config
    export = run(MaskedTask(net=net, vocabulary=60, tokens=10, data=data, validation=data), tmp_path)
    t5, tokenizer = load_component(export, "text_encoder_3"), Tokenizer.load(export / "tokenizer_3")
    assert t5.module.config.vocab_size == tokenizer.vocab_size
    assert tokenizer.max_length == 10


def test_another_config_in_the_same_folder_is_refused(tmp_path: Path) -> None:
    config = configs.get("openmoji_clip")
    other = replace(config, optimizer=replace(config.optimizer, learning_rate=0.5))
    write_json(tmp_path / "config.json", {key: repr(value) for key, value in flatten(config) if key not in WATCHING})
    with pytest.raises(ValueError, match=r"learning_rate = 0.001, not 0.5: .*--workdir"):
        other.run(tmp_path)


def test_moved_pictures_bring_white_in() -> None:
    images = np.zeros((8, 16, 16, 3), np.float32)
    moved = np.asarray(move(jax.random.key(0), images, 2))
    assert set(np.unique(moved)) == {0.0, 1.0}
    np.testing.assert_array_equal(np.asarray(move(jax.random.key(0), images, 0)), images)


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


@pytest.fixture(scope="module")
def teacher(
    tiny_model: Path, tiny_components: dict[str, Component], pictures: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    data = DataConfig(name=f"folder:{pictures}", size=16)
    net = tiny_components["unet"].module.config
    return run(teacher_task(tiny_model, net, data), tmp_path_factory.mktemp("teacher"))


def test_teacher_is_a_pipeline_that_keeps_its_parameterization(teacher: Path) -> None:
    pipe = lcm_jax.load(teacher)
    assert pipe.model.kind == "v_prediction"
    assert pipe.default_sampler == "ddim"
    assert pipe("dog face", steps=2, sampler="ddim", guidance=2.0).shape == (1, 16, 16, 3)


@pytest.mark.parametrize(
    "objective", [LatentConsistencyDistillation, pytest.param(LatentConsistencyFinetuning, marks=pytest.mark.slow)]
)
def test_student_embeds_guidance(
    objective: type, teacher: Path, tiny_model: Path, data: DataConfig, tmp_path: Path
) -> None:
    task = DistillationTask(
        teacher=str(teacher),
        vae=str(tiny_model),
        text=str(tiny_model),
        data=data,
        prompts=data,
        objective=objective(schedule=DDPM(), w_min=0.0, w_max=4.0),
    )
    export = run(task, tmp_path)
    pipe = lcm_jax.load(export)
    assert pipe.model.embeds_guidance
    assert pipe.model.kind == "v_prediction"
    assert pipe.default_sampler == "lcm"
    assert pipe("dog face", steps=4, guidance=3.0).shape == (1, 16, 16, 3)
    if objective is LatentConsistencyDistillation:
        again = replace(task, start=str(export)).build().init(jax.random.key(1))
        jax.tree.map(np.testing.assert_array_equal, again, pipe.params["unet"])


@pytest.mark.slow
def test_lora_goes_onto_its_teacher(teacher: Path, tiny_model: Path, data: DataConfig, tmp_path: Path) -> None:
    task = DistillationTask(
        teacher=str(teacher),
        vae=str(tiny_model),
        text=str(tiny_model),
        data=data,
        prompts=data,
        lora=LoraConfig(rank=2, dropout=0.3),
        objective=LatentConsistencyDistillation(schedule=DDPM(), w_min=2.0, w_max=2.0, target="online"),
    )
    adapters = run(task, tmp_path)
    pipe = lcm_jax.load(teacher, lora=adapters)
    assert not pipe.model.embeds_guidance
    assert pipe("dog face", steps=4).shape == (1, 16, 16, 3)


def distillation(model: Path, data: DataConfig, objective: FewStep, **options: object) -> DistillationTask:
    given = {"image_encoder": "nowhere", **options}
    around = dict.fromkeys(("teacher", "vae", "text"), str(model))
    return DistillationTask(data=data, prompts=data, objective=objective, **around, **given)


@pytest.mark.slow
def test_dropout_is_for_training_alone(tiny_model: Path, data: DataConfig) -> None:
    objective = LatentConsistencyDistillation(schedule=DDPM(), w_min=2.0, w_max=2.0, target="online")
    losses, shown = [], []
    for rate in (0.0, 0.5):
        adapted = LoraConfig(rank=2, dropout=rate)
        task = distillation(tiny_model, data, objective, lora=adapted, preview_steps=1).build()
        params = jax.tree.map(lambda leaf: leaf + 0.1, task.init(jax.random.key(0)))
        batch, key = next(task.batches(4, 0)), jax.random.key(1)
        losses += [jax.jit(task.loss)(params, params, task.frozen, batch, key, 0)[0]]
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


def with_scheduler(model: Path, folder: Path, **keys: object) -> Path:
    shutil.copytree(model, folder)
    path = folder / "scheduler" / "scheduler_config.json"
    write_json(path, {**json.loads(path.read_text()), **keys})
    return folder


@pytest.fixture(scope="module")
def no_snr(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_scheduler(tiny_model, tmp_path_factory.mktemp("no_snr") / "model", rescale_betas_zero_snr=True)


@pytest.fixture(scope="module")
def tiny_v(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_scheduler(tiny_model, tmp_path_factory.mktemp("tiny_v") / "model", prediction_type="v_prediction")


FAST = {("tcd", "tiny_sd3"), ("scm", "tiny_v")}


@pytest.mark.parametrize(
    ("name", "model"),
    [
        pytest.param(name, model, marks=() if (name, model) in FAST else pytest.mark.slow)
        for name in METHODS
        for model in ("tiny_model", "tiny_v", "tiny_sd3")
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
    optimizer = task.optimizer(optax.adam(1e-3))
    step = make_train_step(task.loss, optimizer, decay=0.9, seed=0)
    state = jax.jit(lambda key: TrainState.create(task.init(key), optimizer))(jax.random.key(0))
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


def test_forward_mode_leaves_flash_kernels_aside(
    tiny_model: Path, data: DataConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def build(*_: object, attention: str | None, **__: object) -> None:
        asked.append(attention)
        raise InterruptedError

    monkeypatch.setattr("lcm_jax.train.tasks.distillation.build_net", build)
    for name in ("scm", "meanflow", "lcm"):
        with pytest.raises(InterruptedError):
            distillation(tiny_model, data, method(name, schedule=DDPM())).build()
    assert asked == ["xla", "xla", None]


@pytest.fixture(scope="module")
def flow_teacher(
    tiny_sd3: Path, tiny_sd3_net: MMDiTConfig, pictures: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    data = DataConfig(name=f"folder:{pictures}", size=16)
    task = teacher_task(tiny_sd3, tiny_sd3_net, data)
    objective = Diffusion(schedule=RectifiedFlow(shift=3.0), kind="flow")
    return run(replace(task, objective=objective), tmp_path_factory.mktemp("flow_teacher"))


def test_sd3_is_trained_and_drawn(flow_teacher: Path) -> None:
    pipe = lcm_jax.load(flow_teacher)
    assert pipe.model.kind == "flow"
    assert pipe.model.schedule == RectifiedFlow(shift=3.0)
    assert pipe.default_sampler == "euler"
    assert pipe("dog face", steps=2, sampler="euler", guidance=2.0).shape == (1, 16, 16, 3)


@pytest.mark.parametrize("adapted", [None, LoraConfig(rank=2, targets=lora.MMDIT_TARGETS)], ids=["full", "lora"])
def test_students_of_a_flow(
    adapted: LoraConfig | None, flow_teacher: Path, tiny_sd3: Path, data: DataConfig, tmp_path: Path
) -> None:
    objective = LatentConsistencyDistillation(
        schedule=RectifiedFlow(), grid_points=8, skip=0.125, w_min=0.0, w_max=4.0, target="online"
    )
    task = DistillationTask(
        teacher=str(flow_teacher),
        vae=str(tiny_sd3),
        text=str(tiny_sd3),
        data=data,
        prompts=data,
        objective=objective,
        lora=adapted,
    )
    export = run(task, tmp_path)
    pipe = lcm_jax.load(export) if adapted is None else lcm_jax.load(flow_teacher, lora=export)
    assert pipe.model.embeds_guidance == (adapted is None)
    assert pipe.model.schedule == RectifiedFlow(shift=3.0)
    assert pipe("dog face", steps=4, guidance=3.0 if adapted is None else 1.0).shape == (1, 16, 16, 3)
    assert adapted is not None or pipe.default_sampler == "lcm"


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
    loop, optimizer = replace(LOOP, steps=4, save_every=1, keep=4), OptimizerConfig(warmup=1)
    start = task.batches(loop.batch_size, loop.seed)
    assert {next(start)["mean"].shape for _ in range(4)} == {(4, 8, 8, 4), (4, 6, 10, 4), (4, 10, 6, 4)}

    whole = fit(task, loop, optimizer, tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "killed")
    for step in (3, 4):
        shutil.rmtree(tmp_path / "killed" / "checkpoints" / str(step))
    resumed = fit(task, loop, optimizer, tmp_path / "killed")
    jax.tree.map(np.testing.assert_array_equal, whole.params, resumed.params)
    assert np.any(whole.params["proj_out"]["kernel"])  # zero at first


def test_captions_are_mixed_at_the_rate(tiny_sd3: Path, shapes: DataConfig) -> None:
    conditioner = Conditioner.load(str(tiny_sd3), str(tiny_sd3))
    one = replace(shapes, buckets=False)

    def contexts(data: DataConfig) -> set[bytes]:
        task = DiffusionTask(data=data)
        batches = task.batches(conditioner, data.open_buckets())(6, 0)
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
        loss, _ = jax.eval_shape(task.loss, params, params, task.frozen, batch, key, 0)
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


def test_student_starts_as_its_teacher(teacher: Path) -> None:
    trained = load_component(teacher, "unet").params
    fresh = jax.tree.map(np.zeros_like, trained) | {"new": {"kernel": np.zeros(3)}}
    grafted = merge_pretrained(fresh, trained)
    assert set(grafted) == set(trained) | {"new"}
    for a, b in zip(jax.tree.leaves(trained), jax.tree.leaves({k: grafted[k] for k in trained}), strict=True):
        np.testing.assert_array_equal(a, b)


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
    mine, given = getattr(tiny_sd3_net, key) + 1, getattr(tiny_sd3_net, key)
    with pytest.raises(ValueError, match=f"task.net.{key} is {mine}, but the text encoders' width is {given}"):
        teacher_task(tiny_sd3, replace(tiny_sd3_net, **{key: mine}), data).build()
    with pytest.raises(ValueError, match="joint_attention_dim is 32, but the text encoders' width is 16"):
        teacher_task(tiny_model, tiny_sd3_net, data).build()


@pytest.mark.parametrize("name", sorted(configs.CONFIGS))
def test_registered_configs_are_made_and_named(name: str) -> None:
    assert isinstance(configs.get(name), TrainConfig)


def test_an_unknown_config_names_the_nearest() -> None:
    with pytest.raises(ValueError, match="did you mean openmoji_teacher"):
        configs.get("openmoji_teache")
