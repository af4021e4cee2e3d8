"""Wording of errors that is needed in more than one place."""

from __future__ import annotations

from collections.abc import Sequence


def few(what: str, items: Sequence[str], shown: int = 10) -> str:
    """`3 what (a, b, c)`, cut after a few."""
    more = f", and {len(items) - shown} more" if len(items) > shown else ""
    # Names come from files: one line, and not a long one, whatever they hold.
    names = ", ".join(item if item.isprintable() and len(item) <= 160 else f"{item!r:.160}" for item in items[:shown])
    return f"{len(items)} {what} ({names}{more})"
