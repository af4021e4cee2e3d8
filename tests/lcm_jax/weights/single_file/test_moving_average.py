"""The keys of LDM's moving average: the dots come back, for every published network."""

from __future__ import annotations

from typing import Any

import pytest

from lcm_jax.nets import SD15, SDXL, SDXL_REFINER, SSD1B
from lcm_jax.weights.component import names_of
from lcm_jax.weights.single_file.layouts import original_shapes
from lcm_jax.weights.single_file.moving_average import dotted
from lcm_jax.weights.single_file.reader import layout_of
from mmdit import SD35_MEDIUM

NETWORKS = {
    "sd15": ("UNet2DConditionModel", SD15),
    "sdxl": ("UNet2DConditionModel", SDXL),
    "refiner": ("UNet2DConditionModel", SDXL_REFINER),
    "ssd1b": ("UNet2DConditionModel", SSD1B),
    "sd35": ("SD3Transformer2DModel", SD35_MEDIUM),
}


@pytest.mark.parametrize(
    "name", [n if n in ("sd15", "sdxl") else pytest.param(n, marks=pytest.mark.slow) for n in NETWORKS]
)
def test_every_key_of_a_published_network_gets_its_dots_back(name: str) -> None:
    kind, config = NETWORKS[name]
    keys = original_shapes(names_of(kind, config), layout_of(kind, config))
    assert len(keys) > 400
    assert {key: dotted(key.replace(".", "")) for key in keys} == {key: key for key in keys}


@pytest.mark.parametrize("key", ["encoderconv_inweight", "input_blocks", "something0weight"])
def test_keys_of_other_networks_are_not_guessed(key: str) -> None:
    found: Any = dotted(key)
    assert found is None or found == key
