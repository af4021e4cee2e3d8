"""The commands of `lcm-jax`: demo, sample, compile, train, distill, encode, evaluate, plan, stream, serve, ..."""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import logging
import os
import sys
import time
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.errors import JaxRuntimeError
from jax.sharding import Mesh
from tqdm import tqdm

from lcm_jax import bench
from lcm_jax.cli import demo, listings, picture_files
from lcm_jax.cli.arguments import Parser, parser
from lcm_jax.diffusion.samplers import Sampler, register, sampler_name
from lcm_jax.diffusion.time_grids import RULES
from lcm_jax.evaluation.evaluate import (
    ClipMetric,
    captioned,
    evaluate,
    reconstruct,
    reconstruction,
    row_score,
    score_table,
    shard,
)
from lcm_jax.inference.ahead_of_time import Exported, write_program
from lcm_jax.inference.loading import load
from lcm_jax.inference.parameters import DTYPES
from lcm_jax.inference.pipeline import Pipeline
from lcm_jax.metrics import Preference, load_features
from lcm_jax.metrics.bootstrap import LEVEL
from lcm_jax.parallel import distributed
from lcm_jax.parallel.sharding import make_mesh
from lcm_jax.plan.topologies import check_compiler
from lcm_jax.precision import quantization
from lcm_jax.runtime.cache import use_compilation_cache
from lcm_jax.runtime.hardware import check_platform
from lcm_jax.runtime.image_io import read_picture
from lcm_jax.runtime.json_text import parse_json
from lcm_jax.runtime.messages import LESS_MEMORY, is_out_of_memory
from lcm_jax.runtime.optional_deps import require
from lcm_jax.runtime.progress import phase
from lcm_jax.runtime.user_code import import_file, is_reference, load_object
from lcm_jax.train.overrides import override
from lcm_jax.weights.convert import LORAS, convert, convert_lora

