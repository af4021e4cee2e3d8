"""The parameter trees of a model by component, put on the device when they are first read."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from typing import Any

import jax
import jax.numpy as jnp

from lcm_jax.runtime.messages import did_you_mean
from lcm_jax.typing import Params
from lcm_jax.weights.diffusers_folder import Component

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float16": jnp.float16}


class Parameters(MutableMapping[str, Params]):
    """The parameter trees of a model by component; each is put on the device when it is first read.

    >>> import lcm_jax
    >>> sorted(lcm_jax.load("openmoji").params)
    ['text_encoder', 'unet', 'vae']
    """

    def __init__(self, components: Mapping[str, Component]) -> None:
        self.components = dict(components)

    def __getitem__(self, name: str) -> Params:
        return self.components[name].params

    def __setitem__(self, name: str, params: Params | Callable[..., Params]) -> None:
        self.components[name] = Component(self.components[name].module, params)

    def __delitem__(self, name: str) -> None:
        del self.components[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.components)

    def __len__(self) -> int:
        return len(self.components)


jax.tree_util.register_pytree_node(
    Parameters,
    lambda tree: (tuple(tree.values()), tuple((name, part.module) for name, part in tree.components.items())),
    lambda parts, trees: Parameters({name: Component(m, tree) for (name, m), tree in zip(parts, trees, strict=True)}),
)


def named_dtype(dtype: Any) -> Any:
    """Return a dtype of `DTYPES`, from its name or from any form of it that NumPy takes, such as jnp.bfloat16.

    >>> import numpy as np
    >>> from lcm_jax.inference.parameters import named_dtype
    >>> named_dtype("bfloat16").__name__, named_dtype(np.float32).__name__
    ('bfloat16', 'float32')
    """
    name = dtype
    if not isinstance(dtype, str):
        with contextlib.suppress(TypeError):
            name = jnp.dtype(dtype).name
    if name not in DTYPES:
        raise ValueError(
            f"dtype {name!r:.80} is unknown{did_you_mean(str(name), DTYPES)}; known are {', '.join(DTYPES)}"
        )
    return DTYPES[name]
