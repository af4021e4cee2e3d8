"""The command line: lcm-jax demo, sample, compile, train, distill, encode, evaluate, plan, stream, serve, ..."""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from PIL import Image as PILImage
from PIL import UnidentifiedImageError

from lcm_jax import bench, demo, quantization
from lcm_jax.convert import FORMATS, LORAS, convert, convert_lora
from lcm_jax.evaluate import ClipMetric, captioned, evaluate, reconstruct, reconstruction, spread
from lcm_jax.exported import PLATFORMS, Exported, write_program
from lcm_jax.extras import require
from lcm_jax.metrics.inception import inception_features
from lcm_jax.overrides import override
from lcm_jax.pipeline import DTYPES, Pipeline, load
from lcm_jax.places import use_compilation_cache
from lcm_jax.sampling import SAMPLERS
from lcm_jax.train import distributed
from lcm_jax.train.sharding import make_mesh


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; bad input is one line on standard error and exit code 2."""
    if argv is None:  # a process of its own: what the imports have made stays, and need not be looked through again
        gc.freeze()
        gc.set_threshold(50_000, 20, 20)
    use_compilation_cache()
    arguments, rest = _parser().parse_known_args(argv)
    try:
        if rest and arguments.run not in (_train, _plan):
            raise ValueError(f"unknown argument {rest[0]}; see lcm-jax {arguments.command} --help")
        if "coordinator" in arguments:
            job = (arguments.coordinator, arguments.processes, arguments.process)
            distributed.initialize(*job, timeout=arguments.peer_timeout)
        arguments.run(arguments, rest)
    except distributed.Preempted:
        code = 0
    except (ValueError, OSError, FloatingPointError, ModuleNotFoundError, jax.errors.JaxRuntimeError) as error:
        said = distributed.explain(error) or error
        if os.environ.get("LCM_JAX_TRACEBACK") or (said is error and isinstance(error, jax.errors.JaxRuntimeError)):
            raise
        print(f"lcm-jax: {' '.join(str(said).split())}", file=sys.stderr)
        code = 2
    else:
        code = 0
    distributed.end(code)
    return code


class _Help(argparse.Action):
    """--help of a command, unless a config was named: then its keys are asked for."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: Any, values: Any, option: str | None = None) -> None:
        if namespace.config is None:
            parser.print_help()
            parser.exit()
        namespace.help = True


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="lcm-jax", description="Latent consistency models in JAX.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, run: Callable[..., None], text: str, **options: Any) -> argparse.ArgumentParser:
        formatter = argparse.ArgumentDefaultsHelpFormatter
        sub = commands.add_parser(name, help=text, description=text, formatter_class=formatter, **options)
        sub.set_defaults(run=run)
        return sub

    sub = command("demo", _demo, "Teacher, LCM and LCM-LoRA side by side: a grid, a table, a JSON file.")
    sub.add_argument("--out", type=Path, default=Path("out/demo"), help="folder to write to")
    sub.add_argument("--model", default="openmoji", help="bundled model")
    sub.add_argument("--guidance", type=float, default=demo.GUIDANCE, help="guidance scale of teacher and student")
    sub.add_argument("--seed", type=int, default=0, help="seed of the noise")

    sub = command("sample", _sample, "Draw pictures of prompts.")
    _add_model(sub)
    sub.add_argument("--prompt", nargs="+", required=True, help="one or more texts")
    sub.add_argument("--negative-prompt", default="", help="what not to draw")
    sub.add_argument("--steps", type=int, default=4, help="solver steps")
    sub.add_argument("--seed", type=int, default=0, help="seed of the noise")
    sub.add_argument("--num-images", type=int, default=1, help="pictures for each prompt")
    sub.add_argument("--size", type=int, nargs=2, metavar=("H", "W"), help="pixels; the model's own by default")
    sub.add_argument("--image", type=Path, help="start from this picture (image-to-image)")
    sub.add_argument("--strength", type=float, help="how far it is noised, in (0, 1]; 0.6, or 1 with a mask")
    sub.add_argument("--mask", type=Path, help="redraw only where this picture is white (inpainting)")
    sub.add_argument("--t5-tokens", type=int, help="SD3: length of a prompt for T5; 256 by default")
    sub.add_argument("--shift", type=float, help="SD3: shift of the noise levels; the model's own by default")
    sub.add_argument("--single-shift", action="store_true", help="SD3: shift once, not twice as the references do")
    sub.add_argument("--skip-layers", type=int, nargs="+", default=[], help="SD3: skip-layer guidance, such as 7 8 9")
    sub.add_argument("--skip-scale", type=float, default=2.8, help="its scale")
    sub.add_argument("--skip-interval", type=float, nargs=2, default=(0.01, 0.2), help="its part of the steps")
    sub.add_argument("--compiled", type=Path, metavar="FILE", help="draw by a program of lcm-jax compile")
    sub.add_argument("--out", type=Path, default=Path("out"), help="a .png file for one picture, or a folder")
    _add_devices(sub, None)

    sub = command("compile", _compile, "Write the program that draws, from prompt to picture, for sample --compiled.")
    _add_model(sub)
    sub.add_argument("--size", type=int, nargs=2, metavar=("H", "W"), help="pixels; the model's own by default")
    sub.add_argument("--batch", type=int, default=1, help="pictures of a call")
    sub.add_argument("--platform", choices=PLATFORMS, help="of another machine; this one's by default")
    sub.add_argument("-o", "--out", type=Path, required=True, metavar="FILE", help="file to write")

    for name, text in (("train", "Train a registered config."), ("distill", "Distil a registered config.")):
        text += " What follows are overrides; --config NAME --help lists them."
        sub = command(name, _train, text, add_help=False)
        sub.add_argument("-h", "--help", action=_Help, nargs=0, help="this message, or after --config NAME its keys")
        sub.add_argument("--config", required=True, help="name in lcm_jax.configs")
        sub.add_argument("--workdir", type=Path, help="checkpoints, logs and result; runs/NAME by default")
        if name == "distill":
            sub.add_argument("--objective", metavar="METHOD", help="another few-step method: lcm, tcd, pcm, ctm, ...")
        _add_job(sub)

    sub = command("encode", _encode, "Latents and text embeddings of a data set, once, in shards; goes on if stopped.")
    sub.add_argument("--model", default="openmoji", help="whose autoencoder and text encoders: as in the config")
    sub.add_argument("--data", required=True, help='"folder:PATH", "tar:FILES", "tfds:NAME or PATH", "openmoji"')
    sub.add_argument("--split", default="train", help="split of the data")
    sub.add_argument("--out", type=Path, required=True, help="folder that all processes see; then --task.data.name")
    sub.add_argument("--size", type=int, help="pixels of the squares; the model's own by default")
    sub.add_argument("--shards", type=int, help="at least as many as processes; one for 4096 pictures by default")
    sub.add_argument("--batch", type=int, default=32, help="pictures at a time in each process")
    sub.add_argument("--part", metavar="P/N", help="of N processes that know nothing of one another this is the P-th")
    sub.add_argument("--mesh", default="", help="of a process's devices: fsdp=4 cuts a large T5 over four")
    _add_job(sub)

    text = (
        "Compile a config's training step for a topology: memory, FLOPs, collectives, time. No accelerator is needed."
    )
    text += " What follows are overrides, --mesh among them; --config NAME --help lists them."
    sub = command("plan", _plan, text, add_help=False)
    sub.add_argument("-h", "--help", action=_Help, nargs=0, help="this message, or after --config NAME its keys")
    sub.add_argument("--config", required=True, help="name in lcm_jax.configs")
    sub.add_argument("--topology", default="v5e:8x8", help="chips to plan for: v5e:8x8, v5p:4x4x4, v6e:4x4")
    sub.add_argument("--search", action="store_true", help="try the meshes, and rank them")
    sub.add_argument("--whole", action="store_true", help="run the compiler to its end, machine code too")
    sub.add_argument("--json", type=Path, help="file to write the plans to; - for standard output")

    sub = command("evaluate", _evaluate, "Frechet distance, CLIP score, precision, recall, seconds; VAE PSNR and SSIM.")
    _add_model(sub)
    sub.add_argument("--steps", type=int, nargs="+", default=[1, 2, 4, 8], help="numbers of solver steps")
    sub.add_argument("--data", default="openmoji", help='"openmoji", "openmoji-outline", "folder:PATH" or "tfds:NAME"')
    sub.add_argument("--split", default="validation", help="split of the data")
    sub.add_argument("--limit", type=int, help="most pictures taken")
    sub.add_argument("--clip", default="openmoji", help="model with text_encoder and image_encoder")
    sub.add_argument("--inception", type=Path, help="Inception-v3 weights: Frechet distance on its features instead")
    sub.add_argument("--batch-size", type=int, default=32)
    sub.add_argument("--seed", type=int, default=0)
    sub.add_argument("--out", type=Path, help="JSON file to write the scores to")
    _add_devices(sub, "")

    sub = command("stream", _stream, "Redraw a video, a folder of pictures, a camera, a screen, or draw from noise.")
    sub.add_argument("source", help='a video file, a folder, "camera[:PLACE]", "screen[:PLACE]" or "noise"')
    _add_model(sub)
    sub.add_argument("--out", type=Path, required=True, help="a video file such as out.mp4, or a folder for pictures")
    sub.add_argument("--prompt", nargs="+", required=True, help="what to draw; from noise, several to travel through")
    sub.add_argument("--negative-prompt", default="", help="what not to draw")
    sub.add_argument("--steps", type=int, default=2, help="evaluations of a frame")
    sub.add_argument("--strength", type=float, default=0.6, help="how far frames are noised, in (0, 1]")
    sub.add_argument("--seed", type=int, default=0, help="seed of the noise")
    sub.add_argument("--size", type=int, nargs=2, metavar=("H", "W"), help="pixels; the model's area by default")
    sub.add_argument("--similarity", type=float, help="leave out frames that are this alike, such as 0.98")
    sub.add_argument(
        "--set", nargs="+", default=[], metavar="KEY=VALUE", help="other controls: guidance=self delta=0.5"
    )
    sub.add_argument("--count", type=int, default=60, help="noise: how many pictures")
    sub.add_argument("--seconds", type=float, help="camera, screen: how long; until Ctrl-C by default")
    sub.add_argument("--rate", type=float, default=12.0, help="frames a second of a video that is not made of a video")

    sub = command("bench", _bench, "Measure this machine: medians, quartiles and ratios.")
    sub.add_argument("cases", nargs="+", metavar="CASE", help=", ".join(bench.CASES))
    sub.add_argument("--against", choices=bench.PEERS, help="measure a peer in turns, on the same weights")
    sub.add_argument("--model", default="openmoji", help="of stream, loading and start; random-sd15 for random weights")
    sub.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    sub.add_argument("--scale", default="full", choices=bench.SCALES, help="tiny: networks for a smoke test")
    sub.add_argument("--device", choices=["cpu", "gpu", "tpu"], help="JAX's best by default")
    sub.add_argument("--batch", type=int, nargs="+", default=[], help="batch sizes; each case has its own by default")
    sub.add_argument("--quantize", choices=quantization.KINDS, help="text-to-image: rows in 8 bits too, and their PSNR")
    sub.add_argument("--side", type=int, help="pixels of a stream's sides; the model's own by default")
    sub.add_argument("--repeats", type=int, default=5, help="runs of each row")
    sub.add_argument("--profile", action="store_true", help="print the dearest operations of each row too")
    sub.add_argument("--json", type=Path, help="file to write every time to")

    sub = command("serve", _serve, "Redraw a browser's camera, screen or drawing in real time; pictures by HTTP.")
    _add_model(sub)
    sub.add_argument("--prompt", default="cat face", help="that a session begins with")
    sub.add_argument("--steps", type=int, default=2, help="that a session begins with")
    sub.add_argument("--strength", type=float, default=0.6, help="that a session begins with")
    sub.add_argument("--size", type=int, nargs=2, metavar=("H", "W"), help="pixels; the model's own by default")
    sub.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 for all")
    sub.add_argument("--port", type=int, default=7860, help="0 for any that is free")
    sub.add_argument("--max-sessions", type=int, default=4, help="that stream at once")
    sub.add_argument("--max-waiting", type=int, default=16, help="that wait in line for it")
    sub.add_argument("--idle-timeout", type=float, default=60.0, help="seconds without a frame that end a session")
    sub.add_argument("--together", type=int, help="sessions in one call; --max-sessions by default")
    sub.add_argument("--token", help="that page, socket and HTTP ask for")
    sub.add_argument("--origin", nargs="+", default=[], help="other pages that may connect: https://example.org")

    sub = command("convert", _convert, "Write a model or a LoRA in another format.")
    sub.add_argument("source", metavar="SRC", help="bundled name, diffusers or orbax folder, single file, LoRA, hub id")
    sub.add_argument("target", metavar="DST", type=Path, help="a folder, or a .safetensors file for single and lora-*")
    sub.add_argument("--to", required=True, choices=FORMATS)
    sub.add_argument("--dtype", choices=sorted(DTYPES), help="of floating tensors; their own by default")
    sub.add_argument("--config", help="folder or hub id with the configs and tokenizers of a single file")
    sub.add_argument("--variant", help='which files of a folder to read, such as "fp16"')
    sub.add_argument("--base", help="for LoRA: the model it is for; to extract one: the model SRC was made from")
    sub.add_argument("--rank", type=int, default=64, help="of an extracted LoRA")
    return parser