SAID_IN_ONE_LINE = (ValueError, OSError, FloatingPointError, ModuleNotFoundError, MemoryError)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; bad input is one line on standard error and exit code 2, Ctrl-C one line and 130."""
    if argv is None:  # a process of its own: what the imports made stays, and the collector need not visit it again
        gc.freeze()
        gc.set_threshold(50_000, 20, 20)
        warnings.showwarning = _show_warning
        warnings.filterwarnings("default", category=DeprecationWarning, module="lcm_jax")  # of names the user typed
        _show_phases()
    use_compilation_cache()
    commands = parser(RUNS)
    arguments, rest = commands.parse_known_args(argv)
    try:
        for path in arguments.imports:
            import_file(path, option="--import")
        if rest and arguments.run not in (_train, _plan):
            hint = _command_parser(commands, arguments.command).unknown(rest[0])
            raise ValueError(f"{hint}{'' if hint.endswith('?') else ';'} see lcm-jax {arguments.command} --help")
        if "coordinator" in arguments:
            job = (arguments.coordinator, arguments.processes, arguments.process)
            distributed.initialize(*job, timeout=arguments.peer_timeout)
        check_platform()
        arguments.run(arguments, rest)
    except distributed.Preempted:
        code = distributed.SAVED
    except KeyboardInterrupt:
        print("lcm-jax: stopped by Ctrl-C", file=sys.stderr)
        code = 130
    except (*SAID_IN_ONE_LINE, JaxRuntimeError) as error:
        said: Any = distributed.peer_failure_message(error) or error
        lost = said is not error
        if is_out_of_memory(error):
            said = f"out of memory: {LESS_MEMORY} ({str(error).splitlines()[0]:.200})"
        if os.environ.get("LCM_JAX_TRACEBACK") or (said is error and isinstance(error, JaxRuntimeError)):
            raise
        print(f"lcm-jax: {' '.join(str(said).split())}", file=sys.stderr)
        code = 1 if lost else 2  # a job of which a process is gone may well go on when it is started again
    else:
        code = 0
    distributed.leave_job(code)
    return code


def _show_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, file: Any = None, line: Any = None
) -> None:
    """Print the library's own warnings as one line; those of other libraries are not the user's to act on."""
    if issubclass(category, UserWarning) or "lcm_jax" in Path(filename).parts:
        print(f"lcm-jax: warning: {' '.join(str(message).split())}", file=sys.stderr)


def _show_phases() -> None:
    """Write the names of long phases (loading, compiling, drawing, ...) to standard error, each once in a row."""
    last = ""

    def is_new(record: logging.LogRecord) -> bool:
        nonlocal last
        before, last = last, record.getMessage()
        return last != before

    class Lines(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            tqdm.write(f"lcm-jax: {record.getMessage()}", file=sys.stderr)  # above a bar, if there is one

    handler, log = Lines(), logging.getLogger("lcm_jax")
    handler.addFilter(is_new)
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False


def _say_next(command: str) -> None:
    """Say what to type next, on standard error: standard output is for scripts."""
    if distributed.is_main():
        print(f"next: {command}", file=sys.stderr)


def _command_parser(commands: argparse.ArgumentParser, name: str) -> Parser:
    action = next(action for action in commands._actions if isinstance(action, argparse._SubParsersAction))
    command: Parser = action.choices[name]
    return command


def _mesh(arguments: argparse.Namespace) -> Mesh | None:
    """Return the mesh to draw on: the devices of --mesh, without it all of a job; None is one device."""
    text = "" if arguments.mesh is None and jax.process_count() > 1 else arguments.mesh
    return None if text is None or (text == "" and jax.device_count() == 1) else make_mesh(text)


def _load(arguments: argparse.Namespace) -> tuple[Pipeline, dict[str, Any]]:
    """Return the pipeline, and the sampler and guidance to call it with."""
    parts = [_lora_part(text) for text in arguments.lora]
    options = {name: getattr(arguments, name) for name in ("dtype", "variant", "config", "tiny_vae", "t5")}
    options["scheduler"] = parse_changes(arguments.scheduler)
    options["embeddings"] = [_embedding(text) for text in arguments.embeddings] or None
    kinds = quantization.parse(arguments.quantize)
    with phase(f"loading {arguments.model}"):
        pipe = load(arguments.model, lora=parts or None, **options)
        for part, kind in kinds.items():
            pipe = pipe.quantized(kind, part)
    pipe.prompt_syntax, pipe.clip_skip = arguments.prompt_syntax, arguments.clip_skip
    pipe.check_prompt_options()
    _, guidance, sampler = pipe.settings(guidance=arguments.guidance, sampler=_sampler(arguments.sampler))
    return pipe, {"sampler": sampler, "guidance": guidance}


def _sampler(text: str | None) -> str | None:
    """Return the name of a sampler, of the library or registered from FILE.py:NAME; ValueError for any other text."""
    if text is None or not is_reference(text):
        return None if text is None else sampler_name(text)
    sampler = load_object(text, option="--sampler")
    if not isinstance(sampler, Sampler):
        raise ValueError(
            f"--sampler {text}: it is a {type(sampler).__name__}, and a diffusion.samplers.Sampler is needed"
        )
    register(text, sampler)
    return text


def _embedding(text: str) -> str | tuple[str, str]:
    path, colon, word = text.rpartition(":")
    is_pair = bool(colon and word) and not text.endswith(".safetensors") and not Path(text).exists()
    return (path, word) if is_pair else text


def _lora_part(text: str) -> tuple[str, float]:
    path, colon, weight = text.rpartition(":")
    if not colon:
        return text, 1.0
    try:
        return path, float(weight)
    except ValueError:
        return text, 1.0


def parse_numbers(option: str, text: str | None) -> list[float] | None:
    """Return the numbers of a list such as 999,759,499; ValueError, which names the option, for another text.

    >>> from lcm_jax.cli.main import parse_numbers
    >>> parse_numbers("--timesteps", "999,759")
    [999.0, 759.0]
    """
    try:
        return None if text is None else [float(number) for number in text.split(",")]
    except ValueError:
        rules = f" one of {', '.join(RULES)}, or" if option == "--sigmas" else ""
        raise ValueError(f"{option} {text}: give{rules} numbers with commas between them") from None


def parse_changes(texts: Sequence[str]) -> dict[str, Any]:
    """Return the keys and values of --scheduler KEY=VALUE ...; a value is JSON, or else a text."""
    changes = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not (key and equals):
            raise ValueError(f"--scheduler {text}: give KEY=VALUE, such as prediction_type=v_prediction")
        try:
            changes[key] = parse_json(value)
        except ValueError:
            changes[key] = value
    return changes


def _demo(arguments: argparse.Namespace, _: Sequence[str]) -> None:
    start = time.perf_counter()
    rows = demo.draw_demo(arguments.out, model=arguments.model, guidance=arguments.guidance, seed=arguments.seed)
    print(demo.table(rows))
    print(f"{arguments.out / 'grid.png'} and scores.json in {time.perf_counter() - start:.0f} s on {_device()}")
    _say_next(f'lcm-jax sample --model {arguments.model} --prompt "red heart" --out heart.png')


def _sample(arguments: argparse.Namespace, _: Sequence[str]) -> None:
    if arguments.num_images < 1:
        raise ValueError(f"--num-images {arguments.num_images}: it must be at least 1")
    paths = picture_files.names(arguments.out, arguments.prompt, arguments.num_images, arguments.seed)
    image = None if arguments.image is None else read_image(arguments.image)
    mask = None if arguments.mask is None else read_image(arguments.mask, "--mask").mean(axis=-1).astype(np.uint8)
    ruled, timesteps = arguments.sigmas in RULES, parse_numbers("--timesteps", arguments.timesteps)
    sigmas = arguments.sigmas if ruled else parse_numbers("--sigmas", arguments.sigmas)
    mesh = _mesh(arguments)
    pipe, options = _load(arguments)
    if mesh is not None:
        pipe.shard(mesh)
    size = None if arguments.size is None else pipe.check_size(arguments.size)
    if arguments.compiled is not None:
        _write_pictures(arguments, paths, _sample_compiled(arguments, pipe, size, options))
        return
    pictures = pipe(
        arguments.prompt, negative_prompt=arguments.negative_prompt, steps=arguments.steps, seed=arguments.seed,
        num_images=arguments.num_images, size=size, image=image, strength=arguments.strength, mask=mask,
        t5_tokens=arguments.t5_tokens, shift=arguments.shift, double_shift=False if arguments.single_shift else None,
        skip_layers=arguments.skip_layers, skip_scale=arguments.skip_scale,
        skip_interval=tuple(arguments.skip_interval), sigmas=sigmas,
        timesteps=timesteps, spacing=arguments.spacing, **options,
    )  # fmt: skip
    if distributed.is_main():
        _write_pictures(arguments, paths, pictures)


def _sample_compiled(
    arguments: argparse.Namespace, pipe: Pipeline, size: tuple[int, int] | None, options: dict[str, Any]
) -> np.ndarray:
    exported = Exported(pipe, arguments.compiled)
    refused = ["image", "mask", "strength", "t5_tokens", "shift", "single_shift", "skip_layers", "mesh"]
    for name in (*refused, "sigmas", "timesteps", "spacing"):
        if getattr(arguments, name):
            raise ValueError(f"--{name.replace('_', '-')} is no option of --compiled: leave one of them out")
    for name, asked, compiled_for in (
        ("--size", size, exported.header.size),
        ("--sampler", arguments.sampler, exported.header.sampler),
    ):
        if asked not in (None, compiled_for):
            raise ValueError(
                f"{name} is {asked}, and {arguments.compiled} was compiled for {compiled_for}: leave it out"
            )
    names = ("prompt", "negative_prompt", "steps", "seed", "num_images")
    return exported(guidance=arguments.guidance, **{name: getattr(arguments, name) for name in names})


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
    prompts = '"red heart" ' * header.batch
    _say_next(f"lcm-jax sample --model {arguments.model} --compiled {arguments.out} --prompt {prompts.rstrip()}")


def _write_pictures(arguments: argparse.Namespace, paths: Sequence[Path], pictures: np.ndarray) -> None:
    written = picture_files.write(paths, pictures, replace=paths == [arguments.out])
    for path in written:
        print(path)
    if arguments.seed == 0:
        _say_next("another --seed N draws other pictures; lcm-jax sample --help shows --image, --size and the rest")


def read_image(path: Path, option: str = "--image") -> np.ndarray:
    """Read an image file as uint8 (h, w, 3), upright as it is shown. option: named in errors."""
    if not path.is_file():
        raise FileNotFoundError(f"{option} {path}: no such file")
    return read_picture(path, source=f"{option} {path}")


def _encode(arguments: argparse.Namespace, _: Sequence[str]) -> None:
    require("train")
    from lcm_jax.train.precompute_latents import encode

    part = None
    if arguments.part is not None:
        index, slash, count = arguments.part.partition("/")
        if not (slash and index.isdecimal() and count.isdecimal()):
            raise ValueError(f"--part {arguments.part}: give P/N, such as 0/4 for the first of four")
        part = int(index), int(count)
    names = ("split", "size", "shards", "batch", "mesh", "digest")
    options = {name: getattr(arguments, name) for name in names}
    encode(arguments.model, arguments.data, arguments.out, part=part, **options)
    _say_next(f"lcm-jax train --config NAME --task.data.name {arguments.out}   (lcm-jax configs lists the names)")


def _evaluate(arguments: argparse.Namespace, _: Sequence[str]) -> None:
    require("train")
    from lcm_jax.data import load_source

    if min(arguments.steps) < 1:
        raise ValueError(f"--steps {min(arguments.steps)}: it must be at least 1")
    if arguments.resamples == 1 or arguments.resamples < 0:
        raise ValueError(f"--resamples {arguments.resamples}: it must be at least 2, or 0 for no intervals")
    mesh = _mesh(arguments)
    pipe, options = _load(arguments)
    source = load_source(arguments.data, arguments.split, pipe.size[0])
    images, captions = captioned(source, arguments.limit)
    clip = ClipMetric.load(arguments.clip)
    features = None if arguments.features is None else load_features(arguments.features, option="--features")
    preferences = [Preference.load(text, option="--preference") for text in arguments.preference]
    if mesh is not None:
        pipe.shard(mesh)
        clip, features = clip.shard(mesh), None if features is None else shard(features, mesh)
        preferences = [preference.shard(partial(shard, mesh=mesh)) for preference in preferences]
    rows = evaluate(
        pipe, clip, images, captions, steps=arguments.steps, features=features, preferences=preferences,
        resamples=arguments.resamples, batch_size=arguments.batch_size, seed=arguments.seed, **options,
    )  # fmt: skip
    again = reconstruct(pipe.component("vae"), images, mesh=mesh)
    vae = reconstruction(images, again, resamples=arguments.resamples)
    if not distributed.is_main():
        return
    print(score_table(f"{arguments.model} {options['sampler']}", rows))
    scores = f"PSNR {row_score(vae, 'psnr')} dB, SSIM {row_score(vae, 'ssim')}"
    print(f"VAE reconstruction: {scores} on {len(images)} pictures")
    if arguments.resamples:
        print(f"in brackets: {LEVEL:.0%} intervals over pictures, by a bootstrap of {arguments.resamples} resamples")
    if arguments.out is not None:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        names = ("model", "data", "split", "clip", "features", "preference", "seed", "resamples")
        result = {name: getattr(arguments, name) for name in names} | {"pictures": len(images), **options}
        arguments.out.write_text(json.dumps(result | {"rows": rows, "vae": vae, "device": _device()}, indent=2) + "\n")


def _stream(arguments: argparse.Namespace, _: Sequence[str]) -> None:
    require("serve")
    from lcm_jax.stream.command import parse_controls, run_stream

    pipe, options = _load(arguments)
    plain = ("negative_prompt", "steps", "strength", "seed", "similarity")
    controls = {name: getattr(arguments, name) for name in plain} | {"scale": options["guidance"]}
    said = run_stream(
        pipe, arguments.source, arguments.out, arguments.prompt,
        size=None if arguments.size is None else pipe.check_size(arguments.size), count=arguments.count,
        seconds=arguments.seconds, rate=arguments.rate, sampler=options["sampler"],
        controls=controls | parse_controls(arguments.set),
    )  # fmt: skip
    print(said)


def _bench(arguments: argparse.Namespace, _: Sequence[str]) -> None:
    if arguments.device is not None:
        jax.config.update("jax_platforms", {"gpu": "cuda"}.get(arguments.device, arguments.device))
        check_platform()
    settings = {name: getattr(arguments, name) for name in ("model", "dtype", "scale", "side")}
    settings |= {"quantize": quantization.parse(arguments.quantize), "batches": tuple(arguments.batch)}
    options = bench.Options(peer=arguments.against, **settings)
    bench.run_cases(arguments.cases, options, repeats=arguments.repeats, out=arguments.json, profiled=arguments.profile)


def _serve(arguments: argparse.Namespace, _: Sequence[str]) -> None:
    require("serve")
    from lcm_jax.serve.server import serve
    from lcm_jax.serve.service import Config, beginning

    pipe, options = _load(arguments)
    names = ("host", "port", "max_sessions", "max_waiting", "idle_timeout", "token")
    settings: dict[str, Any] = {name: getattr(arguments, name) for name in names}
    start = {name: getattr(arguments, name) for name in ("prompt", "steps", "strength")}
    controls = beginning(pipe, options["sampler"], options["guidance"]).changed(**start)
    size = pipe.check_size(arguments.size)
    settings |= {
        "model": Path(arguments.model).name,
        "size": size,
        "controls": controls,
        "origins": tuple(arguments.origin),
    }
    config = Config(**settings, **options, together=arguments.together or arguments.max_sessions)
    serve(pipe, config, browser=arguments.open)


def _convert(arguments: argparse.Namespace, _: Sequence[str]) -> None:
    replaced = arguments.target.is_file()
    dtype = None if arguments.dtype is None else DTYPES[arguments.dtype]
    options = {"dtype": dtype, "config": arguments.config}
    scheduler = parse_changes(arguments.scheduler)
    if arguments.to in LORAS:
        if scheduler:
            raise ValueError(f"--scheduler is an option of models, and --to {arguments.to} writes a LoRA: leave it out")
        options |= {"base": arguments.base, "rank": arguments.rank}
        summary = convert_lora(arguments.source, arguments.target, arguments.to, **options)
    else:
        options |= {"variant": arguments.variant, "scheduler": scheduler}
        summary = convert(arguments.source, arguments.target, arguments.to, **options)
    if replaced:
        print(f"lcm-jax: {arguments.target} is replaced", file=sys.stderr)
    print(f"{arguments.target}: {summary}")
    if arguments.to not in LORAS:
        _say_next(f'lcm-jax sample --model {arguments.target} --prompt "a cat"')


def _config(arguments: argparse.Namespace, overrides: Sequence[str]) -> tuple[Any, str]:
    """Return the config that --config, --objective and the keys name, and the run's name."""
    require("train")
    import lcm_jax.configs as configs

    asked = ["--help"] if arguments.help else []
    config, name = configs.get(arguments.config), configs.run_name(arguments.config)
    if getattr(arguments, "objective", None) is not None:
        config = configs.with_method(config, arguments.objective, name)
        name = f"{name}_{arguments.objective.rpartition(':')[2]}"
    return override(config, [*overrides, *asked], arguments.config), name


