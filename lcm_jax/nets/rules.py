"""The PyTorch names of a UNet's parameter paths: regexes applied in order; `lcm_jax.weights.torch_params` uses them.

Data only.
"""

from __future__ import annotations

RULES_UNET: tuple[tuple[str, str], ...] = (
    (r"(?<=transformer_blocks)/", "/*/"),  # stacked by nn.scan
    (r"(?<!linear)_(\d+)(?=/)", r".\1"),
)
