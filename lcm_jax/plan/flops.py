"""FLOPs of a function, counted on what was traced: matrix products and convolutions, as if on one device."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import jax


def flops(jaxpr: jax.extend.core.ClosedJaxpr | jax.extend.core.Jaxpr) -> float:
    """One multiplication and addition are two. A scan counts as often as it runs, a while loop once, and of the
    branches of a `cond` the dearest."""
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    return sum(_of(equation) for equation in jaxpr.eqns)


def _of(equation: Any) -> float:
    name, params = equation.primitive.name, equation.params
    out = equation.outvars[0].aval if equation.outvars else None
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        lhs = equation.invars[0].aval.shape
        return 2.0 * math.prod(out.shape) * math.prod(lhs[i] for i in contracted)
    if name == "conv_general_dilated":
        kernel, numbers = equation.invars[1].aval.shape, params["dimension_numbers"]
        window = math.prod(kernel) / kernel[numbers.rhs_spec[0]]
        return 2.0 * math.prod(out.shape) * window / math.prod(params["lhs_dilation"])
    if name == "cond":
        return max(map(flops, params["branches"]))
    times = params["length"] if name == "scan" else 1
    return times * sum(map(flops, _inner(params)))


def _inner(params: dict[str, Any]) -> Iterator[Any]:
    for value in params.values():
        for item in value if isinstance(value, (tuple, list)) else (value,):
            if hasattr(item, "eqns") or hasattr(getattr(item, "jaxpr", None), "eqns"):
                yield item
