"""`lcm-jax plan`: from a config's name and a topology to what it takes."""

from __future__ import annotations

import json
import math
from pathlib import Path

import jax

from lcm_jax.plan.planning import plan, search
from lcm_jax.plan.report import describe, table
from lcm_jax.plan.topologies import parse
from lcm_jax.train.config import TrainConfig


def run(config: TrainConfig, name: str, topology: str, *, searching: bool, whole: bool, out: Path | None) -> str:
    """What to print; `out`: a JSON file, "-" for standard output in the text's place.

    A plan is made on the CPU, whatever accelerator this machine has, so that none is taken from whom it serves.
    """
    kind, shape = parse(topology)
    jax.config.update("jax_platforms", "cpu")
    if kind == "cpu":
        jax.config.update("jax_num_cpu_devices", math.prod(shape))
    find = search if searching else (lambda *given, **options: [plan(*given, **options)])
    plans = find(config, topology, name, whole=whole)
    record = [each.to_dict() for each in plans]
    text = json.dumps(record if searching else record[0], indent=2)
    if out is not None and str(out) == "-":
        return text
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text + "\n")
    return describe(plans[0]) + (f"\n\n{table(plans)}" if searching else "")
