"""How each model family assembles its condition from its text encoders.

Every function is pure and can be jitted whole; which hidden layer a family reads is decided here, so the same
parameters serve any of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, cast

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from mmdit.text.clip import CLIPTextModel, TextOutput
from mmdit.text.t5 import T5Encoder


class Encoding(NamedTuple):
    """One text encoder at work on a batch: its ids come from its own tokenizer."""

    module: CLIPTextModel | T5Encoder
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


def sdxl(encodings: Sequence[Encoding], time_ids: Float[Array, "b n"], *, clip_skip: int = 0) -> dict[str, Array]:
    """SDXL (Podell et al. 2023, arXiv:2307.01952, section 2.1) -> {"context": (b, l, 2048), "pooled", "time_ids"}.

    context: the penultimate hidden states of CLIP-L and bigG without the final norm, joined on channels.
    pooled: the projected text embedding of the last encoder. time_ids: see `size_ids`. The refiner has bigG alone, so
    its context is 1280 wide.
    """
    if not encodings:
        raise ValueError("sdxl: no text encoder given; SDXL takes CLIP-L and bigG, its refiner bigG")
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


def sd3(
    clips: Sequence[Encoding], t5: Encoding | None, *, width: int, t5_tokens: int, clip_skip: int = 0
) -> dict[str, Array]:
    """SD3 (Esser et al. 2024, arXiv:2403.03206, section 4) -> {"context": (b, l + m, width), "pooled": (b, p)}.

    context: the penultimate hidden states of the CLIPs without the final norm, joined on channels and filled up with
    zeros to `width`, then the states of T5, joined on tokens. pooled: the CLIPs' text embeddings, joined.
    Without T5 its `t5_tokens` tokens are zeros, as when it was dropped in training. `width` is T5's, also without it.
    """
    if not clips:
        raise ValueError("sd3: no text encoder given; SD3 takes CLIP-L and bigG, T5 is optional")
    if len({e.ids.shape for e in clips}) > 1:
        raise ValueError(f"sd3: the CLIPs' ids differ in shape: {', '.join(str(e.ids.shape) for e in clips)}")
    outputs = [_encode(e, -2 - clip_skip, False) for e in clips]
    embeds = [out.text_embeds for out in outputs if out.text_embeds is not None]
    if len(embeds) < len(outputs):
        raise ValueError("sd3: every CLIP needs projection=True, their text_embeds are SD3's pooled vector")
    hidden = jnp.concatenate([out.hidden for out in outputs], axis=-1)
    if hidden.shape[-1] > width:
        raise ValueError(f"sd3: the CLIPs are {hidden.shape[-1]} wide together, more than the context's {width}")
    hidden = jnp.pad(hidden, ((0, 0), (0, 0), (0, width - hidden.shape[-1])))
    if t5 is None:
        states = jnp.zeros((len(hidden), t5_tokens, width), hidden.dtype)
    else:
        states = cast(Array, t5.module.apply({"params": t5.params}, t5.ids))
        if states.shape[1:] != (t5_tokens, width):
            raise ValueError(f"sd3: T5 gives (tokens, width) = {states.shape[1:]}, not {(t5_tokens, width)}")
    context = jnp.concatenate([hidden, states.astype(hidden.dtype)], axis=1)
    return {"context": context, "pooled": jnp.concatenate(embeds, axis=-1)}


def size_ids(
    original: tuple[int, int],
    crop: tuple[int, int] = (0, 0),
    target: tuple[int, int] | None = None,
    *,
    aesthetic_score: float | None = None,
    batch: int = 1,
) -> Float[np.ndarray, "b n"]:
    """SDXL's size conditioning in pixels: (original height, width, crop top, left, target height, width).

    With an aesthetic score (1 to 10) it is the refiner's: (original height, width, crop top, left, score).
    """
    last = (original if target is None else target) if aesthetic_score is None else (aesthetic_score,)
    return np.tile(np.asarray([*original, *crop, *last], np.float32), (batch, 1))


def size_pair(
    size: tuple[int, int],
    *,
    original_size: tuple[int, int] | None = None,
    crop: tuple[int, int] | None = None,
    aesthetic_score: float | None = None,
    refiner: bool = False,
) -> tuple[Float[np.ndarray, " n"], Float[np.ndarray, " n"]]:
    """The size conditioning of a prompt and of its negative prompt, where the picture has `size` (height, width).

    Defaults are diffusers': `size` is the original's too, nothing is cut off, the score is 6. The refiner's negative
    prompt always has a score of 2.5 and nothing cut off.
    """
    original, crop = original_size or size, crop or (0, 0)
    if not refiner:
        row = size_ids(original, crop, size)[0]
        return row, row
    score = 6.0 if aesthetic_score is None else aesthetic_score
    return size_ids(original, crop, aesthetic_score=score)[0], size_ids(original, aesthetic_score=2.5)[0]


def zero_prompt(condition: Mapping[str, Array]) -> dict[str, Array]:
    """SDXL's empty prompt: the text embeddings are zeros, the size conditioning stays."""
    return {name: value if name == "time_ids" else jnp.zeros_like(value) for name, value in condition.items()}
