"""scheduler_config.json in and out: the schedule, the kind of network output and the sampler."""

from __future__ import annotations

import difflib
import json
import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, get_args

from lcm_jax.diffusion.samplers import SAMPLERS, sampler_name
from lcm_jax.diffusion.schedules import DDPM, Cosine, RectifiedFlow
from lcm_jax.diffusion.time_grids import SIGMAS, Spacing
from lcm_jax.runtime.config_values import MOST_LETTERS, check_values
from lcm_jax.runtime.messages import shortened, shown
from lcm_jax.typing import Kind, Schedule

CONTINUOUS = "ContinuousScheduler"
"""The class name written for models that no scheduler of diffusers draws; diffusers refuses it (`from_config`)."""

SCHEDULERS: Mapping[str, str] = {name: sampler for sampler, spec in SAMPLERS.items() for name in spec.diffusers} | {
    CONTINUOUS: "euler"
}
"""The scheduler classes that can be read, each with the sampler that is it."""

CONTINUOUS_SCHEDULES: Mapping[str, type[Any]] = {"cosine": Cosine, "rectified_flow": RectifiedFlow}

# The defaults of the diffusers classes, for configs that leave a key out.
_LATENT = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
_CLASS_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "LCMScheduler": _LATENT,
    "TCDScheduler": _LATENT,
    **dict.fromkeys(
        ("HeunDiscreteScheduler", "KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler", "DPMSolverSDEScheduler"),
        _LATENT | {"beta_schedule": "linear"},
    ),
    "PNDMScheduler": {"set_alpha_to_one": False, "skip_prk_steps": False},
    "DPMSolverSinglestepScheduler": {"lower_order_final": False},
}
_FIELDS = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "rescale_betas_zero_snr")

_NOT_FLOW = tuple(name for name in SCHEDULERS if not name.startswith("FlowMatch") and name != CONTINUOUS)
_MULTISTEP = ("DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler")
_SOLVER_ORDER = (*_MULTISTEP, "DEISMultistepScheduler", "UniPCMultistepScheduler")
_CLIPS = ("LCMScheduler", "TCDScheduler", "DDIMScheduler", "DDPMScheduler")
_FLOWS = ("FlowMatchEulerDiscreteScheduler", "FlowMatchLCMScheduler")
READERS: Mapping[str, tuple[str, ...]] = {
    "algorithm_type": (*_MULTISTEP, "DEISMultistepScheduler"),
    "clip_sample": (*_CLIPS, "HeunDiscreteScheduler"),
    "interpolation_type": ("EulerDiscreteScheduler",),
    "invert_sigmas": _FLOWS,
    "lambda_min_clipped": _MULTISTEP,
    "prediction_type": _NOT_FLOW,
    "rescale_betas_zero_snr": (
        *(*_CLIPS, "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler"),
        *("DPMSolverMultistepScheduler", "UniPCMultistepScheduler"),
    ),
    "scale_factors": ("FlowMatchLCMScheduler",),
    "shift_terminal": (*_FLOWS, "UniPCMultistepScheduler"),
    **dict.fromkeys(("disable_corrector", "predict_x0", "solver_p"), ("UniPCMultistepScheduler",)),
    "solver_order": _SOLVER_ORDER,
    "solver_type": _SOLVER_ORDER,
    "steps_offset": tuple(name for name in _NOT_FLOW if name != "DPMSolverSinglestepScheduler"),
    "stochastic_sampling": ("FlowMatchEulerDiscreteScheduler",),
    "thresholding": (*_CLIPS, *_SOLVER_ORDER),
    "timestep_spacing": tuple(name for name in _NOT_FLOW if name != "DPMSolverSinglestepScheduler"),
    "timestep_scaling": ("LCMScheduler", "TCDScheduler"),
    "timestep_type": ("EulerDiscreteScheduler",),
    "trained_betas": _NOT_FLOW,
    "use_dynamic_shifting": (*_FLOWS, *_SOLVER_ORDER),
    "use_flow_sigmas": _SOLVER_ORDER,
    "variance_type": ("DDPMScheduler", *_MULTISTEP),
}
"""Key of a scheduler_config.json -> the scheduler classes of diffusers that read it; the others pass over it."""

