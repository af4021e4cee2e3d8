"""Large runs planned for TPUs and GPUs: `python experiments/plan/fits.py [--only NAME ...]` writes results/plan.*.

Each is compiled once and kept (lcm_jax.plan), so the table can grow from call to call. libtpu and JAX's CUDA plugin are
needed, a TPU and a GPU are not.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict, replace
from pathlib import Path
from typing import NamedTuple

from lcm_jax import configs
from lcm_jax.plan.planning import Plan, compilers, plan
from lcm_jax.plan.report import table
from lcm_jax.runtime.atomic_files import write_json
from lcm_jax.weights.safetensors_files import read_json

RESULTS = Path(__file__).parent.parent / "results"


class Run(NamedTuple):
    config: str
    topology: str
    mesh: str


RUNS = (
    Run("sdxl_lcm", "v5e:8x8", "fsdp=64"),
    Run("sd3_medium_lcm", "v5e:8x8", "fsdp=64"),
    Run("sd35_large_lcm", "v5p:4x4x4", "fsdp=64"),
    Run("mmdit_d24", "v5e:8x8", "fsdp=64"),
    Run("sd15_lcm", "h100:8", "data=8"),
    Run("sdxl_lcm", "h100:8", "fsdp=8"),
    Run("sd3_medium_lcm", "h100:8", "fsdp=8"),
    Run("mmdit_d24", "h100:8", "fsdp=8"),
)


ABOUT = """
Of one chip and one step, `python experiments/plan/fits.py`. Each row is the training step of a registered config
(distillation: teacher, student, moving average and AdamW; bfloat16 computation on float32 weights, recomputed blocks),
compiled for the slice on a machine without a TPU as far as the scheduled program and its memory; no machine code.
Those for H100s are compiled to the end, but without the choice of algorithms, for which a card is needed; what they
leave to cuBLAS and cuDNN counts as the product, convolution or attention that it is.
compute is a roofline: of every operation the longer of its FLOPs' and its memory traffic's time. communication is that
of all collectives on links of the published rate. step and MFU: if all of it overlaps with compute, and if none does.

Attention of 1024 by 1024 tokens and more goes by jax's flash kernel, each chip for its own rows, and keeps no logits.
By XLA's attention the MMDiTs at 1024 pixels waited for memory: sd3_medium_lcm had 7.84 GiB of temporaries and 1108 GB
of traffic in a step of 1520 ms and more (18% MFU), sd35_large_lcm 13.07, 3185 and 1439 (28%), sdxl_lcm 2.75, 217 and
515.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", default=[], help="configs or topologies to plan now (default: all)")
    arguments = parser.parse_args()
    kept = RESULTS / "plan.json"
    found = read_json(kept) if kept.is_file() else {}
    for run in RUNS:
        if not arguments.only or {run.config, run.topology} & set(arguments.only):
            config = configs.get(run.config)
            config = replace(config, loop=replace(config.loop, mesh=run.mesh))
            found["/".join(run)] = asdict(plan(config, run.topology, run.config))
            write_json(kept, found)
    plans = [Plan(**found["/".join(run)]) for run in RUNS if "/".join(run) in found]
    (RESULTS / "plan.md").write_text(f"{table(plans)}\n{ABOUT}\n{compilers()}\n")
    print(table(plans))


if __name__ == "__main__":
    main()
