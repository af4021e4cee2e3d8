"""The cases of a stream: StreamDiffusion's tables 1 to 3 at a small scale (arXiv:2312.12491)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image as PILImage

from lcm_jax.bench import models, peers
from lcm_jax.bench.measure import Row
from lcm_jax.bench.networks import Options, Titled
from lcm_jax.inference.loading import load
from lcm_jax.inference.pipeline import Pipeline
from lcm_jax.stream import Stream
from vae16 import AutoencoderTiny, TinyConfig


def stream(options: Options) -> Iterator[Titled]:
    """Yield the rows of stream batch, guidance, filter and autoencoder.

    With a peer the only rows are those against its image-to-image, at 1, 2, 4 and 10 steps.
    """
    pipe = open_model(options)
    size = pipe.check_size(None if options.side is None else (options.side, options.side))
    frames = 2 if options.model.startswith(models.PREFIX) else 10
    if options.peer:
        theirs = peers.pipeline(pipe, options.dtype, options.peer, auto="image-to-image")
        yield peer_rows(pipe, theirs, size, frames=frames)
        return
    yield from stream_rows(pipe, size, frames=frames)


def open_model(options: Options) -> Pipeline:
    """Return the model of the options: one with random weights ("random-sd15"), or one that `load` finds."""
    if options.model.startswith(models.PREFIX):
        return models.pipeline(options.model.removeprefix(models.PREFIX), options.dtype, scale=options.scale)
    return load(options.model, dtype=options.dtype)


def stream_rows(pipe: Pipeline, size: tuple[int, int], *, steps: int = 5, frames: int = 10) -> Iterator[Titled]:
    """Yield the rows of a stream without a peer: stream batch, guidance, filter, autoencoder."""
    scene = moving_scene(size, frames)

    def run_over(stream: Stream, pictures: Sequence[np.ndarray] = scene) -> Callable[[], Any]:
        return lambda: [stream(picture) for picture in pictures]

    tiny = with_tiny_vae(pipe)

    def make_stream(model: Pipeline = pipe, **controls: Any) -> Stream:
        return Stream(model, "red heart", size=size, **({"steps": steps, "strength": 0.8} | controls))

    rows = []
    for n in (1, 2, 4):
        sequential = f"{n} steps, one by one"
        rows.append(Row(name=sequential, run=run_over(make_stream(steps=n, batch=False)), frames=frames))
        rows.append(
            Row(name=f"{n} steps, stream batch", run=run_over(make_stream(steps=n)), frames=frames, against=sequential)
        )
    yield "Stream batch", rows

    modes = {name: make_stream(tiny, guidance=name, scale=1.4) for name in ("full", "self", "onetime", "none")}
    yield (
        f"Guidance, {steps} steps, tiny autoencoder",
        [
            Row(name=name, run=run_over(stream), frames=frames, against=None if name == "full" else "full")
            for name, stream in modes.items()
        ],
    )

    still = [scene[0]] * 20
    plain, filtered = make_stream(steps=2), make_stream(steps=2, similarity=0.98)

    def saved() -> str:
        return "" if filtered.filter is None else f"{100 * filtered.filter.saved:.0f} % left out"

    yield (
        "A still scene of 20 frames",
        [
            Row(name="no filter", run=run_over(plain, still), frames=20),
            Row(name="similarity filter", run=run_over(filtered, still), frames=20, against="no filter", note=saved),
        ],
    )

    small = make_stream(tiny, steps=2)
    yield (
        "Autoencoder, 2 steps",
        [
            Row(name="KL", run=run_over(plain), frames=frames),
            Row(name="tiny", run=run_over(small), frames=frames, against="KL", note=lambda: "random weights"),
        ],
    )


def peer_rows(pipe: Pipeline, peer: Any, size: tuple[int, int], *, frames: int) -> Titled:
    """Return the rows of a stream against AutoPipelineForImage2Image with LCM's scheduler, from pure noise.

    This is table 1 of arXiv:2312.12491. The guidance scale is 4 for a student that has it as an input; other models are
    not guided.
    """
    scene = moving_scene(size, frames)
    guidance = 4.0 if pipe.model.embeds_guidance else 1.0

    def theirs(steps: int) -> Callable[[], Any]:
        pictures = [PILImage.fromarray(picture) for picture in scene]
        options = {"strength": 1.0, "guidance_scale": guidance, "output_type": "np", "num_inference_steps": steps}
        return lambda: [peer("red heart", image=picture, **options) for picture in pictures]

    rows = []
    for n in (1, 2, 4, 10):
        stream = Stream(pipe, "red heart", size=size, steps=n, strength=1.0, scale=guidance)
        rows.append(peers.row(f"diffusers, {n} steps", theirs(n), frames=frames))

        def ours(stream: Stream = stream) -> Any:
            return [stream(picture) for picture in scene]

        rows.append(Row(name=f"stream, {n} steps", run=ours, frames=frames, against=f"diffusers, {n} steps"))
    return "Against diffusers", rows


def moving_scene(size: tuple[int, int], frames: int) -> list[np.ndarray]:
    """Return frames (h, w, 3) of uint8 in which a disc crosses a white picture."""
    height, width = size
    y, x = np.mgrid[:height, :width]
    scene = []
    for i in range(frames):
        disc = (y - height / 2) ** 2 + (x - width * (i + 0.5) / frames) ** 2 < (min(size) / 4) ** 2
        scene.append(np.where(disc[..., None], [220, 60, 40], [255] * 3).astype(np.uint8))
    return scene


def with_tiny_vae(pipe: Pipeline) -> Pipeline:
    """Return the pipeline with a tiny autoencoder of its geometry and random weights, to measure its speed only."""
    config: Any = pipe.model.vae.config
    levels = config.downsample_factor.bit_length()
    width = min(config.block_out_channels[0], 64)  # TAESD's width, but not wider than the autoencoder
    tiny = AutoencoderTiny(
        TinyConfig(
            latent_channels=config.latent_channels,
            encoder_block_out_channels=(width,) * levels,
            decoder_block_out_channels=(width,) * levels,
            num_encoder_blocks=(1, *(3,) * (levels - 1)),
            num_decoder_blocks=(*(3,) * (levels - 1), 1),
        )
    )
    pixels = jnp.zeros((1, *pipe.size, 3))
    params = jax.jit(tiny.init)(jax.random.key(0), pixels)["params"]
    folder = pipe.folder
    components = {**folder.components, "vae": type(pipe.component("vae"))(tiny, params)}
    return Pipeline(replace(folder, components=components))
