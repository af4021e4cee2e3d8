"""Pictures on a mesh of TPUs: a guided step compiled for a slice, without a TPU.

`python experiments/plan/drawing.py` writes results/plan_drawing.{json,md}: the memory and the traffic of a chip that
draws one picture. "told" is as in `Pipeline.shard` and the previews of a training, where attention knows how the batch
is sharded (`lcm_jax.parallel.sharding.constrain_batch_sharding`); "not told" is without that. Parameters are bfloat16
and on every chip. Each takes minutes.
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


def measure(name: str, mesh: Any, *, constrained: bool) -> dict[str, Any]:
    """Return the memory (GiB) and traffic (GB) of a chip that draws one picture of the model's size.

    constrained: whether attention knows how the batch is sharded.
    """
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

    def batched(leaf: Any) -> Any:
        return jax.ShapeDtypeStruct((mesh.size, *leaf.shape[1:]), jnp.float32, sharding=batch_sharding(mesh))

    def predict(params: Any, cond: Any, null: Any, x: Any) -> Any:
        with constrain_batch_sharding(mesh) if constrained else contextlib.nullcontext():
            t = jnp.full(x.shape[0], 0.5 * schedule.t_max)
            return model.denoiser(params, cond, null, 7.5, guided=True)(x, t).x0

    on_every_chip = {"dtype": jnp.bfloat16, "sharding": replicated(mesh)}
    shapes = abstract_params(*parts[denoiser])
    weights = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, **on_every_chip), shapes)
    cond = jax.tree.map(batched, dict(cond))
    with lowering_for("tpu"):
        traced = jax.jit(predict).trace(weights, cond, cond, batched(x))
        compiled = traced.lower(lowering_platforms=("tpu",)).compile()
    return {
        "peak_gib": memory_of(compiled) / GIB,
        "temporaries_gib": compiled.memory_analysis().temp_size_in_bytes / GIB,
        "traffic_gb": compiled.cost_analysis()["bytes accessed"] / 1e9,
    }


def main() -> None:
    """Measure the models and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--topology", default="v5e:2x2")
    arguments = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    mesh = make_mesh(devices=open_topology(arguments.topology).devices)
    file = RESULTS / "plan_drawing.json"
    results = read_json(file) if file.is_file() else {}
    for name in arguments.model:
        for constrained in (False, True):
            title = f"{name}, {'told' if constrained else 'not told'}"
            results[title] = measure(name, mesh, constrained=constrained) | {"topology": arguments.topology}
            write_json(file, results)
    lines = ["| model | for | peak, GiB | temporaries, GiB | traffic, GB |", "|---|---|---|---|---|"]
    for title, result in results.items():
        numbers = (f"{result[key]:.2f}" for key in ("peak_gib", "temporaries_gib", "traffic_gb"))
        lines.append(f"| {' | '.join([title, result['topology'], *numbers])} |")
    about = f"\n{compilers()}; `python experiments/plan/drawing.py`"
    (RESULTS / "plan_drawing.md").write_text("\n".join([*lines, about]) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
