"""Every public definition says what it is, in a sentence; what carries mathematics has an example or an equation."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FRAGMENT = re.compile(r"(Of|What|As|Where|Whether|By|For|From|In|On|How|Which|To|At|When)\b")
MATHEMATICS = ("lcm_jax/diffusion", "lcm_jax/objectives", "lcm_jax/metrics", "lcm_jax/inference", "lcm_jax/lora.py")
EQUATION = re.compile(r">>>|=|eq\.|~|->")


def files() -> Iterator[Path]:
    for package in ("vae16", "mmdit", "lcm_jax", "configs"):
        yield from sorted((ROOT / package).rglob("*.py"))


def public(tree: ast.Module | ast.ClassDef, prefix: str = "") -> Iterator[tuple[str, ast.AST]]:
    """Yield the public classes, functions and methods of a module with their dotted names."""
    for node in tree.body:
        if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) and not node.name.startswith("_"):
            yield prefix + node.name, node
            if isinstance(node, ast.ClassDef):
                yield from public(node, f"{prefix}{node.name}.")


@pytest.mark.parametrize("path", list(files()), ids=lambda path: str(path.relative_to(ROOT)))
def test_public_docstrings_are_sentences(path: Path) -> None:
    tree = ast.parse(path.read_text())
    mathematical = str(path.relative_to(ROOT)).startswith(MATHEMATICS)
    if path.name != "__init__.py":
        assert ast.get_docstring(tree), "the module has no docstring"
    for name, node in public(tree):
        text = ast.get_docstring(node)  # type: ignore[arg-type]
        outermost = "." not in name
        assert text or not outermost, f"{name} has no docstring"
        assert not text or not FRAGMENT.match(text), f"{name} opens with a fragment: {text.splitlines()[0]}"
        if mathematical and outermost:
            assert EQUATION.search(text or ""), f"{name} has neither an example nor an equation"
