"""Shapes that are kept between runs are those of a fresh trace, whatever became of the file."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import jax
import pytest

from lcm_jax.weights import abstract_params
from mmdit import MMDiTConfig

TINY = MMDiTConfig(
    sample_size=4,
    num_layers=2,
    num_attention_heads=2,
    attention_head_dim=8,
    joint_attention_dim=16,
    caption_projection_dim=16,
    pooled_projection_dim=8,
)
KIND = "SD3Transformer2DModel"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("LCM_JAX_CACHE", str(tmp_path))
    monkeypatch.setattr(abstract_params, "_MIN_SECONDS", 0.0)
    abstract_params.abstract_params.cache_clear()
    yield tmp_path / "shapes"
    abstract_params.abstract_params.cache_clear()


def again(**changes: int) -> dict:
    abstract_params.abstract_params.cache_clear()
    return abstract_params.abstract_params(KIND, MMDiTConfig(**{**vars(TINY), **changes}))


def test_kept_shapes_are_the_traced_ones(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    traced = again()
    (file,) = cache.iterdir()
    monkeypatch.setattr(abstract_params, "_trace", lambda *_: pytest.fail("traced although it was kept"))
    shapes = again()
    assert jax.tree.structure(shapes) == jax.tree.structure(traced)
    assert jax.tree.leaves(shapes) == jax.tree.leaves(traced)
    assert file.is_file()


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"a": 1}', '{"a": ["float99", 2]}'])
def test_a_damaged_file_is_made_anew(cache: Path, damage: str) -> None:
    traced = jax.tree.leaves(again())
    (file,) = cache.iterdir()
    content = file.read_text()
    file.write_text(damage)
    assert jax.tree.leaves(again()) == traced
    assert file.read_text() == content


def test_another_config_or_code_has_its_own_file(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert jax.tree.leaves(again(num_layers=1)) != jax.tree.leaves(again())
    assert len(list(cache.iterdir())) == 2
    monkeypatch.setattr(abstract_params, "_code", lambda: "changed")
    again()
    assert len(list(cache.iterdir())) == 3


def test_a_home_that_cannot_be_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    traced = jax.tree.leaves(again())
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("LCM_JAX_CACHE", str(blocked))
    assert jax.tree.leaves(again()) == traced
