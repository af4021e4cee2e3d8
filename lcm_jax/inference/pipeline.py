"""`Pipeline`: text in, uint8 images out; one compiled program from noise to image."""

from __future__ import annotations

import contextlib
import copy
import inspect
import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Bool, Float, UInt8
from PIL import Image as PILImage

from lcm_jax.diffusion.parameterization import add_noise
from lcm_jax.diffusion.samplers import Levels, Sampler, check_given_steps, get_sampler, walk
from lcm_jax.diffusion.schedules import RectifiedFlow
from lcm_jax.diffusion.solvers import TCD, InpaintTarget
from lcm_jax.diffusion.time_grids import Grid, Spacing, Walk, pad, truncate
from lcm_jax.inference.call_options import GUIDANCE, Settings, real_number, refuse, two_numbers, whole_number
from lcm_jax.inference.parameters import Parameters, named_dtype
from lcm_jax.inference.prompt_conditioning import (
    Conditions,
    PromptOptions,
    check_prompts,
    encode,
    given_embeds,
    same_length,
    weighted_conditions,
)
from lcm_jax.lora import Adapters, merge
from lcm_jax.models.image_inputs import check_pictures, check_size, fit_masks, latent_mask
from lcm_jax.models.latent_diffusion import BoundDenoiser, LatentDiffusion, SkipLayers
from lcm_jax.models.text_conditioning import Prompts, pair_texts
from lcm_jax.parallel.sharding import constrain_batch_sharding, gather_to_host, put_on_mesh, shard_batch, tree_shardings
from lcm_jax.precision.context import is_low_precision
from lcm_jax.precision.quantization import Quantized, check_part, rounder
from lcm_jax.runtime.compiler_options import compiler_options
from lcm_jax.runtime.hardware import GIB, memory_of
from lcm_jax.runtime.messages import LESS_MEMORY, out_of_memory
from lcm_jax.runtime.progress import phase
from lcm_jax.typing import Array, Cond, Image, Key, Params
from lcm_jax.weights.diffusers_folder import LCM, SD, Component, Folder, save_folder
from lcm_jax.weights.lora.modules import Network
from lcm_jax.weights.model_files import lora_networks
from lcm_jax.weights.registry import class_name
from lcm_jax.weights.scheduler_config import read_scheduler, read_spacing, reads, sampler_of
from mmdit.text import zero_prompt
from mmdit.text.conditioning import size_pair

Picture = UInt8[np.ndarray, "_ _ 3"] | PILImage.Image  # of any size
Mask = UInt8[np.ndarray, "_ _"] | Bool[np.ndarray, "_ _"] | PILImage.Image


