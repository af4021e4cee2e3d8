"""`lcm-jax bench`: times measured side by side in one process, as medians, quartiles and ratios."""

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

# Case -> module.function of this package that makes its rows from Options; the module is imported only then.
CASES: Mapping[str, str] = {
    "unet": "networks.unets",
    "mmdit": "networks.mmdits",
    "vae": "networks.autoencoders",
    "text": "networks.texts",
    "text-to-image": "text_to_image.text_to_image",
    "realtime": "text_to_image.realtime",
    "stream": "stream.stream",
    "training": "training.steps",
    "loading": "startup.loading",
    "start": "startup.starts",
}
WITH_PEER = ("unet", "vae", "text", "text-to-image", "stream", "training")
# Case -> the parts of a model that it can measure in 8 bits.
IN_8_BITS = {"unet": PARTS[:1], "mmdit": PARTS[:1], "vae": ("vae",), "text": ("text",), "text-to-image": PARTS}
NEVER_RANDOM = ("loading", "start")  # these read their model from files
_PACKAGES = ("jax", "jaxlib", "flax", "torch", "diffusers", "transformers")


def run_cases(
    cases: Sequence[str], options: Options, *, repeats: int, out: Path | None = None, profiled: bool = False
) -> None:
    """Measure some cases, print their tables and write every time, with device, versions and date, to a JSON file.

    cases: keys of `CASES`. repeats: runs of each row. out: the JSON file, or None. profiled: print the most expensive
    operations of each row too.

    Raises ValueError for an unknown case, or options that a case does not support, before anything is measured.
    """
    _check(cases, options, repeats)
    titled = (pair for case in cases for pair in rows_of(case, options))
    report(titled, options, repeats=repeats, out=out, profiled=profiled)


def report(
    titled: Iterable[Titled], options: Options, *, repeats: int, out: Path | None = None, profiled: bool = False
) -> None:
    """Measure and print pairs of a title and its rows, one after another, and write the times as `run_cases` does."""
    machine = provenance()
    print(f"{machine['device']}, {options.dtype}, jax {jax.__version__}, {machine['date']}")
    ceiling = ceilings(options.dtype)
    print(f"ceilings: {ceiling.flops / 1e12:.3g} TFLOP/s in a matrix product, {ceiling.bytes / 1e9:.3g} GB/s in a copy")
    record = machine | {"options": vars(options), "ceilings": ceiling._asdict(), "cases": {}}
    for title, rows in titled:
        results = measure(rows, repeats)
        print(f"\n## {title}\n\n{table(results, ceiling)}", flush=True)
        for row in rows if profiled else []:
            print(f"\n{row.name}\n\n{profile.table(profile.operations(row.run))}", flush=True)
        record["cases"][title] = {name: result.record() for name, result in results.items()}
        if out is not None:  # after each case, since a long bench may be stopped
            out.parent.mkdir(parents=True, exist_ok=True)
            write_json(out, record)


def rows_of(case: str, options: Options) -> Iterator[Titled]:
    """Return an iterator over a case's pairs of a title and its rows."""
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
            requested = ", ".join(options.quantize)
            known = "; ".join(f"{name} of {', '.join(parts)}" for name, parts in IN_8_BITS.items())
            raise ValueError(f"bench {case} has no rows of {requested} in 8 bits: --quantize is for {known}")
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
    """Return where and when a measurement is taken: device, date, Python and the versions of installed packages."""
    versions = {name: version for name in _PACKAGES if (version := version_of(name)) is not None}
    return {"device": _device(), "date": str(date.today()), "python": sys.version.split()[0], "versions": versions}


def _device() -> str:
    """Return JAX's name of the device; for a CPU on Linux its model and the number of usable processors."""
    kind, file = jax.devices()[0].device_kind, Path("/proc/cpuinfo")
    model = re.search(r"model name\s*:\s*(.+)", file.read_text()) if kind == "cpu" and file.exists() else None
    return kind if model is None else f"{model.group(1)}, {len(os.sched_getaffinity(0))} processors"
