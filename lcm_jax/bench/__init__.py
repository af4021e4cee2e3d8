"""`lcm-jax bench`: how long things take, measured side by side in one process; medians, spreads and ratios."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import date
from importlib import import_module
from pathlib import Path
from typing import Any

import jax

from lcm_jax.bench import profile
from lcm_jax.bench.measure import Cost, Result, Row, ceilings, measure, table
from lcm_jax.bench.models import GEOMETRIES, PREFIX, SCALES
from lcm_jax.bench.networks import MEASURED, Options, Titled
from lcm_jax.bench.peers import PEERS
from lcm_jax.precision.quantization import PARTS
from lcm_jax.runtime.atomic_files import write_json
from lcm_jax.runtime.optional_deps import version_of

__all__ = [
    "CASES",
    "PEERS",
    "SCALES",
    "Cost",
    "Options",
    "Result",
    "Row",
    "measure",
    "provenance",
    "report",
    "run",
    "table",
]

# Case -> the function of this package that makes its rows, from Options; imported when asked for.
CASES: Mapping[str, str] = {
    "unet": "networks.unets",
    "mmdit": "networks.mmdits",
    "vae": "networks.autoencoders",
    "text": "networks.texts",
    "text-to-image": "pictures.text_to_image",
    "realtime": "pictures.realtime",
    "stream": "stream.stream",
    "training": "training.steps",
    "loading": "starting.loading",
    "start": "starting.starts",
}
WITH_PEER = ("unet", "vae", "text", "text-to-image", "stream", "training")
# Case -> the parts of a model that it has rows of in 8 bits.
IN_8_BITS = {"unet": PARTS[:1], "mmdit": PARTS[:1], "vae": ("vae",), "text": ("text",), "text-to-image": PARTS}
NEVER_RANDOM = ("loading", "start")  # their model is read from files
_PACKAGES = ("jax", "jaxlib", "flax", "torch", "diffusers", "transformers")


def run(
    cases: Sequence[str], options: Options, *, repeats: int, out: Path | None = None, profiled: bool = False
) -> None:
    """Print the tables of some cases, and write every time, with device, versions and date, to a JSON file.

    profiled: print the dearest operations of each row too.

    ValueError for what does not go together, before anything is measured.
    """
    _check(cases, options, repeats)
    titled = (pair for case in cases for pair in rows_of(case, options))
    report(titled, options, repeats=repeats, out=out, profiled=profiled)


def report(
    titled: Iterable[Titled], options: Options, *, repeats: int, out: Path | None = None, profiled: bool = False
) -> None:
    """Measure and print (title, rows), one after another, and keep the times; as `run`."""
    where = provenance()
    print(f"{where['device']}, {options.dtype}, jax {jax.__version__}, {where['date']}")
    ceiling = ceilings(options.dtype)
    print(f"ceilings: {ceiling.flops / 1e12:.3g} TFLOP/s in a matrix product, {ceiling.bytes / 1e9:.3g} GB/s in a copy")
    kept = where | {"options": vars(options), "ceilings": ceiling._asdict(), "cases": {}}
    for title, rows in titled:
        results = measure(rows, repeats)
        print(f"\n## {title}\n\n{table(results, ceiling)}", flush=True)
        for row in rows if profiled else []:
            print(f"\n{row.name}\n\n{profile.table(profile.operations(row.run))}", flush=True)
        kept["cases"][title] = {name: result.record() for name, result in results.items()}
        if out is not None:  # after each, as a long bench may be stopped
            out.parent.mkdir(parents=True, exist_ok=True)
            write_json(out, kept)


def rows_of(case: str, options: Options) -> Iterator[Titled]:
    """(title, rows) of a case."""
    module, function = CASES[case].split(".")
    titled: Iterator[Titled] = getattr(import_module(f"{__name__}.{module}"), function)(options)
    return titled


def _check(cases: Sequence[str], options: Options, repeats: int) -> None:
    for case in cases:
        if case not in CASES:
            raise ValueError(f"bench {case}: no such case; known are {', '.join(CASES)}")
        if options.peer is not None and case not in WITH_PEER:
            raise ValueError(f"bench {case} has no peer to be measured against; {', '.join(WITH_PEER)} have")
        if options.quantize and not options.quantize.keys() & set(IN_8_BITS.get(case, ())):
            asked = ", ".join(options.quantize)
            known = "; ".join(f"{name} of {', '.join(parts)}" for name, parts in IN_8_BITS.items())
            raise ValueError(f"bench {case} has no rows of {asked} in 8 bits: --quantize is for {known}")
    if repeats < 1:
        raise ValueError(f"--repeats {repeats}: it must be at least 1")
    name = options.model.removeprefix(PREFIX)
    if options.model.startswith(PREFIX) and name not in GEOMETRIES:
        known = ", ".join(PREFIX + name for name in GEOMETRIES)
        raise ValueError(f"--model {options.model}: no such geometry; known are {known}")
    for case in cases:
        if case in MEASURED:
            options.geometries(case)
    if "training" in cases:
        import_module(f"{__name__}.training").teacher_of(options)
    clash = next((case for case in cases if case in NEVER_RANDOM), None)
    if options.model.startswith(PREFIX) and clash is not None:
        raise ValueError(f"bench {clash} reads a model from files, and {options.model} has none: give another --model")


def provenance() -> dict[str, Any]:
    """Of a measurement: device (a CPU's model), date, Python and the versions of what is installed."""
    versions = {name: found for name in _PACKAGES if (found := version_of(name)) is not None}
    return {"device": _device(), "date": str(date.today()), "python": sys.version.split()[0], "versions": versions}


def _device() -> str:
    """What JAX calls it; a CPU by its model and the processors that may be used, where Linux says so."""
    kind, told = jax.devices()[0].device_kind, Path("/proc/cpuinfo")
    model = re.search(r"model name\s*:\s*(.+)", told.read_text()) if kind == "cpu" and told.exists() else None
    return kind if model is None else f"{model.group(1)}, {len(os.sched_getaffinity(0))} processors"
