"""Overrides of a config from the command line, by tyro: `--steps 200 --task.objective.skip 10`."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import io
import re
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import tyro

# A field of a union type keeps the type that the config gave it; its keys are flags, not subcommands.
AS_CONFIGURED = (tyro.conf.AvoidSubcommands,)
BARE = ("loop", "optimizer")  # fields of a TrainConfig whose keys have no prefix


def flatten(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (override key, value) of every leaf of a config, in order."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        bare = not prefix and field.name in BARE
        if dataclasses.is_dataclass(value):
            yield from flatten(value, "" if bare else f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}", value


def _without_examples(config: Any) -> None:
    """Cut the examples off the docstrings of a config's classes, which a help text shows; the process ends after it."""
    type(config).__doc__ = (type(config).__doc__ or "").split(3 * ">")[0].rstrip()
    for field in dataclasses.fields(config):
        if dataclasses.is_dataclass(getattr(config, field.name)):
            _without_examples(getattr(config, field.name))


def override(config: Any, overrides: Sequence[str], name: str) -> Any:
    """Return `config` with the overrides applied and checked against the types of its fields.

    overrides: arguments of the command line, such as ("--steps", "200"). name: the config's name, for messages. Raises
    ValueError, in one line, for a wrong value or an unknown key, with the nearest key that exists.
    """
    parse = partial(tyro.cli, type(config), default=config, args=list(overrides), config=AS_CONFIGURED)
    if any(text in ("-h", "--help") for text in overrides):
        _without_examples(config)
        return parse(prog=f"lcm-jax train --config {name}")
    known = {key for key, _ in flatten(config)}
    for text in overrides:
        flag = text.split("=")[0]
        key = flag.removeprefix("--").replace("-", "_")
        if text.startswith("--") and key not in known:
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.4)
            hint = f"; did you mean --{near[0].replace('_', '-')}?" if near else ""
            raise ValueError(f"config {name} has no key {flag}{hint}")
    output = io.StringIO()
    with contextlib.redirect_stderr(output), contextlib.redirect_stdout(output):
        try:
            return parse()
        except SystemExit:
            pass
    words = " ".join(re.sub("[│╭╮╰╯─]", " ", output.getvalue()).split())
    reason = re.search(r"(Error parsing .*?|Missing value.*?|Unrecognized .*?)(?= -{4,}|$)", words)
    raise ValueError(f"config {name}: {reason.group(1) if reason else words}")