# Keys our samplers have no choice about, with every value that leaves their pictures unchanged.
_FIXED: Mapping[str, tuple[Any, ...]] = {
    "algorithm_type": ("dpmsolver++", "deis", "sde-dpmsolver++"),
    "clip_sample": (False, None),
    "interpolation_type": ("linear",),
    "invert_sigmas": (False, None),
    "lambda_min_clipped": (-math.inf, None),
    "predict_epsilon": (True, None),
    "scale_factors": (None,),
    "shift_terminal": (None,),
    "predict_x0": (True, None),
    "disable_corrector": ([], None),
    "solver_p": (None,),
    "solver_order": (1, 2, 3, None),
    "solver_type": ("midpoint", "heun", "bh1", "bh2", "logrho", None),  # a solver passes over the type of another
    "stochastic_sampling": (False, None),
    "thresholding": (False, None),
    "timestep_scaling": (10.0,),
    "timestep_type": ("discrete",),
    "variance_type": (None, "fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log"),
}
# Keys that are followed where the class reads them, with the values that change nothing where it does not.
_FOLLOWED: Mapping[str, tuple[Any, ...]] = {
    "algorithm_type": ("dpmsolver++", "deis"),
    "solver_order": (2, None),
    "solver_type": ("midpoint", "bh1", "bh2", "logrho", None),
    "prediction_type": ("flow", "flow_prediction", None),
    "rescale_betas_zero_snr": (False, None),
    "timestep_spacing": ("linspace", None),
    "trained_betas": (None,),
    "use_dynamic_shifting": (False, None),
    "use_flow_sigmas": (False, None),
}
_TEXTS = (
    "_class_name",
    "prediction_type",
    "sampler",
    "schedule",
    "beta_schedule",
    "timestep_spacing",
    "final_sigmas_type",
)
_NUMBERS = ("num_train_timesteps", "beta_start", "beta_end", "steps_offset", "original_inference_steps")


@dataclass(frozen=True, kw_only=True)
class _FlowShift:
    """The key of diffusers' DPM solvers for the shift of a rectified flow."""

    flow_shift: float = 1.0


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
    *("base_image_seq_len", "base_shift", "clip_sample_range", "dynamic_thresholding_ratio"),
    *("max_image_seq_len", "max_shift", "noise_sampler_seed", "sample_max_value", "sigma_max"),
    *("sigma_min", "skip_prk_steps", "time_shift_type", "upscale_mode"),
}


def check_scheduler_values(config: Mapping[str, Any], *, source: str) -> None:
    """Raise ValueError for a key with a value of the wrong type, a number that is not finite or outside its bounds."""
    for key in _TEXTS:
        value = config.get(key)
        if value is not None and not (isinstance(value, str) and len(value) <= MOST_LETTERS):
            raise ValueError(f"{source}: {key}={shown(value)} is not a text of at most {MOST_LETTERS} letters")
    for key in _NUMBERS:
        if key in config and config[key] is None:
            raise ValueError(f"{source}: {key} is null, not a number")
    for cls in (DDPM, Spacing, RectifiedFlow, _FlowShift):
        check_values(cls, config, source)


def check_config(config: Mapping[str, Any], *, source: str) -> None:
    """ValueError for a class or value that changes the picture and is not supported; a warning for unknown keys."""
    check_scheduler_values(config, source=source)
    name = config.get("_class_name")
    if name is not None and name not in SCHEDULERS:
        raise ValueError(f"{source}: _class_name {shown(name)} is not supported; known are {', '.join(SCHEDULERS)}")
    if config.get("sampler") is not None:
        try:
            sampler_name(str(config["sampler"]))
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from None
    _check_contradictions(config, source=source)
    for key, value in config.items():
        if key in _FIXED and value not in _FIXED[key]:
            if key == "clip_sample":  # no pixels, which have a range, but latents; StableDiffusionPipeline corrects it
                text = f"{source}: clip_sample={shown(value)} is passed over: latents are not clipped"
                warnings.warn(text, stacklevel=2)
            elif not reads(config, key):
                warnings.warn(f"{source}: {key}={shown(value)} is passed over, as by diffusers' {name}", stacklevel=2)
            else:
                raise ValueError(f"{source}: {key}={shown(value)} is not supported; {_instead(key, _FIXED[key][0])}")
        elif key in _FOLLOWED and value not in _FOLLOWED[key] and not reads(config, key):
            text = f"{source}: {key}={shown(value)} is passed over, as by diffusers' {name}"
            if key == "rescale_betas_zero_snr":
                text += f"; to follow it {_with('_class_name', 'DDIMScheduler')}"
            warnings.warn(text, stacklevel=2)
        if key not in _FIXED and key not in _READ | _IDLE and not key.startswith("_"):
            warnings.warn(f"{source}: {shortened(key, 160)}={shown(value)} is not known and is ignored", stacklevel=2)


