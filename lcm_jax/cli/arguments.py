"""The options of the commands of `lcm-jax`."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from lcm_jax import bench
from lcm_jax.cli import demo
from lcm_jax.cli.listings import SHELLS
from lcm_jax.diffusion.samplers import SAMPLERS
from lcm_jax.diffusion.time_grids import RULES, SPACINGS
from lcm_jax.inference.ahead_of_time import PLATFORMS
from lcm_jax.inference.call_options import DIFFUSERS_OPTIONS
from lcm_jax.inference.parameters import DTYPES
from lcm_jax.metrics.bootstrap import RESAMPLES
from lcm_jax.models.prompt_syntax import SYNTAXES
from lcm_jax.precision import quantization
from lcm_jax.runtime.messages import HelpFormatter, did_you_mean
from lcm_jax.runtime.optional_deps import version_of
from lcm_jax.weights.convert import FORMATS

METHOD = "another few-step method: lcm, tcd, pcm, ctm, ..., or FILE.py:CLASS of your own"

Run = Callable[[argparse.Namespace, Sequence[str]], None]

GROUPS: Mapping[str, Sequence[str]] = {
    "draw": ("sample", "demo", "stream", "serve", "compile"),
    "train": ("train", "distill", "encode", "plan"),
    "measure": ("evaluate", "bench"),
    "take weights elsewhere": ("convert",),
    "look up names": ("configs", "models", "samplers", "completion"),
}
EXAMPLES: Mapping[str, Sequence[str]] = {
    "demo": ("lcm-jax demo --out out/demo",),
    "sample": (
        'lcm-jax sample --prompt "red heart" --out heart.png',
        'lcm-jax sample --model openmoji-teacher --prompt "cat face" "dog face" --num-images 4 --seed 7 --out out',
        'lcm-jax sample --prompt "cat face" --image photo.jpg --strength 0.6 --out cat.png',
    ),
    "compile": ('lcm-jax compile -o heart.program && lcm-jax sample --compiled heart.program --prompt "red heart"',),
    "train": (
        "lcm-jax train --config openmoji_teacher --steps 200",
        "lcm-jax train --config openmoji_teacher --task.data.name folder:my-pictures",
        "lcm-jax train --config openmoji_teacher --help   # the keys of the config",
    ),
    "distill": ("lcm-jax distill --config openmoji_lcm", "lcm-jax distill --config openmoji_lcm --objective tcd"),
    "encode": ("lcm-jax encode --data folder:my-pictures --out encoded",),
    "plan": (
        "lcm-jax plan --config sdxl_lcm --topology v5e:8x8",
        "lcm-jax plan --config sd3_medium_lcm --objective scm --topology v5e:8x8 --mesh fsdp=64",
    ),
    "evaluate": (
        "lcm-jax evaluate --model openmoji --steps 1 2 4 8 --out scores.json",
        "lcm-jax evaluate --model my-model --data folder:held-out --features dinov2:facebook/dinov2-large",
    ),
    "stream": (
        'lcm-jax stream film.mp4 --prompt "cat face" --out redrawn.mp4',
        'lcm-jax stream noise --prompt "red heart" "cat face" --strength 1 --out way.mp4',
    ),
    "bench": ("lcm-jax bench unet stream --against diffusers",),
    "serve": ("lcm-jax serve   # then open http://127.0.0.1:7860/",),
    "convert": ("lcm-jax convert model.safetensors my-model --to diffusers",),
    "completion": ('eval "$(lcm-jax completion bash)"   # in ~/.bashrc',),
}
EXIT_CODES = (
    "exit codes: 0 done; 1 or 2 bad input or a failure, said in one line; 75 a training was saved and is not finished; "
    "130 stopped by Ctrl-C"
)


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, with the name that was meant."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse as argparse does, and remember the arguments for the errors."""
        self.typed = list(sys.argv[1:] if args is None else args)
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        """End the process with code 2 and one line."""
        choice = re.match(r"argument (.*): invalid choice: '(.*?)' \(choose from (.*)\)", message)
        if choice is not None:
            known = [word.strip(" '") for word in choice[3].split(",")]
            message, hint = f"{choice[1]} {choice[2]} is unknown", did_you_mean(choice[2], known)
            hint = hint or f"; known are {', '.join(known)}"
        else:
            wrong = [word for word in self.typed if word.startswith("--") and not self._known(word)]
            hint = f"; {self.unknown(wrong[0])}" if wrong and "required" in message else ""
        self.exit(2, f"lcm-jax: {message}{hint}; see {self.prog} --help\n".replace("?;", "?"))

    def unknown(self, word: str) -> str:
        """Return what to say of an option that there is not."""
        name = word.partition("=")[0]
        other = DIFFUSERS_OPTIONS.get(name.strip("-").replace("-", "_"))
        if other is not None:
            option = "--size HEIGHT WIDTH" if other.startswith("size") else f"--{other.replace('_', '-')}"
            if option.split()[0] in self._option_string_actions:
                return f"unknown argument {name}; it is called {option} here"
        return f"unknown argument {name}{did_you_mean(name.replace('_', '-'), self._option_string_actions)}"

    def _known(self, word: str) -> bool:
        return any(option.startswith(word.partition("=")[0]) for option in self._option_string_actions)