def _train(arguments: argparse.Namespace, overrides: Sequence[str]) -> None:
    config, name = _config(arguments, overrides)
    workdir = arguments.workdir or Path("runs") / name
    config.run(workdir)
    if distributed.is_main():
        print(f"{workdir / 'export'}: the result; {workdir / 'tensorboard'}: scalars and pictures")
        model = getattr(config.task, "model", None)  # of some tasks a network's config
        model, word = model if isinstance(model, str) else None, getattr(config.task, "word", None)
        _say_next(_use_of(workdir / "export", model, word))


def _use_of(export: Path, model: str | None, word: str | None = None) -> str:
    """Return the command that draws with the export of a training, or shows its curves where it does not draw."""
    if (export / "model_index.json").is_file():
        return f'lcm-jax sample --model {export} --prompt "red heart"'
    if any(export.glob("*lora*.safetensors")) and model is not None:
        return f'lcm-jax sample --model {model} --lora {export} --prompt "red heart"'
    if word is not None and model is not None:
        return f'lcm-jax sample --model {model} --embeddings {export} --prompt "red heart {word}"'
    return f"tensorboard --logdir {export.parent / 'tensorboard'}"


def _configs(_: argparse.Namespace, __: Sequence[str]) -> None:
    require("train")
    import lcm_jax.configs as configs

    print(listings.list_configs(configs.CONFIGS))
    _say_next("lcm-jax train --config NAME --help   (its keys), lcm-jax train --config NAME")


