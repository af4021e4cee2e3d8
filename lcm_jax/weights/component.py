"""A network as named tensors: what lies between its files, whatever their format, and its parameters here."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache, partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from lcm_jax.runtime.atomic_files import write_json
from lcm_jax.typing import Params
from lcm_jax.weights.abstract_params import abstract_params, stacking
from lcm_jax.weights.registry import FAMILIES, TOWER, class_name
from lcm_jax.weights.safetensors_files import load_tensors, read_json, save_tensors
from lcm_jax.weights.torch_params import Shardings, check, from_torch, to_torch, torch_shapes


class Part(NamedTuple):
    """A network in diffusers' or transformers' naming; its tensors may be memory maps or made when asked for."""

    kind: str  # class name
    config: Any  # a config of ours
    tensors: Mapping[str, np.ndarray]
    source: str  # named in errors


class Component:
    """A network and its parameters: a tree, or what places one on the device when it is first asked for.

    `module, params = component` works too.
    """

    def __init__(self, module: Any, params: Params | Callable[..., Params]) -> None:
        """module: a flax module with a `config`. params: a callable takes `each`, as `from_torch` does."""
        self.module = module
        self._params = params
        self._make = params if callable(params) else None

    @property
    def params(self) -> Params:
        if callable(self._params):
            self._params = self._params()
        return self._params

    def release(self) -> None:
        """Free what was placed: whoever asks again has it placed again."""
        self._params = self._make or self._params

    def made_of(self, each: Callable[[str, Any], Any]) -> Params:
        """The tree of each(path, parameter), made one by one where the parameters are not placed yet."""
        if callable(self._params):
            return self._params(each=each)
        return traverse_util.path_aware_map(lambda path, leaf: each("/".join(map(str, path)), leaf), self._params)

    def __iter__(self) -> Iterator[Any]:
        yield self.module
        yield self.params


class Lazy(Mapping[str, np.ndarray]):
    """Tensors made when they are asked for, so that a model is written in the memory of its largest tensor."""

    def __init__(self, makers: Mapping[str, Callable[[], np.ndarray]]) -> None:
        self._makers = makers

    def __getitem__(self, name: str) -> np.ndarray:
        return self._makers[name]()

    def __iter__(self) -> Iterator[str]:
        return iter(self._makers)

    def __len__(self) -> int:
        return len(self._makers)


def cast(tensors: Mapping[str, np.ndarray], dtype: Any) -> Mapping[str, np.ndarray]:
    """The tensors, floating ones in `dtype` (None: as they are), each cast when it is asked for."""

    def make(name: str) -> np.ndarray:
        tensor = tensors[name]
        return tensor.astype(dtype) if jnp.issubdtype(tensor.dtype, jnp.floating) else tensor

    return tensors if dtype is None else Lazy({name: partial(make, name) for name in tensors})


@lru_cache(maxsize=64)
def names_of(kind: str, config: Any) -> Mapping[str, tuple[int, ...]]:
    """Names and shapes of a network's tensors."""
    return MappingProxyType(torch_shapes(abstract_params(kind, config), FAMILIES[kind].rules))


def config_of(source: Path) -> tuple[str, Any]:
    """The class and config that a config.json describes."""
    values = read_json(source)
    kind = values.get("_class_name") or next(iter(values.get("architectures") or [None]))
    if kind not in FAMILIES:
        raise ValueError(f"{source}: class {kind!r} is not supported; known are {', '.join(FAMILIES)}")
    return kind, FAMILIES[kind].config.from_dict(values, source=str(source))


def read_part(folder: Path, *, variant: str | None = None) -> Part:
    """The network in a folder with config.json and safetensors. Errors name the file and what does not fit."""
    kind, config = config_of(folder / "config.json")
    family = FAMILIES[kind]
    tensors = load_tensors(folder, stem=family.stem, variant=variant)
    if family.prefix:
        tensors = {family.prefix + key if key.startswith(TOWER) else key: tensor for key, tensor in tensors.items()}
    tensors = {name: tensors[other] for other, name in family.aliases.items() if other in tensors} | tensors
    return Part(kind, config, tensors, str(folder))


def write_config(folder: Path, kind: str, config: Any) -> None:
    """The config.json of a network, as diffusers or transformers would write it."""
    values = dict(config.to_dict())
    if FAMILIES[kind].library == "transformers":
        values["architectures"] = [kind]
    write_json(folder / "config.json", values)


def write_part(folder: Path, part: Part, *, dtype: Any = None, variant: str | None = None) -> tuple[str, str]:
    """Write a network's folder as diffusers or transformers would; returns (library, class) for model_index.json."""
    family = FAMILIES[part.kind]
    folder.mkdir(parents=True, exist_ok=True)
    stem = family.stem if variant is None else f"{family.stem}.{variant}"
    wanted = names_of(part.kind, part.config)
    save_tensors(folder / f"{stem}.safetensors", cast({name: part.tensors[name] for name in wanted}, dtype))
    write_config(folder, part.kind, part.config)
    return family.library, part.kind


def check_part(part: Part) -> None:
    """ValueError that lists what a part lacks, has too much, or has in another shape than its config says."""
    family = FAMILIES[part.kind]
    check(
        part.tensors,
        abstract_params(part.kind, part.config),
        family.rules,
        optional=family.optional,
        source=part.source,
    )


def to_component(
    part: Part, *, dtype: Any = jnp.float32, shardings: Shardings | None = None, scan: bool = False
) -> Component:
    """The network; its parameters are placed on the device when first asked for, and until then stay in the file.

    dtype: of both; float32 for weights that overflow in float16. Raises one ValueError for all that does not fit, at
    once; values that are not finite are found when the parameters are placed.
    """
    family = FAMILIES[part.kind]
    if dtype == jnp.float16 and getattr(part.config, "force_upcast", False):
        dtype = jnp.float32
    module = family.build(part.config, dtype=dtype, **stacking(scan))
    check_part(part)
    read = partial(
        from_torch,
        part.tensors,
        abstract_params(part.kind, part.config, scan),
        family.rules,
        dtype=dtype,
        optional=family.optional,
        source=part.source,
        shardings=shardings,
    )
    return Component(module, read)


def to_part(component: Component, *, source: str = "model") -> Part:
    """The way back; tensors are on the host."""
    kind = class_name(component.module)
    return Part(kind, component.module.config, to_torch(component.params, FAMILIES[kind].rules), source)
