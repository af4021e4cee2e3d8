"""Parameter path -> PyTorch name, in order; the weights engine adds the leaf names (kernel -> weight, ...)."""

from __future__ import annotations

Rules = tuple[tuple[str, str], ...]

# Both towers, alone or together in one CLIPModel tree.
RULES_CLIP_TEXT: Rules = (
    (r"encoder/layers/", "encoder.layers.*."),
    (r"encoder/layers_(\d+)/", r"encoder.layers.\1."),
)
RULES_CLIP_VISION: Rules = RULES_CLIP_TEXT

# Keys of older checkpoints that hold no parameter.
OPTIONAL_CLIP: tuple[str, ...] = (r"embeddings\.position_ids$",)
