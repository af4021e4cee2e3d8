"""Published tables, measured on this machine; each table is one command.

    python experiments/bench/tables.py lcm-lora    batches x steps with LCM-LoRA, and 25 steps without it
    python experiments/bench/tables.py stream      StreamDiffusion's tables 1 to 3 (2312.12491)
    python experiments/bench/tables.py training    samples a second of LCM and LCM-LoRA, by batch

    [--model openmoji | random-sd15 | random-sdxl | random-sd-turbo] [--dtype bfloat16] [--batch 1 4 16] [--side 512]
    [--repeats 5] [--json experiments/results/bench/FILE.json]

openmoji runs on any machine; random-sdxl and the others are the published geometries and need an accelerator.
Published: huggingface.co/blog/lcm_lora (SDXL at 1024, 4 steps: 0.7 s on an RTX 4090, 1.2 s on an A100, where 25 steps
take 3.4 and 3.8), and StreamDiffusion's on an RTX 4090 (table 1: 10.7, 16.7, 26.9 and 62.0 ms at 1, 2, 4 and 10 steps;
table 2, 5 steps: full guidance 64.6 ms, self-negative 31.5, onetime-negative 36.0).
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from lcm_jax.bench import PEERS, SCALES, Options, Row, peers, report
from lcm_jax.bench.models import PREFIX
from lcm_jax.bench.networks import Titled
from lcm_jax.bench.stream import moving_scene, open_model, peer_rows, with_tiny_vae
from lcm_jax.bench.text_to_image import PROMPT, pictures
from lcm_jax.bench.training import steps as training_steps
from lcm_jax.inference.loading import load
from lcm_jax.inference.pipeline import Pipeline
from lcm_jax.runtime.cache import use_compilation_cache
from lcm_jax.stream import Stream

STEPS, FRAMES = (1, 2, 4, 8), 10


def lcm_lora(options: Options) -> Iterator[Titled]:
    """Yield the rows of a batch in 1, 2, 4 and 8 steps with LCM-LoRA, and in 25 guided steps of Euler without it."""
    if options.model == "openmoji":
        teacher = load("openmoji-teacher", dtype=options.dtype)
        fast = load("openmoji-teacher", dtype=options.dtype, lora="openmoji-lcm-lora")
    else:
        teacher = fast = open_model(options)
    for n in options.batches or (1, 4, 16):
        plain = f"25 steps, Euler, batch {n}"

        def slow(n: int = n) -> Any:
            return teacher([PROMPT] * n, steps=25, sampler="euler", guidance=7.5)

        rows = [Row(name=plain, run=slow, frames=n)]
        for steps in STEPS:
            row = pictures(f"{steps} steps, LCM, batch {n}", fast, n, "lcm", steps=steps)
            rows.append(Row(name=row.name, run=row.run, prepare=row.prepare, frames=n, against=plain))
        yield f"LCM-LoRA, {options.model}, batch {n}", rows


def stream(options: Options) -> Iterator[Titled]:
    """Yield the rows of StreamDiffusion's tables: 1 with --against diffusers, 2 (guidance) and 3 (each part's gain).

    The autoencoder is a tiny one, as in the paper; its weights are random.
    """
    full_pipe = open_model(options)
    size = full_pipe.check_size(None if options.side is None else (options.side, options.side))
    frames = 2 if options.model.startswith(PREFIX) else FRAMES
    if options.peer:
        theirs = peers.pipeline(full_pipe, options.dtype, options.peer, auto="image-to-image")
        yield peer_rows(full_pipe, theirs, size, frames=frames)
    tiny, scene = with_tiny_vae(full_pipe), moving_scene(size, frames)

    def row(name: str, pipe: Pipeline, against: str | None = None, **controls: Any) -> Row:
        redraw = Stream(pipe, PROMPT, size=size, **({"strength": 0.8} | controls))

        def run() -> Any:
            return [redraw(picture) for picture in scene]

        return Row(name=name, run=run, frames=frames, against=against)

    for n in (1, 2, 3, 4, 5):
        full = f"full, {n} steps"
        rows = [row(full, tiny, guidance="full", scale=1.4, steps=n)]
        for mode in ("self", "onetime"):
            rows.append(row(f"{mode}, {n} steps", tiny, full, guidance=mode, scale=1.4, steps=n))
        yield f"Table 2: guidance, {n} steps", rows
    complete = "stream batch, tiny autoencoder"
    yield (
        "Table 3: 4 steps",
        [
            row(complete, tiny, steps=4),
            row("one step after another", tiny, complete, steps=4, batch=False),
            row("KL autoencoder", full_pipe, complete, steps=4),
        ],
    )


def training(options: Options) -> Iterator[Titled]:
    """Yield the rows of a training step of all weights, and of a LoRA of rank 64."""
    return training_steps(replace(options, batches=options.batches or (1, 4, 16)))


def main() -> None:
    """Measure the table that the command line names; bad input is one line on standard error and exit code 2."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    tables = {"lcm-lora": lcm_lora, "stream": stream, "training": training}
    parser.add_argument("table", choices=tables)
    parser.add_argument("--model", default="openmoji")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--scale", default="full", choices=SCALES)
    parser.add_argument("--against", choices=PEERS)
    parser.add_argument("--batch", type=int, nargs="+", default=[])
    parser.add_argument("--side", type=int)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    use_compilation_cache()
    options = Options(
        model=arguments.model,
        dtype=arguments.dtype,
        scale=arguments.scale,
        peer=arguments.against,
        batches=tuple(arguments.batch),
        side=arguments.side,
    )
    try:
        report(tables[arguments.table](options), options, repeats=arguments.repeats, out=arguments.json)
    except (ValueError, OSError, ModuleNotFoundError) as error:
        parser.exit(2, f"tables.py: {error}\n")


if __name__ == "__main__":
    main()
