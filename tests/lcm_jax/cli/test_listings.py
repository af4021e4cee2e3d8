"""Lists of what can be named, and tab completion of it."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from lcm_jax import configs
from lcm_jax.cli import main as cli
from lcm_jax.diffusion.samplers import SAMPLERS
from lcm_jax.weights.hub import BUNDLED


@pytest.mark.parametrize(
    ("command", "known"), [("configs", configs.CONFIGS), ("models", BUNDLED), ("samplers", SAMPLERS)]
)
def test_a_list_has_every_name_and_a_text(command: str, known: dict, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([command]) == 0
    said = capsys.readouterr()
    lines = dict(line.split(maxsplit=1) for line in said.out.splitlines())
    assert lines.keys() == known.keys()
    assert said.err.startswith("next: lcm-jax ")


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("shtab")
    path = tmp_path_factory.mktemp("completion") / "lcm-jax"
    with pytest.MonkeyPatch.context() as patch, path.open("w") as file:
        patch.setattr("sys.stdout", file)
        assert cli.main(["completion", "bash"]) == 0
    return path


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("sampl", ["sample", "samplers"]),
        ("sample --ste", ["--steps"]),
        ("sample --model openmoji-t", ["openmoji-teacher"]),
        ("train --config openmoji_lcm_", ["openmoji_lcm_lora"]),
        ("sample --dtype b", ["bfloat16"]),
    ],
)
def test_tab_completes(typed: str, expected: list[str], script: Path) -> None:
    words = f"lcm-jax {typed}"
    code = f"source {script}; COMP_WORDS=({words}); COMP_CWORD={words.count(' ')}; _shtab_lcm_jax"
    done = subprocess.run(
        ["bash", "-c", code + '; echo "${COMPREPLY[@]}"'], capture_output=True, text=True, cwd=script.parent
    )
    assert done.stdout.split() == expected


def test_without_shtab_it_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("lcm_jax.runtime.optional_deps.find_spec", lambda name: None)
    assert cli.main(["completion", "bash"]) == 2
    assert capsys.readouterr().err == "lcm-jax: shtab not installed; pip install 'lcm-jax[completion]'\n"
