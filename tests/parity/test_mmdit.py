"""The MMDiT against diffusers' SD3Transformer2DModel, every parameter random (norms and zero initialisations too)."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lcm_jax.weights.diffusers_folder import Component, load_component, save_component
from lcm_jax.weights.torch_params import from_torch, to_torch, torch_shapes
from mmdit.config import MMDiTConfig
from mmdit.embed import position_grid
from mmdit.model import MMDiT, abstract_params
from mmdit.presets import SD3_MEDIUM, SD35_LARGE, SD35_MEDIUM
from mmdit.rules import RULES_MMDIT

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
embeddings = pytest.importorskip("diffusers.models.embeddings")


def config(**changes: object) -> MMDiTConfig:
    defaults = {
        "sample_size": 8,
        "in_channels": 5,
        "out_channels": 3,
        "num_layers": 3,
        "attention_head_dim": 12,
        "num_attention_heads": 2,
        "caption_projection_dim": 24,
        "joint_attention_dim": 20,
        "pooled_projection_dim": 10,
        "pos_embed_max_size": 7,
    }
    return MMDiTConfig(**(defaults | changes))


FAMILIES = {
    "sd3": config(),
    "sd35_large": config(qk_norm="rms_norm"),
    "sd35_medium": config(qk_norm="rms_norm", num_layers=4, dual_attention_layers=(0, 1)),
    "dual_elsewhere": config(dual_attention_layers=(1, 2), patch_size=1, pos_embed_max_size=12),
    "guided": config(time_cond_proj_dim=32, num_layers=1),
}
SIZES = {"sd35_large": (4, 14), "sd35_medium": (14, 6), "dual_elsewhere": (3, 4)}
PRESETS = {"sd3_medium": SD3_MEDIUM, "sd35_medium": SD35_MEDIUM, "sd35_large": SD35_LARGE}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class GuidedEmbedding(embeddings.TimestepEmbedding):
    """The time embedding that a guidance-distilled student has; diffusers' SD3 has no way to pass the condition."""

    condition = None

    def forward(self, sample):
        return super().forward(sample, self.condition)


def oracle(cfg: MMDiTConfig):
    """diffusers' network for a config, without the key that it does not know."""
    values = {key: value for key, value in cfg.to_dict().items() if key != "time_cond_proj_dim"}
    theirs = diffusers.SD3Transformer2DModel.from_config(values).eval()
    if cfg.time_cond_proj_dim:
        theirs.time_text_embed.timestep_embedder = GuidedEmbedding(256, cfg.width, cond_proj_dim=cfg.time_cond_proj_dim)
    return theirs


def random_oracle(cfg: MMDiTConfig, seed: int = 0):
    """Parameters that keep the variance of activations, with random norms and biases, zero initialisations included."""
    theirs = oracle(cfg)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if p.ndim > 1:
                p.copy_(noise / p[0].numel() ** 0.5)
            else:
                p.copy_(0.3 * noise + (1.0 if "attn" in name and ".norm_" in name else 0.0))
    return theirs


def inputs(cfg: MMDiTConfig, size: tuple[int, int], tokens: int = 5) -> tuple[np.ndarray, np.ndarray, dict]:
    rng = np.random.default_rng(1)
    x, context, pooled = (
        rng.standard_normal(shape).astype(np.float32)
        for shape in (
            (2, *size, cfg.in_channels),
            (2, tokens, cfg.joint_attention_dim),
            (2, cfg.pooled_projection_dim),
        )
    )
    cond = {"context": context, "pooled": pooled}
    if cfg.time_cond_proj_dim:
        cond["guidance"] = np.array([6.5, 0.0], np.float32)
    return x, np.array([1000.0, 17.5], np.float32), cond


def their_output(theirs, cfg: MMDiTConfig, x: np.ndarray, t: np.ndarray, cond: dict, skip: tuple) -> np.ndarray:
    if "guidance" in cond:
        half = cfg.time_cond_proj_dim // 2  # as the LCM pipelines embed w
        frequencies = torch.exp(torch.arange(half) * -(np.log(10000.0) / (half - 1)))
        angles = 1000 * torch.from_numpy(cond["guidance"])[:, None] * frequencies
        theirs.time_text_embed.timestep_embedder.condition = torch.cat([angles.sin(), angles.cos()], dim=1).float()
    with torch.no_grad():
        y = theirs(
            torch.from_numpy(x).permute(0, 3, 1, 2),
            encoder_hidden_states=torch.from_numpy(cond["context"]),
            pooled_projections=torch.from_numpy(cond["pooled"]),
            timestep=torch.from_numpy(t),
            skip_layers=list(skip),
        ).sample
    return y.permute(0, 2, 3, 1).numpy()


