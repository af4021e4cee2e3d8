"""`lcm_jax.jit`: `jax.jit` with the library's compiler options, and closed-over arrays as arguments of the program."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
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
    static_argnums: int | Sequence[int] = (),
    static_argnames: str | Sequence[str] = (),
    donate_argnums: int | Sequence[int] = (),
    low_precision: bool = False,
) -> Callable[P, R]:
    """Compile a function as the library compiles its own programs, for loops of your own over `pipe.denoiser`.

    `jax.jit` copies every array that the function closes over, such as a model's weights, into the program as a
    constant: compilation and memory grow with them, and on a CPU the compiler lays them out again. Here they are
    arguments of the program. Their values are those at the first call, as with `jax.jit`. The compiler options are
    those of `runtime.compiler_options`. Inside another transformation (jit, grad, scan, ...) the function is traced as
    part of that one, and under `jax.disable_jit()` it runs as it stands.

    static_argnums, static_argnames: arguments that are hashable Python values, one program for each. donate_argnums:
    arguments whose buffers the result may reuse. low_precision: most of the function's products are of bfloat16 or
    int8.

    >>> import jax.numpy as jnp
    >>> import lcm_jax
    >>> weights = jnp.ones((512, 512))
    >>> double_sum = lcm_jax.jit(lambda x: 2.0 * (x @ weights).sum())
    >>> float(double_sum(jnp.ones((1, 512))))
    524288.0
    """
    positions, names = _static(function, static_argnums, static_argnames)
    donated = (donate_argnums,) if isinstance(donate_argnums, int) else tuple(donate_argnums)
    programs: dict[Any, _Program] = {}

    def trace(args: Sequence[Any], kwargs: Mapping[str, Any], arrays: Mapping[int, Any], keywords: Any) -> _Program:
        def of_arrays(arrays: Mapping[int, Any], keywords: Mapping[str, Any]) -> Any:
            filled = [arrays.get(i, value) for i, value in enumerate(args)]
            return function(*filled, **{**kwargs, **keywords})

        closed, shapes = jax.make_jaxpr(of_arrays, return_shape=True)(arrays, keywords)
        structure = jax.tree.structure(shapes)

        def run(constants: list[Any], keywords: dict[str, Any], *arrays: Any) -> Any:
            leaves = jax.tree.leaves((arrays, keywords))  # in the order of their positions, as they were traced
            return jax.tree.unflatten(structure, jax.core.eval_jaxpr(closed.jaxpr, constants, *leaves))

        order = list(arrays)
        given = tuple(2 + order.index(i % len(args)) for i in donated)
        options = compiler_options(low_precision=low_precision)
        return _Program(jax.jit(run, donate_argnums=given, compiler_options=options), list(closed.consts))

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        fixed = {i % len(args) for i in positions if -len(args) <= i < len(args)}
        arrays = {i: value for i, value in enumerate(args) if i not in fixed}
        keywords = {name: value for name, value in kwargs.items() if name not in names}
        leaves, structure = jax.tree.flatten((arrays, keywords))
        if jax.config.values["jax_disable_jit"] or any(isinstance(leaf, jax.core.Tracer) for leaf in leaves):
            return function(*args, **kwargs)
        constants = [*(args[i] for i in sorted(fixed)), *(kwargs[name] for name in sorted(kwargs.keys() & names))]
        static = tuple((type(value), value) for value in constants)  # 1, 1.0 and True are equal, and not the same
        key = (static, tuple(sorted(kwargs)), structure, tuple(map(jax.typeof, leaves)))
        program = programs.get(key)
        if program is None:
            program = programs[key] = trace(args, kwargs, arrays, keywords)
        return program.run(program.constants, keywords, *arrays.values())

    return call


def _static(
    function: Callable[..., Any], argnums: int | Sequence[int], argnames: str | Sequence[str]
) -> tuple[tuple[int, ...], frozenset[str]]:
    """Return the positions and the names of the static arguments, which may be passed by either."""
    positions = [argnums] if isinstance(argnums, int) else list(argnums)
    names = [argnames] if isinstance(argnames, str) else list(argnames)
    try:
        parameters = list(inspect.signature(function).parameters)
    except (TypeError, ValueError):  # a built-in function has no signature
        parameters = []
    named = [parameters[i] for i in positions if -len(parameters) <= i < len(parameters)]
    numbered = [parameters.index(name) for name in names if name in parameters]
    return tuple(positions + numbered), frozenset(names + named)
