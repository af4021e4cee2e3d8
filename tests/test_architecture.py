"""The house's laws, read from the imports: two leaves and a trunk, and one direction inside the trunk."""

from __future__ import annotations

import ast
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("vae16", "mmdit", "lcm_jax")

# Within lcm_jax a module imports only from its own rank's members listed beside it, or from lower ranks.
RANKS = [
    {"typing", "extras", "overrides", "messages", "images", "places", "compiling", "flops", "chips", "products"},
    {"schedules", "nets", "lora", "quantization", "halves", "reading"},
    {"parameterization"},
    {"guidance", "solvers", "consistency"},
    {"sampling"},
    {"objectives", "metrics", "data", "weights", "generate", "prompts", "pictures"},
    {"train"},
    {"configs", "plan"},
    {"pipeline"},
    {"evaluate", "convert", "encode", "stream", "exported"},
    {"demo", "study", "bench"},
    {"arguments"},
    {"cli"},
]
# Networks are known only here.
KNOWS_NETWORKS = {
    "nets",
    "weights",
    "pipeline",
    "configs",
    "train",
    "generate",
    "evaluate",
    "metrics",
    "convert",
    "bench",
}


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


def rank(module: str) -> int | None:
    part = module.split(".")[1] if "." in module else ""
    return next((i for i, group in enumerate(RANKS) if part in group), None)


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
        mine, its = rank(module), rank(name)
        if other == "lcm_jax" and mine is not None and its is not None:
            assert its <= mine, f"{module} imports {name}, which comes after it"


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
    assert {module for module, _ in hidden} <= {"lcm_jax.cli.main"}
    assert {name for _, name in hidden if not name.startswith("lcm_jax.stream.")} <= {
        "lcm_jax.data.load_source",
        "lcm_jax.plan.command.run",
        "lcm_jax.configs",
        "lcm_jax.train.precompute_latents.encode",
    }


def test_every_module_is_ranked() -> None:
    parts = {module.split(".")[1] for _, module in sources() if module.startswith("lcm_jax.") and module.count(".")}
    assert parts - set().union(*RANKS) <= {"__init__", "bundled"}


def test_every_package_is_in_the_wheel() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    found = {
        ".".join(p.parent.relative_to(ROOT).parts) for name in PACKAGES for p in (ROOT / name).rglob("__init__.py")
    }
    assert set(listed) == found | {"lcm_jax.configs"}
