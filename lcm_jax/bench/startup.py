"""The cases that time a user's wait: reading a model, and `lcm-jax sample` from the shell, cold and warm."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import jax

from lcm_jax.bench.measure import Row
from lcm_jax.bench.networks import Options, Titled
from lcm_jax.inference.loading import load


def loading(options: Options) -> Iterator[Titled]:
    """Yield the row of loading every network of the model, from its files to the device."""

    def read() -> None:
        pipe = load(options.model, dtype=options.dtype)
        jax.block_until_ready([pipe.params[name] for name in pipe.params])

    yield f"Loading {options.model}", [Row(name="lcm_jax.load, all networks", run=read)]


def starts(options: Options) -> Iterator[Titled]:
    """Yield the rows of `lcm-jax sample` in a new process, with an empty and with a filled cache of programs."""
    temporary = tempfile.TemporaryDirectory()  # the rows refer to it, so it is not deleted before they have run
    folder = temporary.name

    def sample(cache: str) -> None:
        command = [
            sys.executable,
            "-m",
            "lcm_jax.cli",
            "sample",
            "--model",
            options.model,
            "--prompt",
            "red heart",
        ]
        command += ["--dtype", options.dtype, "--out", str(Path(folder) / "pictures")]
        subprocess.run(command, check=True, capture_output=True, env=os.environ | {"LCM_JAX_CACHE": cache})

    cold = Row(name="cold", run=lambda: sample(tempfile.mkdtemp(dir=temporary.name)))
    yield (
        f"`lcm-jax sample --model {options.model}`, a new process",
        [cold, Row(name="warm", run=lambda: sample(str(Path(folder) / "cache")), against="cold")],
    )
