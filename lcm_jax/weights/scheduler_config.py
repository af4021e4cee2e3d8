"""scheduler_config.json in and out: the schedule, the kind of network output and the sampler."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, fields
from numbers import Real
from typing import Any, get_args

from lcm_jax.diffusion.samplers import SAMPLERS, sampler_name
from lcm_jax.diffusion.schedules import DDPM, Cosine, RectifiedFlow
from lcm_jax.diffusion.time_grids import Spacing
from lcm_jax.typing import Kind, Schedule

CONTINUOUS = "ContinuousScheduler"
"""The class name written for models that no scheduler of diffusers draws; diffusers refuses it (`from_config`)."""

SCHEDULERS: Mapping[str, str] = {
    name: sampler for sampler, spec in SAMPLERS.items() for name in (*spec.diffusers, *spec.replaces)
} | {CONTINUOUS: "euler"}
"""The scheduler classes that can be read, each with the sampler that is it or stands in for it."""

CONTINUOUS_SCHEDULES: Mapping[str, type[Any]] = {"cosine": Cosine, "rectified_flow": RectifiedFlow}

# The defaults of the diffusers classes, for configs that leave a key out.
_LATENT = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
_CLASS_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "LCMScheduler": _LATENT,
    "TCDScheduler": _LATENT,
    "HeunDiscreteScheduler": _LATENT | {"beta_schedule": "linear"},
}
_FIELDS = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "rescale_betas_zero_snr")

# Keys our samplers have no choice about, with every value that leaves their pictures unchanged.
_FIXED: Mapping[str, tuple[Any, ...]] = {
    "algorithm_type": ("dpmsolver++", "deis"),
    "clip_sample": (False, None),
    "interpolation_type": ("linear",),
    "invert_sigmas": (False, None),
    "lambda_min_clipped": (-math.inf, None),
    "predict_epsilon": (True, None),
    "scale_factors": (None,),
    "shift_terminal": (None,),
    "solver_order": (2,),
    "solver_type": ("midpoint", "bh1", "bh2", "logrho"),  # DPMSolverMultistepScheduler reads the others as midpoint
    "stochastic_sampling": (False, None),
    "thresholding": (False, None),
    "timestep_scaling": (10.0,),
    "timestep_type": ("discrete",),
    "variance_type": (None, "fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log"),
}
_NUMBERS = ("num_train_timesteps", "beta_start", "beta_end", "steps_offset", "original_inference_steps")
_READ = {field.name for field in (*fields(DDPM), *fields(Spacing))} | {
    *(
        "trained_betas",
        "prediction_type",
        "sampler",
        "schedule",
        "shift",
        "flow_shift",
        "use_flow_sigmas",
        "use_dynamic_shifting",
    ),
    *("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas"),
}
# Read by nothing while the keys above have those values, or by no sampler of ours.
_IDLE = {
    *("base_image_seq_len", "base_shift", "clip_sample_range", "disable_corrector", "dynamic_thresholding_ratio"),
    *("max_image_seq_len", "max_shift", "noise_sampler_seed", "predict_x0", "sample_max_value", "sigma_max"),
    *("sigma_min", "skip_prk_steps", "solver_p", "time_shift_type", "upscale_mode"),
}


def check_config(config: Mapping[str, Any], *, source: str) -> None:
    """ValueError for a class or value that changes the picture and is not supported; a warning for unknown keys."""
    name = config.get("_class_name")
    if name is not None and name not in SCHEDULERS:
        raise ValueError(f"{source}: _class_name {name!r} is not supported; known are {', '.join(SCHEDULERS)}")
    if config.get("sampler") is not None:
        try:
            sampler_name(str(config["sampler"]))
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from None
    for key, value in config.items():
        if key in _FIXED and value not in _FIXED[key]:
            raise ValueError(f"{source}: {key}={value!r} is not supported; set it to {_FIXED[key][0]!r}")
        if key in _NUMBERS and (isinstance(value, bool) or not isinstance(value, Real)):
            raise ValueError(f"{source}: {key}={value!r} is not a number")
        if key not in _FIXED and key not in _READ | _IDLE and not key.startswith("_"):
            warnings.warn(f"{source}: {key}={value!r} is not known and is ignored", stacklevel=2)


def from_config(config: Mapping[str, Any], *, source: str = "scheduler_config.json") -> Schedule:
    """Return the schedule that a diffusers scheduler_config.json describes by its betas or its flow shift.

    `Spacing.from_config` reads the spacing, `read_scheduler` the prediction type. The key `schedule`, which diffusers
    does not have, names one of CONTINUOUS_SCHEDULES. Raises ValueError for betas given as a list, for
    resolution-dependent shifting and for an unknown beta_schedule.
    """
    name = str(config.get("_class_name", ""))
    if config.get("trained_betas") is not None:
        raise ValueError(f"{source}: trained_betas is set: give beta_start, beta_end and beta_schedule instead")
    if config.get("use_dynamic_shifting"):
        raise ValueError(f"{source}: use_dynamic_shifting is unsupported: set it to false and give a fixed shift")
    if "schedule" in config:
        made = CONTINUOUS_SCHEDULES.get(config["schedule"])
        if made is None:
            known = ", ".join(CONTINUOUS_SCHEDULES)
            raise ValueError(f"{source}: schedule {config['schedule']!r} is unknown: use one of {known}")
        return made(**{k: v for k, v in config.items() if k in made.__dataclass_fields__})
    if name.startswith("FlowMatch"):
        return RectifiedFlow(shift=float(config.get("shift", 1.0)))
    if config.get("use_flow_sigmas"):
        return RectifiedFlow(shift=float(config.get("flow_shift", 1.0)))
    fields = {k: v for k, v in (*_CLASS_DEFAULTS.get(name, {}).items(), *config.items()) if k in _FIELDS}
    try:
        return DDPM(**fields)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None


def read_scheduler(config: Mapping[str, Any], *, source: str = "scheduler_config.json") -> tuple[Schedule, Kind]:
    """Return the schedule and the prediction type of a scheduler_config.json; ValueError for what is not supported.

    A flow-matching scheduler has no prediction_type: its kind is "flow".

    >>> from lcm_jax.weights.scheduler_config import read_scheduler
    >>> read_scheduler({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0})
    (RectifiedFlow(shift=3.0), 'flow')
    """
    check_config(config, source=source)
    schedule = from_config(config, source=source)
    kind = config.get("prediction_type", schedule.usual_kind)
    kind = {"flow_prediction": "flow"}.get(kind, kind)  # as the DPM solvers call it
    known = [name for name in get_args(Kind) if name != "edm" or "schedule" in config]  # diffusers has none of its own
    if kind not in known:
        raise ValueError(f"{source}: prediction_type {kind!r} is unknown; known are {', '.join(known)}")
    return schedule, kind


def sampler_of(config: Mapping[str, Any], *, source: str = "scheduler_config.json") -> str:
    """Return the sampler that a scheduler_config.json asks for; a UserWarning where another one stands in for it.

    >>> from lcm_jax.weights.scheduler_config import sampler_of
    >>> sampler_of({"_class_name": "HeunDiscreteScheduler"})
    'heun'
    """
    if config.get("sampler"):
        return sampler_name(str(config["sampler"]))
    scheduler = config.get("_class_name", "")
    sampler = SCHEDULERS.get(scheduler, "ddim")
    if scheduler in SAMPLERS[sampler].replaces:
        warnings.warn(
            f"{source} asks for {scheduler}, for which this library has no sampler: {sampler!r} "
            f"({SAMPLERS[sampler].diffusers[0]}) draws in its place; name a sampler to choose another",
            stacklevel=3,
        )
    return sampler


def scheduler_config(schedule: Schedule, kind: Kind, sampler: str) -> dict[str, Any]:
    """scheduler_config.json of a schedule, for a sampler; the key "sampler" names one that is not its class's."""
    config = _scheduler_config(schedule, kind, sampler)
    usual = SCHEDULERS[config["_class_name"]]
    return config if sampler in (usual, "ddim", "euler") else {**config, "sampler": sampler}


