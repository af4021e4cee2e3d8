"""Wording that is needed in more than one place: of errors, and of help."""

from __future__ import annotations

import argparse
from collections.abc import Sequence


def few(what: str, items: Sequence[str], shown: int = 10) -> str:
    """`3 what (a, b, c)`, cut after a few."""
    more = f", and {len(items) - shown} more" if len(items) > shown else ""
    # Names come from files: one line, and not a long one, whatever they hold.
    names = ", ".join(item if item.isprintable() and len(item) <= 160 else f"{item!r:.160}" for item in items[:shown])
    return f"{len(items)} {what} ({names}{more})"


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Defaults after the help of the options that have one: of a flag or an option left out there is nothing to say."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        unsaid = action.default in (None, "", []) or isinstance(action.default, bool)
        return action.help if unsaid else super()._get_help_string(action)