def _add_job(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--coordinator", metavar="HOST:PORT", help="of process 0 of a job of several; auto: as JAX finds it"
    )
    sub.add_argument(
        "--processes", type=int, metavar="N", help="in the job; Slurm, Open MPI and GKE tell by themselves"
    )
    sub.add_argument("--process", type=int, metavar="I", help="which of them this is, from 0")
    sub.add_argument("--peer-timeout", type=int, default=100, metavar="S", help="seconds of silence that mean death")


def _add_devices(sub: argparse.ArgumentParser, mesh: str | None) -> None:
    text = "devices along each axis, such as data=4,fsdp=2; the pictures are cut over data and fsdp"
    sub.add_argument("--mesh", default=mesh, help=f"{text} (all along data by default)" if mesh == "" else text)
    _add_job(sub)


def _mesh(arguments: argparse.Namespace) -> Mesh | None:
    """What to draw on: the devices of --mesh, without it all of a job; None: one."""
    text = "" if arguments.mesh is None and jax.process_count() > 1 else arguments.mesh
    return None if text is None or (text == "" and jax.device_count() == 1) else make_mesh(text)


def _add_model(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--model", default="openmoji", help="bundled name, diffusers or orbax folder, single file, hub id")
    sub.add_argument("--variant", help='which files of a folder to read, such as "fp16"')
    sub.add_argument("--config", help="folder or hub id with the configs and tokenizers of a single file")
    sub.add_argument("--tiny-vae", metavar="PATH", help="a TAESD in the autoencoder's place")
    sub.add_argument("--no-t5", dest="t5", action="store_false", help="SD3: leave out the third text encoder")
    sub.add_argument("--lora", nargs="+", default=[], metavar="PATH[:WEIGHT]", help="adapters to merge")
    sub.add_argument("--sampler", choices=sorted(SAMPLERS), help="the model's own by default")
    sub.add_argument("--guidance", type=float, help=f"guidance scale; {demo.GUIDANCE} by default, 1 with an LCM-LoRA")
    sub.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    sub.add_argument("--quantize", choices=quantization.KINDS, help="the denoiser in 8 bits; int8w: its kernels alone")


def _load(arguments: argparse.Namespace) -> tuple[Pipeline, dict[str, Any]]:
    """The pipeline, and the sampler and guidance to call it with."""
    parts = [_lora_part(text) for text in arguments.lora]
    options = {name: getattr(arguments, name) for name in ("dtype", "variant", "config", "tiny_vae", "t5")}
    if arguments.quantize is not None:
        quantization.check(arguments.quantize)
    pipe = load(arguments.model, lora=parts or None, **options)
    if arguments.quantize is not None:
        pipe = pipe.quantized(arguments.quantize)
    sampler = arguments.sampler or ("lcm" if parts else pipe.default_sampler)
    plain = sampler == "lcm" and not pipe.generator.embeds_guidance
    guidance = arguments.guidance if arguments.guidance is not None else (1.0 if plain else demo.GUIDANCE)
    return pipe, {"sampler": sampler, "guidance": guidance}


def _lora_part(text: str) -> tuple[str, float]:
    path, colon, weight = text.rpartition(":")
    if not colon:
        return text, 1.0
    try:
        return path, float(weight)
    except ValueError:
        return text, 1.0


def _demo(arguments: argparse.Namespace, _: Sequence[str]) -> None:
    start = time.perf_counter()
    rows = demo.run(arguments.out, model=arguments.model, guidance=arguments.guidance, seed=arguments.seed)
    print(demo.table(rows))
    print(f"{arguments.out / 'grid.png'} and scores.json in {time.perf_counter() - start:.0f} s on {_device()}")


def _sample(arguments: argparse.Namespace, _: Sequence[str]) -> None:
    if arguments.num_images < 1:
        raise ValueError(f"--num-images {arguments.num_images}: it must be at least 1")
    image = None if arguments.image is None else read_image(arguments.image)
    mask = None if arguments.mask is None else read_image(arguments.mask, "--mask").mean(axis=-1).astype(np.uint8)
    mesh = _mesh(arguments)
    pipe, options = _load(arguments)
    if mesh is not None:
        pipe.spread(mesh)
    size = None if arguments.size is None else tuple(arguments.size)
    if arguments.compiled is not None:
        _write_pictures(arguments, _sample_compiled(arguments, pipe, size, options))
        return
    pictures = pipe(
        arguments.prompt, negative_prompt=arguments.negative_prompt, steps=arguments.steps, seed=arguments.seed,
        num_images=arguments.num_images, size=size, image=image, strength=arguments.strength, mask=mask,
        t5_tokens=arguments.t5_tokens, shift=arguments.shift, double_shift=False if arguments.single_shift else None,
        skip_layers=arguments.skip_layers, skip_scale=arguments.skip_scale,
        skip_interval=tuple(arguments.skip_interval), **options,
    )  # fmt: skip
    if distributed.is_main():
        _write_pictures(arguments, pictures)


def _sample_compiled(
    arguments: argparse.Namespace, pipe: Pipeline, size: tuple[int, int] | None, options: dict[str, Any]
) -> np.ndarray:
    exported = Exported(pipe, arguments.compiled)
    for name in ("image", "mask", "strength", "t5_tokens", "shift", "single_shift", "skip_layers", "mesh"):
        if getattr(arguments, name):
            raise ValueError(f"--{name.replace('_', '-')} is no option of --compiled: leave one of them out")
    for name, mine, its in (
        ("--size", size, exported.header.size),
        ("--sampler", arguments.sampler, exported.header.sampler),
    ):
        if mine not in (None, its):
            raise ValueError(f"{name} is {mine}, and {arguments.compiled} was compiled for {its}: leave it out")
    names = ("prompt", "negative_prompt", "steps", "seed", "num_images")
    return exported(guidance=options["guidance"], **{name: getattr(arguments, name) for name in names})


def _compile(arguments: argparse.Namespace, _: Sequence[str]) -> None:
    start = time.perf_counter()
    pipe, options = _load(arguments)
    header = write_program(
        pipe, arguments.out, size=arguments.size, batch=arguments.batch, platform=arguments.platform, **options
    )
    size = f"{header.batch} x {header.size[0]}x{header.size[1]} pixels, {header.sampler}"
    print(
        f"{arguments.out}: {size}, for {header.platform} and jax {header.jax}, in {time.perf_counter() - start:.0f} s"
    )


def _write_pictures(arguments: argparse.Namespace, pictures: np.ndarray) -> None:
    for path, picture in zip(_names(arguments.out, arguments.prompt, arguments.num_images), pictures, strict=True):
        path.parent.mkdir(parents=True, exist_ok=True)
        PILImage.fromarray(picture).save(path)
        print(path)


def _names(out: Path, prompts: Sequence[str], each: int) -> list[Path]:
    if out.suffix.lower() == ".png":
        if len(prompts) * each > 1:
            raise ValueError(f"--out {out}: {len(prompts) * each} pictures do not fit in one file; name a folder")
        return [out]
    slugs = [
        "-".join("".join(c if c.isalnum() else " " for c in prompt).split())[:60] or "picture" for prompt in prompts
    ]
    return [out / f"{slug}-{i}.png" for slug in slugs for i in range(each)]


def read_image(path: Path, option: str = "--image") -> np.ndarray:
    """A picture file as uint8 (h, w, 3), transparency on white. option: named in errors."""
    try:
        with PILImage.open(path) as picture:
            rgba = picture.convert("RGBA")
    except FileNotFoundError:
        raise FileNotFoundError(f"{option} {path}: no such file") from None
    except (UnidentifiedImageError, OSError) as error:
        raise ValueError(f"{option} {path}: not a picture that can be read ({error})") from None
    white = PILImage.new("RGBA", rgba.size, "white")
    return np.asarray(PILImage.alpha_composite(white, rgba).convert("RGB"))


def _encode(arguments: argparse.Namespace, _: Sequence[str]) -> None:
    require("train")
    from lcm_jax.encode import encode

    part = None
    if arguments.part is not None:
        index, slash, count = arguments.part.partition("/")
        if not (slash and index.isdecimal() and count.isdecimal()):
            raise ValueError(f"--part {arguments.part}: give P/N, such as 0/4 for the first of four")
        part = int(index), int(count)
    names = ("split", "size", "shards", "batch", "mesh")
    options = {name: getattr(arguments, name) for name in names}
    encode(arguments.model, arguments.data, arguments.out, part=part, **options)


def _evaluate(arguments: argparse.Namespace, _: Sequence[str]) -> None:
    require("train")
    from lcm_jax.data import load_source

    if min(arguments.steps) < 1:
        raise ValueError(f"--steps {min(arguments.steps)}: it must be at least 1")
    mesh = _mesh(arguments)
    pipe, options = _load(arguments)
    source = load_source(arguments.data, arguments.split, pipe.size[0])
    images, captions = captioned(source, arguments.limit)
    clip = ClipMetric.load(arguments.clip)
    features = None if arguments.inception is None else inception_features(arguments.inception)
    if mesh is not None:
        pipe.spread(mesh)
        clip, features = clip.spread(mesh), None if features is None else spread(features, mesh)
    rows = evaluate(
        pipe, clip, images, captions, steps=arguments.steps, features=features,
        batch_size=arguments.batch_size, seed=arguments.seed, **options,
    )  # fmt: skip
    title = f"{arguments.model} {options['sampler']}"
    named = [{"method": f"{title} {row['steps']}", **row} for row in rows]
    vae = reconstruction(images, reconstruct(pipe.component("vae"), images, mesh=mesh))
    if not distributed.is_main():
        return
    print(demo.table(named))
    print(f"VAE reconstruction: PSNR {vae['psnr']:.2f} dB, SSIM {vae['ssim']:.3f} on {len(images)} pictures")
    if arguments.out is not None:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        result = {"model": arguments.model, "data": arguments.data, "split": arguments.split, **options}
        arguments.out.write_text(json.dumps(result | {"rows": rows, "vae": vae, "device": _device()}, indent=2) + "\n")


def _stream(arguments: argparse.Namespace, _: Sequence[str]) -> None:
    require("serve")
    from lcm_jax.stream.command import parse_controls, run

    pipe, options = _load(arguments)
    plain = ("negative_prompt", "steps", "strength", "seed", "similarity")
    controls = {name: getattr(arguments, name) for name in plain} | {"scale": options["guidance"]}
    said = run(
        pipe, arguments.source, arguments.out, arguments.prompt,
        size=None if arguments.size is None else tuple(arguments.size), count=arguments.count,
        seconds=arguments.seconds, rate=arguments.rate, sampler=options["sampler"],
        controls=controls | parse_controls(arguments.set),
    )  # fmt: skip
    print(said)


def _bench(arguments: argparse.Namespace, _: Sequence[str]) -> None:
    if arguments.device is not None:
        jax.config.update("jax_platforms", {"gpu": "cuda"}.get(arguments.device, arguments.device))
    names = ("model", "dtype", "scale", "side", "quantize")
    own = {name: getattr(arguments, name) for name in names}
    options = bench.Options(peer=arguments.against, batches=tuple(arguments.batch), **own)
    bench.run(arguments.cases, options, repeats=arguments.repeats, out=arguments.json, profiled=arguments.profile)


def _serve(arguments: argparse.Namespace, _: Sequence[str]) -> None:
    require("serve")
    from lcm_jax.stream.server import serve
    from lcm_jax.stream.service import Config, beginning

    pipe, options = _load(arguments)
    names = ("host", "port", "max_sessions", "max_waiting", "idle_timeout", "token")
    own: dict[str, Any] = {name: getattr(arguments, name) for name in names}
    start = {name: getattr(arguments, name) for name in ("prompt", "steps", "strength")}
    controls = beginning(pipe, options["sampler"], options["guidance"]).changed(**start)
    size = pipe.check_size(arguments.size)
    own |= {"model": Path(arguments.model).name, "size": size, "controls": controls, "origins": tuple(arguments.origin)}
    serve(pipe, Config(**own, **options, together=arguments.together or arguments.max_sessions))


def _convert(arguments: argparse.Namespace, _: Sequence[str]) -> None:
    dtype = None if arguments.dtype is None else DTYPES[arguments.dtype]
    options = {"dtype": dtype, "config": arguments.config}
    if arguments.to in LORAS:
        options |= {"base": arguments.base, "rank": arguments.rank}
        summary = convert_lora(arguments.source, arguments.target, arguments.to, **options)
    else:
        summary = convert(arguments.source, arguments.target, arguments.to, variant=arguments.variant, **options)
    print(f"{arguments.target}: {summary}")


def _train(arguments: argparse.Namespace, overrides: Sequence[str]) -> None:
    require("train")
    import lcm_jax.configs as configs

    asked = ["--help"] if arguments.help else []
    config, name = configs.get(arguments.config), arguments.config
    if getattr(arguments, "objective", None) is not None:
        config, name = configs.with_method(config, arguments.objective, name), f"{name}_{arguments.objective}"
    config = override(config, [*overrides, *asked], arguments.config)
    workdir = arguments.workdir or Path("runs") / name
    config.run(workdir)
    if distributed.is_main():
        print(f"{workdir / 'export'}: the result; {workdir / 'tensorboard'}: scalars and pictures")


def _plan(arguments: argparse.Namespace, overrides: Sequence[str]) -> None:
    require("train")
    import lcm_jax.configs as configs
    from lcm_jax.plan.command import run

    asked = ["--help"] if arguments.help else []
    config = override(configs.get(arguments.config), [*overrides, *asked], arguments.config)
    options = {"searching": arguments.search, "whole": arguments.whole, "out": arguments.json}
    print(run(config, arguments.config, arguments.topology, **options))


def _device() -> str:
    device = jax.devices()[0]
    return f"{device.device_kind} (jax {jax.__version__})"


if __name__ == "__main__":
    sys.exit(main())
