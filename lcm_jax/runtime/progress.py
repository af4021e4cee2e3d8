"""Progress of work that takes a while: a bar with a name on a terminal, and lines now and then in a log."""

from __future__ import annotations

import contextlib
import logging
import sys
import threading
from collections.abc import Iterable, Iterator
from typing import Any

from tqdm import tqdm

LINE_SECONDS = 30.0  # between two lines of a log; work that is done before writes none
PHASE_SECONDS = 1.0  # a phase without a length that takes less is not named
_LINE = "{desc}: {n_fmt}/{total_fmt} {unit} [{elapsed}<{remaining}, {rate_fmt}{postfix}]"


def progress(
    work: Iterable[Any] | int | None,
    desc: str,
    unit: str = "it",
    *,
    total: int | None = None,
    initial: int = 0,
    leave: bool = False,
    disable: bool = False,
) -> tqdm:
    """Return a tqdm bar for a phase of the work, on stderr; where that is not a terminal, it writes lines now and then.

    A bar is an iterator over `work`, or a context manager whose `update(n)` counts.

    Args:
        work: what to go through, or the number of steps that `update` will count; None: a number that nobody knows.
        desc: the phase's name, such as "encoding". unit: what is counted, in the singular.
        total: the length of `work` where it has none of its own.
        initial: the steps that an earlier run has done.
        leave: whether the bar stays on the terminal when the phase is done.
        disable: nothing is shown; for all processes but the main one.

    >>> from lcm_jax.runtime.progress import progress
    >>> [2 * picture for picture in progress(range(3), "reading", "picture", disable=True)]
    [0, 2, 4]
    """
    iterable, total = (None, work) if isinstance(work, int) else (work, total)
    options: dict[str, Any] = {"desc": desc, "unit": unit, "total": total, "initial": initial, "disable": disable}
    if sys.stderr.isatty():
        return tqdm(iterable, leave=leave, dynamic_ncols=True, **options)
    options |= {"miniters": 1, "mininterval": LINE_SECONDS, "delay": LINE_SECONDS, "bar_format": _LINE}
    return _Lines(iterable, leave=False, **options)  # what stays is the last line


class _Lines(tqdm):
    """A bar for a log: every time it is shown it is one more line, without control characters.

    The first line comes after LINE_SECONDS, whether anything is done by then or not.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._first = threading.Timer(LINE_SECONDS, self.display)
        self._first.daemon = True
        if not self.disable:
            self._first.start()

    def close(self) -> None:
        """Write no more lines but the last."""
        self._first.cancel()
        super().close()

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:
        """Write a line if none was written lately, and the last one when the bar closes."""
        del pos
        closes = msg == ""  # what tqdm shows in place of a bar that is closed and does not stay
        now, last = self._time(), getattr(self, "_last_line", self.start_t)
        if closes or now - last >= self.mininterval:
            self._last_line = now
            self.fp.write(f"{self}\n")
            self.fp.flush()
        return False  # tqdm writes nothing after it

    def clear(self, *_: Any, **__: Any) -> None:
        """Do nothing: a line that is written stays."""


@contextlib.contextmanager
def phase(name: str) -> Iterator[None]:
    """Name a phase that nobody can count, such as "compiling", in the log "lcm_jax" if it is not done in a second.

    The command line writes that log to stderr, a line for each phase; in Python `logging.basicConfig(level="INFO")`
    shows it.

    >>> from lcm_jax.runtime.progress import phase
    >>> with phase("compiling"):
    ...     pass
    """
    timer = threading.Timer(PHASE_SECONDS, logging.getLogger("lcm_jax").info, [name])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
