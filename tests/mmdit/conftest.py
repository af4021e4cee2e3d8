from __future__ import annotations

import jax
import numpy as np
import pytest


@pytest.fixture(scope="session")
def random_params():
    """(init, *inputs, seed) -> a tree as init's, every leaf random, without compiling init."""

    def make(init, *inputs, seed=0):
        random = np.random.default_rng(seed)

        def leaf(path, like):
            values = 0.3 * random.standard_normal(like.shape) + (path[-1].key == "scale")
            return jax.numpy.asarray(values, like.dtype)

        return jax.tree_util.tree_map_with_path(leaf, jax.eval_shape(init, jax.random.key(0), *inputs))

    return make
