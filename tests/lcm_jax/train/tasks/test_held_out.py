"""What a training validates on, and the captions of its previews: pictures of its own data, held out of it."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lcm_jax.configs import CONFIGS
from lcm_jax.data import openmoji
from lcm_jax.data.sources import InMemory
from lcm_jax.diffusion.schedules import DDPM
from lcm_jax.nets import UNetConfig
from lcm_jax.objectives import Diffusion
from lcm_jax.parallel.sharding import BatchedMap, make_mesh
from lcm_jax.train.tasks import diffusion as diffusion_module
from lcm_jax.train.tasks.common import DataConfig, held_out_config, open_with_held_out, share
from lcm_jax.train.tasks.diffusion import DiffusionTask

VALIDATING = {name: key for name in CONFIGS for key in ("prompts", "validation") if hasattr(CONFIGS[name]().task, key)}


@pytest.fixture
def no_emoji(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openmoji, "prepare", None)


@pytest.mark.parametrize("name", VALIDATING)
def test_every_config_validates_on_the_data_that_it_is_given(name: str, pictures: Path) -> None:
    task = CONFIGS[name]().task
    data = replace(task.data, name=f"folder:{pictures}", size=32)
    given = getattr(replace(task, data=data).resolved, VALIDATING[name])
    assert (given.name, given.size) == (data.name, 32)


def test_a_split_by_name_is_taken_and_other_data_have_a_share_held_out(pictures: Path, tmp_path: Path) -> None:
    validation, data = DiffusionTask().prompts, DataConfig(name=f"folder:{pictures}", size=16)
    assert held_out_config(validation, DataConfig()) == DataConfig(split="validation")  # OpenMoji has it
    assert held_out_config(validation, data) is None
    assert held_out_config(replace(validation, split="train"), data) == data
    assert held_out_config(DataConfig(), data) == DataConfig()
    shutil.copytree(pictures, tmp_path / "validation")
    both = replace(data, name=f"folder:{tmp_path}")
    assert held_out_config(validation, both) is None  # the folder is a part of what is trained on
    shutil.copytree(pictures, tmp_path / "train")
    assert held_out_config(validation, both) == replace(both, split="validation")


def test_a_share_is_apart_and_evenly_taken(capfd: pytest.CaptureFixture[str]) -> None:
    for count, most in ((2, 1), (39, 1), (40, 2), (6000, 256)):
        captions = tuple(map(str, range(count)))
        source = InMemory(images=np.zeros((count, 1, 1, 3), np.uint8), captions=captions)
        rest, apart = share(source, "folder:x")
        texts = [[part[i]["caption"] for i in range(len(part))] for part in (rest, apart)]
        assert sorted(texts[0] + texts[1], key=int) == list(captions)
        assert len(apart) == most
        said = f"folder:x has no split for the validation: the training leaves out {most} of its {count} pictures"
        assert said in capfd.readouterr().err
        gaps = np.diff([int(text) for text in texts[1]])
        assert np.ptp(gaps) <= 1 if len(gaps) else True
    one = InMemory(images=np.zeros((1, 1, 1, 3), np.uint8), captions=("a",))
    with pytest.raises(ValueError, match="folder:x: holds one picture, and one is held out"):
        share(one, "folder:x")


@pytest.mark.usefixtures("no_emoji")
def test_pictures_of_your_own_are_all_that_is_read(pictures: Path) -> None:
    data = DataConfig(name=f"folder:{pictures}", size=16)
    rest, apart = open_with_held_out(data, DiffusionTask().prompts)
    assert (len(rest), len(apart)) == (5, 1)
    assert apart[0]["caption"] not in [rest[i]["caption"] for i in range(5)]


@pytest.mark.usefixtures("no_emoji")
@pytest.mark.parametrize("buckets", [False, True])
def test_a_training_never_sees_what_it_validates_on(
    tiny_model: Path, small_net: UNetConfig, pictures: Path, buckets: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[str] = []
    validated: list[Any] = []

    def preview(model: Any, conditioner: Any, captions: list[str], **_: Any) -> Any:
        shown.extend(captions)
        return lambda *_: {}

    monkeypatch.setattr(diffusion_module, "preview", preview)  # takes long to compile
    data = DataConfig(name=f"folder:{pictures}", size=16, buckets=buckets, multiple=4)
    objective = Diffusion(schedule=DDPM())
    task = DiffusionTask(vae=str(tiny_model), text=str(tiny_model), net=small_net, data=data, objective=objective)
    built = task.build()

    def listen(self: BatchedMap, function: Any, rows: Any, **_: Any) -> np.ndarray:
        validated.append(rows[1]["mean"])
        return np.zeros(1)

    monkeypatch.setattr(BatchedMap, "__call__", listen)
    built.preview({}, built.frozen, BatchedMap(mesh=make_mesh(), most=1))
    (held,) = validated[0]
    batches = built.batches(1, 0)
    trained = {next(batches)["mean"].tobytes() for _ in range(10)}
    assert len(trained) == 5
    assert held.tobytes() not in trained
    assert len(shown) == len(set(shown)) == 6
    assert list(built.captions) == shown


@pytest.mark.wrong_types
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"dtype": "cuda"}, "task.dtype is 'cuda'; use one of float32, bfloat16, float16"),
        ({"preview_steps": 0}, "task.preview_steps is 0; it must be at least 1"),
    ],
)
def test_a_wrong_value_is_refused(options: dict[str, Any], words: str) -> None:
    for name in ("openmoji_teacher", "openmoji_lcm", "openmoji_outline"):
        with pytest.raises(ValueError, match=words):
            replace(CONFIGS[name]().task, **options)
