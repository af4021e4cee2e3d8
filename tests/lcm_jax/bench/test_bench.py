"""The bench measures what it says: rows in turns, ratios of medians, operations as counted by hand."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lcm_jax import bench
from lcm_jax.bench import Cost, Options, Row, measure, models, profile, table, training
from lcm_jax.bench.measure import Ceilings, flops_of, program
from lcm_jax.bench.stream import moving_scene
from lcm_jax.weights.safetensors_files import read_json


def test_rows_run_in_turns() -> None:
    """Once to compile, once more, then alternately."""
    order: list[str] = []
    rows = [Row(name=name, run=lambda name=name: order.append(name)) for name in "ab"]
    results = measure(rows, 3)
    assert "".join(order) == "ab" + "ab" + "ababab"
    assert all(len(result.seconds) == 3 for result in results.values())


def test_ratios_are_of_medians_per_frame() -> None:
    rows = [Row(name="slow", run=lambda: None), Row(name="fast", run=lambda: None, frames=4, against="slow")]
    results = measure(rows, 3)
    results["slow"].seconds, results["fast"].seconds = [1.0, 2.0, 30.0], [2.0, 2.0, 2.0]
    line = next(line for line in table(results).splitlines() if line.startswith("| fast"))
    assert "| 2.0 | 500.00 |" in line
    assert "4.00x (3.00-32.00) slow" in line  # of the turns 2, 4 and 60 times


def test_the_scene_moves() -> None:
    scene = moving_scene((16, 24), 5)
    assert len(scene) == 5
    assert scene[0].shape == (16, 24, 3)
    assert all(not np.array_equal(a, b) for a, b in pairwise(scene))


def test_operations_are_counted_and_set_against_the_ceiling() -> None:
    a, b = jnp.ones((8, 16)), jnp.ones((16, 4))
    assert flops_of(jnp.matmul, a, b) == 2 * 8 * 16 * 4
    row = program("product", jnp.matmul, a, b)
    results = measure([row], 2)
    assert results["product"].cost.flops == 2 * 8 * 16 * 4
    assert results["product"].cost.memory == 4 * (8 * 16 + 16 * 4 + 8 * 4)
    results["product"].seconds = [1.0, 1.0]
    assert "| 50 % |" in table(results, Ceilings(flops=2048.0, bytes=1.0))


def test_the_dearest_operation_comes_first() -> None:
    product = jax.jit(lambda a: a @ a)
    found = profile.operations(lambda: product(jnp.ones((512, 512))))
    assert found[0][1] > 0.0
    assert all(one[1] >= other[1] for one, other in pairwise(found))


def test_random_weights_are_the_same_every_time_and_keep_the_variance() -> None:
    kind, config = models.GEOMETRIES["sd15"].parts["text_encoder"]
    trees = [models.component(kind, models.tiny(config), "float32").params for _ in range(2)]
    assert jax.tree.all(jax.tree.map(lambda a, b: bool(jnp.array_equal(a, b)), *trees))
    leaves = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree.leaves_with_path(trees[0])}
    kernel = next(leaf for path, leaf in leaves.items() if "fc1" in path and "kernel" in path)
    assert abs(float(kernel.std()) * kernel.shape[-2] ** 0.5 - 1.0) < 0.1


def test_a_case_is_run_and_written(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [Row(name="one", run=lambda: None, prepare=lambda: Cost(flops=1e9))]
    monkeypatch.setattr(bench, "rows_of", lambda case, options: iter([(f"A title of {case}", rows)]))
    monkeypatch.setattr(bench, "ceilings", lambda dtype: Ceilings(1e12, 1e9))
    bench.run_cases(["unet"], Options(), repeats=4, out=tmp_path / "b" / "x.json")
    assert "## A title of unet" in capsys.readouterr().out
    record = read_json(tmp_path / "b" / "x.json")
    assert len(record["cases"]["A title of unet"]["one"]["seconds"]) == 4
    assert {"device", "versions", "date", "options", "ceilings"} <= set(record)


@pytest.mark.parametrize(
    ("cases", "options", "repeats", "said"),
    [
        (["large"], {}, 1, "bench large: no such case; known are unet, "),
        (["unet"], {}, 0, "--repeats 0: it must be at least 1"),
        (["mmdit"], {"peer": "diffusers"}, 1, "bench mmdit has no peer"),
        (["vae"], {"quantize": {"denoiser": "int8"}}, 1, "bench vae has no rows of denoiser in 8 bits: --quantize is"),
        (["stream"], {"quantize": {"vae": "int8"}}, 1, "bench stream has no rows of vae in 8 bits: --quantize is for"),
        (["stream"], {"model": "random-sd9"}, 1, "--model random-sd9: no such geometry; known are random-sd15, "),
        (
            ["text-to-image"],
            {"model": "random-sd-turbo"},
            1,
            "--model random-sd-turbo: bench text-to-image has random-sd15, ",
        ),
        (["training"], {"model": "openmoji-sd3"}, 1, "bench training distils a UNet, and this has a MMDiT"),
        (["start"], {"model": "random-sd15"}, 1, "bench start reads a model from files, and random-sd15 has none"),
    ],
)
def test_what_does_not_go_together_is_said_first(
    cases: list[str], options: dict, repeats: int, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "ceilings", lambda dtype: pytest.fail("measured before it was said"))
    with pytest.raises(ValueError, match=said):
        bench.run_cases(cases, Options(**options), repeats=repeats)


def test_a_training_step_that_memory_does_not_hold_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal:       24000000 kB\nMemAvailable:    4194304 kB\n")
    monkeypatch.setattr(training, "MEMORY", meminfo)
    training.check_room("LCM", 2**32)
    with pytest.raises(ValueError, match=r"LCM: a training step takes 5\.0 GiB, and 4\.0 are free: give "):
        training.check_room("LCM", 5 * 2**30)


def test_a_training_step_is_of_the_models_own_network() -> None:
    config, tokens = training.teacher_of(Options(model="openmoji"))
    assert (config.in_channels, config.time_cond_proj_dim, tokens) == (16, None, 24)


def test_a_case_runs_on_tiny_networks(capsys: pytest.CaptureFixture[str]) -> None:
    bench.run_cases(["text"], Options(scale="tiny"), repeats=1)
    assert "| CLIP-L |" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize(
    "case", ["unet", "mmdit", "vae", "text-to-image", "realtime", "training", "stream", "loading", "start"]
)
def test_dear_cases_run_on_tiny_networks(case: str, capsys: pytest.CaptureFixture[str]) -> None:
    model = "openmoji" if case in ("stream", "loading", "start") else "random-sd15"
    bench.run_cases([case], Options(scale="tiny", model=model, batches=(1,)), repeats=1)
    assert "ms/frame" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "near"),
    [("unet", "error 0.0"), ("mmdit", "error 0.0"), ("text", "error 0.0"), ("vae", "error"), ("text-to-image", "PSNR")],
)
def test_networks_in_8_bits_stand_beside_themselves(case: str, near: str, capsys: pytest.CaptureFixture[str]) -> None:
    kinds = dict.fromkeys(bench.IN_8_BITS[case], "int8")
    bench.run_cases([case], Options(scale="tiny", model="random-sd15", batches=(1,), quantize=kinds), repeats=1)
    line = next(line for line in capsys.readouterr().out.splitlines() if "int8 |" in line)
    assert near in line


@pytest.mark.slow
@pytest.mark.parametrize("case", ["unet", "vae", "text", "text-to-image", "stream", "training"])
def test_peers_run_on_tiny_networks(case: str, capsys: pytest.CaptureFixture[str]) -> None:
    options = Options(scale="tiny", model="random-sd15", peer="diffusers", batches=(1,))
    bench.run_cases([case], options, repeats=1)
    assert "x (" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lcm-lora", "stream", "training"])
def test_published_tables_run_on_tiny_networks(name: str, tmp_path: Path) -> None:
    script = Path(__file__).parents[3] / "experiments" / "bench" / "tables.py"
    options = ["--model", "random-sd15", "--scale", "tiny", "--batch", "2", "--repeats", "1"]
    command = [sys.executable, str(script), name, *options, "--json", str(tmp_path / "times.json")]
    subprocess.run(command, check=True, capture_output=True)
    cases = json.loads((tmp_path / "times.json").read_text())["cases"]
    assert all(row["seconds"] for rows in cases.values() for row in rows.values())
    assert len(cases) == {"lcm-lora": 1, "stream": 6, "training": 2}[name]
