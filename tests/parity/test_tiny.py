"""The tiny autoencoder against diffusers, and its original files against the original network."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny as Oracle
from safetensors.torch import load_file, save_file
from torch import nn

from lcm_jax.diffusion.schedules import DDPM
from lcm_jax.models.latent_diffusion import LatentDiffusion
from lcm_jax.weights.diffusers_folder import Component, load_component, save_component
from lcm_jax.weights.safetensors_files import load_tensors
from lcm_jax.weights.taesd import load_tiny, save_tiny_original
from lcm_jax.weights.torch_params import to_torch
from vae16 import TINY_ORIGINAL_RULES, AutoencoderTiny, TinyConfig

torch.set_num_threads(1)
WIDTH, DEPTHS = 8, ((1, 2, 1), (2, 1, 1))
SIZES = {
    "encoder_block_out_channels": (WIDTH,) * 3, "decoder_block_out_channels": (WIDTH,) * 3,
    "num_encoder_blocks": DEPTHS[0], "num_decoder_blocks": DEPTHS[1],
}  # fmt: skip
GEOMETRIES = {
    "4 channels (TAESD, TAESDXL)": SIZES | {"latent_channels": 4},
    "16 channels (TAESD3)": SIZES | {"latent_channels": 16},
    "another activation and shape": {
        "encoder_block_out_channels": (6, 6), "decoder_block_out_channels": (10, 10),
        "num_encoder_blocks": (2, 0), "num_decoder_blocks": (0, 1),
        "latent_channels": 3, "act_fn": "gelu", "latent_magnitude": 2, "latent_shift": 0.3,
    },
}  # fmt: skip


def error(got: object, want: torch.Tensor) -> float:
    reference = want.permute(0, 2, 3, 1).numpy()
    assert np.shape(got) == reference.shape
    return float(np.abs(np.asarray(got) - reference).max() / np.abs(reference).max())


def randomised(module: nn.Module) -> nn.Module:
    """Kernels that keep the signal's size through ReLUs and biases that matter."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in module.parameters():
            size = (1.5 / p[0].numel()) ** 0.5 if p.ndim == 4 else 0.3
            p.copy_(size * torch.randn(p.shape, generator=generator))
    return module.eval()


def directions(component: Component):
    """encode and decode, compiled."""
    module, params = component
    return (
        lambda x: jax.jit(lambda p, x: module.apply({"params": p}, x, method="encode")[0])(params, x),
        lambda z: jax.jit(lambda p, z: module.apply({"params": p}, z, method="decode"))(params, z),
    )


