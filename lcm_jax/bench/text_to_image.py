"""The cases of complete pictures: text-to-image, and image-to-image in one step as a stream draws."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lcm_jax.bench import models, peers
from lcm_jax.bench.measure import Cost, Row, flops_of
from lcm_jax.bench.networks import Options, Titled
from lcm_jax.inference.pipeline import Pipeline
from lcm_jax.metrics import psnr
from lcm_jax.models.latent_diffusion import LatentDiffusion, as_apply
from lcm_jax.precision.quantization import PARTS
from lcm_jax.stream import Stream

PROMPT = "red heart"


def text_to_image(options: Options) -> Iterator[Titled]:
    """Yield the rows of four steps of LCM, from the prompt to uint8 pictures.

    SD1.5 draws 512 x 512 pixels, SDXL and SD3-medium 1024 x 1024; SD3-medium takes Euler's steps.
    """
    slow = jax.default_backend() == "cpu" and options.scale == "full"
    for name in options.geometries("text-to-image"):
        pipe = models.pipeline(name, options.dtype, scale=options.scale)
        sampler = "euler" if name == "sd3" else "lcm"
        batches = options.batches or ((1,) if slow else (1, 4, 16))
        theirs = None
        if options.peer:
            theirs = peers.pipeline(pipe, options.dtype, options.peer)
        rows: list[Row] = []
        for n in batches:
            ours = pictures(f"{name}, batch {n}", pipe, n, sampler)
            if theirs is not None:
                peer = _theirs(f"diffusers, {name}, batch {n}", theirs, n, pipe.size)
                rows += [peer, replace(ours, against=peer.name)]
            else:
                rows.append(ours)
            if options.quantize:
                rows.append(_quantized(ours, pipe, options.quantize, n, sampler))
        yield f"Text to image, {name} at {pipe.size[0]}x{pipe.size[1]}, 4 steps without guidance", rows
        del pipe, theirs, rows


def pictures(name: str, pipe: Pipeline, n: int, sampler: str, *, steps: int = 4) -> Row:
    """Return a row of a pipeline's call for n pictures; its FLOPs are those of the steps and of the decoder."""

    def draw() -> Any:
        return pipe([PROMPT] * n, steps=steps, sampler=sampler, guidance=1.0)

    def prepare() -> Cost:
        return Cost(flops=steps * step_flops(pipe, n) + decode_flops(pipe.model, pipe, n))

    return Row(name=name, run=draw, prepare=prepare, frames=n)


def _quantized(plain: Row, pipe: Pipeline, kinds: Mapping[str, str], n: int, sampler: str) -> Row:
    """Return a row of the same pictures with some parts in 8 bits; its note is the PSNR against the plain ones."""
    name = ", ".join([plain.name, *(kind if part == PARTS[0] else f"{part} {kind}" for part, kind in kinds.items())])
    for part, kind in kinds.items():
        pipe = pipe.quantized(kind, part)
    row = pictures(name, pipe, n, sampler)

    def similarity() -> str:
        return f"PSNR {float(psnr(row.run(), plain.run(), data_range=255).mean()):.1f} dB"

    return replace(row, prepare=plain.prepare, against=plain.name, note=similarity)


def step_flops(pipe: Pipeline, n: int) -> float:
    """Return the FLOPs of one evaluation of the denoiser for n pictures of the pipeline's size."""
    cond = {key: jnp.repeat(leaf, n, axis=0) for key, leaf in pipe.encode_prompt([PROMPT]).items()}
    x, t = jax.ShapeDtypeStruct((n, *_latents(pipe)), jnp.float32), jax.ShapeDtypeStruct((n,), jnp.float32)
    return flops_of(as_apply(pipe.model.net), pipe.net_params, x, t, cond)


def decode_flops(model: LatentDiffusion, pipe: Pipeline, n: int) -> float:
    """Return the FLOPs of decoding n pictures."""
    latents = jax.ShapeDtypeStruct((n, *_latents(pipe)), jnp.float32)
    return flops_of(model.decode, pipe.params["vae"], latents)


def encode_flops(model: LatentDiffusion, pipe: Pipeline, n: int) -> float:
    """Return the FLOPs of encoding n pictures."""
    return flops_of(model.encode, pipe.params["vae"], jax.ShapeDtypeStruct((n, *pipe.size, 3), jnp.uint8))


def _latents(pipe: Pipeline) -> tuple[int, int, int]:
    config = pipe.model.vae.config
    height, width = (side // config.downsample_factor for side in pipe.size)
    return height, width, config.latent_channels


def _theirs(name: str, pipe: Any, n: int, size: tuple[int, int]) -> Row:
    options = {"num_inference_steps": 4, "guidance_scale": 1.0, "height": size[0], "width": size[1]}
    return peers.row(name, lambda: pipe([PROMPT] * n, output_type="np", **options), frames=n)


def realtime(options: Options) -> Iterator[Titled]:
    """Yield the rows of image-to-image in one step, with SD-Turbo's geometry and TAESD.

    Frames are sent one after another, where each call waits for its picture, or pipelined, two ahead; single, and in
    buffers of 12. StreamDiffusion (arXiv:2312.12491) has 93.9 frames a second on an RTX 4090, about 150 in buffers of
    12.
    """
    pipe = models.pipeline("sd-turbo", options.dtype, scale=options.scale, taesd=True)
    rows = []
    for frames in options.batches or (1, 12):
        stream = Stream(pipe, PROMPT, steps=1, strength=0.6, frames=frames)
        shape = (frames, *pipe.size, 3) if frames > 1 else (*pipe.size, 3)
        scene = list(np.random.default_rng(0).integers(0, 256, (4, *shape), np.uint8))
        flops = step_flops(pipe, frames) + decode_flops(pipe.model, pipe, frames)
        flops += encode_flops(pipe.model, pipe, frames)
        calls = 32 if options.scale == "full" and jax.default_backend() != "cpu" else 2
        for name, draw in (("one after another", _awaited), ("pipelined", _pipelined)):
            rows.append(
                Row(
                    name=f"buffers of {frames}, {name}" if frames > 1 else f"single frames, {name}",
                    run=_repeat(draw, stream, scene, calls),
                    prepare=partial(Cost, calls * flops),
                    frames=frames * calls,
                )
            )
    yield f"Image to image in real time, sd-turbo with TAESD at {pipe.size[0]}x{pipe.size[1]}, 1 step", rows


def _repeat(draw: Callable[..., None], stream: Stream, scene: list[np.ndarray], calls: int) -> Callable[[], None]:
    return lambda: draw(stream, [scene[i % len(scene)] for i in range(calls)])


def _awaited(stream: Stream, frames: list[np.ndarray]) -> None:
    for frame in frames:
        stream(frame)


def _pipelined(stream: Stream, frames: list[np.ndarray]) -> None:
    for _ in stream.map(frames, ahead=2):
        pass
