"""How each model family assembles its condition from its text encoders.

Every function is pure and can be jitted whole; which hidden layer a family reads is decided here, so the same
parameters serve any of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, cast

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mmdit.text.clip import CLIPTextModel, TextOutput


class Encoding(NamedTuple):
    """One text encoder at work on a batch: its ids come from its own tokenizer."""

    module: CLIPTextModel
    params: Any
    ids: Int[Array, "b l"]


def _encode(encoding: Encoding, hidden_layer: int, final_norm: bool) -> TextOutput:
    module = encoding.module.clone(hidden_layer=hidden_layer, final_norm=final_norm)
    return cast(TextOutput, module.apply({"params": encoding.params}, encoding.ids))


def stable_diffusion(encoding: Encoding, *, clip_skip: int = 0) -> dict[str, Array]:
    """SD1 and SD2 -> {"context": (b, l, d)}: the last hidden state after the final norm.

    SD2 was trained on OpenCLIP-H's penultimate layer; its checkpoint leaves the last one out, so nothing differs here.
    clip_skip: number of last layers to skip (the final norm stays), as some finetunes of SD1 ask for.
    """
    return {"context": _encode(encoding, -1 - clip_skip, True).hidden}


def sdxl(encodings: Sequence[Encoding], time_ids: Float[Array, "b 6"], *, clip_skip: int = 0) -> dict[str, Array]:
    """SDXL (Podell et al. 2023, arXiv:2307.01952, section 2.1) -> {"context": (b, l, 2048), "pooled", "time_ids"}.

    context: the penultimate hidden states of CLIP-L and bigG without the final norm, joined on channels.
    pooled: the projected text embedding of the last encoder. time_ids: see `size_ids`.
    """
    if not encodings:
        raise ValueError("sdxl: no text encoder given; SDXL takes CLIP-L and bigG")
    if len({e.ids.shape for e in encodings}) > 1:
        raise ValueError(f"sdxl: the encoders' ids differ in shape: {', '.join(str(e.ids.shape) for e in encodings)}")
    outputs = [_encode(e, -2 - clip_skip, False) for e in encodings]
    pooled = outputs[-1].text_embeds
    if pooled is None:
        raise ValueError("sdxl: the last text encoder needs projection=True, its text_embeds are SDXL's pooled vector")
    return {
        "context": jnp.concatenate([out.hidden for out in outputs], axis=-1),
        "pooled": pooled,
        "time_ids": time_ids,
    }


def size_ids(
    original: tuple[int, int], crop: tuple[int, int] = (0, 0), target: tuple[int, int] | None = None, *, batch: int = 1
) -> Float[Array, "b 6"]:
    """SDXL's size conditioning in pixels: (original height, width, crop top, left, target height, width)."""
    row = jnp.asarray([*original, *crop, *(original if target is None else target)], jnp.float32)
    return jnp.tile(row, (batch, 1))


def zero_prompt(condition: Mapping[str, Array]) -> dict[str, Array]:
    """SDXL's empty prompt: the text embeddings are zeros, the size conditioning stays."""
    return {name: value if name == "time_ids" else jnp.zeros_like(value) for name, value in condition.items()}
