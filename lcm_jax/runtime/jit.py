"""`lcm_jax.jit`: `jax.jit` with the library's compiler options, and closed-over arrays as arguments of the program."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, ParamSpec, TypeVar

import jax

from lcm_jax.runtime.compiler_options import compiler_options

P = ParamSpec("P")
R = TypeVar("R")


class _Program(NamedTuple):
    """A function that was traced for one kind of arguments: its compiled form, and the arrays it closed over."""

    run: Any
    constants: list[Any]


def jit(
    function: Callable[P, R],
    *,
    static_argnums: int | tuple[int, ...] = (),
    donate_argnums: int | tuple[int, ...] = (),
    low_precision: bool = False,
) -> Callable[P, R]:
    """Compile a function as the library compiles its own programs, for loops of your own over `pipe.denoiser`.

    `jax.jit` copies every array that the function closes over, such as a model's weights, into the program as a
    constant: compilation and memory grow by all of them, and on a CPU the compiler then lays them out anew. Here they
    are arguments. The values are those at the first call, as with `jax.jit`. Compiler options are those of
    `runtime.compiler_options`.

    static_argnums: positional arguments that are Python values, one program for each. donate_argnums: arguments whose
    buffers the result may reuse. low_precision: most of the function's products are of bfloat16 or int8.

    >>> import jax.numpy as jnp
    >>> import lcm_jax
    >>> weights = jnp.ones((512, 512))
    >>> double_sum = lcm_jax.jit(lambda x: 2.0 * (x @ weights).sum())
    >>> float(double_sum(jnp.ones((1, 512))))
    524288.0
    """
    static = (static_argnums,) if isinstance(static_argnums, int) else tuple(static_argnums)
    donated = (donate_argnums,) if isinstance(donate_argnums, int) else tuple(donate_argnums)
    programs: dict[Any, _Program] = {}

    def trace(args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Program:
        closed, shapes = jax.make_jaxpr(function, static_argnums=static, return_shape=True)(*args, **kwargs)
        structure = jax.tree.structure(shapes)

        def run(constants: list[Any], kwargs: dict[str, Any], *args: Any) -> Any:
            leaves = jax.tree.leaves((args, kwargs))
            return jax.tree.unflatten(structure, jax.core.eval_jaxpr(closed.jaxpr, constants, *leaves))

        # (constants, kwargs, *arguments without the static ones)
        moved = tuple(2 + i - sum(j < i for j in static) for i in donated)
        options = compiler_options(low_precision=low_precision)
        return _Program(jax.jit(run, donate_argnums=moved, compiler_options=options), list(closed.consts))

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        arrays = tuple(value for i, value in enumerate(args) if i not in static)
        leaves, structure = jax.tree.flatten((arrays, kwargs))
        key = (tuple(args[i] for i in static), structure, tuple(map(jax.typeof, leaves)))
        program = programs.get(key)
        if program is None:
            program = programs[key] = trace(args, kwargs)
        return program.run(program.constants, kwargs, *arrays)

    return call
