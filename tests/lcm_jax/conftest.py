"""Shared by the tests of streams, servers, training and many devices: light networks, frames, processes."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lcm_jax
from lcm_jax.diffusion.schedules import DDPM
from lcm_jax.diffusion.time_grids import Spacing
from lcm_jax.inference.pipeline import Pipeline
from lcm_jax.models.image_inputs import check_size
from lcm_jax.models.latent_diffusion import LatentDiffusion
from lcm_jax.stream import Weights
from vae16 import AutoencoderConfig, AutoencoderKL


@dataclass(frozen=True)
class LightConfig:
    """What a generator reads."""

    time_cond_proj_dim: int | None = None


class Light(nn.Module):
    """A network that compiles in no time: time, text and the pixels beside one another, mixed."""

    config: LightConfig = LightConfig()

    @nn.compact
    def __call__(self, x: Any, t: Any, cond: Any) -> Any:
        embedded = jnp.sin(t[:, None, None, None] / 200.0) + cond["context"].mean(1)[:, None, None, :4]
        y = jnp.tanh(nn.Dense(16)(jnp.concatenate([x, jnp.roll(x, 1, 1), embedded * jnp.ones_like(x)], axis=-1)))
        return nn.Dense(4)(y)


class Pixels(AutoencoderKL):
    """An autoencoder whose latents are quarter pictures; nothing to compile."""

    config: AutoencoderConfig = AutoencoderConfig(block_out_channels=(8, 8), latent_channels=4, norm_num_groups=4)

    def apply(self, variables: Any, x: Any, *, method: str) -> Any:
        if method == "decode":
            return jnp.tanh(jnp.repeat(jnp.repeat(x[..., :3], 2, 1), 2, 2))
        b, h, w, c = x.shape
        small = x.reshape(b, h // 2, 2, w // 2, 2, c).mean((2, 4))
        return jnp.concatenate([small, small[..., :1]], axis=-1) * 4.0, None


@dataclass(frozen=True, kw_only=True)
class Model:
    """What the tests need of a pipeline."""

    model: LatentDiffusion
    weights: Weights
    cond: Any  # of the prompt, one row
    null: Any


def light_model() -> Model:
    """Random parameters and two random prompts."""
    net = Light()
    text = jax.random.normal(jax.random.key(5), (2, 1, 6, 8))
    params = net.init(jax.random.key(0), jnp.zeros((1, 8, 8, 4)), jnp.zeros(1), {"context": text[0]})["params"]
    schedule = DDPM(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    model = LatentDiffusion(net=net, vae=Pixels(), schedule=schedule, kind="epsilon")
    return Model(model=model, weights=Weights(params, {}), cond={"context": text[0]}, null={"context": text[1]})


class LightPipe(Pipeline):
    """As much of a pipeline as a stream asks for, over `light_model`; a text's embedding comes from its letters."""

    spacing = Spacing()
    size = (16, 16)
    folder = SimpleNamespace(denoiser="unet", pipeline="StableDiffusionPipeline")

    def __init__(self, model: Model) -> None:
        self.model, self.params = model.model, {"unet": model.weights.net, "vae": model.weights.vae}
        self.encoded: list[str] = []

    @cached_property
    def net_params(self) -> Any:
        return self.params["unet"]

    def check_size(self, size: Sequence[int] | None) -> tuple[int, int]:
        return check_size(self.size if size is None else size, 2, None)

    def size_conditioning(self, size: tuple[int, int]) -> tuple[None, None]:
        return None, None

    def encode_prompt(self, prompts: Sequence[str], *, sizes: Any = None) -> dict[str, Any]:
        self.encoded += prompts
        rows = [np.random.default_rng([0, *text.encode()]).normal(size=(6, 8)) for text in prompts]
        return {"context": jnp.asarray(np.stack(rows), jnp.float32)}

    def conditions(self, prompts: Any, negatives: Sequence[str], sizes: Any, **_: Any) -> tuple[Any, Any]:
        return self.encode_prompt(prompts), self.encode_prompt(negatives)

    def encode_image(self, frames: np.ndarray) -> Any:
        return self.model.encode({}, jnp.asarray(frames))


@pytest.fixture(scope="session")
def light() -> Model:
    return light_model()


@pytest.fixture(scope="session")
def make_light_pipe(light: Model) -> Callable[[], LightPipe]:
    return lambda: LightPipe(light)


@pytest.fixture
def light_pipe(light: Model) -> LightPipe:
    return LightPipe(light)


@pytest.fixture(scope="session")
def unet(tiny_model: Path) -> Model:
    """Stable Diffusion's networks, tiny and random, with keys and values of the text computed before."""
    pipe = lcm_jax.load(tiny_model)
    cond, null = (
        pipe.model.precompute(pipe.net_params, pipe.encode_prompt([text])) for text in ("red heart", "dog face")
    )
    assert cond["cross"]
    return Model(model=pipe.model, weights=Weights(pipe.net_params, pipe.params["vae"]), cond=cond, null=null)


@pytest.fixture(scope="session")
def frames() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (8, 1, 16, 16, 3), np.uint8)


@pytest.fixture(scope="module")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """LCM_JAX_CACHE is a folder of this module's own."""
    patch = pytest.MonkeyPatch()
    patch.setenv("LCM_JAX_CACHE", str(tmp_path_factory.mktemp("cache")))
    yield
    patch.undo()


@pytest.fixture(scope="session")
def environment() -> Callable[[int], dict[str, str]]:
    """Return the environment of a process with a number of devices, which compiles as the tests do."""

    def of(devices: int) -> dict[str, str]:
        return os.environ | {
            "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}",
            "JAX_PLATFORMS": "cpu",
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
            "JAX_COMPILATION_CACHE_DIR": str(jax.config.values["jax_compilation_cache_dir"]),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.3",
        }

    return of
