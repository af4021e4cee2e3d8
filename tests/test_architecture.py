"""The house's laws, read from the imports: two leaves and a trunk, and one direction inside the trunk."""

from __future__ import annotations

import ast
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("vae16", "mmdit", "lcm_jax")

# The parts of lcm_jax in order: a module imports from its own part, or from parts of the lines above its own.
RANKS = [
    {"typing", "runtime"},
    {"nets", "diffusion", "precision", "parallel", "lora", "data"},
    {"models", "objectives"},
    {"weights"},
    {"inference", "metrics"},
    {"train", "stream"},
    {"configs", "plan", "bench", "evaluation"},
    {"serve"},
    {"cli"},
]
# Networks are built and named only here; the mathematics sees `apply(params, ...)`.
KNOWS_NETWORKS = {"nets", "models", "weights", "inference", "configs", "train", "bench"}
# One idea in two parts: a network and its task, an objective and its task, the configs and presets of two networks.
SHARED_NAMES = {"autoencoder", "blocks", "command", "config", "contrastive", "diffusion", "discriminator", "embed"}
SHARED_NAMES |= {"layers", "masked_language_model", "openmoji", "presets", "registry", "report", "rules", "stream"}
LOOSE = {"typing", "lora"}  # modules beside the folders


def sources() -> Iterator[tuple[Path, str]]:
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            yield path, ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in (ROOT / "configs").rglob("*.py"):
        yield path, "lcm_jax." + ".".join(path.relative_to(ROOT).with_suffix("").parts)


def imports(path: Path, *, top: bool) -> set[str]:
    """Dotted names imported anywhere, or at the top of the module only."""
    tree = ast.parse(path.read_text())
    found: set[str] = set()
    for node in tree.body if top else ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def part_of(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def rank(module: str) -> int | None:
    return next((i for i, group in enumerate(RANKS) if part_of(module) in group), None)


@pytest.mark.parametrize(("path", "module"), list(sources()), ids=lambda value: value if isinstance(value, str) else "")
def test_imports_run_one_way(path: Path, module: str) -> None:
    package = module.split(".")[0]
    for name in imports(path, top=False):
        other = name.split(".")[0]
        if other not in PACKAGES:
            continue
        if package != "lcm_jax":
            assert other == package, f"{module} imports {name}: {package} is a leaf"
            continue
        upper, lower = rank(module), rank(name)
        if other == "lcm_jax" and upper is not None and lower is not None and part_of(module) != part_of(name):
            assert lower < upper, f"{module} imports {name}, which is not below it"


@pytest.mark.parametrize(("path", "module"), list(sources()), ids=lambda value: value if isinstance(value, str) else "")
def test_the_mathematics_knows_no_network(path: Path, module: str) -> None:
    parts = module.split(".")
    if parts[0] != "lcm_jax" or len(parts) < 2 or parts[1] in KNOWS_NETWORKS | {"__init__"}:
        return
    assert not any(name.startswith("lcm_jax.nets") for name in imports(path, top=False)), module


def test_only_optional_dependencies_are_imported_inside_functions() -> None:
    """`lcm-jax sample` must not need the train extra; elsewhere imports stand at the top."""
    hidden = {
        (module, name)
        for path, module in sources()
        for name in imports(path, top=False) - imports(path, top=True)
        if name.split(".")[0] in PACKAGES
    }
    hidden = {(module, name) for module, name in hidden if module != "lcm_jax.__init__"}  # lazy, for type checkers only
    assert {module for module, _ in hidden} <= {"lcm_jax.cli.main"}
    assert {name for _, name in hidden if not name.startswith(("lcm_jax.stream.", "lcm_jax.serve."))} <= {
        "lcm_jax.data.load_source",
        "lcm_jax.plan.command.run_plan",
        "lcm_jax.configs",
        "lcm_jax.train.precompute_latents.encode",
    }


def test_every_module_is_ranked() -> None:
    parts = {module.split(".")[1] for _, module in sources() if module.startswith("lcm_jax.") and module.count(".")}
    assert parts - set().union(*RANKS) <= {"__init__", "bundled"}


def test_few_modules_stand_beside_the_folders() -> None:
    assert {path.stem for path in (ROOT / "lcm_jax").glob("*.py")} == LOOSE | {"__init__"}


def test_no_two_modules_share_a_name_but_the_ones_of_one_sense() -> None:
    """A file's name says one thing: two modules share one only where they are of one thing in two parts."""
    names = [path.stem for path, _ in sources() if not path.stem.startswith("__")]
    assert {name for name in names if names.count(name) > 1} <= SHARED_NAMES


def test_every_package_is_in_the_wheel() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    found = {
        ".".join(p.parent.relative_to(ROOT).parts) for name in PACKAGES for p in (ROOT / name).rglob("__init__.py")
    }
    assert set(listed) == found | {"lcm_jax.configs"}
