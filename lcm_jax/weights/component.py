"""A network as named tensors: the form between files of any format and the parameter trees of this library."""

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
from lcm_jax.runtime.config_values import check_config, check_values
from lcm_jax.runtime.messages import shortened, shown
from lcm_jax.typing import Params
from lcm_jax.weights.abstract_params import abstract_params, stacking
from lcm_jax.weights.registry import FAMILIES, TOWER, class_name
from lcm_jax.weights.safetensors_files import find_weights, load_tensors, read_json, save_tensors
from lcm_jax.weights.torch_params import Shardings, check_tensors, from_torch, to_torch, torch_shapes

_MOVING_AVERAGE = (
    *("decay", "min_decay", "inv_gamma", "power", "optimization_step", "update_after_step", "use_ema_warmup"),
)


class Part(NamedTuple):
    """A network in diffusers' or transformers' naming; its tensors may be memory maps or computed on access."""

    kind: str  # class name
    config: Any  # of this library's class
    tensors: Mapping[str, np.ndarray]
    source: str  # named in errors


class Component:
    """A network and its parameters: a tree, or a function that places the tree on the device on first access.

    A component also unpacks: `module, params = component`.
    """

    def __init__(self, module: Any, params: Params | Callable[..., Params]) -> None:
        """Bind a flax module with a `config` to its parameters; a callable takes `transform`, as `from_torch` does."""
        self.module = module
        self._params = params
        self._make = params if callable(params) else None

    @property
    def params(self) -> Params:
        """The parameter tree; the first access places it on the device."""
        if callable(self._params):
            self._params = self._params()
        return self._params

    def release(self) -> None:
        """Drop the parameters from the device; the next access places them again. A given tree stays."""
        self._params = self._make or self._params

    def map_params(self, transform: Callable[[str, Any], Any]) -> Params:
        """Return the tree of each(path, parameter), one parameter at a time if they are not on the device yet."""
        if callable(self._params):
            return self._params(transform=transform)
        return traverse_util.path_aware_map(lambda path, leaf: transform("/".join(map(str, path)), leaf), self._params)

    def __iter__(self) -> Iterator[Any]:
        yield self.module
        yield self.params


class Lazy(Mapping[str, np.ndarray]):
    """Tensors that are computed on access, so that writing a model needs the memory of its largest tensor only."""

    def __init__(self, makers: Mapping[str, Callable[[], np.ndarray]]) -> None:
        self._makers = makers

    def __getitem__(self, name: str) -> np.ndarray:
        return self._makers[name]()

    def __iter__(self) -> Iterator[str]:
        return iter(self._makers)

    def __len__(self) -> int:
        return len(self._makers)


def cast(tensors: Mapping[str, np.ndarray], dtype: Any) -> Mapping[str, np.ndarray]:
    """Return the tensors with floating ones in `dtype` (None: unchanged), each cast on access."""

    def make(name: str) -> np.ndarray:
        tensor = tensors[name]
        return tensor.astype(dtype) if jnp.issubdtype(tensor.dtype, jnp.floating) else tensor

    return tensors if dtype is None else Lazy({name: partial(make, name) for name in tensors})


@lru_cache(maxsize=64)
def names_of(kind: str, config: Any) -> Mapping[str, tuple[int, ...]]:
    """Return {name: shape} of a network's tensors in diffusers' or transformers' naming."""
    return MappingProxyType(torch_shapes(abstract_params(kind, config), FAMILIES[kind].rules))


def config_of(source: Path) -> tuple[str, Any]:
    """Return the class name and the config in a config.json; ValueError as `parse_config` raises it."""
    return parse_config(read_json(source), source=str(source))


def parse_config(values: Mapping[str, Any], *, source: str) -> tuple[str, Any]:
    """Return the class name and the config in the content of a config.json.

    The settings of a moving average, which diffusers' EMAModel writes among those of its network, are passed over.
    source: the file that errors name. Raises ValueError if the class is not supported or a value has the wrong type, is
    not finite or is outside its bounds.
    """
    values = {key: value for key, value in values.items() if key not in _MOVING_AVERAGE}
    kind = values.get("_class_name")
    if kind is None and isinstance(architectures := values.get("architectures"), list) and architectures:
        kind = architectures[0]
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise ValueError(f"{source}: class {shown(kind)} is not supported; known are {', '.join(FAMILIES)}")
    cls = FAMILIES[kind].config
    check_values(cls, values, source)
    try:
        config = cls.from_dict(values, source=source)
    except ValueError as error:
        raise ValueError(shortened(str(error))) from None
    except (TypeError, LookupError, AttributeError, ArithmeticError) as error:  # of keys that are no fields
        raise ValueError(f"{source}: not a config of a {kind} ({shortened(str(error), 200)})") from error
    check_config(config, source)
    return kind, config


