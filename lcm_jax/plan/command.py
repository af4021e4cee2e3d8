"""`lcm-jax plan`: the plan of a config's training step on a topology, as text or JSON."""

from __future__ import annotations

import json
import math
from pathlib import Path

import jax

from lcm_jax.plan.planning import plan, search
from lcm_jax.plan.report import describe, table
from lcm_jax.plan.topologies import check_compiler, parse
from lcm_jax.train.config import TrainConfig


def run_plan(
    config: TrainConfig, name: str, topology: str, *, searching: bool, machine_code: bool, out: Path | None
) -> str:
    """Plan a config's training step and return the text to print.

    searching: plan all meshes of the topology and add a table of them, the best first. machine_code: run the compiler
    to its end. out: a JSON file to write; "-" returns the JSON in place of the text. A plan is made on the CPU,
    whatever accelerator this machine has, so that other programs can use the accelerator. Raises ValueError as `plan`
    and `search` do.
    """
    kind, shape = parse(topology)
    check_compiler(topology)
    jax.config.update("jax_platforms", "cpu")
    if kind == "cpu":
        jax.config.update("jax_num_cpu_devices", math.prod(shape))
    plans = (
        search(config, topology, name, machine_code=machine_code)
        if searching
        else [plan(config, topology, name, machine_code=machine_code)]
    )
    records = [entry.to_dict() for entry in plans]
    text = json.dumps(records if searching else records[0], indent=2)
    if out is not None and str(out) == "-":
        return text
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text + "\n")
    return describe(plans[0]) + (f"\n\n{table(plans)}" if searching else "")