class Pipeline:
    """A text-to-image model: networks, parameters and schedule. `load` makes it.

    params: the parameter trees by component ("unet" or "transformer", "vae", "text_encoder", ...), to read or replace.
    model: the networks and the schedule without parameters. spacing: the folder's rule for time grids.

    >>> import lcm_jax
    >>> pipe = lcm_jax.load("openmoji")
    >>> pipe
    <Pipeline LatentConsistencyModelPipeline: unet, vae, text_encoder; 64x64 pixels, lcm, 4 steps, guidance 4>
    >>> pipe("red heart", steps=1).shape
    (1, 64, 64, 3)
    """

    adapted = False  # adapters were merged by `load`
    mesh: Mesh | None = None  # that of `shard`
    prompt_syntax: str | None = None  # of calls that do not name one
    clip_skip: int | None = None  # likewise

    def __init__(self, folder: Folder, *, source: str = "scheduler_config.json") -> None:
        """Bind a model's folder. source: the scheduler config's name in errors."""
        self.folder, self.scheduler_source = folder, source
        self.params = Parameters(folder.components)
        self.rounded: dict[str, str] = {}  # part -> how it is in 8 bits: `quantized`
        config = dict(folder.scheduler)
        if folder.pipeline in SD and reads(config, "steps_offset"):
            config["steps_offset"] = 1  # as diffusers corrects it: SD was trained on timesteps that begin at 1
        schedule, kind = read_scheduler(config, source=source)
        self.spacing = read_spacing(config, source=source)
        net, vae = folder.components[folder.denoiser].module, folder.components["vae"].module
        embeds = net.config.time_cond_proj_dim is not None
        spans = getattr(net.config, "span_embedding", False)
        self.model = LatentDiffusion(
            net=net, vae=vae, schedule=schedule, kind=kind, embeds_guidance=embeds, embeds_span=spans
        )

    def shard(self, mesh: Mesh) -> None:
        """Draw on all devices of a mesh (`lcm_jax.parallel.sharding.make_mesh`) from now on.

        The parameters are sharded as in training, the images of a call along the batch; they are the same for any
        number of devices. All processes of a job must make the same calls; each encodes the texts by itself.
        """
        for name in self.params if jax.process_count() == 1 else (self.folder.denoiser, "vae"):
            self.params[name] = put_on_mesh(self.params[name], tree_shardings(self.params[name], mesh))
        self.mesh = mesh
        self.__dict__.pop("_draw", None)

    def spread(self, mesh: Mesh) -> None:
        """Do what `shard` does, under its name in version 0.1."""
        warnings.warn("Pipeline.spread is now called shard", DeprecationWarning, stacklevel=2)
        self.shard(mesh)

    @property
    def size(self) -> tuple[int, int]:
        """The (height, width) in pixels of the model's training; ValueError if its config does not say."""
        side = self.model.net.config.sample_size
        if side is None:
            raise ValueError("the network's config has no sample_size: give size=(height, width) in pixels")
        factor = self.model.vae.config.downsample_factor
        return (side * factor, side * factor) if isinstance(side, int) else tuple(s * factor for s in side)

    @property
    def net_params(self) -> Params:
        """The denoiser's parameters."""
        return self.params[self.folder.denoiser]

    def component(self, name: str) -> Component:
        """Return a network with its present parameters."""
        return self.params.components[name]

    @property
    def default_sampler(self) -> str:
        """The sampler that the folder's scheduler config names; a warning where another has to stand in for it.

        With an adapter that `load` merged it is "lcm", as for an LCM-LoRA: files of adapters do not say their sampler.
        """
        return "lcm" if self.adapted else sampler_of(self.folder.scheduler, source=self.scheduler_source)

    def settings(
        self, *, steps: int | None = None, guidance: float | None = None, sampler: str | Sampler | None = None
    ) -> Settings:
        """Return the settings of a call: those given, and the model's own where one is None.

        A model's sampler is `default_sampler`, its steps are those that the sampler usually takes (4 of a student, 50
        of DDIM, 28 of Euler), and its guidance is 4, or 1, none, for a student without a w-embedding.
        """
        if sampler is None:
            sampler = self.default_sampler
        if not isinstance(sampler, (str, Sampler)):
            raise ValueError(f"sampler is {sampler!r:.80}: give a name, or a diffusion.samplers.Sampler")
        spec = get_sampler(sampler)
        if guidance is None:
            guidance = 1.0 if spec.few_steps and not self.model.embeds_guidance else GUIDANCE
        steps = spec.usual_steps if steps is None else whole_number("steps", steps, 1)
        return Settings(steps, real_number("guidance", guidance), sampler)

    def __repr__(self) -> str:
        names, size = ", ".join(self.params), self.model.net.config.sample_size and "x".join(map(str, self.size))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a sampler that stands in for another: said where pictures are drawn
            steps, guidance, sampler = self.settings()
        bits = "".join(f", {part} in {kind}" for part, kind in self.rounded.items())
        settings_text = f"{sampler}, {steps} steps, guidance {guidance:g}"
        return f"<Pipeline {self.folder.pipeline}: {names}{bits}; {f'{size} pixels, ' if size else ''}{settings_text}>"

    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        *,
        negative_prompt: str | Sequence[str] | None = "",
        steps: int | None = None,
        guidance: float | None = None,
        sampler: str | Sampler | None = None,
        sigmas: str | Levels | None = None,
        timesteps: Levels | None = None,
        spacing: str | None = None,
        gamma: float | None = None,
        seed: int = 0,
        size: int | Sequence[int] | None = None,
        num_images: int = 1,
        latents: Float[Array | np.ndarray, "n h2 w2 c"] | None = None,
        image: Picture | Sequence[Picture] | UInt8[np.ndarray, "_ _ _ 3"] | None = None,
        strength: float | None = None,
        mask: Mask | Sequence[Mask] | UInt8[np.ndarray, "_ _ _"] | Bool[np.ndarray, "_ _ _"] | None = None,
        t5_tokens: int | None = None,
        shift: float | None = None,
        double_shift: bool | None = None,
        skip_layers: Sequence[int] = (),
        skip_scale: float = 2.8,
        skip_interval: tuple[float, float] = (0.01, 0.2),
        original_size: tuple[int, int] | None = None,
        crop: tuple[int, int] | None = None,
        aesthetic_score: float | None = None,
        prompt_syntax: str | None = None,
        clip_skip: int | None = None,
        prompt_embeds: Mapping[str, Any] | Any = None,
        negative_prompt_embeds: Mapping[str, Any] | Any = None,
        **unknown: Any,
    ) -> UInt8[np.ndarray, "n h w 3"]:
        """Draw images of the prompts, `num_images` for each, as uint8.

        prompt, negative_prompt: one text or a list. steps, guidance, sampler: the model's own for None, which
        `settings` returns. steps: solver steps, each of as many network evaluations as the sampler's solver declares.
        guidance: classifier-free guidance scale, 1 for none; a network with a w-embedding receives w = guidance - 1.
        sampler: a name in `diffusion.samplers.SAMPLERS`, or a `Sampler`. sigmas: the rule that places the steps by
        noise levels, "karras", "exponential", "beta", "lu" or "ays", or the levels themselves; timesteps: what the
        network is told at each step; spacing: "leading", "trailing" or "linspace" (`diffusion.samplers.walk`).
        gamma: for tcd, the share of a step that is noise, 0.3 by default. seed: the seed of the noise, from 0 to
        2**32 - 1. size: (height, width) in pixels, or one number for a square; the model's own by default. latents: the
        initial unit noise, for parity with other systems.
        image, strength: image-to-image; the image (uint8 or of PIL, scaled to `size` and cut to its middle) is noised
        up to `strength` (0.6 by default) of the way and redrawn. mask: inpainting; only white (128 and above) or true
        pixels are redrawn, from pure noise without a strength.

        prompt_syntax: "a1111", "compel" or "comfyui" for prompts with weights and of any length (docs/prompts.md); None
        is plain text of 77 tokens. clip_skip: the number of the text encoders' last layers to leave out, as diffusers
        counts; not for negative prompts. prompt_embeds, negative_prompt_embeds: in place of the texts, what
        `encode_prompt` returns, or for one text encoder its array (n, l, d).

        For SD3: t5_tokens of a prompt (256 by default, at most 512). shift of the noise levels, the folder's by
        default, and double_shift, whether it is applied twice as in both references (it is by default). skip_layers
        such as (7, 8, 9): skip-layer guidance of scale skip_scale, in the steps between the fractions skip_interval.

        For SDXL, its size conditioning: original_size (height, width) of the image before it was scaled, `size` by
        default, and crop, the (top, left) that was cut off, (0, 0) by default; for its refiner aesthetic_score (1 to
        10), 6 by default. With the negative prompt the refiner's score is 2.5 and its crop (0, 0).

        ValueError, before anything is drawn, for options that do not fit the model or one another; TypeError for an
        option that there is not; MemoryError where the device has too little memory.
        """
        if unknown:
            refuse("pipe", unknown, CALL_OPTIONS)
        options = self._prompt_options(prompt_syntax, clip_skip, t5_tokens)
        num_images = whole_number("num_images", num_images)
        given, given_null = self._given(prompt, prompt_embeds, negative_prompt, negative_prompt_embeds, num_images)
        texts: Any = prompt if given is None else [""] * (len(given["context"]) // max(num_images, 1))
        prompts, negatives = pair_texts(texts, negative_prompt, num_images)
        seed = whole_number("seed", seed, 0, 2**32 - 1)  # jax.random.key wraps larger ones around
        steps = check_given_steps(steps, sigmas, timesteps)
        steps, guidance, sampler = self.settings(steps=steps, guidance=guidance, sampler=sampler)
        spec = get_sampler(sampler)
        for name, value in (("strength", strength), ("mask", mask)):
            if value is not None and image is None:
                raise ValueError(f"{name} is given without an image; image-to-image and inpainting need one")
        if image is None and self.folder.is_refiner:
            raise ValueError("this is SDXL's refiner, which redraws pictures: give it an image, and a strength")
        if strength is None:
            strength = 0.6 if image is not None and mask is None else 1.0
        strength = real_number("strength", strength)
        model, rules = self._on_shift(shift, double_shift)
        size = self.check_size(size)
        self.check_memory(size, len(prompts))
        pictures = None if image is None else check_pictures(image, size, len(prompts))
        redrawn = None
        if mask is not None:
            redrawn = latent_mask(fit_masks(mask, size), size, len(prompts), model.vae.config.downsample_factor)
        sizes = self.size_conditioning(size, original_size=original_size, crop=crop, aesthetic_score=aesthetic_score)
        spec = spec.configured(rules, model.kind)
        if gamma is not None:
            if sampler != "tcd":
                raise ValueError(f"gamma is an option of the sampler tcd, and this is {sampler}: leave it out")
            spec = replace(spec, solver=TCD(gamma=real_number("gamma", gamma)))
        walked = self.walk(model, spec, steps, rules, strength, sigmas=sigmas, timesteps=timesteps, spacing=spacing)
        times, rules = walked.times, rules if spacing is None else replace(rules, timestep_spacing=spacing)
        guided = (guidance != 1.0 or bool(skip_layers)) and not model.embeds_guidance
        skip = None
        if skip_layers:
            interval = two_numbers("skip_interval", skip_interval)
            scale = real_number("skip_scale", skip_scale)
            skip = SkipLayers.in_steps(times, self._check_skip(skip_layers), scale, interval)
        noise_key, sample_key = jax.random.split(jax.random.key(seed))
        noise = self.noise(noise_key, len(prompts), size, latents)
        empty = negative_prompt is None or negative_prompt == ""
        check_prompts([*prompts, *negatives], options.syntax, len(times) - 1)
        what = f"{len(prompts)} picture{'s' * (len(prompts) > 1)} of {size[0]}x{size[1]} pixels"
        with out_of_memory(f"{what} in {_precision(self)}", LESS_MEMORY):
            with phase("reading the weights and encoding the prompts"):
                cond, null, parts_of_steps = self._conditions(
                    prompts, negatives, sizes, options, empty=empty, guided=guided, steps=len(times) - 1,
                    given=given, given_null=given_null,
                )  # fmt: skip
                x, inpaint_target = noise * spec.init_noise_sigma(model.schedule, times, rules), None
                if pictures is not None:
                    x0 = jnp.repeat(self.encode_image(pictures), len(noise) // len(pictures), axis=0)
                    if redrawn is not None:
                        inpaint_target = InpaintTarget(mask=redrawn, x0=x0, eps=noise)
                    if mask is None or strength < 1.0:
                        x = add_noise(model.schedule, x0, noise, times[0])
                if self.mesh is not None:
                    cond, null, x, inpaint_target = shard_batch((cond, null, x, inpaint_target), self.mesh)
                params = self.net_params, self.params["vae"]
            parts = (*params, cond, null, x, pad(walked), jnp.float32(guidance), sample_key)
            with phase(f"compiling the program for {what}"):  # returns once the device has begun
                made = self._draw(
                    *parts, skip, inpaint_target, parts_of_steps, model=model, sampler=spec, guided=guided
                )
            with phase(f"drawing {what} in {steps} step{'s' * (steps > 1)}"):
                return gather_to_host(made)[: len(prompts)]

    def encode_prompt(
        self,
        prompts: Sequence[str],
        *,
        sizes: Float[Array | np.ndarray, " n"] | None = None,
        t5_tokens: int | None = None,
        clip_skip: int | None = None,
        prompt_syntax: str | None = None,
        most_chunks: int | None = None,
    ) -> dict[str, Array]:
        """Encode texts as conditioning: {"context": (n, l, d)}, for SDXL and SD3 "pooled" (n, p), for SDXL "time_ids".

        sizes: SDXL's size conditioning in pixels (`mmdit.text.size_ids`); that of the model's own size by default.
        t5_tokens: length for SD3's third encoder, 256 by default. clip_skip, prompt_syntax: as of a call. most_chunks:
        the number of chunks of 75 tokens after which a prompt with a syntax is cut off; None is none. A text that is
        too long for an encoder is a warning.
        """
        options = self._prompt_options(prompt_syntax, clip_skip, t5_tokens)._replace(most_chunks=most_chunks)
        rows = None
        if self.folder.is_sdxl:
            sizes = self.size_conditioning(self.size)[0] if sizes is None else sizes
            rows = np.tile(np.asarray(sizes, np.float32), (len(prompts), 1))
        return encode(self._prompts(t5_tokens, options.clip_skip), self.params, prompts, rows, options)

    def encode_image(self, image: UInt8[np.ndarray, "n h2 w2 3"]) -> Image:
        """Encode images as latents in the denoiser's units (the posterior's mean)."""
        return self._encode_image(self.params["vae"], jnp.asarray(image))

    def denoiser(
        self,
        prompt: str | Sequence[str],
        *,
        guidance: float | None = 1.0,
        negative_prompt: str | Sequence[str] | None = "",
    ) -> BoundDenoiser:
        """Return the denoiser (x_t, t) -> Prediction(x0, eps) of prompts, on which solvers and new ideas are built.

        guidance: 1 for the network alone, None for the model's own scale. The denoiser is compiled when it is first
        called. It is a tree whose leaves are parameters, conditioning and guidance, so it can be an argument of a
        jitted function. `lcm_jax.jit` compiles such a function as the library compiles its own programs:

            denoise = pipe.denoiser("red heart", guidance=4.0)
            x0 = lcm_jax.jit(lambda denoise, x, t: denoise(x, t).x0)(denoise, x, t)
        """
        prompts, negatives = pair_texts(prompt, negative_prompt, 1)
        guidance = self.settings(guidance=guidance).guidance
        guided, sizes = guidance != 1.0, self.size_conditioning(self.size) if self.folder.is_sdxl else (None, None)
        empty = negative_prompt is None or negative_prompt == ""
        cond, null = self.conditions(prompts, negatives, sizes, empty=empty, guided=guided)
        scale = jnp.float32(guidance)
        return BoundDenoiser(
            model=self.model, params=self.net_params, cond=cond, null=null, guidance=scale, guided=guided
        )

    def quantized(self, kind: str, part: str = "denoiser") -> Pipeline:
        """Return the same model with one part in 8 bits: "int8", "int8w" (kernels alone) or "fp8"; see `quantization`.

        part: "denoiser", "vae", or "text" for all text encoders (use int8w for T5, whose inputs have outliers).
        Parameters that were not used yet are rounded one at a time as they come from the file. Merge LoRAs before. The
        result draws, streams and evaluates; it cannot be saved. ValueError for an unknown part or kind.
        """
        check_part(part)
        if part in self.rounded:
            raise ValueError(f"the {part} is in {self.rounded[part]} already")
        transform, other = rounder(kind), copy.copy(self)
        other.params, other.rounded = Parameters(self.params.components), {**self.rounded, part: kind}
        names = {"denoiser": [self.folder.denoiser], "text": list(self.folder.prompts.modules), "vae": ["vae"]}
        for name in names[part]:
            other.params[name] = partial(_quantized, self.component(name), transform, kind)
        for program in ("_draw", "_encode_image"):  # are compiled otherwise
            other.__dict__.pop(program, None)
        return other

    def plain(self, what: str) -> None:
        """Raise ValueError if a component is quantized; `what` names the operation."""
        for part, kind in self.rounded.items():
            raise ValueError(f"the {part} is in {kind}, which {what} does not take: use the model as it was loaded")

    def save(self, path: str | Path, *, dtype: str | None = None, variant: str | None = None) -> None:
        """Write a diffusers folder that diffusers and `load` read. dtype: of the files; None keeps the parameters' own.

        variant: a part of the files' names such as "fp16", as hubs have that keep several precisions side by side.
        """
        self.plain("save")
        kind = None if dtype is None else named_dtype(dtype)
        save_folder(Path(path), replace(self.folder, components=self.params.components), dtype=kind, variant=variant)

    @property
    def networks(self) -> dict[str, Network]:
        """The networks that LoRA files adapt, by the components' names in such files."""
        return lora_networks(
            {
                name: (class_name(part.module), part.module.config, self.params[name])
                for name, part in self.folder.components.items()
            }
        )

    def add_lora(self, adapters: Mapping[str, Adapters], weight: float = 1.0) -> None:
        """Merge the adapters of some components, {"unet": ..., "text_encoder": ...}, times `weight`."""
        self.plain("add_lora")
        for name, tree in adapters.items():
            self.params[name] = merge(self.params[name], tree, weight)

    def _on_shift(self, shift: float | None, double: bool | None) -> tuple[LatentDiffusion, Spacing]:
        """Return the model and spacing with another shift of the noise levels than the folder's."""
        schedule = self.model.schedule
        if shift is None and double is None:
            return self.model, self.spacing
        if not isinstance(schedule, RectifiedFlow):
            raise ValueError(f"shift and double_shift are options of SD3, and this is a {self.folder.pipeline}")
        schedule = schedule if shift is None else RectifiedFlow(shift=real_number("shift", shift))
        spacing = self.spacing if double is None else replace(self.spacing, double_shift=double)
        return replace(self.model, schedule=schedule), spacing

    def _check_skip(self, layers: Sequence[int]) -> tuple[int, ...]:
        if self.folder.family != "sd3" or self.model.embeds_guidance:
            raise ValueError("skip_layers is an option of SD3 without a w-embedding: leave it out")
        depth = self.model.net.config.num_layers
        indices = tuple(layers) if isinstance(layers, Iterable) else (layers,)
        if any(i not in range(depth) for i in indices):
            raise ValueError(f"skip_layers={indices}: this model has the layers 0 to {depth - 1}")
        return indices

    def walk(
        self,
        model: LatentDiffusion,
        spec: Sampler,
        steps: int,
        rules: Spacing,
        strength: float,
        *,
        sigmas: Any = None,
        timesteps: Any = None,
        spacing: str | None = None,
    ) -> Walk:
        """Return the steps: LCM's pipeline spends all of them below the strength, the others drop the first ones.

        sigmas, timesteps, spacing: what places them in place of the folder's `rules` (`diffusion.samplers.walk`).
        """
        below = not spec.even or model.schedule.timesteps is None or self.folder.pipeline in LCM
        placed: dict[str, Any] = {"sigmas": sigmas, "timesteps": timesteps, "timestep_spacing": spacing}
        placed |= {"spacing": rules, "family": "sdxl" if self.folder.is_sdxl else "sd1"}
        walked = walk(spec, model.schedule, steps, strength=strength if below else 1.0, **placed)
        walked = walked if below else walked.last(len(truncate(walked.times, strength)) - 1)
        model.check_start(float(walked.times[0]))
        return walked

    def noise(self, key: Key, n: int, size: tuple[int, int], latents: Any = None) -> Image:
        """Return unit noise of the latents' shape, or the given latents; ValueError if those do not fit."""
        config = self.model.vae.config
        shape = (n, *(side // config.downsample_factor for side in size), config.latent_channels)
        try:
            noise = jax.random.normal(key, shape) if latents is None else jnp.asarray(latents, jnp.float32)
        except (TypeError, ValueError):
            raise ValueError(f"latents is a {type(latents).__name__}: give an array of shape {shape}") from None
        if noise.shape != shape:
            raise ValueError(f"latents have shape {noise.shape}; {shape} is needed for {n} pictures of this size")
        return noise

    def size_conditioning(self, size: tuple[int, int], **options: Any) -> tuple[Any, Any]:
        """Return SDXL's size conditioning (`size_pair`) for a prompt and its negative prompt; None for other models."""
        sdxl, refiner = self.folder.is_sdxl, self.folder.is_refiner
        for name, value in options.items():
            fits, whose = (refiner, "SDXL's refiner") if name == "aesthetic_score" else (sdxl, "SDXL")
            if value is not None and not fits:
                raise ValueError(f"{name} is an option of {whose}, and this is a {self.folder.pipeline}: leave it out")
            if value is not None:
                options[name] = (real_number if name == "aesthetic_score" else two_numbers)(name, value)
        return size_pair(size, refiner=refiner, **options) if sdxl else (None, None)

    def conditions(
        self,
        prompts: list[str],
        negatives: list[str],
        sizes: tuple[Any, Any],
        *,
        empty: bool,
        guided: bool,
        t5_tokens: int | None = None,
        most_chunks: int | None = None,
    ) -> tuple[Cond, Cond]:
        """Return the conditioning of the prompts and of the negative prompts.

        empty: no negative prompt was given. guided: without guidance the second is not computed. most_chunks: as for
        `encode_prompt`.
        """
        options = self._prompt_options(None, None, t5_tokens)._replace(most_chunks=most_chunks)
        check_prompts([*prompts, *negatives], options.syntax, None)
        return self._conditions(prompts, negatives, sizes, options, empty=empty, guided=guided)[:2]

    def _conditions(
        self,
        prompts: list[str],
        negatives: list[str],
        sizes: tuple[Any, Any],
        options: PromptOptions,
        *,
        empty: bool,
        guided: bool,
        steps: int = 1,
        given: dict[str, Array] | None = None,
        given_null: dict[str, Array] | None = None,
    ) -> Conditions:
        """Return the conditioning of a call. given, given_null: what stands in place of the texts, see `_given`."""
        texts = self._prompts(options.t5_tokens, options.clip_skip)
        plain = self._prompts(options.t5_tokens, None)  # of negative prompts no layer is skipped, as in diffusers
        zeros = empty and self.folder.zeros_for_empty_prompt
        if options.syntax is not None and given is None and given_null is None:
            parts = ((texts, plain), self.params, prompts, negatives, sizes, options)
            return weighted_conditions(*parts, zeros=zeros, guided=guided, steps=steps)

        def encoded(
            encoders: Prompts, prompts: list[str], leaves: dict[str, Array] | None, row: Any
        ) -> dict[str, Array]:
            rows = None if row is None else np.tile(np.asarray(row, np.float32), (len(prompts), 1))
            if leaves is not None:
                return leaves if rows is None else leaves | {"time_ids": jnp.asarray(rows)}
            return encode(encoders, self.params, prompts, rows, options)

        cond = encoded(texts, prompts, given, sizes[0])
        if not guided:
            return Conditions(cond, cond)
        if zeros and given_null is None:
            return Conditions(cond, zero_prompt(cond | {"time_ids": jnp.tile(sizes[1], (len(prompts), 1))}))
        null = encoded(plain, negatives, given_null, sizes[1])
        return same_length(cond, null, repeats=self.folder.family != "sd3")

    def check_prompt_options(self) -> None:
        """Raise ValueError for a `prompt_syntax` or `clip_skip` of this pipeline that does not fit its model."""
        self._prompt_options(None, None, None)

    def _prompt_options(self, syntax: str | None, clip_skip: int | None, t5_tokens: int | None) -> PromptOptions:
        """Return how the prompts of a call are read, checked against the model."""
        clip_skip = self.clip_skip if clip_skip is None else clip_skip
        clip_skip = None if clip_skip is None else whole_number("clip_skip", clip_skip)
        options = PromptOptions(self.prompt_syntax if syntax is None else syntax, clip_skip, t5_tokens)
        check_prompts([], options.syntax, None)
        self._prompts(t5_tokens, clip_skip)
        return options

    def _given(
        self, prompt: Any, embeds: Any, negative_prompt: Any, negative_embeds: Any, num_images: int
    ) -> tuple[dict[str, Array] | None, dict[str, Array] | None]:
        """Return the conditioning that was given in place of texts, one row for each picture; None for texts."""
        pair: list[dict[str, Array] | None] = []
        for name, value, text in (
            ("prompt_embeds", embeds, prompt),
            ("negative_prompt_embeds", negative_embeds, negative_prompt),
        ):
            if value is not None and text not in (None, ""):
                raise ValueError(f"{name} stands in place of {name.removesuffix('_embeds')}: give one of them")
            leaves = None if value is None else given_embeds(name, value, self._prompts(None, None))
            pair.append(None if leaves is None else {n: jnp.repeat(a, num_images, axis=0) for n, a in leaves.items()})
        given, null = pair
        rows = None if given is None else len(given["context"])
        if rows is None and null is not None and prompt is not None:
            rows = len(pair_texts(prompt, "", num_images)[0])
        if null is not None and rows is not None and len(null["context"]) != rows:
            if len(null["context"]) != num_images:
                count = len(null["context"]) // num_images
                raise ValueError(f"negative_prompt_embeds has {count} rows, and there are {rows // num_images} prompts")
            null = {n: jnp.repeat(a[:1], rows, axis=0) for n, a in null.items()}
        return given, null

    def check_size(self, size: int | Sequence[int] | None) -> tuple[int, int]:
        """Return a size in pixels that fits the network's patches and position grid; ValueError for another."""
        config = self.model.net.config
        factor = self.model.vae.config.downsample_factor * getattr(config, "patch_size", 1)
        return check_size(self.size if size is None else size, factor, getattr(config, "pos_embed_max_size", None))

    def check_memory(self, size: tuple[int, int], number: int = 1) -> None:
        """Raise ValueError, before anything is compiled, if pictures of a size can never fit into the device's memory.

        The estimate is a lower bound: what enters and leaves one layer of the network for all `number` pictures, and
        the last layers of the decoder for one of them.
        """
        available = memory_of(jax.devices()[0] if self.mesh is None else self.mesh.local_devices[0])
        net, vae = self.model.net, self.model.vae
        pixels = math.prod(size)
        decoder = sum(getattr(vae.config, "block_out_channels", ())[:2]) * pixels * _itemsize(vae)
        blocks = getattr(net.config, "block_out_channels", None)
        heads = [getattr(net.config, name, 0) for name in ("num_attention_heads", "attention_head_dim")]
        width = blocks[0] if blocks else math.prod(heads) if all(isinstance(n, int) for n in heads) else 0
        tokens = pixels // (vae.config.downsample_factor * getattr(net.config, "patch_size", 1)) ** 2
        network = 2 * number * tokens * width * _itemsize(net) // (1 if self.mesh is None else self.mesh.size)
        needed = max(decoder, network)
        if available is not None and needed > available:
            pictures = "a picture" if number == 1 else f"{number} pictures"
            advice = "give a smaller size" if decoder > available or number == 1 else "give fewer pictures at a time"
            raise ValueError(
                f"size {size[0]}x{size[1]}: {pictures} of it would need more than {needed / GIB:.0f} GiB, and "
                f"{jax.devices()[0].device_kind} has {available / GIB:.0f} GiB: {advice}"
            )

    @cached_property
    def _draw(self) -> Any:
        mesh, options = self.mesh, compiler_options(low_precision=is_low_precision(self.net_params, self.params["vae"]))

        @partial(jax.jit, static_argnames=("model", "sampler", "guided"), compiler_options=options)
        def draw(
            net: Params, vae: Params, cond: Cond, null: Cond, x: Image, grid: Grid, guidance: Array, key: Key,
            skip: SkipLayers | None, inpaint_target: InpaintTarget | None, parts: Array | None,
            *, model: LatentDiffusion, sampler: Sampler, guided: bool,
        ) -> Array:  # fmt: skip
            options: dict[str, Any] = {"sampler": sampler, "guided": guided, "skip": skip}
            options |= {"inpaint_target": inpaint_target, "parts": parts}
            with contextlib.nullcontext() if mesh is None else constrain_batch_sharding(mesh):
                return model.decode(vae, model.latents(net, cond, null, x, grid, guidance, key, **options))

        return draw

    @cached_property
    def _prompts(self) -> Callable[[int | None, int | None], Prompts]:
        """The text encoders for a number of T5's tokens and a clip_skip; compiled once for each pair."""
        return cache(lambda t5, clip_skip: replace(self.folder.prompts, t5_tokens=t5, clip_skip=clip_skip))

    @cached_property
    def _encode_image(self) -> Any:
        options = compiler_options(low_precision=is_low_precision(self.params["vae"]))
        return jax.jit(self.model.encode, compiler_options=options)


CALL_OPTIONS = tuple(inspect.signature(Pipeline.__call__).parameters)[1:-1]  # without self and unknown


def _quantized(part: Component, transform: Callable[[str, Array], Any], kind: str) -> Quantized:
    return Quantized(params=part.map_params(transform), kind=kind)


def _precision(pipe: Pipeline) -> str:
    name = jnp.dtype(getattr(pipe.model.net, "dtype", jnp.float32)).name
    return pipe.rounded.get("denoiser", name)


def _itemsize(module: Any) -> int:
    """Return the bytes of a number that a network computes with; the least that there are if it does not say."""
    return jnp.dtype(getattr(module, "dtype", jnp.bfloat16)).itemsize
