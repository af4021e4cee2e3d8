"""The rule by which few-step objectives take random keys: written once, and kept to."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path

import jax
import numpy as np
import pytest

import lcm_jax.objectives
from lcm_jax.objectives import METHODS, FewStep, RandomKeys

FOLDER = Path(lcm_jax.objectives.__path__[0])


def test_every_kind_of_draw_has_a_key_of_its_own() -> None:
    keys = RandomKeys.of(jax.random.key(3))
    words = [tuple(jax.random.key_data(key).tolist()) for key in keys]
    assert len(set(words)) == len(RandomKeys._fields)


def test_the_rule_stays_what_it_was() -> None:
    """A run that was begun with an earlier version draws the same numbers after it is resumed."""
    key = jax.random.key(3)
    before = [*jax.random.split(key, 4), *(jax.random.fold_in(key, i) for i in range(4, 9))]
    for now, then in zip(RandomKeys.of(key), before, strict=True):
        np.testing.assert_array_equal(jax.random.key_data(now), jax.random.key_data(then))


@pytest.mark.parametrize("name", METHODS)
def test_a_loss_uses_its_key_only_by_the_rule(name: str) -> None:
    """`key` of a loss goes to RandomKeys.of, to `draw`, to a parent's loss or to its parts, and nowhere else."""
    method = getattr(METHODS[name], "func", METHODS[name])
    parts = ("parts", "denoising_loss", "ends")  # of which the same is required
    allowed = {"RandomKeys.of", "self.draw", "super().__call__", *(f"self.{part}" for part in parts)}
    owners = [c for c in method.__mro__ if issubclass(c, FewStep)]
    for owner, part in ((c, part) for c in owners for part in ("__call__", *parts) if part in vars(c)):
        tree = ast.parse(inspect.cleandoc("\n" + inspect.getsource(vars(owner)[part])))
        allowed.add(f"super({owner.__name__}, self).__call__")
        calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
        uses = {
            ast.unparse(call.func)
            for call in calls
            if any(isinstance(a, ast.Name) and a.id == "key" for a in call.args)
        }
        assert uses <= allowed, f"{owner.__name__} uses its key in {uses - allowed}"
