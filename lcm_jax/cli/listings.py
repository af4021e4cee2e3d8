"""What there is to name on the command line: `lcm-jax configs`, `models`, `samplers`, and tab completion of it."""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from lcm_jax.diffusion.samplers import SAMPLERS
from lcm_jax.runtime.optional_deps import require
from lcm_jax.weights.hub import BUNDLED

SHELLS = ("bash", "zsh", "tcsh")
_MODELS = {
    "openmoji": "64x64 emoji in four steps: a latent consistency model",
    "openmoji-teacher": "the model that openmoji was distilled from, with DDIM",
    "openmoji-lcm-lora": "an adapter that lets openmoji-teacher draw in four steps: --model openmoji-teacher --lora",
    "openmoji-sd3": "a small Stable Diffusion 3 in four steps",
    "openmoji-sd3-teacher": "the model that openmoji-sd3 was distilled from, with Euler",
    "openmoji-sd3-lcm-lora": "an adapter that lets openmoji-sd3-teacher draw in four steps",
}


def list_configs(configs: Mapping[str, Callable[[], Any]]) -> str:
    """Return the registered configs, a line each, with the first sentence of their docstrings."""
    rows = []
    for name, config in sorted(configs.items()):
        text = " ".join((inspect.getdoc(config) or "").partition("\n\n")[0].split())
        rows.append((name, text))
    return _columns(rows)


def list_models() -> str:
    """Return the bundled models, a line each."""
    return _columns((name, _MODELS[name]) for name in BUNDLED)


def list_samplers() -> str:
    """Return the samplers, a line each: the usual steps, evaluations a step, and diffusers' names for it.

    >>> from lcm_jax.cli.listings import list_samplers
    >>> print(list_samplers().splitlines()[0])
    lcm          4 steps, 1 evaluation a step; LCMScheduler, FlowMatchLCMScheduler
    """
    rows = []
    for name, sampler in SAMPLERS.items():
        evaluations = sampler.solver.evaluations
        facts = f"{sampler.usual_steps} steps, {evaluations} evaluation{'s' * (evaluations > 1)} a step"
        rows.append((name, "; ".join([facts, *([", ".join(sampler.diffusers)] if sampler.diffusers else [])])))
    return _columns(rows)


def completion(parser: argparse.ArgumentParser, shell: str, configs: Iterable[str] = ()) -> str:
    """Return a script for tab completion of commands, options, configs, models and files in a shell, by shtab.

    configs: the names of the registered configs.
    """
    require("completion")
    import shtab

    words = {"--config": sorted(configs), "--model": [*BUNDLED], "--sampler": [*SAMPLERS]}
    preamble = "".join(
        f'_lcm_jax_{option.strip("-")}() {{ compgen -W "{" ".join(known)}" -- "$1"; compgen -f -- "$1"; }}\n'
        for option, known in words.items()
    )
    for sub in _subparsers(parser):
        for action in sub._actions:
            option = next((text for text in action.option_strings if text in words), None)
            if option is not None:
                known = " ".join(words[option])
                action.complete = {  # type: ignore[attr-defined]
                    "bash": f"_lcm_jax_{option.strip('-')}",
                    "zsh": f"({known})",
                    "tcsh": f"p/*/({known})/",
                }
            elif action.type is not None and getattr(action.type, "__name__", "") == "Path":
                action.complete = shtab.FILE  # type: ignore[attr-defined]
    preambles: Any = {"bash": preamble}
    script: str = shtab.complete(parser, shell, preamble=preambles)
    return script


def _subparsers(parser: argparse.ArgumentParser) -> Iterable[argparse.ArgumentParser]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            action.help = None  # shtab leaves out what is suppressed
            yield from action.choices.values()


def _columns(rows: Iterable[tuple[str, str]]) -> str:
    rows = list(rows)
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:{width}}  {text}".rstrip() for name, text in rows)