def _check_contradictions(config: Mapping[str, Any], *, source: str) -> None:
    """Raise ValueError for two rules of sigmas, and for an algorithm that the class does not have."""
    name = str(config.get("_class_name", ""))
    spec = SAMPLERS[SCHEDULERS.get(name, "ddim")]
    asked = [key for key, rule in SIGMAS.items() if config.get(key) and rule in spec.rules]
    if len(asked) > 1:
        raise ValueError(f"{source}: {' and '.join(asked)} are both set, and each places the steps: set one of them")
    noisy = config.get("algorithm_type") == "sde-dpmsolver++" and reads(config, "algorithm_type")
    if noisy and name != "DPMSolverMultistepScheduler":
        hint = _instead("algorithm_type", _FIXED["algorithm_type"][0])
        raise ValueError(f"{source}: algorithm_type='sde-dpmsolver++' is not supported for {name}; {hint}")


def reads(config: Mapping[str, Any], key: str) -> bool:
    """Return whether diffusers' scheduler of this config reads a key; True where the key or the class is not known.

    >>> from lcm_jax.weights.scheduler_config import reads
    >>> reads({"_class_name": "PNDMScheduler"}, "rescale_betas_zero_snr")
    False
    """
    name = config.get("_class_name", CONTINUOUS)
    return key not in READERS or name == CONTINUOUS or name not in SCHEDULERS or name in READERS[key]


