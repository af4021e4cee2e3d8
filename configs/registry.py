"""The registry of configs: functions without arguments, so that using one config builds none of the others."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace

from lcm_jax.objectives import METHODS, method
from lcm_jax.objectives import register as register_method
from lcm_jax.runtime.messages import did_you_mean
from lcm_jax.runtime.user_code import call_without_arguments, is_reference, is_same_definition, load_object
from lcm_jax.train.config import TrainConfig
from lcm_jax.train.tasks.distillation import DistillationTask

CONFIGS: dict[str, Callable[[], TrainConfig]] = {}


def register(make: Callable[[], TrainConfig]) -> Callable[[], TrainConfig]:
    """Register a config under its function's name, and return it; raise ValueError if the name is taken."""
    if not is_same_definition(CONFIGS.get(make.__name__, make), make):
        raise ValueError(f"config {make.__name__!r} is registered twice")
    CONFIGS[make.__name__] = make
    return make


def get(name: str) -> TrainConfig:
    """Return the config of that name; raise ValueError, with the nearest name or all names, if there is none.

    "my_file.py:my_config" or "my_package.my_module:my_config" is a config of your own, a `TrainConfig` or a function
    that returns one; see `lcm_jax.runtime.user_code.load_object` for its errors.

    >>> from lcm_jax import configs
    >>> configs.get("sd15_lcm").loop.batch_size
    128
    >>> configs.get("sd15_lcn")
    Traceback (most recent call last):
    ValueError: --config sd15_lcn: no such config; did you mean sd15_lcm?
    """
    if is_reference(name):
        return _of_a_file(name)
    if name not in CONFIGS:
        hint = did_you_mean(name, CONFIGS) or f"; known are {', '.join(sorted(CONFIGS))}"
        raise ValueError(f"--config {name}: no such config{hint}")
    return CONFIGS[name]()


def run_name(name: str) -> str:
    """Return the name of a config's folder under runs/: the config's own, after the file's path for one of a file.

    >>> from lcm_jax import configs
    >>> configs.run_name("openmoji_lcm"), configs.run_name("my/first.py:cfg"), configs.run_name("../second.py:cfg")
    ('openmoji_lcm', 'my-first-cfg', 'second-cfg')
    """
    return re.sub(r"\W+", "-", name.replace(".py:", ":")).strip("-")


def _of_a_file(reference: str) -> TrainConfig:
    config = load_object(reference, option="--config")
    if not isinstance(config, TrainConfig) and callable(config):
        config = call_without_arguments(config, source=f"--config {reference}")
    if not isinstance(config, TrainConfig):
        raise ValueError(
            f"--config {reference}: it is a {type(config).__name__}, not a TrainConfig or a function of one"
        )
    return config


def with_method(config: TrainConfig, method_name: str, name: str) -> TrainConfig:
    """Return a distillation config with another method, at its published defaults.

    A method with a teacher keeps the config's range of w if its student takes w as an input, or if the range is one
    value.

    method_name: a method of `lcm_jax.objectives`, or FILE.py:CLASS of your own. name: the config's name, for messages.
    Raises ValueError if the config is no distillation.
    """
    task = config.task
    if not isinstance(task, DistillationTask):
        raise ValueError(f"--objective: config {name} is no distillation")
    old = task.objective
    if is_reference(method_name) and method_name not in METHODS:
        register_method(method_name)(load_object(method_name, option="--objective"))
    objective = method(method_name, schedule=old.schedule, kind=old.kind)
    if objective.needs_teacher and (objective.embed_w or old.w_min == old.w_max):
        objective = replace(objective, w_min=old.w_min, w_max=old.w_max)
    loop = replace(config.loop, **objective.moving_average)
    return replace(config, task=replace(task, objective=objective), loop=loop)