class _Help(argparse.Action):
    """Print the help of a command, or, where a config is named, leave it to the command to print the config's keys."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: Any, values: Any, option: str | None = None) -> None:
        if namespace.config is None:
            parser.print_help()
            parser.exit()
        namespace.help = True


def parser(runs: Mapping[str, Run]) -> argparse.ArgumentParser:
    """Return the parser of all commands. runs: the function of each command, which becomes `run` once parsed."""
    commands_parser = Parser(
        prog="lcm-jax",
        description="Latent consistency models and Stable Diffusion in JAX.",
        formatter_class=HelpFormatter,
    )
    commands_parser.add_argument("--version", action="version", version=f"lcm-jax {version_of('lcm-jax')}")
    commands = commands_parser.add_subparsers(dest="command", required=True, metavar="COMMAND", help=argparse.SUPPRESS)
    texts: dict[str, str] = {}

    def command(name: str, text: str, **options: Any) -> argparse.ArgumentParser:
        texts[name] = text
        examples = "".join(f"\n  {line}" for line in EXAMPLES.get(name, ()))
        epilog = (f"examples:{examples}\n\n" if examples else "") + f"{EXIT_CODES}\n"
        sub: argparse.ArgumentParser = commands.add_parser(
            name, help=text, description=text, epilog=epilog, formatter_class=HelpFormatter, **options
        )
        sub.set_defaults(run=runs[name])
        if name in GROUPS["look up names"]:
            sub.set_defaults(imports=[])
            return sub
        text = "Python files of your own to run first, which register samplers, objectives, data sources or configs"
        sub.add_argument("--import", nargs="+", default=[], type=Path, metavar="FILE.py", dest="imports", help=text)
        return sub

    sub = command("demo", "Teacher, LCM and LCM-LoRA side by side: a grid, a table, a JSON file.")
    sub.add_argument("--out", type=Path, default=Path("out/demo"), help="folder to write to")
    sub.add_argument("--model", default="openmoji", help="bundled model")
    sub.add_argument("--guidance", type=float, default=demo.GUIDANCE, help="guidance scale of teacher and student")
    sub.add_argument("--seed", type=int, default=0, help="seed of the noise")

    sub = command("sample", "Draw pictures of prompts.")
    _add_model(sub)
    sub.add_argument("--prompt", nargs="+", required=True, help="one or more texts")
    sub.add_argument("--negative-prompt", default="", help="text to guide away from")
    sub.add_argument("--steps", type=int, help="solver steps; the sampler's usual number by default, 4 for a student")
    text = f"rule for the steps' noise levels, of {', '.join(RULES)}, or the levels themselves, such as 14,3,0.5"
    sub.add_argument("--sigmas", metavar="RULE|LIST", help=text)
    sub.add_argument("--timesteps", metavar="LIST", help="timesteps of the steps, such as 999,759,499,259")
    sub.add_argument("--spacing", choices=SPACINGS, help="spacing of the timesteps; the model's own by default")
    sub.add_argument("--seed", type=int, default=0, help="seed of the noise")
    sub.add_argument("--num-images", type=int, default=1, help="pictures for each prompt")
    _add_size(sub)
    sub.add_argument("--image", type=Path, help="start from this picture (image-to-image)")
    sub.add_argument("--strength", type=float, help="share of the way to noise, in (0, 1]; 0.6, or 1 with --mask")
    sub.add_argument("--mask", type=Path, help="redraw only where this picture is white (inpainting)")
    sd3 = sub.add_argument_group("Stable Diffusion 3")
    sd3.add_argument("--t5-tokens", type=int, help="length of a prompt for T5; 256 by default")
    sd3.add_argument("--shift", type=float, help="shift of the noise levels; the model's own by default")
    sd3.add_argument("--single-shift", action="store_true", help="shift once, not twice as the references do")
    sd3.add_argument("--skip-layers", type=int, nargs="+", default=[], help="skip-layer guidance, such as 7 8 9")
    sd3.add_argument("--skip-scale", type=float, default=2.8, help="scale of skip-layer guidance")
    sd3.add_argument(
        "--skip-interval", type=float, nargs=2, default=(0.01, 0.2), help="first and last fraction of the steps with it"
    )
    sub.add_argument("--compiled", type=Path, metavar="FILE", help="draw with a program that lcm-jax compile wrote")
    sub.add_argument("--out", type=Path, default=Path("out"), help="a .png or .jpg file for one picture, or a folder")
    _add_devices(sub, None)

    sub = command("compile", "Write a program that draws, from prompt to picture, for sample --compiled.")
    _add_model(sub)
    _add_size(sub)
    sub.add_argument("--batch", type=int, default=1, help="pictures in a call")
    sub.add_argument("--platform", choices=PLATFORMS, help="platform to compile for; this machine's by default")
    sub.add_argument("-o", "--out", type=Path, required=True, metavar="FILE", help="file to write")

    for name, text in (("train", "Train a registered config."), ("distill", "Distil a registered config.")):
        text += " Other options override keys of the config; --config NAME --help lists them."
        sub = command(name, text, add_help=False)
        sub.add_argument("-h", "--help", action=_Help, nargs=0, help="this message, or after --config NAME its keys")
        sub.add_argument("--config", required=True, help="name in lcm_jax.configs, or FILE.py:NAME of your own")
        sub.add_argument("--workdir", type=Path, help="checkpoints, logs and result; runs/NAME by default")
        if name == "distill":
            sub.add_argument("--objective", metavar="METHOD", help=METHOD)
        _add_job(sub)

    sub = command(
        "encode", "Compute latents and text embeddings of a data set once, in shards; resumes where it stopped."
    )
    sub.add_argument(
        "--model",
        default="openmoji",
        help="model whose autoencoder and text encoders are used, as in the training config",
    )
    sub.add_argument("--data", required=True, help='"folder:PATH", "tar:FILES", "tfds:NAME or PATH", "openmoji"')
    sub.add_argument("--split", default="train", help="split of the data")
    sub.add_argument(
        "--out",
        type=Path,
        required=True,
        help="folder that all processes share; training then takes it as --task.data.name",
    )
    sub.add_argument("--size", type=int, help="pixels of the squares; the model's own by default")
    sub.add_argument(
        "--shards", type=int, help="number of shards, at least one for each process; one for 4096 pictures by default"
    )
    sub.add_argument(
        "--batch", type=int, help="pictures at a time in each process; a megapixel for each device by default"
    )
    sub.add_argument(
        "--part", metavar="P/N", help="this is process P of N processes that are not connected, such as 0/4"
    )
    sub.add_argument("--mesh", default="", help="mesh of a process's devices: fsdp=4 cuts a large T5 over four")
    sub.add_argument(
        "--digest",
        action="store_true",
        help="know pictures by their bytes, all of which are read first, and not by path, size and time",
    )
    _add_job(sub)

    text = (
        "Compile a config's training step for a topology: memory, FLOPs, collectives, time. No accelerator is needed."
    )
    text += " Other options override keys of the config, such as --mesh; --config NAME --help lists them."
    sub = command("plan", text, add_help=False)
    sub.add_argument("-h", "--help", action=_Help, nargs=0, help="this message, or after --config NAME its keys")
    sub.add_argument("--config", required=True, help="name in lcm_jax.configs, or FILE.py:NAME of your own")
    sub.add_argument("--objective", metavar="METHOD", help=f"of a distillation: {METHOD}")
    sub.add_argument("--topology", default="v5e:8x8", help="chips to plan for: v5e:8x8, v5p:4x4x4, h100:8")
    sub.add_argument("--search", action="store_true", help="try the meshes, and rank them")
    sub.add_argument("--machine-code", action="store_true", help="run the compiler to its end, with machine code")
    sub.add_argument("--json", type=Path, help="file to write the plans to; - for standard output")

    sub = command(
        "evaluate",
        "Frechet distance, KID, CMMD, CLIP score, precision, recall, density, coverage; VAE PSNR and SSIM. Each has an "
        "interval of 95 percent: the pictures are drawn again with replacement, --resamples times (basic bootstrap; of "
        "Frechet distances by the first-order influence of each picture).",
    )
    _add_model(sub)
    sub.add_argument("--steps", type=int, nargs="+", default=[1, 2, 4, 8], help="numbers of solver steps to evaluate")
    sub.add_argument("--data", default="openmoji", help='"openmoji", "openmoji-outline", "folder:PATH" or "tfds:NAME"')
    sub.add_argument("--split", default="validation", help="split of the data")
    sub.add_argument("--limit", type=int, help="number of pictures at most")
    sub.add_argument("--clip", default="openmoji", help="model with text_encoder and image_encoder, or a CLIP's folder")
    known = "distances on other features than the CLIP's: dinov2:FOLDER (FD-DINOv2) or inception:FILE (FID)"
    sub.add_argument("--features", metavar="KIND:PATH", help=known)
    sub.add_argument(
        "--inception",
        dest="features",
        type=lambda path: f"inception:{path}",
        default=argparse.SUPPRESS,
        metavar="FILE",
        help="the same as --features inception:FILE",
    )
    known = "PickScore, a CLIPModel's folder, or HPSv2, a file with OpenCLIP's names; pickscore: or hpsv2: says which"
    sub.add_argument("--preference", nargs="+", default=[], metavar="[KIND:]PATH", help=known)
    sub.add_argument("--resamples", type=int, default=RESAMPLES, help="of the bootstrap; 0 for no intervals")
    sub.add_argument("--batch-size", type=int, default=32, help="pictures in a call")
    sub.add_argument("--seed", type=int, default=0, help="seed of the noise")
    sub.add_argument("--out", type=Path, help="JSON file to write the scores to")
    _add_devices(sub, "")

    sub = command("stream", "Redraw a video, a folder of pictures, a camera, a screen, or draw from noise.")
    sub.add_argument("source", help='a video file, a folder, "camera[:PLACE]", "screen[:PLACE]" or "noise"')
    _add_model(sub)
    sub.add_argument("--out", type=Path, required=True, help="a video file such as out.mp4, or a folder for pictures")
    sub.add_argument("--prompt", nargs="+", required=True, help="what to draw; from noise, several to travel through")
    sub.add_argument("--negative-prompt", default="", help="text to guide away from")
    sub.add_argument("--steps", type=int, default=2, help="network evaluations for each frame")
    sub.add_argument("--strength", type=float, default=0.6, help="share of the way to noise, in (0, 1]")
    sub.add_argument("--seed", type=int, default=0, help="seed of the noise")
    _add_size(sub, default="area")
    sub.add_argument(
        "--similarity", type=float, help="skip frames that are more similar than this to the last, such as 0.98"
    )
    sub.add_argument(
        "--set", nargs="+", default=[], metavar="KEY=VALUE", help="other controls: guidance=self delta=0.5"
    )
    sub.add_argument("--count", type=int, default=60, help="source noise: number of pictures")
    sub.add_argument("--seconds", type=float, help="source camera or screen: seconds to run; until Ctrl-C by default")
    sub.add_argument("--rate", type=float, default=12.0, help="frames a second of a video whose source is not a video")

    sub = command("bench", "Measure this machine: medians, quartiles and ratios.")
    sub.add_argument("cases", nargs="+", metavar="CASE", help=", ".join(bench.CASES))
    sub.add_argument("--against", choices=bench.PEERS, help="measure a peer in turns, on the same weights")
    model = "model for the cases stream, training, loading and start; random-sd15 has random weights"
    sub.add_argument("--model", default="openmoji", help=model)
    sub.add_argument("--dtype", default="float32", choices=DTYPES, help="precision of the networks")
    sub.add_argument("--scale", default="full", choices=bench.SCALES, help="tiny: networks for a smoke test")
    sub.add_argument("--device", choices=["cpu", "gpu", "tpu"], help="JAX's best by default")
    sub.add_argument("--batch", type=int, nargs="+", default=[], help="batch sizes; each case has its own by default")
    _add_quantize(sub, "rows of the denoiser in 8 bits too")
    sub.add_argument("--side", type=int, help="pixels of a stream's sides; the model's own by default")
    sub.add_argument("--repeats", type=int, default=5, help="runs of each row")
    sub.add_argument("--profile", action="store_true", help="also print the most expensive operations of each row")
    sub.add_argument("--json", type=Path, help="JSON file to write every measured time to")

    sub = command("serve", "Redraw a browser's camera, screen or drawing in real time; pictures by HTTP.")
    _add_model(sub)
    sub.add_argument("--prompt", default="cat face", help="prompt at the start of a session")
    sub.add_argument("--steps", type=int, default=2, help="steps at the start of a session")
    sub.add_argument("--strength", type=float, default=0.5, help="strength at the start of a session")
    _add_size(sub)
    sub.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 for all")
    sub.add_argument("--port", type=int, default=7860, help="port; 0 for any that is free")
    sub.add_argument("--open", action="store_true", help="open the page in the browser of this machine")
    sub.add_argument("--max-sessions", type=int, default=4, help="sessions that stream at the same time")
    sub.add_argument("--max-waiting", type=int, default=16, help="sessions that wait for a place")
    sub.add_argument("--idle-timeout", type=float, default=60.0, help="seconds without a frame that end a session")
    sub.add_argument("--together", type=int, help="sessions in one call of the network; --max-sessions by default")
    sub.add_argument("--token", help="token that page, socket and HTTP ask for")
    sub.add_argument("--origin", nargs="+", default=[], help="other pages that may connect: https://example.org")

    sub = command("convert", "Write a model or a LoRA in another format.")
    sub.add_argument("source", metavar="SRC", help="bundled name, diffusers or orbax folder, single file, LoRA, hub id")
    sub.add_argument("target", metavar="DST", type=Path, help="a folder, or a .safetensors file for single and lora-*")
    sub.add_argument("--to", required=True, choices=FORMATS)
    sub.add_argument("--dtype", choices=sorted(DTYPES), help="dtype of floating tensors; unchanged by default")
    sub.add_argument("--config", help="folder or hub id with the configs and tokenizers of a single file")
    sub.add_argument("--variant", help='which files of a folder to read, such as "fp16"')
    _add_scheduler(sub)
    sub.add_argument("--base", help="for LoRA: the model it is for; to extract one: the model SRC was made from")
    sub.add_argument("--rank", type=int, default=64, help="rank of an extracted LoRA")

    command("configs", "List the configs that train, distill and plan take.")
    command("models", "List the bundled models; a folder, a single file or a hub id is a model too.")
    command("samplers", "List the samplers.")
    sub = command("completion", "Write a script for tab completion; pip install 'lcm-jax[completion]' brings shtab.")
    sub.add_argument("shell", choices=SHELLS)

    lines = [f"  {name:10}  {texts[name].partition('. ')[0].rstrip('.')}" for name in texts]
    by_name = dict(zip(texts, lines, strict=True))
    parts = [
        "\n".join([f"to {group}:", *(by_name[name] for name in group_names)]) for group, group_names in GROUPS.items()
    ]
    more = "lcm-jax COMMAND --help shows a command's options and examples."
    commands_parser.epilog = "\n\n".join([*parts, more, EXIT_CODES]) + "\n"
    return commands_parser


def _add_job(command_parser: argparse.ArgumentParser) -> None:
    sub = command_parser.add_argument_group("processes of a job")
    sub.add_argument(
        "--coordinator",
        metavar="HOST:PORT",
        help="address of process 0 in a job of several processes; auto: as JAX finds it",
    )
    sub.add_argument(
        "--processes", type=int, metavar="N", help="number of processes in the job; found on Slurm, Open MPI and GKE"
    )
    sub.add_argument("--process", type=int, metavar="I", help="index of this process, from 0")
    sub.add_argument(
        "--peer-timeout",
        type=int,
        default=100,
        metavar="S",
        help="seconds without a sign after which a process counts as dead",
    )


def _add_devices(sub: argparse.ArgumentParser, mesh: str | None) -> None:
    text = "devices along each axis, such as data=4,fsdp=2; the batch is cut over data and fsdp"
    sub.add_argument("--mesh", default=mesh, help=f"{text} (all along data by default)" if mesh == "" else text)
    _add_job(sub)


def _add_size(sub: argparse.ArgumentParser, default: str = "own") -> None:
    text = f"the model's {default} by default"
    sub.add_argument(
        "--size", type=int, nargs="+", metavar="PIXELS", help=f"height and width, or one for a square; {text}"
    )


def _add_scheduler(sub: Any) -> None:
    text = "keys of the scheduler config to replace: prediction_type=v_prediction rescale_betas_zero_snr=true"
    sub.add_argument("--scheduler", nargs="+", default=[], metavar="KEY=VALUE", help=text)


def _add_quantize(sub: Any, what: str) -> None:
    known = f"{what}: {', '.join(quantization.KINDS)} (int8w: kernels only); also text=KIND and vae=KIND"
    sub.add_argument("--quantize", nargs="+", default=[], metavar="[PART=]KIND", help=known)


def _add_model(command_parser: argparse.ArgumentParser) -> None:
    sub = command_parser.add_argument_group("the model")
    sub.add_argument("--model", default="openmoji", help="bundled name, diffusers or orbax folder, single file, hub id")
    sub.add_argument("--variant", help='which files of a folder to read, such as "fp16"')
    sub.add_argument("--config", help="folder or hub id with the configs and tokenizers of a single file")
    _add_scheduler(sub)
    sub.add_argument("--tiny-vae", metavar="PATH", help="a TAESD in place of the autoencoder")
    sub.add_argument("--no-t5", dest="t5", action="store_false", help="SD3: leave out the third text encoder")
    sub.add_argument("--lora", nargs="+", default=[], metavar="PATH[:WEIGHT]", help="adapters to merge")
    text = "textual inversions; WORD stands for one in a prompt, by default its own or the file's name"
    sub.add_argument("--embeddings", nargs="+", default=[], metavar="FILE[:WORD]", help=text)
    text = "prompts with weights and of any length: (word:1.2) of a1111 and comfyui, (word)1.2 of compel"
    sub.add_argument("--prompt-syntax", choices=sorted(SYNTAXES), help=text)
    sub.add_argument(
        "--clip-skip", type=int, metavar="LAYERS", help="last layers of the CLIPs to leave out, as in diffusers"
    )
    known = ", ".join(sorted(SAMPLERS))
    sub.add_argument("--sampler", help=f"the model's own by default; {known}, or FILE.py:NAME of your own")
    sub.add_argument(
        "--guidance",
        type=float,
        help=f"guidance scale; {demo.GUIDANCE:g} by default, 1 with an LCM-LoRA or a student without one",
    )
    sub.add_argument("--dtype", default="float32", choices=DTYPES, help="precision of the networks")
    _add_quantize(sub, "the denoiser in 8 bits")
