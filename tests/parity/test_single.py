"""Original layouts against diffusers' own converters, and whole single files through `from_single_file`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from lcm_jax.nets import SD15, SD21, SDXL, SDXL_REFINER, SSD1B, UNetConfig
from lcm_jax.weights.component import names_of
from lcm_jax.weights.convert import convert
from lcm_jax.weights.single_file.infer_config import clip_config, mmdit_config, t5_config, unet_config, vae_config
from lcm_jax.weights.single_file.layouts import from_original, original_shapes, to_original
from lcm_jax.weights.single_file.reader import layout_of
from mmdit import SD3_MEDIUM, SD35_LARGE, SD35_MEDIUM, MMDiTConfig
from mmdit.text import CLIP_BIGG, CLIP_H, CLIP_L, T5_XXL, CLIPTextConfig
from vae16 import AutoencoderConfig

torch = pytest.importorskip("torch")
utils = pytest.importorskip("diffusers.loaders.single_file_utils")

SMALL = {"block_out_channels": (32, 64), "norm_num_groups": 8, "cross_attention_dim": 24, "sample_size": 8}
CROSS = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
}
PLAIN = {
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}
XL = {
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 58,
}
UNETS = {
    "sd1": UNetConfig(**SMALL, **PLAIN, attention_head_dim=2),
    "sdxl": UNetConfig(**SMALL, **CROSS, **XL, transformer_layers_per_block=(1, 2), attention_head_dim=(1, 2)),
    "one layer": UNetConfig(**SMALL, **PLAIN, layers_per_block=1),
}
MMDIT = MMDiTConfig(
    sample_size=8,
    num_layers=3,
    num_attention_heads=3,
    attention_head_dim=64,
    joint_attention_dim=24,
    caption_projection_dim=192,
    pooled_projection_dim=20,
    pos_embed_max_size=6,
    in_channels=16,
    dual_attention_layers=(0,),
    qk_norm="rms_norm",
)
CLIP = CLIPTextConfig(
    hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=1, projection_dim=48
)
VAE = AutoencoderConfig(block_out_channels=(16, 24, 32), layers_per_block=2, norm_num_groups=8)


def random_tensors(kind: str, config: object) -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    return {name: random.standard_normal(shape).astype(np.float32) for name, shape in names_of(kind, config).items()}


def to_torch_dict(tensors: dict[str, np.ndarray], prefix: str) -> dict[str, object]:
    return {prefix + key: torch.from_numpy(np.array(tensor)) for key, tensor in tensors.items()}


def assert_equal(theirs: dict[str, object], ours: dict[str, np.ndarray]) -> None:
    assert theirs.keys() == ours.keys()
    for name, tensor in ours.items():
        np.testing.assert_array_equal(theirs[name].numpy(), tensor, err_msg=name)


def there_and_back(tensors: dict[str, np.ndarray], kind: str, config: object, **options: bool) -> dict[str, np.ndarray]:
    """The tensors in the original layout, after checking that the way back gives every one of them."""
    layout = layout_of(kind, config, **options)
    original = to_original(tensors, layout)
    assert {key: tensor.shape for key, tensor in original.items()} == original_shapes(names_of(kind, config), layout)
    back = from_original(original, tensors, layout, source="file")
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(back[name], tensor, err_msg=name)
    return original


@pytest.mark.parametrize("config", UNETS.values(), ids=UNETS.keys())
def test_unet_keys_are_those_that_diffusers_converts(config: UNetConfig) -> None:
    kind = "UNet2DConditionModel"
    tensors = random_tensors(kind, config)
    original = there_and_back(tensors, kind, config)
    values = config.to_dict() | {"num_class_embeds": None}
    assert_equal(utils.convert_ldm_unet_checkpoint(to_torch_dict(original, "model.diffusion_model."), values), tensors)


def test_autoencoder_keys_are_those_that_diffusers_converts() -> None:
    tensors = random_tensors("AutoencoderKL", VAE)
    original = there_and_back(tensors, "AutoencoderKL", VAE)
    assert original["decoder.mid.attn_1.q.weight"].shape == (32, 32, 1, 1)
    assert_equal(
        utils.convert_ldm_vae_checkpoint(to_torch_dict(original, "first_stage_model."), VAE.to_dict()), tensors
    )


def test_openclip_keys_are_those_that_diffusers_converts() -> None:
    kind = "CLIPTextModelWithProjection"
    config = CLIPTextConfig(**vars(CLIP) | {"projection_dim": 64})  # diffusers takes its rows for the width
    tensors = random_tensors(kind, config)
    original = there_and_back(tensors, kind, config, open_clip=True)
    prefix = "conditioner.embedders.1.model."
    assert_equal(utils.convert_open_clip_checkpoint(None, to_torch_dict(original, prefix), prefix=prefix), tensors)


def test_mmdit_keys_are_those_that_diffusers_converts() -> None:
    kind = "SD3Transformer2DModel"
    tensors = random_tensors(kind, MMDIT)
    original = there_and_back(tensors, kind, MMDIT)
    assert_equal(utils.convert_sd3_transformer_checkpoint_to_diffusers(to_torch_dict(original, "")), tensors)


PUBLISHED = {"sd15": SD15, "sd21": SD21, "sdxl": SDXL, "refiner": SDXL_REFINER, "ssd1b": SSD1B}


@pytest.mark.parametrize(
    "config",
    [pytest.param(c, id=n, marks=() if n in ("sd15", "sdxl") else pytest.mark.slow) for n, c in PUBLISHED.items()],
)
def test_published_unets_are_recognised_by_their_shapes(config: UNetConfig) -> None:
    kind = "UNet2DConditionModel"
    shapes = original_shapes(names_of(kind, config), layout_of(kind, config))
    found = unet_config(shapes, source="file")
    assert names_of(kind, found) == names_of(kind, config)
    assert found.heads == config.heads


@pytest.mark.parametrize(
    "config",
    [
        pytest.param(SD3_MEDIUM, id="medium", marks=pytest.mark.slow),
        pytest.param(SD35_MEDIUM, id="35medium"),
        pytest.param(SD35_LARGE, id="35large", marks=pytest.mark.slow),
    ],
)
def test_published_mmdits_are_recognised_by_their_shapes(config: MMDiTConfig) -> None:
    kind = "SD3Transformer2DModel"
    assert mmdit_config(original_shapes(names_of(kind, config), layout_of(kind, config)), source="file") == config


@pytest.mark.parametrize(
    ("config", "open_clip"), [(CLIP_L, False), (CLIP_H, True), pytest.param(CLIP_BIGG, True, marks=pytest.mark.slow)]
)
def test_published_text_towers_are_recognised_by_their_shapes(config: CLIPTextConfig, open_clip: bool) -> None:
    kind = "CLIPTextModelWithProjection"
    shapes = original_shapes(names_of(kind, config), layout_of(kind, config, open_clip=open_clip))
    assert clip_config(shapes, source="file") == config


def test_t5_and_autoencoder_are_recognised_by_their_shapes() -> None:
    assert t5_config(names_of("T5EncoderModel", T5_XXL), source="file") == T5_XXL
    wide = AutoencoderConfig(
        block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=16, use_quant_conv=False,
        use_post_quant_conv=False, scaling_factor=1.5305, shift_factor=0.0609, sample_size=1024,
    )  # fmt: skip
    shapes = original_shapes(names_of("AutoencoderKL", wide), layout_of("AutoencoderKL", wide))
    assert vae_config(shapes, source="file", family="sd3") == wide


def test_a_single_file_made_here_is_a_pipeline_of_diffusers(tiny_model: Path, tmp_path: Path) -> None:
    """The folder lends its configs, tokenizer and scheduler; every weight comes from the file, beside its markers."""
    diffusers = pytest.importorskip("diffusers")
    marked = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    convert(tiny_model, tmp_path / "model.safetensors", to="single", scheduler=marked)
    options = {"config": str(tiny_model), "local_files_only": True, "safety_checker": None}
    made = diffusers.StableDiffusionPipeline.from_single_file(str(tmp_path / "model.safetensors"), **options)
    wanted = diffusers.DiffusionPipeline.from_pretrained(tiny_model, local_files_only=True)
    for name in ("unet", "vae", "text_encoder"):
        want = {key: value.numpy() for key, value in wanted.components[name].state_dict().items()}
        assert_equal(made.components[name].state_dict(), want)
