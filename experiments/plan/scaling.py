"""Weak scaling by plan, from 8 to 256 chips: `python experiments/plan/scaling.py` writes results/plan_scaling.*.

The batch grows with the number of chips. Efficiency is the step's time on 8 chips over that on n chips, once with no
collective overlapping compute and once with all of them.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict, replace
from pathlib import Path

import matplotlib.pyplot as plt

from lcm_jax import configs
from lcm_jax.plan.planning import Plan, plan
from lcm_jax.plan.report import table
from lcm_jax.runtime.atomic_files import write_json
from lcm_jax.weights.safetensors_files import read_json

RESULTS = Path(__file__).parent.parent / "results"
TOPOLOGIES = {8: "v5e:2x4", 16: "v5e:4x4", 32: "v5e:4x8", 64: "v5e:8x8", 128: "v5e:8x16", 256: "v5e:16x16"}


def meshes(chips: int) -> dict[str, str]:
    """Return the meshes to compare: all chips along fsdp, or groups of eight along fsdp with copies along data."""
    return {"fsdp=n": f"data=1,fsdp={chips}", "data=n/8, fsdp=8": f"data={chips // 8},fsdp=8"}


def main() -> None:
    """Plan every number of chips and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="mmdit_d24")
    parser.add_argument("--rows", type=int, default=16, help="examples of the batch on each chip")
    parser.add_argument("--chips", type=int, nargs="+", default=list(TOPOLOGIES))
    arguments = parser.parse_args()
    file = RESULTS / "plan_scaling.json"
    results = read_json(file) if file.is_file() else {}
    for chips in arguments.chips:
        for title, mesh in meshes(chips).items():
            config = configs.get(arguments.config)
            loop = replace(config.loop, mesh=mesh, batch_size=arguments.rows * chips)
            result = plan(replace(config, loop=loop), TOPOLOGIES[chips], arguments.config)
            results.setdefault(title, {})[str(chips)] = asdict(result)
            write_json(file, results)
    plans = {title: [Plan(**runs[str(n)]) for n in TOPOLOGIES if str(n) in runs] for title, runs in results.items()}
    report(plans)
    draw(plans)


def report(plans: dict[str, list[Plan]]) -> None:
    """Print and write the tables and the efficiencies."""
    text = "".join(f"{title}\n\n{table(runs)}\n" for title, runs in plans.items())
    for title, runs in plans.items():
        efficiency = {name: getattr(runs[0], name) / getattr(runs[-1], name) for name in ("step", "overlapped")}
        text += (
            f"{title}: efficiency at {runs[-1].chips} chips against {runs[0].chips} {efficiency['step']:.0%} if no "
            f"collective overlaps with compute, {efficiency['overlapped']:.0%} if all do.\n\n"
        )
    text += "Larger slices have more links to a chip: both axes, and from 16 chips on an axis it closes to a ring.\n"
    (RESULTS / "plan_scaling.md").write_text(text)
    print(text)


def draw(plans: dict[str, list[Plan]]) -> None:
    """Plot the bytes sent by a chip, and the efficiency, against the number of chips."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4))
    for color, (title, runs) in zip(("C0", "C1"), plans.items(), strict=False):
        chips = [run.chips for run in runs]
        sent = [sum(entry["bytes"] for entry in run.collectives.values()) / 1e9 for run in runs]
        left.plot(chips, sent, marker="o", color=color, label=title)
        right.plot(chips, [runs[0].step / run.step for run in runs], marker="o", color=color, label=title)
        overlapped = [runs[0].overlapped / run.overlapped for run in runs]
        right.plot(chips, overlapped, marker="x", linestyle=":", color=color, label=f"{title}, all overlapped")
    left.set_ylabel("sent by a chip in a step, GB")
    right.set_ylabel("efficiency against 8 chips")
    right.axhline(0.9, color="grey", linewidth=0.8)
    right.set_ylim(0, 1.3)
    left.set_ylim(0)
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.set_xticks(list(TOPOLOGIES), list(map(str, TOPOLOGIES)))
        axes.set_xlabel("chips (TPU v5e)")
        axes.grid(alpha=0.3)
        axes.legend()
    first = next(iter(plans.values()))[0]
    figure.suptitle(f"{first.config}, batch {first.batch_size // first.chips} a chip: weak scaling by plan")
    figure.savefig(RESULTS / "plan_scaling.png", dpi=120, bbox_inches="tight")


if __name__ == "__main__":
    main()