def followed(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a scheduler config without the keys that diffusers' class passes over, see `reads`.

    >>> from lcm_jax.weights.scheduler_config import followed
    >>> followed({"_class_name": "HeunDiscreteScheduler", "steps_offset": 1, "rescale_betas_zero_snr": True})
    {'_class_name': 'HeunDiscreteScheduler', 'steps_offset': 1}
    """
    return {key: value for key, value in config.items() if reads(config, key)}


def has_zero_terminal_snr(config: Mapping[str, Any]) -> bool:
    """Return whether a scheduler config ends in pure noise, as its class of diffusers follows it."""
    return bool(followed(config).get("rescale_betas_zero_snr"))


def _instead(key: str, value: Any) -> str:
    return f"{_with(key, value)}, or change the file"


def _with(key: str, value: Any) -> str:
    """Return how to load a model with another value in its scheduler config, for messages."""
    text = json.dumps(value) if not isinstance(value, str) else value
    return f"load with scheduler={{{key!r}: {value!r}}} (--scheduler {key}={text})"


def overridden(config: Mapping[str, Any], changes: Mapping[str, Any], *, source: str) -> dict[str, Any]:
    """Return a scheduler config with some keys replaced; ValueError for a key that no scheduler has.

    A class that is named here keeps what it shares with the old one, as diffusers' `from_config` does.

    >>> from lcm_jax.weights.scheduler_config import overridden
    >>> overridden({"_class_name": "DDIMScheduler"}, {"prediction_type": "v_prediction"}, source="file")
    {'_class_name': 'DDIMScheduler', 'prediction_type': 'v_prediction'}
    """
    known = {"_class_name", *_FIXED, *_READ, *_IDLE}
    for key in changes:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f", did you mean {near[0]}?" if near else f"; known are {', '.join(sorted(known))}"
            raise ValueError(f"scheduler: {key!r} is no key of a scheduler config{hint}")
    changed = {**config, **changes}
    check_config(changed, source=source)
    return changed


def with_zero_terminal_snr(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a scheduler config whose last timestep is pure noise (2305.08891), with a grid that begins there.

    A class of diffusers that would pass over rescale_betas_zero_snr becomes DDIMScheduler.
    """
    changed = {**config, "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    if not reads(config, "rescale_betas_zero_snr"):
        changed |= {"_class_name": "DDIMScheduler", "clip_sample": False}  # that class clips unless told otherwise
    return changed


def from_config(config: Mapping[str, Any], *, source: str = "scheduler_config.json") -> Schedule:
    """Return the schedule that a diffusers scheduler_config.json describes by its betas or its flow shift.

    `read_spacing` reads the spacing, `read_scheduler` the prediction type. The key `schedule`, which diffusers
    does not have, names one of CONTINUOUS_SCHEDULES. Raises ValueError for betas given as a list, for
    resolution-dependent shifting and for an unknown beta_schedule.
    """
    config = followed(config)
    name = str(config.get("_class_name", ""))
    if config.get("trained_betas") is not None:
        hint = f"give beta_start, beta_end and beta_schedule instead, and {_instead('trained_betas', None)}"
        raise ValueError(f"{source}: trained_betas is set: {hint}")
    if config.get("use_dynamic_shifting"):
        hint = f"give a fixed shift and {_instead('use_dynamic_shifting', False)}"
        raise ValueError(f"{source}: use_dynamic_shifting is unsupported: {hint}")
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


def read_spacing(config: Mapping[str, Any], *, source: str = "scheduler_config.json") -> Spacing:
    """Return the spacing and the solver's options of a scheduler_config.json, with its class's defaults.

    >>> from lcm_jax.weights.scheduler_config import read_spacing
    >>> read_spacing({"_class_name": "PNDMScheduler"}).set_alpha_to_one
    False
    """
    defaults = _CLASS_DEFAULTS.get(str(config.get("_class_name", "")), {})
    return Spacing.from_config({**defaults, **followed(config)}, source=source)


def read_scheduler(config: Mapping[str, Any], *, source: str = "scheduler_config.json") -> tuple[Schedule, Kind]:
    """Return the schedule and the prediction type of a scheduler_config.json; ValueError for what is not supported.

    A flow-matching scheduler has no prediction_type: its kind is "flow".

    >>> from lcm_jax.weights.scheduler_config import read_scheduler
    >>> read_scheduler({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0})
    (RectifiedFlow(shift=3.0), 'flow')
    """
    check_config(config, source=source)
    schedule = from_config(config, source=source)
    kind = followed(config).get("prediction_type", schedule.usual_kind)
    kind = {"flow_prediction": "flow"}.get(kind, kind)  # as the DPM solvers call it
    known = [name for name in get_args(Kind) if name != "edm" or "schedule" in config]  # diffusers has none of its own
    if kind not in known:
        raise ValueError(f"{source}: prediction_type {kind!r} is unknown; known are {', '.join(known)}")
    return schedule, kind


def prediction_of(config: Mapping[str, Any]) -> str:
    """Return the network's output as a scheduler config declares it: "epsilon", "v_prediction", "sample" or "flow"."""
    config = followed(config)
    flow = "FlowMatch" in str(config.get("_class_name", "")) or bool(config.get("use_flow_sigmas"))
    kind = str(config.get("prediction_type") or ("flow" if flow else "epsilon"))
    return {"flow_prediction": "flow"}.get(kind, kind)


def not_held_by_single_files(config: Mapping[str, Any], family: str) -> list[str]:
    """Return the keys of a scheduler config, with values, without which other programs misread a single file.

    They read the prediction type and zero terminal SNR, and take the rest from the model's family ("sd1", ..., "sd3").

    >>> from lcm_jax.weights.scheduler_config import not_held_by_single_files
    >>> not_held_by_single_files({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 1.0}, "sd3")
    ['shift=1.0']
    """
    prediction, flow = prediction_of(config), family == "sd3"
    lost = [] if prediction in (("flow",) if flow else ("epsilon", "v_prediction")) else ["prediction_type"]
    if flow:
        shift = "flow_shift" if config.get("use_flow_sigmas") else "shift"
        lost += [] if config.get(shift, 1.0) == 3.0 else [shift]
    else:
        usual = {"num_train_timesteps": 1000, **_LATENT, "trained_betas": None}
        plain = {"num_train_timesteps": 1000, "beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear"}
        values = {**plain, **_CLASS_DEFAULTS.get(str(config.get("_class_name", "")), {}), **config}
        lost += [key for key, value in usual.items() if values.get(key) != value]
    return [f"{key}={config.get(key)!r}" for key in lost]


def sampler_of(config: Mapping[str, Any], *, source: str = "scheduler_config.json") -> str:
    """Return the sampler that a scheduler_config.json asks for; a UserWarning where another one stands in for it.

    >>> from lcm_jax.weights.scheduler_config import sampler_of
    >>> sampler_of({"_class_name": "HeunDiscreteScheduler"})
    'heun'
    """
    if config.get("sampler"):
        return sampler_name(str(config["sampler"]))
    scheduler = config.get("_class_name", "")
    sampler, other = SCHEDULERS.get(scheduler, "ddim"), None
    if scheduler == "DPMSolverMultistepScheduler" and config.get("algorithm_type") == "sde-dpmsolver++":
        order = config.get("solver_order") or 2
        sampler = "dpm++3m_sde" if order == 3 else "dpm++2m_sde"
        other = "solver_order 1" if order == 1 else None
    if scheduler == "DPMSolverSinglestepScheduler" and config.get("solver_type") == "heun":
        other = "solver_type heun"
    if scheduler == "PNDMScheduler" and not config.get("skip_prk_steps"):
        other = "skip_prk_steps false"
    if scheduler == "DDPMScheduler" and config.get("variance_type") not in (None, "fixed_small", "fixed_small_log"):
        other = f"variance_type {config['variance_type']}"
    if other is not None:
        warnings.warn(
            f"{source} asks for {scheduler} with {other}, for which this library has no sampler: {sampler!r} draws in "
            "its place; name a sampler to choose another",
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
