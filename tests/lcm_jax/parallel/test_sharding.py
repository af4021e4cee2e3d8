"""One run is the same run on any mesh: eight virtual devices, layouts of every kind, and what lies where."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from lcm_jax.parallel.sharding import (
    MeshConfig,
    gather_to_host,
    init_sharded,
    local_batch_indices,
    make_mesh,
    shard_batch,
    tree_shardings,
)
from lcm_jax.train.loop import LoopConfig

pytestmark = pytest.mark.usefixtures("own_cache")

JOB = Path(__file__).with_name("job.py")
LAYOUTS: dict[str, dict[str, Any]] = {
    "data=8": {"mesh": "data=8"},
    "fsdp=8": {"mesh": "fsdp=8"},
    "data=2 x fsdp=4": {"mesh": "data=2,fsdp=4"},
    "fsdp=4 x tensor=2": {"mesh": "fsdp=4,tensor=2"},
    "pmap": {"parallel": "pmap"},
}
LOOP = {"steps": 10, "batch_size": 8, "log_every": 1, "save_every": 100, "preview_every": 100, "ema": 0.9}
Run = Callable[[list[dict[str, Any]]], list[Mapping[str, np.ndarray]]]


@pytest.fixture
def run(tmp_path: Path, environment: Callable[[int], dict[str, str]]) -> Run:
    """Trains cases one after another in a process of eight devices."""

    def start(cases: list[dict[str, Any]]) -> list[Mapping[str, np.ndarray]]:
        folders = [tmp_path / str(i) for i in range(len(cases))]
        for folder in folders:
            folder.mkdir()
        configured = [{**case, "workdir": str(folder)} for case, folder in zip(cases, folders, strict=True)]
        (tmp_path / "cases.json").write_text(json.dumps({"cases": configured}))
        command = [sys.executable, str(JOB), str(tmp_path / "cases.json")]
        done = subprocess.run(command, env=environment(8), capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return [np.load(folder / "result.npz") for folder in folders]

    return start


def same(one: Mapping[str, np.ndarray], other: Mapping[str, np.ndarray], tolerance: float = 1e-5) -> None:
    assert set(one) == set(other)
    for name in one:
        if name not in ("bytes", "held"):
            np.testing.assert_allclose(one[name], other[name], rtol=tolerance, atol=tolerance, err_msg=name)


def cases(layouts: Iterable[str] = LAYOUTS, **options: Any) -> list[dict[str, Any]]:
    """One device, then the layouts."""
    loop = LOOP | options.pop("loop", {})
    rest = [{"loop": loop | LAYOUTS[name], **options} for name in layouts]
    return [{"loop": loop, "one": True, **options}, *rest]


def check(results: list[Mapping[str, np.ndarray]], share: float) -> None:
    """All agree with one device, and fsdp left each device at most a `share` of the state."""
    first, *rest = results
    assert len(first["losses"]) == 10
    assert len(set(first["losses"])) == 10
    for other in rest:
        same(first, other)
    held = {name: other["bytes"][1] / other["bytes"][0] for name, other in zip(LAYOUTS, rest, strict=True)}
    assert held["data=8"] == held["pmap"] == 1.0
    assert held["fsdp=8"] < share
    assert held["fsdp=8"] < held["data=2 x fsdp=4"] < 2.5 * share
    assert held["fsdp=4 x tensor=2"] < held["data=2 x fsdp=4"]


def test_ten_steps_are_the_same_on_a_mesh_of_two_axes_and_by_pmap(run: Run) -> None:
    first, *rest = run(cases(("fsdp=4 x tensor=2", "pmap")))
    assert len(set(first["losses"])) == 10
    for other in rest:
        same(first, other)
    assert [other["bytes"][1] / other["bytes"][0] for other in rest] == [pytest.approx(1 / 8, abs=0.05), 1.0]


@pytest.mark.slow
def test_ten_steps_are_the_same_on_every_mesh(run: Run) -> None:
    check(run(cases()), share=0.2)


@pytest.mark.slow
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("net", ["unet", "mmdit"])
def test_ten_lcm_steps_are_the_same_on_every_mesh(run: Run, net: str, lora: bool) -> None:
    check(run(cases(net=net, lora=lora)), share=0.5)


@pytest.mark.slow
def test_accumulated_gradients_are_the_same_on_every_mesh(run: Run) -> None:
    options = {"net": "unet", "loop": LOOP | {"accumulate": 2, "batch_size": 16}}
    first, *rest = run([case for case in cases(**options) if case["loop"].get("parallel") != "pmap"])
    for other in rest:
        same(first, other)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["tiny_model", "tiny_sd3"])
def test_pictures_are_the_same_on_every_mesh(run: Run, kind: str, request: pytest.FixtureRequest) -> None:
    model = {"model": str(request.getfixturevalue(kind))}
    meshes = ["data=8", "fsdp=8", "data=2,fsdp=2,tensor=2"]
    first, *rest = run([model, *({**model, "mesh": mesh} for mesh in meshes)])
    assert first["images"].shape == (7, 16, 16, 3)
    for other in rest:
        assert np.abs(first["images"].astype(int) - other["images"]).max() <= 1  # a half is rounded up or down


@pytest.mark.slow
def test_a_preview_is_the_same_by_pmap(run: Run, tiny_model: Path, pictures: Path) -> None:
    case = {"learn": "diffusion", "folder": str(tiny_model), "pictures": str(pictures)}
    one, other = run([{**case, "loop": LOOP | {"steps": 2} | LAYOUTS[name]} for name in ("data=8", "pmap")])
    assert float(one["seen validation_loss"]) > 0
    same(one, other, tolerance=1e-4)


def on(shape: tuple[int, int, int]) -> Any:
    """A mesh of devices that are not there."""
    return jax.sharding.AbstractMesh(shape, ("data", "fsdp", "tensor"))


def specs(tree: Any, shape: tuple[int, int, int]) -> Any:
    return jax.tree.map(lambda sharding: sharding.spec, tree_shardings(tree, on(shape)))


def test_shapes_and_names_say_where_an_array_lies() -> None:
    def array(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    tree = {
        "conv": {"kernel": array(3, 3, 64, 128), "bias": array(128)},
        "odd": {"kernel": array(33, 35)},
        "attn": {"to_q": {"kernel": array(64, 128)}, "to_out_0": {"kernel": array(128, 64)}},
        "blocks": {"ff": {"net_0": {"proj": {"kernel": array(24, 64, 256)}}, "net_2": {"kernel": array(24, 256, 64)}}},
        "a/to_q/kernel": {"down": array(64, 32), "up": array(32, 128), "alpha": array()},
    }
    P = PartitionSpec
    assert not any(any(spec) for spec in jax.tree.leaves(specs(tree, (8, 1, 1)), is_leaf=lambda x: isinstance(x, P)))
    assert specs(tree, (1, 4, 2)) == {
        "conv": {"kernel": P(None, None, None, "fsdp"), "bias": P()},
        "odd": {"kernel": P(None, None)},
        "attn": {"to_q": {"kernel": P("fsdp", "tensor")}, "to_out_0": {"kernel": P("tensor", "fsdp")}},
        "blocks": {
            "ff": {
                "net_0": {"proj": {"kernel": P(None, "fsdp", "tensor")}},
                "net_2": {"kernel": P(None, "tensor", "fsdp")},
            }
        },
        "a/to_q/kernel": {"down": P("fsdp", None), "up": P("fsdp", "tensor"), "alpha": P()},
    }


@pytest.mark.parametrize(
    ("text", "devices", "shape"),
    [
        ("", 8, (8, 1, 1)),
        ("fsdp=4", 8, (2, 4, 1)),
        ("data=2, fsdp=-1", 8, (2, 4, 1)),
        ("data=1,fsdp=4,tensor=2", 8, (1, 4, 2)),
    ],
)
def test_a_mesh_from_text(text: str, devices: int, shape: tuple[int, int, int]) -> None:
    assert MeshConfig.parse(text).shape(devices) == shape


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("data:4", "'data:4' is not AXIS=NUMBER"),
        ("model=4", "'model=4' is not AXIS=NUMBER"),
        ("data=0", "'data=0' is not AXIS=NUMBER"),
        ("data=2,data=2", "at most once"),
        ("data=-1,fsdp=-1", "only one axis"),
    ],
)
def test_what_is_no_mesh_is_refused_with_the_config(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LoopConfig(mesh=text)


def test_a_mesh_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="data=3,fsdp=2,tensor=1 does not fit 8 devices"):
        MeshConfig.parse("data=3,fsdp=2").shape(8)
    with pytest.raises(ValueError, match="does not fit 8 devices"):
        MeshConfig.parse("fsdp=3").shape(8)
    with pytest.raises(ValueError, match=r"loop.accumulate = 2 is for loop.parallel = jit"):
        LoopConfig(parallel="pmap", accumulate=2)


def test_what_a_beginning_closes_over_is_no_constant() -> None:
    weights = jnp.arange(4096.0).reshape(64, 64)
    mesh = make_mesh()

    def make(key: Any) -> Any:
        return {"copy": weights, "drawn": jax.random.normal(key, (3,))}

    shardings = tree_shardings(jax.eval_shape(make, jax.random.key(1)), mesh)
    made = init_sharded(make, jax.random.key(1), shardings)
    np.testing.assert_array_equal(made["copy"], weights)
    np.testing.assert_array_equal(made["drawn"], jax.random.normal(jax.random.key(1), (3,)))


def test_rows_of_a_process_and_back() -> None:
    mesh = make_mesh()
    assert local_batch_indices(jax.sharding.NamedSharding(mesh, PartitionSpec("data")), 6) == (0, 1, 2, 3, 4, 5)
    np.testing.assert_array_equal(gather_to_host(shard_batch({"x": np.arange(3)}, mesh))["x"], np.arange(3))