def _models(_: argparse.Namespace, __: Sequence[str]) -> None:
    print(listings.list_models())
    _say_next('lcm-jax sample --model NAME --prompt "red heart"')


def _samplers(_: argparse.Namespace, __: Sequence[str]) -> None:
    print(listings.list_samplers())
    _say_next('lcm-jax sample --sampler NAME --prompt "red heart"')


def _completion(arguments: argparse.Namespace, _: Sequence[str]) -> None:
    names: list[str] = []
    with contextlib.suppress(ModuleNotFoundError):  # without the extra there is nothing to train
        require("train")
        import lcm_jax.configs as configs

        names = [*configs.CONFIGS]
    print(listings.completion(parser(RUNS), arguments.shell, names))


def _plan(arguments: argparse.Namespace, overrides: Sequence[str]) -> None:
    from lcm_jax.plan.command import run_plan

    check_compiler(arguments.topology)
    config, name = _config(arguments, overrides)

    options = {"searching": arguments.search, "machine_code": arguments.machine_code, "out": arguments.json}
    print(run_plan(config, name, arguments.topology, **options))


def _device() -> str:
    device = jax.devices()[0]
    return f"{device.device_kind} (jax {jax.__version__})"


RUNS = {
    "demo": _demo,
    "sample": _sample,
    "compile": _compile,
    "train": _train,
    "distill": _train,
    "encode": _encode,
    "plan": _plan,
    "evaluate": _evaluate,
    "stream": _stream,
    "bench": _bench,
    "serve": _serve,
    "convert": _convert,
    "configs": _configs,
    "models": _models,
    "samplers": _samplers,
    "completion": _completion,
}
