from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lcm_jax.weights.lpips import load_lpips
from lcm_jax.weights.safetensors_files import save_tensors
from lcm_jax.weights.torch_params import to_torch
from vae16 import LPIPS, LPIPS_PACKAGE_RULES, LPIPS_RULES, LPIPSConfig


@pytest.mark.parametrize("rules", [LPIPS_RULES, LPIPS_PACKAGE_RULES])
def test_both_namings_are_read(rules: tuple[tuple[str, str], ...], tmp_path: Path) -> None:
    module = LPIPS(LPIPSConfig(channels=(2, 2, 2, 2, 2)))
    image = jnp.zeros((1, 16, 16, 3))
    params = jax.jit(module.init)(jax.random.key(0), image, image)["params"]
    save_tensors(tmp_path / "lpips.safetensors", to_torch(params, rules))
    jax.tree.map(np.testing.assert_array_equal, load_lpips(tmp_path / "lpips.safetensors", module), params)
