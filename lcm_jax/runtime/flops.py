"""FLOPs of a function, counted on what was traced: matrix products and convolutions, as if on one device."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any


def flops(jaxpr: Any) -> float:
    """Of a jaxpr, closed or not. One multiplication and addition are two. A scan counts as often as it runs, a while
    loop once, what is mapped over devices for each of them, and of the branches of a `cond` the dearest."""
    return sum((_of(equation) for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns), 0.0)


def _of(equation: Any) -> float:
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
    if match := _ATTENTION.fullmatch(str(params.get("name", name))):
        # 2 products of (l, d) by (m, d) for each head, and 5 in the gradient
        (*_, length, heads, width), (_, others, _, _) = (operand.aval.shape for operand in equation.invars[:2])
        products = 2 if match["pass"] == "fwd" else 5
        return 2.0 * products * equation.invars[0].aval.shape[0] * heads * length * others * width
    return float(_times(name, params) * sum(map(flops, _inner(params))))


# cuDNN's primitives, and the functions of mmdit.tpu_attention.
_ATTENTION = re.compile(r"dot_product_attention(_tpu)?_(?P<pass>fwd|bwd)(_wrapper)?")


def _times(name: str, params: dict[str, Any]) -> int:
    """How often what an equation holds runs."""
    match name:
        case "scan":
            return params["length"]
        case "xla_pmap":
            return params["global_axis_size"]
        case "shard_map":
            return params["mesh"].size
    return 1


def _inner(params: dict[str, Any]) -> Iterator[Any]:
    for value in params.values():
        for item in value if isinstance(value, (tuple, list)) else (value,):
            if hasattr(item, "eqns") or hasattr(getattr(item, "jaxpr", None), "eqns"):
                yield item