def compare(cfg: MMDiTConfig, size: tuple[int, int], scan: bool, skip: tuple[int, ...]) -> float:
    """The relative error of our output; converting their weights and back is checked to be exact."""
    theirs = random_oracle(cfg)
    x, t, cond = inputs(cfg, size)
    expected = their_output(theirs, cfg, x, t, cond, skip)
    state = {key: value.numpy() for key, value in theirs.state_dict().items()}
    net = MMDiT(cfg, scan=scan)
    params = from_torch(state, abstract_params(net), RULES_MMDIT)
    back = to_torch(params, RULES_MMDIT)
    assert back.keys() == state.keys()
    for key, value in state.items():
        np.testing.assert_array_equal(back[key], value, err_msg=key)
    fast = {"xla_backend_optimization_level": 0}  # halves the compilation, which is nearly all of the time here
    forward = jax.jit(net.apply, static_argnames="skip_layers", compiler_options=fast)
    y = forward({"params": params}, x, t, cond, skip_layers=skip)
    assert y.shape == expected.shape
    assert y.dtype == jnp.float32
    return float(np.abs(y - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize(
    ("name", "scan", "skip"),
    [
        ("sd3", True, ()),
        ("sd35_large", False, (1,)),
        ("sd35_medium", True, ()),
        ("dual_elsewhere", False, ()),
        ("guided", True, ()),
    ],
)
def test_equals_diffusers(name: str, scan: bool, skip: tuple[int, ...]) -> None:
    error = compare(FAMILIES[name], SIZES.get(name, (8, 8)), scan, skip)
    # The phase of w = 6.5 is thousands of radians, in which float32 frequencies show.
    assert error <= (1e-4 if name == "guided" else 1e-5)


@pytest.mark.parametrize("scan", [False, True])
def test_diffusers_reads_what_we_write_and_we_what_it_writes(scan: bool, tmp_path: Path) -> None:
    cfg = FAMILIES["sd35_medium"]
    theirs = random_oracle(cfg)
    theirs.save_pretrained(tmp_path / "transformer")
    component = load_component(tmp_path, "transformer")
    assert component.module == MMDiT(cfg)
    state = {key: value.numpy() for key, value in theirs.state_dict().items()}
    stacked = MMDiT(cfg, scan=scan)
    params = from_torch(state, abstract_params(stacked), RULES_MMDIT)
    assert save_component(tmp_path, "ours", Component(stacked, params)) == ("diffusers", "SD3Transformer2DModel")
    back = diffusers.SD3Transformer2DModel.from_pretrained(tmp_path / "ours").state_dict()
    read = to_torch(component.params, RULES_MMDIT)
    assert back.keys() == read.keys() == state.keys()
    for key, value in state.items():
        np.testing.assert_array_equal(back[key].numpy(), value, err_msg=key)
        np.testing.assert_array_equal(read[key], value, err_msg=key)


@pytest.mark.parametrize(("size", "sample", "patch", "heads"), [(7, 8, 2, 2), (12, 9, 1, 3), (192, 128, 2, 1)])
def test_the_grid_is_theirs(size: int, sample: int, patch: int, heads: int) -> None:
    width = 12 * heads
    theirs = embeddings.PatchEmbed(sample, sample, patch, 3, width, pos_embed_max_size=size).pos_embed
    np.testing.assert_allclose(position_grid(size, sample // patch, width), theirs.numpy(), atol=1e-7)


def test_our_config_is_theirs() -> None:
    for name in ("sd3", "sd35_medium"):
        assert MMDiTConfig.from_dict(dict(oracle(FAMILIES[name]).config)) == FAMILIES[name]
    with torch.device("meta"):
        small = diffusers.SD3Transformer2DModel(num_layers=1)
    assert MMDiTConfig.from_dict(dict(small.config)) == MMDiTConfig(num_layers=1)  # their defaults are ours


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_name_every_tensor(preset: str) -> None:
    with torch.device("meta"):
        theirs = {name: tuple(p.shape) for name, p in oracle(PRESETS[preset]).state_dict().items()}
    assert torch_shapes(abstract_params(MMDiT(PRESETS[preset], scan=True)), RULES_MMDIT) == theirs


def test_both_layouts_have_the_same_names() -> None:
    cfg = FAMILIES["sd35_medium"]
    ours = [torch_shapes(abstract_params(MMDiT(cfg, scan=scan)), RULES_MMDIT) for scan in (False, True)]
    assert ours[0] == ours[1]
    with torch.device("meta"):
        assert ours[0].keys() == oracle(cfg).state_dict().keys()
