"""The UNet against diffusers' UNet2DConditionModel, every parameter random (norms and zero initialisations too)."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from lcm_jax.nets import RULES_UNET, SD15, SD21, SDXL, SDXL_REFINER, SSD1B, UNet, UNetConfig, abstract_params
from lcm_jax.weights.torch_params import from_torch, to_torch, torch_name

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

CROSS = ("CrossAttnDownBlock2D", "CrossAttnUpBlock2D")
PLAIN = ("DownBlock2D", "UpBlock2D")


def config(levels: tuple[tuple[str, str], ...], **changes: object) -> UNetConfig:
    defaults = {
        "block_out_channels": (16, 32, 48)[: len(levels)],
        "norm_num_groups": 8,
        "attention_head_dim": 2,
        "cross_attention_dim": 20,
        "layers_per_block": 1,
    }
    return UNetConfig(
        down_block_types=tuple(down for down, _ in levels),
        up_block_types=tuple(up for _, up in reversed(levels)),
        **(defaults | changes),
    )


XL = {
    "use_linear_projection": True,
    "attention_head_dim": (2, 4),
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 6 * 8 + 10,
}
FAMILIES = {
    "sd1": config((CROSS, PLAIN), layers_per_block=2),
    "sd2_odd_size": config((CROSS, PLAIN), use_linear_projection=True, attention_head_dim=(2, 4)),
    "sdxl": config((PLAIN, CROSS), transformer_layers_per_block=(1, 3), **XL),
    "ssd1b": config(
        (PLAIN, CROSS),
        layers_per_block=2,
        mid_block_type="UNetMidBlock2D",
        transformer_layers_per_block=(1, (2, 1)),
        reverse_transformer_layers_per_block=((1, 2, 3), 1),
        **XL,
    ),
    "lcm": config((PLAIN, CROSS), time_cond_proj_dim=32),
    "variants": config(
        (CROSS, PLAIN),
        mid_block_type=None,
        only_cross_attention=(True, False),
        cross_attention_dim=(20, 20),
        layers_per_block=(1, 2),
        resnet_time_scale_shift="scale_shift",
        center_input_sample=True,
        flip_sin_to_cos=False,
        freq_shift=1,
        time_embedding_dim=40,
        conv_in_kernel=1,
        conv_out_kernel=5,
        norm_eps=1e-3,
        in_channels=5,
        out_channels=3,
    ),
}
PRESETS = {"sd15": SD15, "sd21": SD21, "sdxl": SDXL, "refiner": SDXL_REFINER, "ssd1b": SSD1B}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def random_unet(cfg: UNetConfig, seed: int = 0):
    """A diffusers UNet whose parameters keep the variance of activations, with random norms and biases."""
    theirs = diffusers.UNet2DConditionModel.from_config(cfg.to_dict()).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if p.ndim > 1:
                p.copy_(noise / p[0].numel() ** 0.5)
            else:
                p.copy_(0.2 * noise + (1.0 if "norm" in name and name.endswith("weight") else 0.0))
    return theirs


def inputs(cfg: UNetConfig, size: tuple[int, int], tokens: int = 5) -> tuple[np.ndarray, np.ndarray, dict]:
    rng = np.random.default_rng(1)
    x = rng.standard_normal((2, *size, cfg.in_channels)).astype(np.float32)
    cond = {"context": rng.standard_normal((2, tokens, cfg.level("cross_attention_dim", 0))).astype(np.float32)}
    if cfg.time_cond_proj_dim:
        cond["guidance"] = np.array([6.5, 0.0], np.float32)
    if cfg.addition_embed_type:
        cond["pooled"] = rng.standard_normal((2, 10)).astype(np.float32)
        cond["time_ids"] = np.array([[512, 512, 0, 64, 1024, 1024]] * 2, np.float32)
    return x, np.array([999.0, 17.0], np.float32), cond


def their_output(theirs, cfg: UNetConfig, x: np.ndarray, t: np.ndarray, cond: dict) -> np.ndarray:
    options = {}
    if "guidance" in cond:
        half = cfg.time_cond_proj_dim // 2  # as the LCM pipelines embed w
        frequencies = torch.exp(torch.arange(half) * -(np.log(10000.0) / (half - 1)))
        angles = 1000 * torch.from_numpy(cond["guidance"])[:, None] * frequencies
        options["timestep_cond"] = torch.cat([angles.sin(), angles.cos()], dim=1).float()
    if "pooled" in cond:
        options["added_cond_kwargs"] = {
            "text_embeds": torch.from_numpy(cond["pooled"]),
            "time_ids": torch.from_numpy(cond["time_ids"]),
        }
    with torch.no_grad():
        y = theirs(
            torch.from_numpy(x).permute(0, 3, 1, 2),
            torch.from_numpy(t),
            torch.from_numpy(cond["context"]),
            **options,
        ).sample
    return y.permute(0, 2, 3, 1).numpy()


def compare(cfg: UNetConfig, size: tuple[int, int], scan: bool) -> float:
    """The relative error of our output; converting their weights and back is checked to be exact."""
    theirs = random_unet(cfg)
    x, t, cond = inputs(cfg, size)
    expected = their_output(theirs, cfg, x, t, cond)
    state = {name: p.numpy() for name, p in theirs.state_dict().items()}
    net = UNet(cfg, scan=scan)
    params = from_torch(state, abstract_params(net), RULES_UNET)
    back = to_torch(params, RULES_UNET)
    assert back.keys() == state.keys()
    for name, value in state.items():
        np.testing.assert_array_equal(back[name], value, err_msg=name)
    del theirs, state, back  # the full-width network has to fit in memory once
    fast = {"xla_backend_optimization_level": 0}  # halves the compilation, which is nearly all of the time here
    y = jax.jit(net.apply, compiler_options=fast if size[0] < 32 else {})({"params": params}, x, t, cond)
    assert y.shape == expected.shape
    assert y.dtype == jnp.float32
    return float(np.abs(y - expected).max() / np.abs(expected).max())


GATE = ("sd2_odd_size", "ssd1b", "variants")  # which have every part of the others


@pytest.mark.parametrize(
    "family", [name if name in GATE else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES]
)
def test_equals_diffusers(family: str) -> None:
    size = (7, 9) if "odd" in family else (8, 8)
    error = compare(FAMILIES[family], size, scan=family in ("sdxl", "ssd1b"))
    assert error <= 1e-4


@pytest.mark.slow
def test_sd15_at_full_width_equals_diffusers() -> None:
    error = compare(dataclasses.replace(SD15, sample_size=32), (32, 32), scan=False)
    assert error <= 1e-4


def test_our_config_is_theirs() -> None:
    for cfg in FAMILIES.values():
        with torch.device("meta"):
            theirs = diffusers.UNet2DConditionModel.from_config(cfg.to_dict())
        assert UNetConfig.from_dict(dict(theirs.config)) == cfg


@pytest.mark.slow
@pytest.mark.parametrize("preset", PRESETS)
def test_presets_name_every_tensor(preset: str) -> None:
    with torch.device("meta"):
        theirs = diffusers.UNet2DConditionModel.from_config(PRESETS[preset].to_dict())
    ours = {}
    for path, leaf in traverse_util.flatten_dict(abstract_params(UNet(PRESETS[preset])), sep="/").items():
        swap = (*leaf.shape[-1:-3:-1], *leaf.shape[:-2]) if path.endswith("/kernel") else leaf.shape
        ours[torch_name(path, RULES_UNET)] = swap
    assert ours == {name: tuple(p.shape) for name, p in theirs.state_dict().items()}
