"""The configs of the published MMDiTs, from their config.json files, and the family of the scaling study."""

from __future__ import annotations

import dataclasses

from mmdit.config import MMDiTConfig

SD3_MEDIUM = MMDiTConfig(num_layers=24, num_attention_heads=24, caption_projection_dim=1536, pos_embed_max_size=192)

SD35_MEDIUM = dataclasses.replace(
    SD3_MEDIUM, pos_embed_max_size=384, dual_attention_layers=tuple(range(13)), qk_norm="rms_norm"
)

SD35_LARGE = MMDiTConfig(  # and large-turbo
    num_layers=38,
    num_attention_heads=38,
    caption_projection_dim=2432,
    pos_embed_max_size=192,
    qk_norm="rms_norm",
)


def family(depth: int) -> MMDiTConfig:
    """Return the model of `depth` blocks in the scaling study of arXiv:2403.03206, section 5.3.

    It has `depth` heads of 64 channels each. It is for images of 256 x 256 pixels, latents of 32 x 32; the position
    grid allows twice that on each side.

    >>> from mmdit import family
    >>> family(15).width
    960
    """
    return MMDiTConfig(
        sample_size=32,
        num_layers=depth,
        num_attention_heads=depth,
        caption_projection_dim=64 * depth,
        pos_embed_max_size=32,
    )
