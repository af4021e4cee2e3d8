"""Every study of experiments/ for one variant and one step, from its command line to its table."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import matplotlib as mpl
import numpy as np
import pytest

from lcm_jax.evaluation.study import SCALES
from lcm_jax.weights.safetensors_files import read_json

mpl.use("agg")
EXPERIMENTS = Path(__file__).parent.parent / "experiments"
# script -> the variant that is run here
STUDIES = {
    "sd3/vae_channels": "4 channels",
    "sd3/architectures": "DiT",
    "sd3/formulations": "edm/cos",
    "few_step/ablate": "lcm-lora",
    "few_step/lcm_ablations": "dpm++ k=50",
}


@pytest.fixture
def script(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    path = EXPERIMENTS / f"{request.param}.py"
    monkeypatch.syspath_prepend(str(path.parent))
    for name in ("ablate", "training"):
        sys.modules.pop(name, None)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("script", STUDIES, indirect=True)
def test_every_variant_has_a_config_at_every_scale(script: ModuleType) -> None:
    for make in script.STUDY.variants.values():
        names = [make(scale).task.data.name for scale in SCALES]
        assert names[:2] == ["openmoji", "openmoji"]
        assert names[2].startswith("folder:")  # what a published model is trained on, its user has


@pytest.mark.slow
@pytest.mark.parametrize(("script", "variant"), STUDIES.items(), indirect=["script"])
def test_a_study_from_its_command_line(
    script: ModuleType, variant: str, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LCM_JAX_CACHE", str(tmp_path / "cache"))
    watched = "validation" if script.STUDY.name == "vae_channels" else "prompts"
    data = [f"--task.{name}.name=folder:{pictures}" for name in ("data", watched)]
    sizes = ["--steps=2", "--batch-size=2", "--save-every=1", "--preview-every=2", f"--task.{watched}.split=train"]
    arguments = ["--variants", variant, "--out", str(tmp_path / "out"), *data, *sizes]
    assert script.main(script.STUDY, arguments) == 0
    row = read_json(tmp_path / "out" / "table.json")["rows"][variant]
    for column in script.STUDY.columns:
        assert np.isfinite(row[column.key]["mean"]), column.key
    assert (tmp_path / "out" / "plot.png").is_file()