def inputs(config: TinyConfig) -> tuple[np.ndarray, np.ndarray]:
    """An image and a latent, some of it far outside the clamp."""
    random, f = np.random.default_rng(0), config.downsample_factor
    x = random.uniform(-1, 1, (2, 16, 24, config.in_channels)).astype(np.float32)
    return x, 3 * random.normal(size=(2, 16 // f, 24 // f, config.latent_channels)).astype(np.float32)


def nchw(x: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(x).permute(0, 3, 1, 2)


@pytest.fixture(scope="module", params=GEOMETRIES.values(), ids=GEOMETRIES.keys())
def pair(request, tmp_path_factory):
    """A random network of diffusers, the folder that it saves itself to, and what is read from there."""
    oracle = randomised(Oracle(**request.param))
    folder = tmp_path_factory.mktemp("tiny")
    oracle.save_pretrained(folder)
    return oracle, folder, load_tiny(folder)


def test_encode_and_decode(pair):
    oracle, _, component = pair
    x, z = inputs(component.module.config)
    encode, decode = directions(component)
    with torch.no_grad():
        errors = {
            "encode": error(encode(x), oracle.encode(nchw(x)).latents),
            "decode": error(decode(z), oracle.decode(nchw(z)).sample),
        }
    assert max(errors.values()) <= 1e-4, errors


def test_there_and_back_and_loaded_there_again(pair, tmp_path):
    oracle, folder, component = pair
    assert save_component(tmp_path, "vae", component) == ("diffusers", "AutoencoderTiny")
    want = {name: value.numpy() for name, value in oracle.state_dict().items()}
    back = load_tensors(tmp_path / "vae")
    assert back.keys() == want.keys()
    for name, value in want.items():
        np.testing.assert_array_equal(back[name], value)
    again, report = Oracle.from_pretrained(tmp_path / "vae", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    saved, written = (json.loads((path / "config.json").read_text()) for path in (folder, tmp_path / "vae"))
    for key, value in written.items():
        assert json.loads(json.dumps(again.config.get(key, value))) == value == saved[key]
    for name, value in again.state_dict().items():
        np.testing.assert_array_equal(value.numpy(), want[name])
    jax.tree.map(np.testing.assert_array_equal, load_component(tmp_path, "vae").params, component.params)


def test_it_takes_the_autoencoders_place_in_a_pipeline(pair):
    oracle, _, (module, params) = pair
    _, z = inputs(module.config)
    generator = LatentDiffusion(
        net=None, vae=module, schedule=DDPM(beta_start=0.00085, beta_end=0.012, beta_schedule="linear"), kind="epsilon"
    )
    pictures = np.asarray(generator.decode(params, jnp.asarray(z)))
    with torch.no_grad():
        want = ((oracle.decode(nchw(z)).sample + 1) * 127.5).round().clamp(0, 255).permute(0, 2, 3, 1).numpy()
    assert pictures.dtype == np.uint8
    assert np.abs(pictures - want).max() <= 1


class Clamp(nn.Module):
    def forward(self, x):
        return torch.tanh(x / 3) * 3


class Block(nn.Module):
    def __init__(self, n):
        super().__init__()
        c = [nn.Conv2d(n, n, 3, padding=1) for _ in range(3)]
        self.conv = nn.Sequential(c[0], nn.ReLU(), c[1], nn.ReLU(), c[2])

    def forward(self, x):
        return torch.relu(self.conv(x) + x)


def original(latents: int) -> tuple[nn.Sequential, nn.Sequential]:
    """The author's layout, on images in [0, 1]: an encoder, and a decoder that begins with the clamp."""
    n = WIDTH
    encoder, decoder = [nn.Conv2d(3, n, 3, padding=1)], [Clamp(), nn.Conv2d(latents, n, 3, padding=1), nn.ReLU()]
    for i, depth in enumerate(DEPTHS[0]):
        encoder += [nn.Conv2d(n, n, 3, 2, padding=1, bias=False)] if i else []
        encoder += [Block(n) for _ in range(depth)]
    for i, depth in enumerate(DEPTHS[1]):
        decoder += [nn.Upsample(scale_factor=2), nn.Conv2d(n, n, 3, padding=1, bias=False)] if i else []
        decoder += [Block(n) for _ in range(depth)]
    encoder.append(nn.Conv2d(n, latents, 3, padding=1))
    decoder.append(nn.Conv2d(n, 3, 3, padding=1))
    return randomised(nn.Sequential(*encoder)), randomised(nn.Sequential(*decoder))


@pytest.fixture(scope="module")
def author(tmp_path_factory):
    """The original's halves of 16 channels, and the folder of their files."""
    folder = tmp_path_factory.mktemp("author")
    parts = dict(zip(("encoder", "decoder"), original(16), strict=True))
    for name, half in parts.items():
        save_file(half.state_dict(), folder / f"taesd3_{name}.safetensors")
    return parts, folder


def test_the_original_files_are_read(author):
    parts, folder = author
    component = load_tiny(folder)
    assert component.module.config == TinyConfig(**SIZES, latent_channels=16)
    x, z = inputs(component.module.config)
    encode, decode = directions(component)
    with torch.no_grad():
        assert error(encode(x), parts["encoder"]((nchw(x) + 1) / 2)) <= 1e-4
        assert error((decode(z) + 1) / 2, parts["decoder"](nchw(z))) <= 1e-4


def test_the_original_files_are_written(author, tmp_path):
    parts, folder = author
    component = load_tiny(folder)
    save_tiny_original(tmp_path, component, name="mine")
    for name, half in parts.items():
        written = load_file(tmp_path / f"mine_{name}.safetensors")
        fresh = dict(zip(("encoder", "decoder"), original(16), strict=True))[name]
        fresh.load_state_dict(written, strict=True)
        for key, value in half.state_dict().items():
            assert torch.equal(fresh.state_dict()[key], value)
    jax.tree.map(np.testing.assert_array_equal, load_tiny(tmp_path).params, component.params)
    assert len(to_torch(component.params, TINY_ORIGINAL_RULES)) == sum(len(h.state_dict()) for h in parts.values())


def test_what_the_original_files_cannot_say_is_not_written(tmp_path):
    odd = Component(AutoencoderTiny(TinyConfig(act_fn="silu")), {})
    with pytest.raises(ValueError, match="act_fn='silu' would be lost"):
        save_tiny_original(tmp_path, odd)
    assert not list(tmp_path.iterdir())


def test_unfitting_files_are_one_clear_line(author, tmp_path):
    parts, _ = author

    def fails(case: str, kind: type[Exception], words: str, **files: dict[str, torch.Tensor]) -> None:
        folder = tmp_path / case
        folder.mkdir()
        for name, tensors in files.items():
            save_file(tensors, folder / f"{name}.safetensors")
        with pytest.raises(kind, match=words) as caught:
            load_tiny(folder)
        assert str(caught.value).startswith(str(folder))
        assert "\n" not in str(caught.value)

    encoder, decoder = (parts[name].state_dict() for name in ("encoder", "decoder"))
    four = original(4)[1].state_dict()
    fails("empty", FileNotFoundError, r"no config\.json and no \*_encoder")
    fails("half", FileNotFoundError, r"no \*_decoder", t_encoder=encoder)
    fails("two", ValueError, "which of a_encoder.safetensors, b_encoder", a_encoder=encoder, b_encoder=encoder)
    fails("mixed", ValueError, r"mis-shaped \(decoder\.1\.weight", t_encoder=encoder, t_decoder=four)
    foreign = {"conv_in.weight": torch.zeros(1)}
    fails("foreign", ValueError, r"conv_in\.weight is no key", t_encoder=foreign, t_decoder=decoder)
    fails("flat", ValueError, "begin and end", t_encoder={"0.bias": torch.zeros(1)}, t_decoder=decoder)
    cut = {name: value for name, value in encoder.items() if name != "1.conv.2.weight"}
    fails("cut", ValueError, r"1 missing \(encoder\.1\.conv\.2\.weight\)", t_encoder=cut, t_decoder=decoder)
    short = {name: value for name, value in encoder.items() if name.startswith("0.")}
    fails("short", ValueError, "encoder_block_out_channels", t_encoder=short, t_decoder=decoder)
    (tmp_path / "pickle").mkdir()
    for name in parts:
        (tmp_path / "pickle" / f"taesd_{name}.pth").write_bytes(b"PK")
    with pytest.raises(ValueError, match="pickle"):
        load_tiny(tmp_path / "pickle")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"_class_name": "AutoencoderKL"}')
    with pytest.raises(ValueError, match="'AutoencoderKL', not 'AutoencoderTiny'"):
        load_tiny(tmp_path / "other")
