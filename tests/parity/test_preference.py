"""PickScore and HPSv2 against transformers' CLIPModel and its preparation of pictures, in both layouts of files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from PIL import Image  # noqa: E402
from safetensors.numpy import load_file, save_file  # noqa: E402

from lcm_jax.metrics import ClipTowers, Preference  # noqa: E402
from lcm_jax.weights.single_file.layouts import openclip_layout, to_original  # noqa: E402
from mmdit.text import train_tokenizer  # noqa: E402

torch.set_num_threads(1)
TEXTS = ["red heart", "cat face"]
SIZES: dict[str, Any] = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIPModel of transformers with random weights everywhere, and its tokenizer."""
    path = tmp_path_factory.mktemp("clip")
    tokenizer = train_tokenizer(TEXTS, 600, path, 12)
    text = dict(SIZES, vocab_size=600, max_position_embeddings=12, hidden_act="gelu")
    text["eos_token_id"] = tokenizer.eos_token_id
    vision = dict(SIZES, image_size=16, patch_size=8, hidden_act="gelu")
    model = transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=24))
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.ndim:
            parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def open_clip(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same weights in one file with OpenCLIP's names, without a config."""
    path = tmp_path_factory.mktemp("hps") / "HPS_v2.safetensors"
    tensors = to_original(load_file(folder / "model.safetensors"), openclip_layout)
    save_file({name: np.ascontiguousarray(tensors[name]) for name in tensors}, path)
    for file in folder.glob("*token*"):
        (path.parent / file.name).write_bytes(file.read_bytes())
    return path


def pictures(height: int, width: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (2, 5, 5, 3), dtype=np.uint8)
    return np.stack([np.asarray(Image.fromarray(x).resize((width, height), Image.Resampling.BICUBIC)) for x in coarse])


@torch.no_grad()
def theirs(folder: Path, images: np.ndarray) -> tuple[np.ndarray, float]:
    """The cosines of the model's embeddings and its scale, with PIL's preparation of pictures."""
    model = transformers.CLIPModel.from_pretrained(folder).eval()
    size = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}
    processor = transformers.CLIPImageProcessorPil(**size)
    pixels = processor([Image.fromarray(x) for x in images], return_tensors="pt")["pixel_values"]
    tokens = torch.tensor(np.asarray(ClipTowers.load(folder).tokenizer(TEXTS, 12)))
    logits = model(input_ids=tokens, pixel_values=pixels).logits_per_image
    return np.diagonal(logits.numpy()) / model.logit_scale.exp().item(), model.logit_scale.exp().item()


@pytest.mark.parametrize("sides", [(16, 16), (40, 60)], ids=["own size", "cropped"])
def test_pickscore(folder: Path, sides: tuple[int, int]) -> None:
    images = pictures(*sides)
    cosines, scale = theirs(folder, images)
    score = Preference.load(str(folder))
    assert (score.kind, score.title) == ("pickscore", "PickScore")
    np.testing.assert_allclose(score(images, TEXTS) / scale, cosines, atol=1e-4)


def test_hpsv2_from_names_of_openclip(folder: Path, open_clip: Path) -> None:
    images = pictures(16, 16)
    cosines, _ = theirs(folder, images)
    for path in (open_clip, open_clip.parent):
        score = Preference.load(str(path))
        assert score.title == "HPSv2"
    np.testing.assert_allclose(score(images, TEXTS), cosines, atol=1e-4)
    assert Preference.load(f"hpsv2:{folder}")(images, TEXTS) == pytest.approx(score(images, TEXTS), abs=1e-5)
    scaled = Preference.load(f"pickscore:{open_clip}")
    assert scaled(images, TEXTS) == pytest.approx(score.towers.scale * score(images, TEXTS), rel=1e-5)


def test_weights_that_are_no_clip_are_refused(folder: Path, open_clip: Path, tmp_path: Path) -> None:
    tensors = load_file(open_clip)
    for name, message in (
        ("visual.proj", "its image encoder has no visual.proj of 2 axes"),
        ("logit_scale", "logit_scale"),
        ("visual.transformer.resblocks.1.attn.in_proj_bias", "does not fit the network"),
    ):
        save_file({key: tensor for key, tensor in tensors.items() if key != name}, tmp_path / "short.safetensors")
        with pytest.raises(ValueError, match=rf"short\.safetensors: .*{message}"):
            Preference.load(str(tmp_path / "short.safetensors"))
    tensors = load_file(folder / "model.safetensors")
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    save_file(tensors | {"head.weight": np.zeros(1, np.float32)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"model\.safetensors.*unexpected.*head\.weight"):
        ClipTowers.load(tmp_path)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(
        FileNotFoundError, match=r"tokenizer\.json nor vocab\.json.*put the files of the CLIP's tokenizer"
    ):
        ClipTowers.load(tmp_path)
