"""`lcm-jax bench`: how long things take, measured side by side in one process; medians, spreads and ratios.

A case is a list of rows, each a function without arguments that ends when its result is there. Rows of one case are run
in turns, so that what else the machine does falls on all of them alike, and their ratios can be believed.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import date
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image as PILImage

from lcm_jax.pipeline import Pipeline
from lcm_jax.stream import Stream
from lcm_jax.weights.files import write_json
from vae16 import AutoencoderTiny, TinyConfig


@dataclass(frozen=True, kw_only=True)
class Row:
    """Something that is timed. frames: pictures that one run makes. against: the row it is a ratio to."""

    name: str
    run: Callable[[], Any]
    frames: int = 1
    against: str | None = None
    note: Callable[[], str] = lambda: ""  # asked for after the runs


@dataclass(kw_only=True)
class Result:
    """Of a row: seconds of each run, and of the first, which compiles."""

    row: Row
    first: float
    seconds: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return float(np.median(self.seconds))

    @property
    def spread(self) -> tuple[float, float]:
        """The quartiles."""
        low, high = np.quantile(self.seconds, [0.25, 0.75])
        return float(low), float(high)


def measure(rows: Sequence[Row], repeats: int) -> dict[str, Result]:
    """Every row once, which compiles it, once more, and then `repeats` times in turns."""
    results = {row.name: Result(row=row, first=_timed(row.run)) for row in rows}
    for row in rows:
        row.run()
    for _ in range(repeats):
        for row in rows:
            results[row.name].seconds.append(_timed(row.run))
    return results


def _timed(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - start


def table(results: Mapping[str, Result]) -> str:
    """One line for each row: frames a second, milliseconds a frame with quartiles, ratio, first run."""
    lines = [
        "| | frames/s | ms/frame | quartiles | ratio | first, s | |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, result in results.items():
        each = 1e3 / result.row.frames
        low, high = result.spread
        base = results.get(result.row.against or "")
        ratio = "" if base is None else f"{_frame(base) / _frame(result):.2f}x {result.row.against}"
        lines.append(
            f"| {name} | {1.0 / _frame(result):.1f} | {result.median * each:.1f} | {low * each:.1f}-{high * each:.1f} "
            f"| {ratio} | {result.first:.1f} | {result.row.note()} |"
        )
    return "\n".join(lines)


def _frame(result: Result) -> float:
    return result.median / result.row.frames


def stream_rows(pipe: Pipeline, *, steps: int = 5, frames: int = 10) -> Iterator[tuple[str, list[Row]]]:
    """The stream's cases: (title, rows). StreamDiffusion's tables 1-3 in small (2312.12491)."""
    scene = moving_scene(pipe.size, frames)

    def over(stream: Stream, pictures: Sequence[np.ndarray] = scene) -> Callable[[], Any]:
        return lambda: [stream(picture) for picture in pictures]

    def made(**controls: Any) -> Stream:
        return Stream(pipe, "red heart", **({"steps": steps, "strength": 0.8} | controls))

    rows = []
    for n in (1, 2, 4):
        alone = f"{n} steps, one by one"
        rows.append(Row(name=alone, run=over(made(steps=n, batch=False)), frames=frames))
        rows.append(Row(name=f"{n} steps, stream batch", run=over(made(steps=n)), frames=frames, against=alone))
    yield "Stream batch", rows

    modes = {name: made(guidance=name, scale=1.4) for name in ("full", "self", "onetime", "none")}
    yield (
        f"Guidance, {steps} steps",
        [
            Row(name=name, run=over(stream), frames=frames, against=None if name == "full" else "full")
            for name, stream in modes.items()
        ],
    )

    still = [scene[0]] * 20
    plain, filtered = made(steps=2), made(steps=2, similarity=0.98)

    def saved() -> str:
        return "" if filtered.filter is None else f"{100 * filtered.filter.saved:.0f} % left out"

    yield (
        "A still scene of 20 frames",
        [
            Row(name="no filter", run=over(plain, still), frames=20),
            Row(name="similarity filter", run=over(filtered, still), frames=20, against="no filter", note=saved),
        ],
    )

    tiny = with_tiny_vae(pipe)
    small = Stream(tiny, "red heart", steps=2, strength=0.8)
    yield (
        "Autoencoder, 2 steps",
        [
            Row(name="KL", run=over(plain), frames=frames),
            Row(name="tiny", run=over(small), frames=frames, against="KL", note=lambda: "random weights"),
        ],
    )


def peer_rows(pipe: Pipeline, *, frames: int = 10) -> Iterator[tuple[str, list[Row]]]:
    """A stream against diffusers' AutoPipelineForImage2Image, LCM, on the same weights (2312.12491, table 1)."""
    peer = _diffusers(pipe)
    scene, guidance = moving_scene(pipe.size, frames), 4.0
    embeds, _ = peer.encode_prompt("red heart", "cpu", 1, False)

    def theirs(steps: int) -> Callable[[], Any]:
        pictures = [PILImage.fromarray(picture) for picture in scene]
        options = {"prompt_embeds": embeds, "strength": 1.0, "guidance_scale": guidance, "output_type": "np"}
        return lambda: [peer(image=one, num_inference_steps=steps, **options).images for one in pictures]

    rows = []
    for n in (1, 2, 4, 10):
        stream = Stream(pipe, "red heart", steps=n, strength=1.0, scale=guidance)
        rows.append(Row(name=f"diffusers, {n} steps", run=theirs(n), frames=frames))

        def ours(stream: Stream = stream) -> Any:
            return [stream(picture) for picture in scene]

        rows.append(Row(name=f"stream, {n} steps", run=ours, frames=frames, against=f"diffusers, {n} steps"))
    yield "Against diffusers", rows


