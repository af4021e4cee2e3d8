"""The effect of 8 bits on a TPU: a network compiled for one chip, in bfloat16 and in 8 bits, without a TPU.

`python experiments/plan/quantized.py` writes results/plan_quantized.{json,md}: the matrix products of the compiled
program by the type that they sum in (int32 for products of 8 bits), the bytes read and written, and the bytes of
arguments and temporaries in the chip's memory. Each takes minutes.
"""

from __future__ import annotations

import argparse
import re
from collections import Counter
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lcm_jax.bench.models import GEOMETRIES
from lcm_jax.nets import example_inputs
from lcm_jax.plan.planning import compilers
from lcm_jax.plan.topologies import open_topology
from lcm_jax.precision.context import precision_context
from lcm_jax.precision.quantization import quantize
from lcm_jax.runtime.atomic_files import write_json
from lcm_jax.weights.abstract_params import abstract_params
from lcm_jax.weights.registry import FAMILIES
from lcm_jax.weights.safetensors_files import read_json
from mmdit import example_inputs as mmdit_inputs
from mmdit.attention import attention_mesh, lowering_for
from mmdit.text import T5_XXL

RESULTS = Path(__file__).parent.parent / "results"
# Name -> the kind of 8 bits; denoisers for one picture, and SD3's largest text encoder for one prompt.
NETWORKS = {"sd15": "int8", "sd3": "int8", "t5": "int8w"}
_PRODUCT = re.compile(r" = (s32|f32|bf16)\[[^\]]*\]\S* convolution\(")  # every matrix product in a TPU's program


def _half(tree: Any) -> Any:
    """Return the same shapes with bfloat16 in place of other float types."""
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(
            leaf.shape, jnp.bfloat16 if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf.dtype
        ),
        tree,
    )


def _network(name: str) -> tuple[str, Any, tuple[Any, ...]]:
    """Return the class, the config and the inputs of a network."""
    if name == "t5":
        return "T5EncoderModel", T5_XXL, (jax.ShapeDtypeStruct((1, 256), jnp.int32),)
    family, config = GEOMETRIES[name].parts["transformer" if name == "sd3" else "unet"]
    size = (config.sample_size,) * 2
    x, t, cond = mmdit_inputs(config, size=size, tokens=154) if name == "sd3" else example_inputs(config, size=size)
    return family, config, (_half(x), jax.ShapeDtypeStruct(t.shape, jnp.float32), _half(cond))


def measure(name: str, kind: str, device: Any) -> dict[str, Any]:
    """Return products, traffic and memory (GB) of a call for one picture of the network's size, or for one prompt."""
    family, config, inputs = _network(name)
    net = FAMILIES[family].build(config, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    params = _half(abstract_params(family, config))
    if kind != "bfloat16":
        params = jax.eval_shape(lambda tree: quantize(tree, kind), params)

    def call(params: Any, *inputs: Any) -> Any:
        with precision_context(params) as net_params:
            return net.apply({"params": net_params}, *inputs)

    mesh = Mesh(np.array([[device]]), ("rows", "heads"))
    sharding = NamedSharding(mesh, PartitionSpec())
    with lowering_for("tpu"), attention_mesh(mesh, ("rows",), "heads"):  # attention is that of a single chip
        traced = jax.jit(call, in_shardings=sharding, out_shardings=sharding).trace(params, *inputs)
        compiled = traced.lower(lowering_platforms=("tpu",)).compile()
    memory = compiled.memory_analysis()
    return {
        "products": Counter(_PRODUCT.findall(compiled.as_text())),
        "traffic_gb": compiled.cost_analysis()["bytes accessed"] / 1e9,
        "arguments_gb": memory.argument_size_in_bytes / 1e9,
        "temporaries_gb": memory.temp_size_in_bytes / 1e9,
    }


def main() -> None:
    """Measure the networks and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", nargs="+", default=list(NETWORKS), choices=list(NETWORKS))
    parser.add_argument("--topology", default="v5e:1x1")
    arguments = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    topology = open_topology(arguments.topology)
    file = RESULTS / "plan_quantized.json"
    results = read_json(file) if file.is_file() else {}
    for name in arguments.model:
        for kind in ("bfloat16", NETWORKS[name]):
            results[f"{name}, {kind}"] = measure(name, kind, topology.devices[0]) | {"topology": arguments.topology}
            write_json(file, results)
    lines = [
        "| network | for | products in int32, others | traffic, GB | arguments, GB | temporaries, GB |",
        "|---|---|---|---|---|---|",
    ]
    for title, result in results.items():
        products = Counter(result["products"])
        numbers = (f"{result[key]:.2f}" for key in ("traffic_gb", "arguments_gb", "temporaries_gb"))
        line = (title, result["topology"], f"{products['s32']}, {products.total() - products['s32']}", *numbers)
        lines.append(f"| {' | '.join(line)} |")
    about = f"\n{compilers()}; `python experiments/plan/quantized.py`"
    (RESULTS / "plan_quantized.md").write_text("\n".join([*lines, about]) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
