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
from lcm_jax.data.sources import OPENERS
from lcm_jax.diffusion.samplers import Sampler
from lcm_jax.diffusion.samplers import register as register_sampler
from lcm_jax.objectives import METHODS, FewStep
from lcm_jax.objectives import register as register_method
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
    keys |= {"steps": "2", "batch-size": "2", "task.guidance-dim": "8", "task.preview-steps": "1"}
    return [text for key, value in keys.items() for text in (f"--{key}", value)]


def test_a_method_of_80_lines_trains_from_the_command_line(
    tiny_keys: list[str], tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert len(METHOD.read_text().splitlines()) <= 80
    monkeypatch.setenv("LCM_JAX_CACHE", str(tmp_path / "cache"))
    run, short = tmp_path / "run", ["--task.objective.solver-steps", "1"]
    assert cli.main(["distill", "--config", f"{METHOD}:kd_openmoji", "--workdir", str(run), *tiny_keys, *short]) == 0
    student = lcm_jax.load(run / "export")
    assert student.default_sampler == "flow_map"  # as the method says
    trained, start = (lcm_jax.load(path).net_params["conv_in"]["kernel"] for path in (run / "export", tiny_model))
    assert bool(jnp.any(trained != start))


def test_a_registered_method_is_known_by_its_name() -> None:
    load_object(f"{METHOD}:KnowledgeDistillation", option="--objective")
    assert "kd" in METHODS
    config = configs.with_method(configs.get("openmoji_lcm"), "kd", "openmoji_lcm")
    assert type(config.task.objective).__name__ == "KnowledgeDistillation"


def test_a_solver_draws_from_the_command_line_and_from_python(tiny_model: Path, tmp_path: Path) -> None:
    out = tmp_path / "heart.png"
    reference = f"{SOLVER}:ab2"
    command = ["sample", "--model", str(tiny_model), "--prompt", "red heart", "--steps", "3", "--out", str(out)]
    assert cli.main([*command, "--sampler", reference]) == 0
    assert out.is_file()
    pipe = lcm_jax.load(tiny_model)
    solver = load_object(reference, option="sampler")
    one, other = (pipe("red heart", steps=3, sampler=sampler) for sampler in (solver, "ddim"))
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


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def make(width): ...", r"it needs arguments \(width\); give a function without any"),
        ("make = 3", "it is a int, not a TrainConfig"),
        ("import no_such_neighbour\nmake = 3", r"mistake_2.py: No module named 'no_such_neighbour'"),
    ],
)
def test_mistakes_in_a_file_are_one_line(
    text: str, message: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    number = request.node.callspec.indices["text"]
    path = tmp_path / f"mistake_{number}.py"
    path.write_text(text)
    with pytest.raises((ValueError, ModuleNotFoundError), match=message):
        configs.get(f"{path}:make")


def test_a_file_may_import_its_neighbours_and_have_dots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_neighbour.py").write_text("value = 7")
    (tmp_path / "my.own.v2.py").write_text("from my_neighbour import value")
    assert load_object(f"{tmp_path}/my.own.v2.py:value", option="--config") == 7
    monkeypatch.syspath_prepend(tmp_path)  # as where Python runs in the file's own folder
    (tmp_path / "my_third.py").write_text("value = 8")
    assert load_object(f"{tmp_path}/my_third.py:value", option="--config") == 8


@pytest.mark.wrong_types
def test_what_is_no_method_sampler_or_source_is_refused() -> None:
    with pytest.raises(ValueError, match=r"give a class that extends lcm_jax\.objectives\.FewStep"):
        register_method("mine")(lambda nets, batch, key: 0.0)
    with pytest.raises(ValueError, match="OnlyHalf has no __call__"):
        register_method("mine")(type("OnlyHalf", (FewStep,), {}))
    with pytest.raises(ValueError, match="solver Euler2 has no order, evaluations, stochastic, init, step"):
        Sampler(solver=type("Euler2", (), {})())
    with pytest.raises(ValueError, match="'mine' is a int: give a Sampler"):
        register_sampler("mine", 3)
    with pytest.raises(ValueError, match="'mine' is a int: give a function"):
        data.register("mine", 3)


@pytest.mark.wrong_types
@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([], "it has no records"),
        (
            [{"image": np.zeros((8, 8, 3)), "caption": "a"}],
            r"image must be a uint8 array .*, and is float64 \(8, 8, 3\)",
        ),
        ([{"image": np.zeros((8, 8, 3), np.uint8)}], "record 0: caption must be a text, and is NoneType"),
        (None, "its function returned a NoneType, without __len__"),
    ],
)
def test_a_wrong_record_names_the_source_and_the_field(records: object, message: str) -> None:
    data.register("wrong", lambda text, split, size: records)
    try:
        with pytest.raises(ValueError, match=f"data wrong:x.*{message}"):
            data.load_source("wrong:x", "train", 8)
    finally:
        del OPENERS["wrong"]


def test_a_file_of_a_modules_name_is_refused(tmp_path: Path) -> None:
    (tmp_path / "json.py").write_text("x = 1")
    with pytest.raises(ValueError, match=r"json.py has the name of another Python module, .*; rename your file"):
        load_object(f"{tmp_path / 'json.py'}:x", option="--config")


def test_the_page_shows_every_example() -> None:
    page = (EXAMPLES.parent / "extending.md").read_text()
    assert set(re.findall(r"examples/(\w+\.py)", page)) == {path.name for path in EXAMPLES.glob("*.py")}


@pytest.mark.slow
def test_the_code_of_the_page_runs() -> None:
    (code,) = re.findall(r"```python\n(.*?)```", (EXAMPLES.parent / "extending.md").read_text(), re.S)
    names: dict[str, object] = {}
    exec(compile(code, "extending.md", "exec"), names)
    assert names["latents"].shape == (1, 8, 8, 16)


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


def test_jit_under_other_transformations_is_part_of_them() -> None:
    weights = jnp.arange(4.0)
    square = lcm_jax.jit(lambda x: (x * weights) ** 2)
    x = jnp.full(4, 3.0)
    np.testing.assert_allclose(jax.jit(square)(x), square(x))
    np.testing.assert_allclose(lcm_jax.jit(lambda x: square(x) + 1.0)(x), square(x) + 1.0)
    np.testing.assert_allclose(jax.grad(lambda x: square(x).sum())(x), 2.0 * x * weights**2)
    np.testing.assert_allclose(jax.vmap(square)(x[None]), square(x)[None])
    np.testing.assert_allclose(jax.lax.scan(lambda c, _: (square(c) / 9.0, None), x, None, length=1)[0], weights**2)
    with jax.disable_jit():
        np.testing.assert_allclose(square(x), 9.0 * weights**2)


def test_jit_keeps_equal_values_of_other_types_apart() -> None:
    named = lcm_jax.jit(lambda x, kind: x * {bool: 2, float: 3, int: 5}[type(kind)], static_argnames="kind")
    assert [int(named(jnp.int32(1), kind)) for kind in (1, True, 1.0)] == [5, 2, 3]
    assert int(named(jnp.int32(1), kind=True)) == 2
    last = lcm_jax.jit(lambda x, n: x * n, static_argnums=-1)
    assert int(last(jnp.int32(2), 3)) == 6


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
