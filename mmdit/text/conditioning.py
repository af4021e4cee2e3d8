"""The conditioning of each model family: the arrays that its network takes, assembled from its text encoders.

Every function is pure and can be jitted. The hidden layer of a family is chosen here, so the same parameters work for
all of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, cast

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from mmdit.text.clip import CLIPTextModel, TextOutput
from mmdit.text.t5 import T5Encoder


class Encoding(NamedTuple):
    """A text encoder, its parameters, and the token ids of a batch from its own tokenizer.

    mask: True where a token may be attended to; None is everywhere.
    """

    module: CLIPTextModel | T5Encoder
    params: Any
    ids: Int[Array, "b l"]
    mask: Bool[Array, "b l"] | None = None


def _encode(encoding: Encoding, hidden_layer: int, final_norm: bool) -> TextOutput:
    module = encoding.module.clone(hidden_layer=hidden_layer, final_norm=final_norm)
    return cast(TextOutput, module.apply({"params": encoding.params}, encoding.ids, encoding.mask))


def stable_diffusion(encoding: Encoding, *, clip_skip: int = 0) -> dict[str, Array]:
    """Return the conditioning of SD1 and SD2, {"context": (b, l, d)}: the last hidden state after the final norm.

    SD2 was trained on OpenCLIP-H's penultimate layer, but its checkpoint does not have the last one, so both are equal
    here. clip_skip: number of last layers to skip (the final norm stays), as some finetunes of SD1 need.

    >>> import jax, jax.numpy as jnp
    >>> from mmdit.text import CLIPTextConfig, CLIPTextModel, Encoding, stable_diffusion
    >>> sizes = dict(vocab_size=10, hidden_size=4, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    >>> clip = CLIPTextModel(CLIPTextConfig(**sizes, eos_token_id=9))
    >>> ids = jax.ShapeDtypeStruct((1, 5), jnp.int32)
    >>> params = jax.eval_shape(clip.init, jax.random.key(0), ids)["params"]
    >>> jax.eval_shape(lambda p, ids: stable_diffusion(Encoding(clip, p, ids)), params, ids)["context"].shape
    (1, 5, 4)
    """
    return {"context": _encode(encoding, -1 - clip_skip, True).hidden}


def sdxl(
    encodings: Sequence[Encoding], time_ids: Float[Array | np.ndarray, "b n"], *, clip_skip: int = 0
) -> dict[str, Array]:
    """Return the conditioning of SDXL (Podell et al. 2023, arXiv:2307.01952, section 2.1).

    It is {"context": (b, l, 2048), "pooled": (b, 1280), "time_ids": (b, n)}. context: the penultimate hidden states of
    CLIP-L and bigG without the final norm, concatenated on channels. pooled: the projected text embedding of the last
    encoder. time_ids: see `size_ids`. The refiner has only bigG, so its context is 1280 wide. clip_skip: number of
    further layers to skip. Raises ValueError without encoders, for ids of different shapes, or if the last encoder has
    no projection.
    """
    if not encodings:
        raise ValueError("sdxl: no text encoder given; SDXL takes CLIP-L and bigG, its refiner bigG only")
    if len({e.ids.shape for e in encodings}) > 1:
        raise ValueError(f"sdxl: the encoders' ids differ in shape: {', '.join(str(e.ids.shape) for e in encodings)}")
    outputs = [_encode(e, -2 - clip_skip, False) for e in encodings]
    pooled = outputs[-1].text_embeds
    if pooled is None:
        raise ValueError("sdxl: the last text encoder needs projection=True: its text_embeds are SDXL's pooled vector")
    return {
        "context": jnp.concatenate([out.hidden for out in outputs], axis=-1),
        "pooled": pooled,
        "time_ids": jnp.asarray(time_ids),
    }


def sd3(
    clips: Sequence[Encoding], t5: Encoding | None, *, width: int, t5_tokens: int, clip_skip: int = 0
) -> dict[str, Array]:
    """Return the conditioning of SD3 (Esser et al. 2024, arXiv:2403.03206, section 4).

    It is {"context": (b, l + m, width), "pooled": (b, p)}. context: the penultimate hidden states of the CLIPs without
    the final norm, concatenated on channels and padded with zeros to `width`, then the states of T5 as further tokens.
    pooled: the CLIPs' text embeddings, concatenated. Without T5 its `t5_tokens` tokens are zeros, as when it was
    dropped in training; `width` is T5's width in any case. clip_skip: number of further layers to skip. Raises
    ValueError without CLIPs, for ids of different shapes, for a CLIP without projection, or if widths or lengths do not
    fit.

    >>> import jax, jax.numpy as jnp
    >>> from mmdit.text import CLIPTextConfig, CLIPTextModel, Encoding, sd3
    >>> sizes = dict(vocab_size=10, hidden_size=4, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    >>> clip = CLIPTextModel(CLIPTextConfig(**sizes, projection_dim=6, eos_token_id=9), projection=True)
    >>> ids = jax.ShapeDtypeStruct((1, 5), jnp.int32)
    >>> params = jax.eval_shape(clip.init, jax.random.key(0), ids)["params"]
    >>> def condition(params, ids):
    ...     return sd3([Encoding(clip, params, ids)] * 2, None, width=8, t5_tokens=3)
    >>> cond = jax.eval_shape(condition, params, ids)
    >>> cond["context"].shape, cond["pooled"].shape
    ((1, 8, 8), (1, 12))
    """
    if not clips:
        raise ValueError("sd3: no text encoder given; SD3 takes CLIP-L and bigG, T5 is optional")
    if len({e.ids.shape for e in clips}) > 1:
        raise ValueError(f"sd3: the CLIPs' ids differ in shape: {', '.join(str(e.ids.shape) for e in clips)}")
    outputs = [_encode(e, -2 - clip_skip, False) for e in clips]
    embeds = [out.text_embeds for out in outputs if out.text_embeds is not None]
    if len(embeds) < len(outputs):
        raise ValueError("sd3: every CLIP needs projection=True: their text_embeds are SD3's pooled vector")
    hidden = jnp.concatenate([out.hidden for out in outputs], axis=-1)
    if hidden.shape[-1] > width:
        raise ValueError(f"sd3: the CLIPs are {hidden.shape[-1]} wide together, more than the context's {width}")
    hidden = jnp.pad(hidden, ((0, 0), (0, 0), (0, width - hidden.shape[-1])))
    if t5 is None:
        states = jnp.zeros((len(hidden), t5_tokens, width), hidden.dtype)
    else:
        states = cast(Array, t5.module.apply({"params": t5.params}, t5.ids, t5.mask))
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
    """Return SDXL's size conditioning in pixels (arXiv:2307.01952, section 2.2), one row for each of `batch` images.

    A row is (original height, width, crop top, left, target height, width); the target is the original by default.
    With an aesthetic score (1 to 10) it is the refiner's: (original height, width, crop top, left, score).

    >>> from mmdit.text import size_ids
    >>> size_ids((1024, 768)).tolist()
    [[1024.0, 768.0, 0.0, 0.0, 1024.0, 768.0]]
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
    """Return the size conditioning of a prompt and of its negative prompt, for an image of `size` (height, width).

    The defaults are those of diffusers: the original has `size` too, there is no crop, the score is 6. The refiner's
    negative prompt always has a score of 2.5 and no crop.

    >>> from mmdit.text.conditioning import size_pair
    >>> prompt, negative = size_pair((512, 512), refiner=True)
    >>> prompt.tolist(), negative.tolist()
    ([512.0, 512.0, 0.0, 0.0, 6.0], [512.0, 512.0, 0.0, 0.0, 2.5])
    """
    original, crop = original_size or size, crop or (0, 0)
    if not refiner:
        row = size_ids(original, crop, size)[0]
        return row, row
    score = 6.0 if aesthetic_score is None else aesthetic_score
    return size_ids(original, crop, aesthetic_score=score)[0], size_ids(original, aesthetic_score=2.5)[0]


def zero_prompt(condition: Mapping[str, Array]) -> dict[str, Array]:
    """Return the conditioning of SDXL's empty prompt: zeros for the text, while the size conditioning stays.

    >>> import jax.numpy as jnp
    >>> from mmdit.text import zero_prompt
    >>> empty = zero_prompt({"pooled": jnp.ones((1, 2)), "time_ids": jnp.ones((1, 2))})
    >>> empty["pooled"].tolist(), empty["time_ids"].tolist()
    ([[0.0, 0.0]], [[1.0, 1.0]])
    """
    return {name: value if name == "time_ids" else jnp.zeros_like(value) for name, value in condition.items()}
