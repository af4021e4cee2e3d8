"""DINOv2's ViT against transformers: each kind of network, at its own size of pictures and at another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from lcm_jax.weights.component import read_part, to_component, to_part, write_part  # noqa: E402

torch.set_num_threads(1)
SMALL: dict[str, Any] = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=56, patch_size=14)
KINDS = {
    "mlp": ("Dinov2", {}),
    "swiglu": ("Dinov2", {"use_swiglu_ffn": True, "qkv_bias": False}),
    "registers": ("Dinov2WithRegisters", {"num_register_tokens": 3}),
}


def oracle(kind: str) -> Any:
    """A network of transformers with random weights everywhere, layer scales and registers included."""
    name, options = KINDS[kind]
    config = getattr(transformers, f"{name}Config")(**SMALL, **options)
    model = getattr(transformers, f"{name}Model")(config)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_tokens_and_files_agree_with_transformers(kind: str, tmp_path: Path) -> None:
    model = oracle(kind)
    model.save_pretrained(tmp_path / "theirs")
    net, params = to_component(read_part(tmp_path / "theirs"))
    apply = jax.jit(net.apply)
    for height, width in ((56, 56), (28, 84)):  # the trained size; shrunk and enlarged positions
        images = np.random.default_rng(height).normal(size=(2, height, width, 3)).astype(np.float32)
        theirs = model(torch.from_numpy(images.transpose(0, 3, 1, 2))).last_hidden_state.numpy()
        np.testing.assert_allclose(apply({"params": params}, images), theirs, atol=1e-4, rtol=0)
        assert np.abs(theirs).max() > 1.0
    write_part(tmp_path / "ours", to_part(to_component(read_part(tmp_path / "theirs"))))
    again, report = type(model).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    np.testing.assert_array_equal(again(torch.from_numpy(images.transpose(0, 3, 1, 2))).last_hidden_state, theirs)


def test_a_file_without_a_layer_is_refused(tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    oracle("mlp").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["encoder.layer.1.layer_scale2.lambda1"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"does not fit the network.*encoder\.layer\.1\.layer_scale2\.lambda1"):
        to_component(read_part(tmp_path))
