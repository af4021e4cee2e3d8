"""The PyTorch names of the parameter paths: regexes applied in order.

`lcm_jax.weights.torch_params` adds the leaf names (kernel -> weight, ...). Data only.
"""

from __future__ import annotations

Rules = tuple[tuple[str, str], ...]

# Both encoders of CLIP, each alone or both in one CLIPModel tree.
RULES_CLIP_TEXT: Rules = (
    (r"encoder/layers/", "encoder.layers.*."),
    (r"encoder/layers_(\d+)/", r"encoder.layers.\1."),
)
RULES_CLIP_VISION: Rules = RULES_CLIP_TEXT

RULES_MMDIT: Rules = (
    (r"(?<=transformer_blocks)/", "/*/"),  # stacked by nn.scan from block 0 on
    (r"(?<=transformer_blocks)_from_(\d+)/", r"/*+\1/"),  # and a later run
    (r"(?<!linear)_(\d+)(?=/)", r".\1"),
)

# Keys of older checkpoints that are no parameters.
OPTIONAL_CLIP: tuple[str, ...] = (r"embeddings\.position_ids$",)

# All blocks use the first block's position bias: here it is outside the blocks, so that the stacked blocks are equal.
RULES_T5: Rules = (
    (r"^encoder/relative_attention_bias/", "encoder.block.0.layer.0.SelfAttention.relative_attention_bias."),
    (r"^encoder/block/", "encoder.block.*."),
    (r"(block|layer)_(\d+)/", r"\1.\2."),
)

# The embedding under its second name, and the decoder of a full T5.
OPTIONAL_T5: tuple[str, ...] = (r"^encoder\.embed_tokens\.weight$", r"^decoder\.", r"^lm_head\.")

# The second name of a tensor in a file -> the name above: files have either or both of a tied pair.
ALIASES_T5: dict[str, str] = {"encoder.embed_tokens.weight": "shared.weight"}