def has_weights(folder: Path, variant: str | None) -> bool:
    """Return whether a network's folder has the file of a variant, such as "fp16"; None is the one without a name."""
    kind, _ = config_of(folder / "config.json")
    return find_weights(folder, FAMILIES[kind].stem, variant) is not None


def read_part(folder: Path, *, variant: str | None = None) -> Part:
    """Return the network in a folder with config.json and safetensors; errors name the file and the reason.

    variant: such as "fp16", in the name of the file to read. The tensors are memory maps and not checked: `check_part`.
    """
    kind, config = config_of(folder / "config.json")
    family = FAMILIES[kind]
    tensors = load_tensors(folder, stem=family.stem, variant=variant)
    if family.prefix:
        tensors = {family.prefix + key if key.startswith(TOWER) else key: tensor for key, tensor in tensors.items()}
    tensors = {name: tensors[alias] for alias, name in family.aliases.items() if alias in tensors} | tensors
    return Part(kind, config, tensors, str(folder))


def write_config(folder: Path, kind: str, config: Any) -> None:
    """Write the config.json of a network, as diffusers or transformers would."""
    write_json(folder / "config.json", config_values(kind, config))


def config_values(kind: str, config: Any) -> dict[str, Any]:
    """Return the content of a network's config.json, as diffusers or transformers would write it."""
    values = dict(config.to_dict())
    if FAMILIES[kind].library == "transformers":
        # transformers would take the files' dtype, diffusers takes float32 for its networks: without this key a folder
        # of half precision mixes the two.
        values |= {"architectures": [kind], "dtype": "float32"}
    return values


def write_part(folder: Path, part: Part, *, dtype: Any = None, variant: str | None = None) -> tuple[str, str]:
    """Write a network's folder as diffusers or transformers would; return (library, class) for model_index.json.

    dtype: that of the floating tensors in the file; None keeps each tensor's. variant: such as "fp16", in its name.
    """
    family = FAMILIES[part.kind]
    folder.mkdir(parents=True, exist_ok=True)
    stem = family.stem if variant is None else f"{family.stem}.{variant}"
    names = names_of(part.kind, part.config)
    save_tensors(folder / f"{stem}.safetensors", cast({name: part.tensors[name] for name in names}, dtype))
    write_config(folder, part.kind, part.config)
    return family.library, part.kind


def check_depth(kind: str, config: Any, tensors: int, source: str | Path) -> None:
    """Raise ValueError for a config of more layers than the file has tensors, before its layers are traced one by one.

    The file tells at once: no layer is without a tensor of its own.
    """
    if (depth := FAMILIES[kind].depth(config)) > tensors:
        raise ValueError(
            f"{source}: does not fit the network: its config asks for {depth} layers, and it has {tensors} tensors"
        )


def check_part(part: Part) -> None:
    """Raise ValueError unless the tensors fit the config; it lists those missing, unexpected or mis-shaped."""
    check_depth(part.kind, part.config, len(part.tensors), part.source)
    try:
        like = abstract_params(part.kind, part.config)
    except ValueError as error:
        raise ValueError(f"{part.source}: {error}") from None
    family = FAMILIES[part.kind]
    check_tensors(part.tensors, like, family.rules, optional=family.optional, source=part.source)


def to_component(
    part: Part, *, dtype: Any = jnp.float32, shardings: Shardings | None = None, scan: bool = False
) -> Component:
    """Return the network as a component; its parameters stay in the file until the first access.

    dtype: that of parameters and computation; float16 becomes float32 for weights that overflow in it (force_upcast).
    shardings: see `from_torch`. scan: whether equal layers are stacked, for networks that can. Raises one ValueError
    with everything that does not fit; values that are not finite raise when the parameters are placed.
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
    """Return a component as named tensors on the host: the inverse of `to_component`."""
    kind = class_name(component.module)
    return Part(kind, component.module.config, to_torch(component.params, FAMILIES[kind].rules), source)
