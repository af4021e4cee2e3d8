"""The time to compile the step of an MMDiT of depth 24, with its blocks scanned or unrolled.

`python experiments/plan/compiling.py` writes results/plan_compiling.{json,md}: seconds of a core to trace and lower the
step, and to compile it. Each runs in its own process without a compilation cache. For one CPU device the compiler runs
to its end, for a TPU slice to the scheduled program, as for a plan. Seconds of a core are counted because other
processes may run at the same time.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import jax

from lcm_jax import configs
from lcm_jax.parallel.sharding import make_mesh
from lcm_jax.plan.planning import DUMP, Traced, compile_step, compilers, elapsed
from lcm_jax.plan.topologies import open_topology
from lcm_jax.runtime.atomic_files import write_json
from lcm_jax.weights.safetensors_files import read_json

RESULTS = Path(__file__).parent.parent / "results"


def measure(config_name: str, topology_name: str, mesh: str, scan: bool) -> dict[str, float]:
    """Return the seconds to lower and to compile the step, of a core and in all, and the peak memory in GiB.

    scan: whether the blocks are scanned. For a TPU the environment variable DUMP names the folder of the compiler's
    dump.
    """
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_compilation_cache", False)
    config = configs.get(config_name)
    batch_size = config.loop.batch_size if topology_name != "cpu:1" else 8
    task, loop = replace(config.task, scan=scan), replace(config.loop, mesh=mesh, batch_size=batch_size)
    topology = open_topology(topology_name)
    devices = make_mesh(mesh, batch_size=batch_size, devices=topology.devices)
    traced = Traced(config=replace(config, task=task, loop=loop), mesh=devices, platform=topology.platform)
    folder = Path(os.environ["DUMP"]) if topology.platform == "tpu" else None
    start, wall = time.process_time(), time.perf_counter()
    lowered = traced.lowered
    middle = time.process_time()
    with elapsed(f"compiling {config_name} for {topology_name}, {'scanned' if scan else 'unrolled'}", 60.0):
        compile_step(lowered, devices.size, folder)
    end = time.process_time()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    wall = time.perf_counter() - wall
    return {"lowering": middle - start, "compiling": end - middle, "wall": wall, "peak_gib": peak}


def main() -> None:
    """Measure what is not in the results yet, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="mmdit_d24")
    parser.add_argument("--topology", nargs="+", default=["cpu:1", "v5e:8x8"])
    parser.add_argument("--one", nargs=3, metavar=("TOPOLOGY", "MESH", "SCAN"), help="in this process, and print it")
    arguments = parser.parse_args()
    if arguments.one:
        topology, mesh, scan = arguments.one
        print(json.dumps(measure(arguments.config, topology, mesh, scan == "scan")), flush=True)
        os._exit(0)  # the compiler may still run
    file = RESULTS / "plan_compiling.json"
    results = read_json(file) if file.is_file() else {}
    for topology in arguments.topology:
        mesh = "data=1" if topology == "cpu:1" else "fsdp=64"
        for scan in ("scan", "unrolled"):
            if scan not in results.setdefault(topology, {}):
                command = [sys.executable, __file__, "--config", arguments.config, "--one", topology, mesh, scan]
                with tempfile.TemporaryDirectory() as folder:
                    environment = os.environ | {"DUMP": folder, "XLA_FLAGS": DUMP.format(folder=folder)}
                    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
                results[topology][scan] = json.loads(done.stdout.splitlines()[-1])
                write_json(file, results)
    lines = ["| step of | for | blocks | lowering, s | compiling, s | peak memory, GiB |", "|---|---|---|---|---|---|"]
    for topology, runs in results.items():
        for scan, run in runs.items():
            numbers = f"{run['lowering']:.1f} | {run['compiling']:.1f} | {run['peak_gib']:.1f}"
            lines.append(f"| {arguments.config} | {topology} | {scan} | {numbers} |")
    for topology, runs in results.items():
        if len(runs) == 2:
            ratio = runs["unrolled"]["compiling"] / runs["scan"]["compiling"]
            lines.append(f"\n{topology}: scanned blocks compile {ratio:.1f} times faster.")
    about = f"\n{compilers()}, {os.cpu_count()} cores; `python experiments/plan/compiling.py`"
    (RESULTS / "plan_compiling.md").write_text("\n".join([*lines, about]) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
