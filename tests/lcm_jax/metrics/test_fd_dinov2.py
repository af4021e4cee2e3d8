"""FD-DINOv2: its pictures are prepared as PIL and torchvision do it, and its features are the class token."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from lcm_jax.metrics import dinov2_features, load_features
from lcm_jax.metrics.clip_towers import crop, pad
from lcm_jax.metrics.fd_dinov2 import IMAGE_MEAN, IMAGE_STD, prepare_images
from lcm_jax.nets import RULES_DINOV2, Dinov2, Dinov2Config
from lcm_jax.weights.component import Part, write_part
from lcm_jax.weights.torch_params import to_torch

CONFIG = Dinov2Config(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, image_size=28)

PREPARE = jax.jit(prepare_images)


def pictures(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)


@pytest.mark.parametrize("sides", [(40, 40), (300, 260)], ids=["enlarged", "shrunk"])
def test_pictures_are_those_of_pil(sides: tuple[int, int]) -> None:
    images = pictures(1, *sides)
    across = Image.fromarray(images[0]).resize((224, sides[0]), Image.Resampling.BICUBIC)
    theirs = np.asarray(across.resize((224, 224), Image.Resampling.BICUBIC), np.float32)
    ours = np.asarray(PREPARE(jnp.asarray(images / np.float32(127.5) - 1)))[0] * IMAGE_STD + IMAGE_MEAN
    levels = np.abs(ours * 255 - theirs)
    assert levels.max() < 1.01  # PIL's weights have 22 bits
    assert np.mean(levels > 0.5) < 1e-3
    assert np.allclose(ours * 255, np.round(ours * 255), atol=1e-3)


@pytest.mark.parametrize("sides", [(40, 60), (60, 40)])
def test_crops_keep_the_middle_and_pads_the_whole(sides: tuple[int, int]) -> None:
    """A ramp along each axis shows where the middle of the picture lies and how far the rest reaches."""
    h, w = sides
    rows = np.broadcast_to(np.linspace(-1, 1, h)[:, None, None], (h, w, 3)).astype(np.float32)
    columns = np.broadcast_to(np.linspace(-1, 1, w)[None, :, None], (h, w, 3)).astype(np.float32)
    for squared, side in ((crop, 20), (pad, 30)):
        x, y = np.asarray(jax.jit(squared, static_argnums=1)(jnp.stack([columns, rows]), side))[..., 0]
        assert x.shape == y.shape == (side, side)
        assert abs(x[side // 2 - 1 : side // 2 + 1, side // 2 - 1 : side // 2 + 1].mean()) < 0.05
        assert abs(y[side // 2 - 1 : side // 2 + 1, side // 2 - 1 : side // 2 + 1].mean()) < 0.05
        reach = x[side // 2].max(), y[:, side // 2].max()
        if squared is pad:
            assert min(reach) > 0.9
        else:
            assert np.allclose(reach, (min(1.0, h / w), min(1.0, w / h)), atol=0.08)


def test_features_are_the_class_token(tmp_path: Path) -> None:
    net = Dinov2(CONFIG)
    params = jax.jit(net.init)(jax.random.key(0), jnp.zeros((1, 28, 28, 3)))["params"]
    params = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(jax.random.key(1), x.shape), params)
    write_part(tmp_path, Part("Dinov2Model", CONFIG, to_torch(params, RULES_DINOV2), "dino"))
    images = pictures(3, 30, 20)
    extract = load_features(f"dinov2:{tmp_path}")
    assert extract.distance == "FD-DINOv2"
    prepared = PREPARE(jnp.asarray(images / np.float32(127.5) - 1))
    tokens = jax.jit(net.apply)({"params": params}, prepared)
    np.testing.assert_allclose(extract(images), tokens[:, 0], atol=1e-5)


def test_what_is_no_dinov2_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"architectures": ["Dinov2Model"], "hidden_size": 10}')
    with pytest.raises(ValueError, match=r"config\.json: Dinov2Config: hidden_size=10 is not a multiple of num_att"):
        dinov2_features(tmp_path)
    (tmp_path / "config.json").write_text('{"architectures": ["Dinov2Model"], "image_size": [224, 224]}')
    with pytest.raises(
        ValueError, match=r"config\.json: image_size=\[224, 224\] is not supported; give a whole number"
    ):
        dinov2_features(tmp_path)
    (tmp_path / "x.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=r"x\.safetensors: a file; give the folder of a DINOv2"):
        dinov2_features(tmp_path / "x.safetensors")
    for text in ("dinov2", "dinov2:", "fid:x"):
        with pytest.raises(ValueError, match=f"features {text}: give KIND:PATH with a KIND of dinov2, inception"):
            load_features(text)
