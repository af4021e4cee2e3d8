from __future__ import annotations

import math

import jax
import numpy as np
import pytest


@pytest.fixture(scope="session")
def random_params():
    """(init, *inputs, seed) -> a tree as init's, random, and of outputs as large as inputs, without compiling init."""

    def make(init, *inputs, seed=0):
        random = np.random.default_rng(seed)

        def leaf(path, like):
            deviation = math.prod(like.shape[:-1]) ** -0.5 if path[-1].key == "kernel" else 0.1
            return jax.numpy.asarray(deviation * random.standard_normal(like.shape) + (path[-1].key == "scale"))

        return jax.tree_util.tree_map_with_path(leaf, jax.eval_shape(init, jax.random.key(0), *inputs))

    return make
