"""Plans of large runs for TPUs and GPUs: `python experiments/plan/fits.py [--only NAME ...]` writes results/plan.*.

Each run is compiled once and cached (lcm_jax.plan), so the table can grow from call to call. libtpu and JAX's CUDA
plugin are needed; a TPU or a GPU is not.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict, replace
from datetime import date
from pathlib import Path
from typing import NamedTuple

from lcm_jax import configs
from lcm_jax.plan.planning import Plan, compilers, plan
from lcm_jax.plan.report import table
from lcm_jax.runtime.atomic_files import write_json
from lcm_jax.weights.safetensors_files import read_json

RESULTS = Path(__file__).parent.parent / "results"


class Run(NamedTuple):
    """A run to plan: its config, topology and mesh, and where they are not the config's, the method and attention."""

    config: str
    topology: str
    mesh: str
    objective: str = ""
    attention: str = ""

    @property
    def key(self) -> str:
        """The run's name in the results."""
        return "/".join(filter(None, self))

    def plan(self) -> Plan:
        """Compile the training step, or read its plan from the cache."""
        config, name = configs.get(self.config), self.config
        if self.objective:
            config, name = configs.with_method(config, self.objective, name), f"{name}_{self.objective}"
        if self.attention:
            config = replace(config, task=replace(config.task, attention=self.attention))
            name = f"{name}, attention {self.attention}"
        return plan(replace(config, loop=replace(config.loop, mesh=self.mesh)), self.topology, name)


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

FORWARD_MODE = (
    Run("sd3_medium_lcm", "v5e:8x8", "fsdp=64", "scm", "xla"),
    Run("sd3_medium_lcm", "v5e:8x8", "fsdp=64", "scm"),
    Run("sd3_medium_lcm", "v5e:8x8", "fsdp=64", "meanflow", "xla"),
    Run("sd3_medium_lcm", "v5e:8x8", "fsdp=64", "meanflow"),
)

ABOUT = """
The numbers are those of one chip and one step, by `python experiments/plan/fits.py`. Each row is the training step of a
registered config (distillation: teacher, student, moving average and AdamW; bfloat16 computation on float32 weights,
recomputed blocks), compiled for the slice on a machine without a TPU, up to the scheduled program and its memory; no
machine code is made. Steps for H100s are compiled to the end, but without the choice of algorithms, which needs a card;
calls of cuBLAS and cuDNN count as the product, convolution or attention that they compute.
compute is a roofline: for every operation the longer time, that of its FLOPs or that of its memory traffic.
communication is the time of all collectives on links of the published rate. step and MFU are ranges: if all
communication overlaps with compute, and if none does.

Attention of 1024 by 1024 tokens and more uses jax's flash kernel, each chip for its own part of the batch, and stores
no logits. With XLA's attention the MMDiTs at 1024 pixels were limited by memory: sd3_medium_lcm had 7.84 GiB of
temporaries and 1108 GB of traffic in a step of 1520 ms and more (18% MFU), sd35_large_lcm 13.07, 3185 and 1439 (28%),
sdxl_lcm 2.75, 217 and 515.
"""

ABOUT_FORWARD_MODE = """
sCM and MeanFlow train with the network's derivative along a direction (`jax.jvp`), of which jax's flash kernel has
none. `attention xla` is XLA's, which stores the logits and their derivatives; without it attention and its derivative
are one kernel (`mmdit/tpu_attention_jvp.py`), and attention elsewhere is jax's flash kernel. The command of a row is
`lcm-jax plan --config sd3_medium_lcm --objective METHOD --topology v5e:8x8 --mesh fsdp=64`, with `--task.attention
xla` or without; all rows at once, `python experiments/plan/fits.py --only scm meanflow`.
A kernel's operands count once in the traffic. The kernel of the derivative reads the keys once for each of nine tiles
of queries, which is 11 GB more in a step.
"""


def main() -> None:
    """Plan the runs and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", default=[], help="configs, topologies, methods (default: all)")
    arguments = parser.parse_args()
    file = RESULTS / "plan.json"
    results = read_json(file) if file.is_file() else {}
    for run in (*RUNS, *FORWARD_MODE):
        if not arguments.only or {run.config, run.topology, run.objective} & set(arguments.only):
            results[run.key] = asdict(run.plan())
            write_json(file, results)
    first, second = (
        table([Plan(**results[run.key]) for run in runs if run.key in results]) for runs in (RUNS, FORWARD_MODE)
    )
    title = "## Methods that need the derivative of attention"
    text = (
        f"{first}\n{ABOUT}\n{compilers()}\n\n{title}\n\n{second}{ABOUT_FORWARD_MODE}\n{date.today()}; {compilers()}\n"
    )
    (RESULTS / "plan.md").write_text(text)
    print(first, second, sep="\n")


if __name__ == "__main__":
    main()
