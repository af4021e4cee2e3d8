"""The shapes of a training without its weights and data, derived from the configs of its models alone."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import optax

from lcm_jax.diffusion.schedules import DDPM, RectifiedFlow
from lcm_jax.models.text_conditioning import Prompts
from lcm_jax.nets import SD15, SDXL
from lcm_jax.runtime.image_io import Size
from lcm_jax.train.optimizer import MakeOptimizer
from lcm_jax.train.task import Task
from lcm_jax.train.tasks.conditioner import FAMILY_OF
from lcm_jax.train.train_step import Loss
from lcm_jax.typing import Key, Kind, Params, Schedule
from lcm_jax.weights.component import config_of
from lcm_jax.weights.diffusers_folder import TOKENIZERS
from lcm_jax.weights.hub import locate
from lcm_jax.weights.registry import DENOISERS, FAMILIES, denoiser_of
from lcm_jax.weights.safetensors_files import read_json
from lcm_jax.weights.scheduler_config import read_scheduler
from mmdit import SD3_MEDIUM, SD35_LARGE, SD35_MEDIUM
from mmdit.text import Tokenizer
from vae16 import AutoencoderConfig

Shapes = Any  # a tree of ShapeDtypeStruct


@dataclass(frozen=True, kw_only=True)
class ModelShapes:
    """The configs of a model that determine its shapes.

    net: the denoiser's config. tokens: length of a prompt in the conditioning's `context`, in tokens.
    """

    net: Any
    vae: AutoencoderConfig
    tokens: int
    schedule: Schedule
    kind: Kind


_VAE = AutoencoderConfig(block_out_channels=(128, 256, 512, 512), layers_per_block=2, sample_size=512)
_VAE_SDXL = replace(_VAE, scaling_factor=0.13025, sample_size=1024)
_VAE_SD3 = replace(
    _VAE, latent_channels=16, use_quant_conv=False, use_post_quant_conv=False, scaling_factor=1.5305,
    shift_factor=0.0609, sample_size=1024,
)  # fmt: skip
_SD = DDPM(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")


def _sd3(net: Any) -> ModelShapes:
    return ModelShapes(net=net, vae=_VAE_SD3, tokens=77 + 256, schedule=RectifiedFlow(shift=3.0), kind="flow")


# The contents of these repositories, so that a plan needs no connection; other models' config.json files are read.
PUBLISHED: Mapping[str, ModelShapes] = MappingProxyType(
    {
        "stable-diffusion-v1-5/stable-diffusion-v1-5": ModelShapes(
            net=SD15, vae=_VAE, tokens=77, schedule=_SD, kind="epsilon"
        ),
        "stabilityai/stable-diffusion-xl-base-1.0": ModelShapes(
            net=SDXL, vae=_VAE_SDXL, tokens=77, schedule=_SD, kind="epsilon"
        ),
        "stabilityai/stable-diffusion-3-medium-diffusers": _sd3(SD3_MEDIUM),
        "stabilityai/stable-diffusion-3.5-medium": _sd3(SD35_MEDIUM),
        "stabilityai/stable-diffusion-3.5-large": _sd3(SD35_LARGE),
    }
)


def model_shapes(model: str) -> ModelShapes:
    """Return the shapes of a model: one of PUBLISHED, or a bundled name, folder or hub id; no weights are read.

    A field for which the folder has no file is None or 0; `required_shape_of` raises ValueError for it.
    """
    if model in PUBLISHED:
        return PUBLISHED[model]
    location = locate(model, weights=False)
    names = [name for name in (*DENOISERS, "vae", *TOKENIZERS) if location.at(name).is_dir()]
    components = {name: config_of(location.at(name) / "config.json") for name in names}
    configs = {name: config for name, (_, config) in components.items()}
    scheduler = location.at("scheduler") / "scheduler_config.json"
    schedule, kind = (
        read_scheduler(read_json(scheduler), source=str(scheduler)) if scheduler.is_file() else (None, None)
    )
    texts = {name: components[name] for name in TOKENIZERS if name in components}
    tokens = 0
    if texts:
        prompts = Prompts(
            modules={name: FAMILIES[family].build(config) for name, (family, config) in texts.items()},
            tokenizers={name: Tokenizer.load(location.at(TOKENIZERS[name])) for name in texts},
            family=FAMILY_OF[max(texts)],
        )
        tokens = prompts.lengths["text_encoder"] + prompts.lengths.get("t5", 0)
    net: Any = next((configs[name] for name in DENOISERS if name in configs), None)
    fields: dict[str, Any] = {"net": net, "vae": configs.get("vae"), "schedule": schedule, "kind": kind}
    return ModelShapes(tokens=tokens, **fields)


def required_shape_of(model: str, part: str) -> Any:
    """Return the field `part` of a model's shapes; raise ValueError if its folder has no file for it."""
    value = getattr(model_shapes(model), part)
    if not value:
        raise ValueError(f"model {model}: its folder has no config of its {part}; name a model that has one")
    return value


def frozen_and_batch_shapes(
    net: Any, vae: str, text: str, size: Size
) -> tuple[dict[str, Shapes], Callable[[int], Shapes]]:
    """Return the shapes of a latent task's frozen trees "null" and "vae", and a function b -> shapes of a batch of b.

    net: the denoiser's config, which determines the conditioning. vae, text: models whose autoencoder and text encoders
    are used. size: (height, width) of the pictures in pixels. Raises ValueError if the channels of `net` and of the
    autoencoder differ, or if a model lacks a part.
    """
    config = required_shape_of(vae, "vae")
    if config.latent_channels != net.in_channels:
        raise ValueError(f"in_channels is {net.in_channels}, but the VAE has {config.latent_channels} latent channels")
    tokens, family = required_shape_of(text, "tokens"), denoiser_of(net)[1]
    h, w = (side // config.downsample_factor for side in size)

    def conditioning(n: int) -> Shapes:
        cond = jax.eval_shape(lambda: family.example(net, batch=n, size=(h, w), tokens=tokens))[2]  # type: ignore[call-arg]
        return {name: leaf for name, leaf in cond.items() if name not in ("guidance", "span")}

    def batch(n: int) -> Shapes:
        latent = jax.ShapeDtypeStruct((n, h, w, config.latent_channels), jnp.float16)
        return {"mean": latent, "std": latent, **cast(conditioning(n), jnp.float16)}

    null = {name: leaf for name, leaf in conditioning(1).items() if name != "time_ids"}
    module = FAMILIES["AutoencoderKL"].build(config)
    weights = jax.eval_shape(lambda: module.init(jax.random.key(0), *FAMILIES["AutoencoderKL"].example(config)))
    return {"null": null, "vae": weights["params"]}, batch


def cast(shapes: Shapes, dtype: Any) -> Shapes:
    """Return the same shapes with another dtype."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), shapes)


def abstract_task(
    init: Callable[[Key], Params],
    loss: Loss,
    frozen: Shapes,
    batch: Callable[[int], Shapes],
    optimizer: Callable[[MakeOptimizer], optax.GradientTransformation] = lambda make: make(),
) -> Task:
    """Return a task whose step can be compiled but not run: its frozen trees and batches are shapes.

    init: is only traced. batch: b -> shapes of a batch of b.
    """

    def refuse(*_: Any) -> NoReturn:
        raise TypeError("an abstract task has no weights: it can neither draw previews nor export; use build()")

    def batches(n: int, *_: Any) -> Any:
        return itertools.repeat(batch(n))

    return Task(
        init=init, loss=loss, frozen=frozen, batches=batches, preview=refuse, export=refuse, optimizer=optimizer
    )
