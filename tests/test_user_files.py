"""A file of a user's own works from Python and from the command line: docs/examples, as they stand."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import lcm_jax
from lcm_jax import configs, data
from lcm_jax.cli import main as cli
from lcm_jax.objectives import METHODS
from lcm_jax.runtime.user_code import load_object
from lcm_jax.train.config import TrainConfig

EXAMPLES = Path(__file__).parents[1] / "docs" / "examples"
METHOD, SOLVER, DATA, TASK = (EXAMPLES / f"own_{name}.py" for name in ("method", "solver", "data", "task"))


@pytest.fixture
def tiny_keys(tiny_model: Path, pictures: Path) -> list[str]:
    """Overrides that put the tiny networks and pictures into a config of the openmoji distillations."""
    keys = {f"task.{name}": str(tiny_model) for name in ("teacher", "vae", "text")}
    keys |= {f"task.{name}.name": f"folder:{pictures}" for name in ("data", "prompts")}
    keys |= {"task.data.size": "16", "task.prompts.size": "16", "task.prompts.split": "train"}
    keys |= {"steps": "2", "batch-size": "2", "task.guidance-dim": "8", "ema-every": "1"}
    return [text for key, value in keys.items() for text in (f"--{key}", value)]


def test_a_method_of_80_lines_trains_from_the_command_line(
    tiny_keys: list[str], tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert len(METHOD.read_text().splitlines()) <= 80
    monkeypatch.setenv("LCM_JAX_CACHE", str(tmp_path / "cache"))
    run = tmp_path / "run"
    assert cli.main(["distill", "--config", f"{METHOD}:reflow_openmoji", "--workdir", str(run), *tiny_keys]) == 0
    student = lcm_jax.load(run / "export")
    assert student.default_sampler == "ddim"  # as the method says
    trained, start = (lcm_jax.load(path).net_params["conv_in"]["kernel"] for path in (run / "export", tiny_model))
    assert bool(jnp.any(trained != start))


def test_a_registered_method_is_known_by_its_name() -> None:
    load_object(f"{METHOD}:Reflow", option="--objective")
    assert "reflow" in METHODS
    config = configs.with_method(configs.get("openmoji_lcm"), "reflow", "openmoji_lcm")
    assert type(config.task.objective).__name__ == "Reflow"


def test_a_solver_draws_from_the_command_line_and_from_python(tiny_model: Path, tmp_path: Path) -> None:
    out = tmp_path / "heart.png"
    reference = f"{SOLVER}:ab2"
    command = ["sample", "--model", str(tiny_model), "--prompt", "red heart", "--steps", "3", "--out", str(out)]
    assert cli.main([*command, "--sampler", reference]) == 0
    assert out.is_file()
    pipe = lcm_jax.load(tiny_model)
    one, other = (pipe("red heart", steps=3, sampler=sampler) for sampler in (reference, "ddim"))
    assert one.shape == other.shape
    assert np.any(one != other)


def test_a_data_source_is_read_by_its_name(tmp_path: Path, tiny_model: Path) -> None:
    load_object(f"{DATA}:open_shapes", option="--import")
    source = data.load_source("shapes:all", "train", 16)
    assert (len(source), source[0]["caption"], source[0]["image"].shape) == (16, "red disc", (16, 16, 3))
    with pytest.raises(ValueError, match="one size; leave buckets out"):
        data.load_buckets("shapes:all", "train", [(16, 16), (16, 32)])
    command = ["encode", "--import", str(DATA), "--model", str(tiny_model), "--data", "shapes:discs", "--size", "16"]
    assert cli.main([*command, "--out", str(tmp_path / "encoded")]) == 0
    assert len(data.load_source(str(tmp_path / "encoded"), "train", 16, encoded=True)) == 8


def test_a_task_trains_from_the_command_line(pictures: Path, tmp_path: Path) -> None:
    keys = ["--task.data.name", f"folder:{pictures}", "--task.data.size", "16", "--steps", "2"]
    assert cli.main(["train", "--config", f"{TASK}:count_dark", "--workdir", str(tmp_path / "run"), *keys]) == 0
    assert "Dense_0/kernel" in load_file(tmp_path / "run" / "export" / "model.safetensors")


def test_a_config_may_be_a_value_or_a_function(tmp_path: Path) -> None:
    path = tmp_path / "my_own_config.py"
    path.write_text("from lcm_jax import configs\nvalue = configs.get('openmoji_lcm')\nwrong = 3\n")
    assert isinstance(configs.get(f"{path}:value"), TrainConfig)
    with pytest.raises(ValueError, match=r"wrong: it is a int, not a TrainConfig"):
        configs.get(f"{path}:wrong")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("absent.py:name", "--config: no file absent.py"),
        ("numpy.py:name", "no file numpy.py"),
        ("lcm_jax.configs:absent", "lcm_jax.configs has no absent; it has"),
        ("no_such_module_here:name", "No module named 'no_such_module_here'"),
    ],
)
def test_what_cannot_be_found_is_one_line(text: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "--config", text]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_file_of_a_modules_name_is_refused(tmp_path: Path) -> None:
    (tmp_path / "json.py").write_text("x = 1")
    with pytest.raises(ValueError, match=r"json.py has the name of another Python module; rename the file"):
        load_object(f"{tmp_path / 'json.py'}:x", option="--config")


def test_the_page_shows_every_example() -> None:
    page = (EXAMPLES.parent / "extending.md").read_text()
    assert set(re.findall(r"examples/(\w+\.py)", page)) == {path.name for path in EXAMPLES.glob("*.py")}


def test_jit_takes_closed_over_arrays_as_arguments(tiny_model: Path) -> None:
    denoise = lcm_jax.load(tiny_model).denoiser("red heart", guidance=3.0)
    x, t = jnp.ones((1, 8, 8, 4)), jnp.float32(500.0)
    traced = []

    def closed(x: jax.Array, t: jax.Array) -> jax.Array:
        traced.append(t)
        return denoise(x, t).x0

    with_arguments = lcm_jax.jit(lambda denoise, x, t: denoise(x, t).x0)
    compiled = lcm_jax.jit(closed)
    want = jax.jit(closed)(x, t)
    np.testing.assert_allclose(compiled(x, t), want, atol=1e-5)
    np.testing.assert_allclose(with_arguments(denoise, x, t), want, atol=1e-5)
    count = len(traced)
    compiled(x + 1.0, t)
    assert len(traced) == count  # the second call runs what the first compiled
    assert len(jax.tree.leaves(denoise)) > len(jax.tree.leaves(denoise.params))  # parameters, conditioning, guidance


def test_jit_takes_static_donated_and_keyword_arguments() -> None:
    weights = jnp.arange(4.0)

    def scaled(n: int, x: jax.Array, *, shift: jax.Array) -> dict[str, jax.Array]:
        return {"y": n * (x * weights) + shift}

    compiled = lcm_jax.jit(scaled, static_argnums=0, donate_argnums=1)
    for n in (1, 2):
        x = jnp.ones(4)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a CPU may decline to donate
            y = compiled(n, x, shift=jnp.ones(4))["y"]
        np.testing.assert_allclose(y, n * np.arange(4.0) + 1.0)
    assert x.is_deleted()
