"""Pictures on a mesh of TPUs: a guided step compiled for a slice, without a TPU.

`python experiments/plan/drawing.py` writes results/plan_drawing.{json,md}: what a chip holds and moves that has one
picture, as `Pipeline.spread` and the previews of a training have it, and if attention were not told how the rows lie
(`lcm_jax.parallel.sharding.constrain_batch_sharding`). Parameters are bfloat16 and on every chip. Minutes for each.
"""

from __future__ import annotations

import argparse
import contextlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from lcm_jax.bench.models import GEOMETRIES
from lcm_jax.models.latent_diffusion import LatentDiffusion
from lcm_jax.nets import example_inputs
from lcm_jax.parallel.sharding import batch_sharding, constrain_batch_sharding, make_mesh, replicated
from lcm_jax.plan.planning import compilers
from lcm_jax.plan.topologies import open_topology
from lcm_jax.runtime.atomic_files import write_json
from lcm_jax.runtime.compiler_options import memory_of
from lcm_jax.runtime.hardware import GIB
from lcm_jax.weights.abstract_params import abstract_params
from lcm_jax.weights.registry import FAMILIES
from lcm_jax.weights.safetensors_files import read_json
from lcm_jax.weights.scheduler_config import read_scheduler
from mmdit import example_inputs as mmdit_inputs
from mmdit.attention import lowering_for

RESULTS = Path(__file__).parent.parent / "results"
MODELS = ("sd15", "sd3")


def measure(name: str, mesh: Any, *, told: bool) -> dict[str, Any]:
    """GiB and GB of a chip, for a picture of the model's own size on each."""
    parts = GEOMETRIES[name].parts
    denoiser = "transformer" if name == "sd3" else "unet"
    types = {"dtype": jnp.bfloat16, "param_dtype": jnp.bfloat16}
    net, vae = (FAMILIES[parts[part][0]].build(parts[part][1], **types) for part in (denoiser, "vae"))
    schedule, kind = read_scheduler(dict(GEOMETRIES[name].scheduler), source=name)
    model = LatentDiffusion(net=net, vae=vae, schedule=schedule, kind=kind)
    size = (net.config.sample_size,) * 2
    x, _, cond = (
        mmdit_inputs(net.config, size=size, tokens=333) if name == "sd3" else example_inputs(net.config, size=size)
    )

    def rows(leaf: Any) -> Any:
        return jax.ShapeDtypeStruct((mesh.size, *leaf.shape[1:]), jnp.float32, sharding=batch_sharding(mesh))

    def believe(params: Any, cond: Any, null: Any, x: Any) -> Any:
        with constrain_batch_sharding(mesh) if told else contextlib.nullcontext():
            t = jnp.full(x.shape[0], 0.5 * schedule.t_max)
            return model.denoiser(params, cond, null, 7.5, guided=True)(x, t).x0

    everywhere = {"dtype": jnp.bfloat16, "sharding": replicated(mesh)}
    shapes = abstract_params(*parts[denoiser])
    weights = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, **everywhere), shapes)
    cond = jax.tree.map(rows, dict(cond))
    with lowering_for("tpu"):
        traced = jax.jit(believe).trace(weights, cond, cond, rows(x))
        compiled = traced.lower(lowering_platforms=("tpu",)).compile()
    return {
        "peak_gib": memory_of(compiled) / GIB,
        "temporaries_gib": compiled.memory_analysis().temp_size_in_bytes / GIB,
        "traffic_gb": compiled.cost_analysis()["bytes accessed"] / 1e9,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--topology", default="v5e:2x2")
    arguments = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    mesh = make_mesh(devices=open_topology(arguments.topology).devices)
    kept = RESULTS / "plan_drawing.json"
    found = read_json(kept) if kept.is_file() else {}
    for name in arguments.model:
        for told in (False, True):
            title = f"{name}, {'told' if told else 'not told'}"
            found[title] = measure(name, mesh, told=told) | {"topology": arguments.topology}
            write_json(kept, found)
    lines = ["| model | for | peak, GiB | temporaries, GiB | traffic, GB |", "|---|---|---|---|---|"]
    for title, of in found.items():
        numbers = (f"{of[key]:.2f}" for key in ("peak_gib", "temporaries_gib", "traffic_gb"))
        lines.append(f"| {' | '.join([title, of['topology'], *numbers])} |")
    about = f"\n{compilers()}; `python experiments/plan/drawing.py`"
    (RESULTS / "plan_drawing.md").write_text("\n".join([*lines, about]) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
