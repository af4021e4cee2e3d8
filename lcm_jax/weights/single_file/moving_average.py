"""The moving average in an LDM checkpoint (LitEma): its keys are those of the network without their dots."""

from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np

PREFIX = "model_ema."
NETWORK = "model.diffusion_model."

# The names between the dots. A number follows where a list is, and two follow the lists of blocks (block 10, layer 1).
_WORDS = (
    *("input_blocks", "output_blocks", "middle_block", "time_embed", "label_emb", "out", "op"),
    *("in_layers", "emb_layers", "out_layers", "skip_connection", "transformer_blocks", "conv"),
    *("attn1", "attn2", "attn", "norm1", "norm2", "norm3", "norm", "proj_in", "proj_out", "proj", "ff", "net"),
    *("to_q", "to_k", "to_v", "to_out", "cond_proj", "span_proj", "weight", "bias"),
    *("joint_blocks", "x_block", "context_block", "qkv", "ln_q", "ln_k", "mlp", "fc1", "fc2", "linear", "pos_embed"),
    *("adaLN_modulation", "final_layer", "x_embedder", "t_embedder", "y_embedder", "context_embedder"),
)
_WORD = "|".join(sorted(_WORDS, key=len, reverse=True))
_TOKEN = re.compile(rf"((?:input|output)_blocks)(\d+?)(\d)(?!\d)|(label_emb)(\d)(\d)|({_WORD})(?=$|[a-z]|\d)|(\d+)")


def dotted(flat: str) -> str | None:
    """Return a key of a UNet or MMDiT in original naming from the same key without dots; None if it is of neither.

    >>> from lcm_jax.weights.single_file.moving_average import dotted
    >>> dotted("input_blocks101transformer_blocks0attn2to_out0weight")
    'input_blocks.10.1.transformer_blocks.0.attn2.to_out.0.weight'
    """
    words, position = [], 0
    while position < len(flat):
        match = _TOKEN.match(flat, position)
        if match is None:
            return None
        words += [group for group in match.groups() if group is not None]
        position = match.end()
    return ".".join(words)


def is_alone(tensors: Mapping[str, np.ndarray]) -> bool:
    """Return whether a checkpoint has the moving average of its network, and not the network."""
    has_network = any(key.startswith(NETWORK) for key in tensors)
    return not has_network and any(key.startswith(f"{PREFIX}diffusion_model") for key in tensors)


def as_network(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return the tensors of a checkpoint with the moving average in the network's place, if it has that alone."""
    if not is_alone(tensors):
        return dict(tensors)
    renamed: dict[str, np.ndarray] = {}
    for key, tensor in tensors.items():
        flat = key.removeprefix(PREFIX).removeprefix("diffusion_model").removeprefix(".")
        name = None
        if key.startswith(f"{PREFIX}diffusion_model"):
            name = flat if "." in flat else dotted(flat)
        renamed[key if name is None else NETWORK + name] = tensor
    return renamed
