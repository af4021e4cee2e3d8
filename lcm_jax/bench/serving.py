"""`lcm-jax serve` as a process of its own, for what measures or tests it from outside."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple


class Served(NamedTuple):
    """A server that listens at `address`, http://127.0.0.1:PORT; `process.stdout` is what it prints from then on."""

    address: str
    process: subprocess.Popen[str]


@contextmanager
def serving(*options: str, **environment: str) -> Iterator[Served]:
    """A server with options of the command line, on a free port; told to end (SIGINT) where it has not been before.

    RuntimeError if it ends before it listens.
    """
    command = [sys.executable, "-m", "lcm_jax.cli", "serve", "--port", "0", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | environment) as process:
        try:
            assert process.stdout is not None
            lines = map(re.compile(r"(http://127\.0\.0\.1:\d+)/$").search, process.stdout)
            found = next(filter(None, lines), None)
            if found is None:
                own = " ".join(command[3:])
                raise RuntimeError(f"lcm-jax {own} ended with status {process.wait()} before it listened")
            yield Served(found.group(1), process)
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGINT)
                process.wait(60)