def _diffusers(pipe: Pipeline) -> Any:
    """The pipeline in diffusers, image-to-image with LCM's scheduler."""
    import torch
    from diffusers import AutoPipelineForImage2Image, LCMScheduler

    with tempfile.TemporaryDirectory() as folder:
        pipe.save(folder)
        options = {"torch_dtype": torch.float32, "safety_checker": None, "requires_safety_checker": False}
        peer = AutoPipelineForImage2Image.from_pretrained(folder, **options)
    peer.scheduler = LCMScheduler.from_config(peer.scheduler.config)
    peer.set_progress_bar_config(disable=True)
    return peer


def moving_scene(size: tuple[int, int], frames: int) -> list[np.ndarray]:
    """A disc that crosses a white picture."""
    height, width = size
    y, x = np.mgrid[:height, :width]
    scene = []
    for i in range(frames):
        disc = (y - height / 2) ** 2 + (x - width * (i + 0.5) / frames) ** 2 < (min(size) / 4) ** 2
        scene.append(np.where(disc[..., None], [220, 60, 40], [255] * 3).astype(np.uint8))
    return scene


def with_tiny_vae(pipe: Pipeline) -> Pipeline:
    """The pipeline with a tiny autoencoder of its geometry and random weights: for its speed alone."""
    config = pipe.generator.vae.config
    levels = config.downsample_factor.bit_length()
    tiny = AutoencoderTiny(
        TinyConfig(
            latent_channels=config.latent_channels,
            encoder_block_out_channels=(64,) * levels,
            decoder_block_out_channels=(64,) * levels,
            num_encoder_blocks=(1, *(3,) * (levels - 1)),
            num_decoder_blocks=(*(3,) * (levels - 1), 1),
        )
    )
    pixels = jnp.zeros((1, *pipe.size, 3))
    params = jax.jit(tiny.init)(jax.random.key(0), pixels)["params"]
    folder = pipe.folder
    components = {**folder.components, "vae": type(pipe.component("vae"))(tiny, params)}
    return Pipeline(replace(folder, components=components))


Case = Callable[[Pipeline], Iterator[tuple[str, list[Row]]]]
CASES: Mapping[str, Case] = {"stream": stream_rows}
AGAINST: Mapping[str, Mapping[str, Case]] = {"diffusers": {"stream": peer_rows}}


def run(
    pipe: Pipeline, cases: Sequence[str], *, repeats: int, out: Path | None, model: str, against: str | None = None
) -> None:
    """Print the tables of some cases, and write every time, with device, versions and date, to a JSON file.

    against: a peer that runs in turns with the case instead, on the same weights.
    """
    known = CASES if against is None else AGAINST[against]
    unknown = [case for case in cases if case not in known]
    if unknown:
        raise ValueError(f"bench {unknown[0]}: no such case; known are {', '.join(known)}")
    if repeats < 1:
        raise ValueError(f"--repeats {repeats}: it must be at least 1")
    device = jax.devices()[0].device_kind
    print(f"{model} at {pipe.size[0]}x{pipe.size[1]}, {device}, jax {jax.__version__}, {date.today()}")
    kept: dict[str, Any] = {"model": model, "device": device, "jax": jax.__version__, "date": str(date.today())}
    for case in cases:
        for title, rows in known[case](pipe):
            results = measure(rows, repeats)
            print(f"\n## {title}\n\n{table(results)}", flush=True)
            kept[title] = {
                name: {"frames": r.row.frames, "first": r.first, "seconds": r.seconds} for name, r in results.items()
            }
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_json(out, kept)
