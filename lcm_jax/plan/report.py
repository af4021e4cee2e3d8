"""Plans as text: one plan in full, several as a table."""

from __future__ import annotations

from collections.abc import Sequence

from lcm_jax.plan.planning import Plan, format_mesh
from lcm_jax.runtime.hardware import GIB


def describe(plan: Plan) -> str:
    """Return one plan as text: memory, FLOPs, collectives and time, a line for each."""
    gib = [size / GIB for size in (plan.arguments, plan.temporaries, plan.peak, plan.capacity)]
    lines = [
        f"{plan.config} on {plan.topology}, {format_mesh(plan.mesh)}, batch {plan.batch_size}, "
        f"{plan.parameters / 1e6:,.0f} M trained parameters",
        f"memory of a chip: {gib[0]:.2f} GiB arguments, {gib[1]:.2f} GiB temporaries; peak {gib[2]:.2f} of "
        f"{gib[3]:.0f} GiB: {'fits' if plan.fits else 'DOES NOT FIT'}",
    ]
    if not plan.fits and not plan.flops:
        return "\n".join(lines)
    lines += [
        f"FLOPs of a chip: {plan.flops / 1e12:.2f} T executed, {plan.model_flops / 1e12:.2f} T of the model; "
        f"memory traffic {plan.traffic / 1e9:.1f} GB",
        *(
            f"{kind}: {entry['count']:,.0f}, {entry['bytes'] / 1e9:.3f} GB sent by a chip, {entry['seconds']:.4f} s"
            for kind, entry in sorted(plan.collectives.items())
        ),
        f"step: {plan.compute * 1e3:.0f} ms compute + {plan.communication * 1e3:.0f} ms communication, between "
        f"{plan.overlapped * 1e3:.0f} ms (all of it overlaps) and {plan.step * 1e3:.0f} ms (none does); MFU "
        f"{plan.mfu[1]:.0%} to {plan.mfu[0]:.0%}; {plan.batch_size / plan.step:,.0f} samples/s",
    ]
    if plan.endless:
        lines.append(f"{plan.endless} loops, whose length the program does not give, are counted once")
    return "\n".join(lines)


HEADS = (
    *("config", "topology", "mesh", "batch", "arguments, GiB", "temporaries, GiB", "peak, GiB", "HBM, GiB", "fits"),
    *("TFLOP", "traffic, GB", "collectives", "sent, GB", "compute, ms", "communication, ms", "step, ms", "MFU"),
)


def table(plans: Sequence[Plan]) -> str:
    """Return plans as a Markdown table, one plan a row.

    Bytes, FLOPs and collectives are those of one chip and one step. step and MFU are ranges: with overlap of all
    communication, and without any.
    """
    rows = [HEADS, ("---",) * len(HEADS), *map(_row, plans)]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n"


def _row(plan: Plan) -> tuple[str, ...]:
    sizes = [f"{size / GIB:.2f}" for size in (plan.arguments, plan.temporaries, plan.peak)]
    head = (
        plan.config,
        plan.topology,
        format_mesh(plan.mesh),
        str(plan.batch_size),
        *sizes,
        f"{plan.capacity / GIB:.0f}",
    )
    if not plan.flops:
        return (*head, "no", *("",) * 8)
    count, sent = (sum(entry[key] for entry in plan.collectives.values()) for key in ("count", "bytes"))
    return (
        *head,
        "yes" if plan.fits else "no",
        f"{plan.flops / 1e12:.2f}",
        f"{plan.traffic / 1e9:.0f}",
        f"{count:,.0f}",
        f"{sent / 1e9:.2f}",
        f"{plan.compute * 1e3:.0f}",
        f"{plan.communication * 1e3:.0f}",
        f"{plan.overlapped * 1e3:.0f} – {plan.step * 1e3:.0f}",
        f"{plan.mfu[1]:.0%} – {plan.mfu[0]:.0%}",
    )
