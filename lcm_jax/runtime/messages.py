"""Wording that is needed in more than one place: of errors, and of help."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable, Sequence


def few(what: str, items: Sequence[str], shown: int = 10) -> str:
    """`3 what (a, b, c)`, cut after a few."""
    more = f", and {len(items) - shown} more" if len(items) > shown else ""
    # Names come from files: one line, and not a long one, whatever they hold.
    names = ", ".join(item if item.isprintable() and len(item) <= 160 else f"{item!r:.160}" for item in items[:shown])
    return f"{len(items)} {what} ({names}{more})"


def other_depths(want: Iterable[str], have: Iterable[str]) -> list[str]:
    """Stacks of numbered layers of which a file has another number than the network that its config describes."""

    def count(names: Iterable[str]) -> dict[str, int]:
        found: dict[str, set[str]] = {}
        for name in names:
            if match := re.match(r"(.*?)\.(\d+)\.", name):
                found.setdefault(match[1], set()).add(match[2])
        return {stack: len(numbers) for stack, numbers in found.items()}

    counts = count(have)
    return [
        f"depth: {counts[stack]} {stack} in the file, {n} by its config (num_layers, num_hidden_layers)"
        for stack, n in count(want).items()
        if counts.get(stack, n) != n
    ]


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Defaults after the help of the options that have one: of a flag or an option left out there is nothing to say."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        unsaid = action.default in (None, "", []) or isinstance(action.default, bool)
        return action.help if unsaid else super()._get_help_string(action)
