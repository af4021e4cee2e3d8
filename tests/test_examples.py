"""The examples in the docstrings run, and print what stands there."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
from collections.abc import Iterator
from pathlib import Path

import pytest

import lcm_jax
import mmdit
import vae16


def modules_with_examples() -> Iterator[str]:
    for package in (lcm_jax, mmdit, vae16):
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            spec = module.module_finder.find_spec(module.name, None)  # type: ignore[call-arg]
            if spec and spec.origin and ">>>" in Path(spec.origin).read_text(encoding="utf-8"):
                yield module.name


@pytest.mark.parametrize("name", list(modules_with_examples()))
def test_examples(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = doctest.testmod(importlib.import_module(name), optionflags=doctest.NORMALIZE_WHITESPACE)
    assert result.attempted
    assert not result.failed
