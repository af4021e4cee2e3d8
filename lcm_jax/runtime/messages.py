"""Texts of errors and of the command line's help that several packages share."""

from __future__ import annotations

import argparse
import contextlib
import difflib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax


def shown(value: Any, most: int = 160) -> str:
    """Return a value from a file as it is shown in a message: escaped where it is not printable, and cut.

    >>> from lcm_jax.runtime.messages import shown
    >>> shown("a\\nb"), shown([1, 2]), shown("long" * 100, most=12)
    ("'a\\\\nb'", '[1, 2]', "'longlong...")
    """
    return shortened(repr(value), most)


def shortened(text: str, most: int = 800) -> str:
    """Return a text as one printable line of at most `most` characters: other characters are escaped.

    >>> from lcm_jax.runtime.messages import shortened
    >>> shortened("one\\ntwo"), shortened("a long text", most=9)
    ('one\\\\ntwo', 'a long...')
    """
    line = text if text.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in text[:most])
    return line if len(line) <= most else f"{line[: most - 3]}..."


def few(what: str, items: Sequence[str], shown: int = 10) -> str:
    """Return the number of items and their names, of which the first `shown` are written out.

    >>> few("layers", ["conv_in", "mid", "conv_out"], shown=2)
    '3 layers (conv_in, mid, and 1 more)'
    """
    more = f", and {len(items) - shown} more" if len(items) > shown else ""
    # Names come from files, and may hold anything: the message stays one line and short.
    names = ", ".join(shortened(item, 160) for item in items[:shown])
    return f"{len(items)} {what} ({names}{more})"


def raise_all(problems: Sequence[str], shown: int = 3) -> None:
    """Raise ValueError, in one line, with the first problems and the number of the others; none is no error.

    So a folder with many faults is not started again for each of them.

    >>> raise_all(["a.png: no caption", "b.png: no caption"])
    Traceback (most recent call last):
    ValueError: a.png: no caption (1 problem more: b.png: no caption)
    """
    if problems:
        first, *rest = problems
        more = "; ".join(rest[:shown]) + ("; ..." if len(rest) > shown else "")
        count = f" ({len(rest)} problem{'s' * (len(rest) > 1)} more: {more})" if rest else ""
        raise ValueError(first + count)


def did_you_mean(word: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """Return "; did you mean NAME?" with the known name nearest to a word, in upper or lower case, or "" for none.

    >>> did_you_mean("Sampel", ["sample", "stream"]), did_you_mean("x", ["sample"])
    ('; did you mean sample?', '')
    """
    by_folded = {name.casefold(): name for name in known}
    near = difflib.get_close_matches(word.casefold(), by_folded, n=1, cutoff=cutoff)
    return f"; did you mean {by_folded[near[0]]}?" if near else ""


LESS_MEMORY = "give a smaller size, fewer pictures or a smaller batch, dtype bfloat16, or quantize to int8"


@contextlib.contextmanager
def out_of_memory(what: str, advice: str) -> Iterator[None]:
    """Turn an exhausted device into a MemoryError of one line. what: what did not fit. advice: what needs less memory.

    >>> with out_of_memory("4 pictures", "draw fewer"):
    ...     raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 8 bytes.")
    Traceback (most recent call last):
    MemoryError: 4 pictures: the memory of cpu is too small; draw fewer (Out of memory allocating 8 bytes.)
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if not is_out_of_memory(error):
            raise
        reason = str(error).partition(": ")[2].splitlines()[0]
        device = jax.devices()[0].device_kind
        raise MemoryError(f"{what}: the memory of {device} is too small; {advice} ({reason:.200})") from None


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that a device has no memory left.

    XLA says so as RESOURCE_EXHAUSTED; on a CPU, of a program that runs in the background, as INTERNAL with the reason.
    """
    said = str(error)
    is_jax = isinstance(error, jax.errors.JaxRuntimeError)
    return is_jax and ("RESOURCE_EXHAUSTED" in said or "Out of memory" in said)


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """A help formatter that writes an option's default after its help, but for flags and where the default is empty.

    A text of several lines, such as a command's examples, keeps them.
    """

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default in (None, "", [], ()) or isinstance(action.default, bool):
            return action.help
        text = super()._get_help_string(action)
        if isinstance(action.default, (list, tuple)) and text is not None:  # as they are typed
            text = text.replace("%(default)s", " ".join(map(str, action.default)))
        return text

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        if "\n" in text:
            return "".join(f"{indent}{line}\n" for line in text.splitlines())
        return super()._fill_text(text, width, indent)
