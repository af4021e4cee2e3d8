"""`lcm_jax.load`: a model ready to draw. Text in, uint8 pictures out; one compiled program from noise to picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, UInt8

from lcm_jax.generate import Generator, to_float
from lcm_jax.lora import Adapters, merge_all
from lcm_jax.nets import RULES_UNET
from lcm_jax.parameterization import add_noise
from lcm_jax.sampling import SAMPLERS, Grid, Sampler, Spacing, pad, time_grid
from lcm_jax.typing import Array, Cond, Denoiser, Image, Key, Params
from lcm_jax.weights.folders import Component, Folder, load_folder, save_folder
from lcm_jax.weights.hub import locate
from lcm_jax.weights.lora import load_lora
from lcm_jax.weights.scheduler import read_scheduler
from mmdit.text import Encoding, stable_diffusion
from vae16 import scale

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float16": jnp.float16}


class Pipeline:
    """A text-to-image model: networks, parameters and schedule. Made by `load`."""

    def __init__(self, folder: Folder, *, source: str = "model") -> None:
        self.folder = folder
        self.params: dict[str, Params] = {name: part.params for name, part in folder.components.items()}
        schedule, kind = read_scheduler(folder.scheduler, source=source)
        self.spacing = Spacing.from_config(folder.scheduler, source=source)
        net, vae = folder.components["unet"].module, folder.components["vae"].module
        embeds = net.config.time_cond_proj_dim is not None
        self.generator = Generator(net=net, vae=vae, schedule=schedule, kind=kind, embeds_guidance=embeds)

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) in pixels that the model was trained at."""
        side = self.folder.components["unet"].module.config.sample_size
        factor = self.generator.vae.config.downsample_factor
        return (side * factor, side * factor) if isinstance(side, int) else tuple(s * factor for s in side)

    @property
    def default_sampler(self) -> str:
        """What the folder's scheduler config asks for."""
        names = {"LCMScheduler": "lcm", "EulerDiscreteScheduler": "euler", "HeunDiscreteScheduler": "heun"}
        names["DPMSolverMultistepScheduler"] = "dpm++2m"
        return names.get(self.folder.scheduler.get("_class_name", ""), "ddim")

    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        negative_prompt: str | Sequence[str] = "",
        steps: int = 4,
        guidance: float = 1.0,
        sampler: str = "lcm",
        seed: int = 0,
        size: tuple[int, int] | None = None,
        num_images: int = 1,
        latents: Float[Array, "n h w c"] | None = None,
        image: UInt8[np.ndarray, "*n h w 3"] | None = None,
        strength: float | None = None,
    ) -> UInt8[np.ndarray, "n h w 3"]:
        """Pictures of the prompts, `num_images` for each, as uint8.

        prompt, negative_prompt: one text or a list. steps: network evaluations (twice that for heun and dpm2).
        guidance: classifier-free guidance scale, 1 for none; a network with a w-embedding is told w = guidance - 1.
        sampler: "lcm", "ddim", "euler", "heun", "dpm++2m" or "dpm2". seed: of the noise. size: (height, width) in
        pixels, the model's own by default. latents: the initial unit noise, for parity with other systems.
        image, strength: image-to-image; the picture is noised up to `strength` (0.6 by default) of the way and redrawn.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        prompts = [text for text in prompts for _ in range(num_images)]
        if not prompts:
            raise ValueError(f"nothing to draw: {'prompt is empty' if num_images > 0 else f'num_images={num_images}'}")
        negatives = [negative_prompt] * len(prompts) if isinstance(negative_prompt, str) else list(negative_prompt)
        if len(negatives) * num_images == len(prompts) and not isinstance(negative_prompt, str):
            negatives = [text for text in negatives for _ in range(num_images)]
        if len(negatives) != len(prompts):
            raise ValueError(f"negative_prompt: {len(negatives)} texts for {len(prompts) // num_images} prompts")
        if sampler not in SAMPLERS:
            raise ValueError(f"sampler {sampler!r} is unknown; known are {', '.join(SAMPLERS)}")
        if strength is not None and image is None:
            raise ValueError("strength is given without an image; image-to-image needs both")
        strength = 1.0 if image is None else (0.6 if strength is None else strength)
        height, width = self._check_size(image.shape[-3:-1] if image is not None and size is None else size)
        spec = SAMPLERS[sampler]
        times = time_grid(spec, self.generator.schedule, steps, spacing=self.spacing, strength=strength)
        factor = self.generator.vae.config.downsample_factor
        shape = (len(prompts), height // factor, width // factor, self.generator.vae.config.latent_channels)
        noise_key, sample_key = jax.random.split(jax.random.key(seed))
        noise = jax.random.normal(noise_key, shape) if latents is None else jnp.asarray(latents, jnp.float32)
        if noise.shape != shape:
            raise ValueError(
                f"latents have shape {noise.shape}; {shape} is needed for {len(prompts)} pictures of this size"
            )
        if image is None:
            x = noise * spec.init_scale(self.generator.schedule, times, self.spacing)
        else:
            x = self._noised(image, noise, times[0], (height, width))
        guided = guidance != 1.0 and not self.generator.embeds_guidance
        cond = self.encode_prompt(prompts)
        null = self.encode_prompt(negatives) if guided else cond
        arguments = (
            self.params["unet"],
            self.params["vae"],
            cond,
            null,
            x,
            pad(times),
            jnp.float32(guidance),
            sample_key,
        )
        return np.asarray(self._draw(*arguments, sampler=spec, guided=guided))

    def encode_prompt(self, prompts: Sequence[str]) -> dict[str, Array]:
        """Texts to the UNet's conditioning, {"context": (n, l, d)}."""
        length = self.folder.components["text_encoder"].module.config.max_position_embeddings
        return self._encode_ids(self.params["text_encoder"], jnp.asarray(self.folder.tokenizer(list(prompts), length)))

    def encode_image(self, image: UInt8[np.ndarray, "n h w 3"]) -> Image:
        """Pictures to latents in the UNet's units (the posterior's mean)."""
        return self._encode_image(self.params["vae"], jnp.asarray(image))

    def denoiser(self, prompt: str | Sequence[str], *, guidance: float = 1.0, negative_prompt: str = "") -> Denoiser:
        """(x_t, t) -> Prediction(x0, eps), prompts and parameters bound: what solvers and new ideas are built on."""
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        null = self.encode_prompt([negative_prompt] * len(prompts))
        cond = self.encode_prompt(prompts)
        return self.generator.denoiser(self.params["unet"], cond, null, guidance, guided=guidance != 1.0)

    def save(self, path: str | Path, *, dtype: str | None = None) -> None:
        """A diffusers folder that diffusers and `load` read. dtype: of the files; None keeps the parameters' own."""
        parts = {name: Component(part.module, self.params[name]) for name, part in self.folder.components.items()}
        save_folder(Path(path), replace(self.folder, components=parts), dtype=None if dtype is None else _dtype(dtype))

    def add_lora(self, parts: Sequence[tuple[Adapters, float]]) -> None:
        """Merge adapters, each with its weight, into the UNet."""
        self.params["unet"] = merge_all(self.params["unet"], parts)

    def _check_size(self, size: Sequence[int] | None) -> tuple[int, int]:
        height, width = self.size if size is None else tuple(size)
        factor = self.generator.vae.config.downsample_factor
        if min(height, width) < factor or height % factor or width % factor:
            raise ValueError(f"size {height}x{width}: height and width must be positive multiples of {factor} pixels")
        return height, width

    def _noised(self, image: np.ndarray, noise: Image, t: float, size: tuple[int, int]) -> Image:
        image = np.asarray(image)
        if image.dtype != np.uint8 or image.ndim not in (3, 4) or image.shape[-1] != 3:
            raise ValueError(f"image: expected uint8 (h, w, 3) or (n, h, w, 3), got {image.dtype} {image.shape}")
        image = image[None] if image.ndim == 3 else image
        if image.shape[1:3] != size:
            raise ValueError(
                f"image is {image.shape[1]}x{image.shape[2]}, size asks for {size[0]}x{size[1]}: resize it"
            )
        if len(noise) % len(image):
            raise ValueError(f"image: {len(image)} pictures for {len(noise)} prompts")
        x0 = jnp.repeat(self.encode_image(image), len(noise) // len(image), axis=0)
        return add_noise(self.generator.schedule, x0, noise, t)

    @cached_property
    def _draw(self) -> Any:
        @partial(jax.jit, static_argnames=("sampler", "guided"))
        def draw(
            unet: Params, vae: Params, cond: Cond, null: Cond, x: Image, grid: Grid, guidance: Array, key: Key,
            *, sampler: Sampler, guided: bool,
        ) -> Array:  # fmt: skip
            z = self.generator.latents(unet, cond, null, x, grid, guidance, key, sampler=sampler, guided=guided)
            return self.generator.decode(vae, z)

        return draw

    @cached_property
    def _encode_ids(self) -> Any:
        module = self.folder.components["text_encoder"].module
        return jax.jit(lambda params, ids: stable_diffusion(Encoding(module, params, ids)))

    @cached_property
    def _encode_image(self) -> Any:
        vae = self.generator.vae

        def encode(params: Params, image: Array) -> Image:
            return scale(vae.apply({"params": params}, to_float(image), method="encode")[0], vae.config)

        return jax.jit(encode)


def load(
    name: str | Path,
    *,
    dtype: str = "float32",
    lora: str | Path | Sequence[tuple[str | Path, float]] | None = None,
    variant: str | None = None,
) -> Pipeline:
    """A pipeline from a bundled name ("openmoji", "openmoji-teacher"), a diffusers folder or a hub id.

    dtype: of parameters and computation. lora: an adapter file, folder or bundled name ("openmoji-lcm-lora"), or a list
    of (adapter, weight) pairs, merged into the UNet.
    """
    location = locate(name)
    pipe = Pipeline(load_folder(location, dtype=_dtype(dtype), variant=variant), source=str(name))
    if lora is not None:
        parts = [(lora, 1.0)] if isinstance(lora, (str, Path)) else list(lora)
        like = pipe.params["unet"]
        pipe.add_lora([(load_lora(locate(path).path, like, RULES_UNET), weight) for path, weight in parts])
    return pipe


def _dtype(name: str) -> Any:
    if name not in DTYPES:
        raise ValueError(f"dtype {name!r} is unknown; known are {', '.join(DTYPES)}")
    return DTYPES[name]
