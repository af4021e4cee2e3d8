"""`lcm-jax`, also as `python -m lcm_jax.cli`."""

import importlib
import os
import signal
import sys
from typing import Any


def run() -> int:
    """Run the command line; Ctrl-C while it is still imported, which takes seconds, is one line too."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # XLA's own lines, such as of a compilation that is slow
    usual = signal.getsignal(signal.SIGINT)
    if usual is signal.default_int_handler:
        signal.signal(signal.SIGINT, _stop)
    main = importlib.import_module("lcm_jax.cli.main").main
    if usual is signal.default_int_handler:
        signal.signal(signal.SIGINT, usual)
    code: int = main()
    return code


def _stop(*_: Any) -> None:
    # Not an exception: half-imported extension modules turn it into errors of their own.
    print("lcm-jax: stopped by Ctrl-C", file=sys.stderr, flush=True)
    os._exit(130)


if __name__ == "__main__":
    sys.exit(run())
