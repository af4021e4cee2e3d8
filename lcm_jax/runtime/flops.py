"""FLOPs of a traced function: its matrix products and convolutions, as if on one device."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any


def flops(jaxpr: Any) -> float:
    """Return the floating-point operations of a jaxpr, closed or not; a multiplication with its addition counts as two.

    The body of a scan counts once for each iteration, that of a while loop once, what is mapped over devices (`pmap`,
    `shard_map`) once for each device, that of a Pallas kernel once for each point of its grid, and of the branches of a
    `cond` the one with the most.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> a, b = jax.ShapeDtypeStruct((2, 3), jnp.float32), jax.ShapeDtypeStruct((3, 5), jnp.float32)
    >>> flops(jax.make_jaxpr(jnp.dot)(a, b))  # 2 x 2 x 3 x 5
    60.0
    """
    return sum((_equation_flops(equation) for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns), 0.0)


def _equation_flops(equation: Any) -> float:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        lhs, out = equation.invars[0].aval.shape, equation.outvars[0].aval.shape
        return 2.0 * math.prod(out) * math.prod(lhs[i] for i in contracted)
    if name == "conv_general_dilated":
        kernel, numbers = equation.invars[1].aval.shape, params["dimension_numbers"]
        out = equation.outvars[0].aval.shape
        window = math.prod(kernel) / kernel[numbers.rhs_spec[0]]
        return 2.0 * math.prod(out) * window / math.prod(params["lhs_dilation"])
    if name == "cond":
        return max(map(flops, params["branches"]))
    match = _ATTENTION.fullmatch(str(params.get("name", name)))
    if match and len(equation.invars) > 1:  # none are there where flax.linen.scan has looked for constants of the loop
        # 2 products of (l, d) by (m, d) for each head, and 5 in the gradient
        (*_, length, heads, width), (_, key_length, _, _) = (operand.aval.shape for operand in equation.invars[:2])
        products = 2 if match["pass"] == "fwd" else 5
        return 2.0 * products * equation.invars[0].aval.shape[0] * heads * length * key_length * width
    return float(_repetitions(name, params) * sum(map(flops, _inner_jaxprs(params))))


# cuDNN's primitives, and the functions of mmdit.tpu_attention.
_ATTENTION = re.compile(r"dot_product_attention(_tpu)?_(?P<pass>fwd|bwd)(_wrapper)?")


def _repetitions(name: str, params: dict[str, Any]) -> int:
    """Return how often the inner jaxprs of an equation run."""
    match name:
        case "scan":
            return params["length"]
        case "xla_pmap":
            return params["global_axis_size"]
        case "shard_map":
            return params["mesh"].size
        case "pallas_call":
            return math.prod(params["grid_mapping"].grid)
    return 1


def _inner_jaxprs(params: dict[str, Any]) -> Iterator[Any]:
    for value in params.values():
        for item in value if isinstance(value, (tuple, list)) else (value,):
            if hasattr(item, "eqns") or hasattr(getattr(item, "jaxpr", None), "eqns"):
                yield item
