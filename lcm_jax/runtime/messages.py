"""Texts of errors and of the command line's help that several packages share."""

from __future__ import annotations

import argparse
from collections.abc import Sequence


def few(what: str, items: Sequence[str], shown: int = 10) -> str:
    """Return the number of items and their names, of which the first `shown` are written out.

    >>> few("layers", ["conv_in", "mid", "conv_out"], shown=2)
    '3 layers (conv_in, mid, and 1 more)'
    """
    more = f", and {len(items) - shown} more" if len(items) > shown else ""
    # Names come from files, and may hold anything: the message stays one line and short.
    names = ", ".join(item if item.isprintable() and len(item) <= 160 else f"{item!r:.160}" for item in items[:shown])
    return f"{len(items)} {what} ({names}{more})"


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """A help formatter that writes an option's default after its help, but for flags and where the default is empty."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        is_silent = action.default in (None, "", []) or isinstance(action.default, bool)
        return action.help if is_silent else super()._get_help_string(action)
