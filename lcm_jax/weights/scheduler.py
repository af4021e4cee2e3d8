"""scheduler_config.json: the schedule and the kind of output, in and out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, get_args

from lcm_jax.schedules import DDPM, from_config
from lcm_jax.typing import Kind, Schedule


def read_scheduler(config: Mapping[str, Any], *, source: str = "scheduler_config.json") -> tuple[Schedule, Kind]:
    """What a scheduler_config.json declares. A flow-matching scheduler has no prediction_type: its kind is flow."""
    schedule = from_config(config, source=source)
    kind = config.get("prediction_type", "epsilon" if isinstance(schedule, DDPM) else "flow")
    if kind not in get_args(Kind):
        raise ValueError(f"{source}: prediction_type {kind!r} is unknown; known are {', '.join(get_args(Kind))}")
    return schedule, kind


def scheduler_config(schedule: Schedule, kind: Kind, sampler: str) -> dict[str, Any]:
    """scheduler_config.json of a table schedule: an LCMScheduler for "lcm", a DDIMScheduler otherwise."""
    if not isinstance(schedule, DDPM):
        raise ValueError(f"no scheduler_config.json is written for {type(schedule).__name__}; use a DDPM table")
    shared = {
        "num_train_timesteps": schedule.num_train_timesteps,
        "beta_start": schedule.beta_start,
        "beta_end": schedule.beta_end,
        "beta_schedule": schedule.beta_schedule,
        "rescale_betas_zero_snr": schedule.rescale_betas_zero_snr,
        "prediction_type": kind,
        "clip_sample": False,
        "set_alpha_to_one": True,
    }
    if sampler == "lcm":
        return {"_class_name": "LCMScheduler", **shared, "original_inference_steps": 50, "timestep_scaling": 10.0}
    return {"_class_name": "DDIMScheduler", **shared, "timestep_spacing": "trailing", "steps_offset": 0}
