"""`lcm-jax serve` in a separate process, for benches and tests that use it from outside."""

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
    """A server that listens at `address`, http://127.0.0.1:PORT; `process.stdout` has what it prints after that."""

    address: str
    process: subprocess.Popen[str]


@contextmanager
def serving(*options: str, **environment: str) -> Iterator[Served]:
    """Run a server on a free port while the block runs; at the end it is stopped by SIGINT if it still runs.

    options: of the command line `lcm-jax serve`. environment: variables added to this process's. Raises RuntimeError if
    the server ends before it listens.
    """
    command = [sys.executable, "-m", "lcm_jax.cli", "serve", "--port", "0", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | environment) as process:
        try:
            assert process.stdout is not None
            lines = map(re.compile(r"(http://127\.0\.0\.1:\d+)/$").search, process.stdout)
            match = next(filter(None, lines), None)
            if match is None:
                arguments = " ".join(command[3:])
                raise RuntimeError(f"lcm-jax {arguments} ended with status {process.wait()} before it listened")
            yield Served(match.group(1), process)
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGINT)
                process.wait(60)
