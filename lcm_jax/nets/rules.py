"""Parameter paths to PyTorch names (data only); `lcm_jax.weights.torch_params` walks the tables in both directions."""

from __future__ import annotations

RULES_UNET: tuple[tuple[str, str], ...] = (
    (r"(?<=transformer_blocks)/", "/*/"),  # stacked by nn.scan
    (r"(?<!linear)_(\d+)(?=/)", r".\1"),
)