def _scheduler_config(schedule: Schedule, kind: Kind, sampler: str) -> dict[str, Any]:
    writer = _WRITERS.get(type(schedule))
    config = None if writer is None else writer(schedule, kind, sampler)
    if config is None:
        raise ValueError(
            f"no scheduler_config.json is written for {kind!r} on {type(schedule).__name__}; use a rectified flow"
        )
    return config


def _continuous_config(schedule: Any, kind: Kind, _: str) -> dict[str, Any]:
    name = next(name for name, known in CONTINUOUS_SCHEDULES.items() if type(schedule) is known)
    return {"_class_name": CONTINUOUS, "schedule": name, "prediction_type": kind, **asdict(schedule)}


def _flow_config(schedule: RectifiedFlow, kind: Kind, sampler: str) -> dict[str, Any]:
    if kind != "flow":
        return _continuous_config(schedule, kind, sampler)
    name = "FlowMatchLCMScheduler" if sampler == "lcm" else "FlowMatchEulerDiscreteScheduler"
    return {"_class_name": name, "num_train_timesteps": 1000, "shift": schedule.shift}


def _table_config(schedule: DDPM, kind: Kind, sampler: str) -> dict[str, Any] | None:
    if kind == "edm":
        return None
    shared = {name: getattr(schedule, name) for name in _FIELDS}
    shared |= {"prediction_type": kind, "clip_sample": False, "set_alpha_to_one": True}
    if sampler in ("lcm", "tcd"):
        name = SAMPLERS[sampler].diffusers[0]
        return {"_class_name": name, **shared, "original_inference_steps": 50, "timestep_scaling": 10.0}
    return {"_class_name": "DDIMScheduler", **shared, "timestep_spacing": "trailing", "steps_offset": 0}


_WRITERS: Mapping[type[Any], Callable[..., dict[str, Any] | None]] = {
    DDPM: _table_config,
    RectifiedFlow: _flow_config,
    Cosine: _continuous_config,
}
