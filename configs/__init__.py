"""The registered configs, which `lcm-jax train --config NAME` runs."""

from lcm_jax.configs import openmoji as openmoji
from lcm_jax.configs import openmoji_sd3 as openmoji_sd3
from lcm_jax.configs import sd3 as sd3
from lcm_jax.configs import stable_diffusion as stable_diffusion
from lcm_jax.configs.registry import CONFIGS, get, register, run_name, with_method

__all__ = ["CONFIGS", "get", "register", "run_name", "with_method"]
