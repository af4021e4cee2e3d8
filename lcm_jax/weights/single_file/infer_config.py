"""Configs of the networks in a single file, inferred from keys and shapes (original naming, prefixes removed).

The shapes tell widths, depths and conditioning. The rest (numbers of heads, activations, norm groups, scale of the
latents) is taken from the published families: heads of 64 channels, but eight heads in SD1, and 32 groups.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from itertools import pairwise
from typing import Any

from lcm_jax.nets import UNetConfig
from lcm_jax.runtime.messages import shown
from mmdit import MMDiTConfig
from mmdit.text import CLIPTextConfig, CLIPVisionConfig, T5Config
from vae16 import AutoencoderConfig

_MOST_LAYERS = 1024  # as in `abstract_params`
Shapes = Mapping[str, tuple[int, ...]]
_CROSS, _PLAIN = ("CrossAttnDownBlock2D", "CrossAttnUpBlock2D"), ("DownBlock2D", "UpBlock2D")


def _count(keys: Iterable[str], pattern: str) -> int:
    """Return one more than the largest number that `pattern` captures in a key; 0 if it matches none.

    Raises ValueError for a number that no network's layers reach.
    """
    numbers = {match[1]: key for key in keys if (match := re.match(pattern, key))}
    for number, key in numbers.items():
        if len(number) > 4 or int(number) >= _MOST_LAYERS:
            raise ValueError(
                f"the layer in the key {shown(key)} is numbered beyond {_MOST_LAYERS}; the file is damaged"
            )
    return max(map(int, numbers), default=-1) + 1


def _same(values: list[Any]) -> Any:
    """Return the common value of a list of equal values, else the list as a tuple."""
    return values[0] if all(value == values[0] for value in values) else tuple(values)


def unet_config(shapes: Shapes, *, source: str) -> UNetConfig:
    """Return the config of a UNet in LDM's or SGM's naming.

    shapes: key -> shape. source: the file that errors name. Raises ValueError for a UNet that is incomplete or not of
    Stable Diffusion's families.
    """
    for key in ("input_blocks.0.0.weight", "out.2.weight", "time_embed.0.weight"):
        if key not in shapes:
            raise ValueError(f"{source}: its UNet has no {key}; the file is incomplete")
    levels: list[tuple[int, list[int]]] = [(0, [])]  # (channels, transformer depth of each layer)
    for i in range(1, _count(shapes, r"input_blocks\.(\d+)\.")):
        if f"input_blocks.{i}.0.op.weight" in shapes:
            levels.append((0, []))
            continue
        channels = shapes.get(f"input_blocks.{i}.0.out_layers.3.weight", (0,))[0]
        levels[-1] = (channels, [*levels[-1][1], _depth(shapes, f"input_blocks.{i}.1")])
    up = [_depth(shapes, f"output_blocks.{i}.1") for i in range(_count(shapes, r"output_blocks\.(\d+)\."))]
    down = [depths for _, depths in levels]
    layers = [len(depths) for depths in down]
    ends = [sum(n + 1 for n in layers[::-1][:i]) for i in range(len(layers) + 1)]
    ups = [up[a:b] for a, b in pairwise(ends)]
    contexts = sorted({shape[1] for key, shape in shapes.items() if key.endswith(".attn2.to_k.weight")})
    projections = [len(shape) for key, shape in shapes.items() if key.endswith(".1.proj_in.weight")]
    if len(contexts) != 1 or not all(channels for channels, _ in levels):
        raise ValueError(f"{source}: its UNet is none of Stable Diffusion's (context widths {contexts})")
    widths = tuple(channels for channels, _ in levels)
    middle = _depth(shapes, "middle_block.1")
    linear = 2 in projections
    sgm = "label_emb.0.0.weight" in shapes
    heads = 8 if contexts[0] == 768 and not linear else _same([width // 64 for width in widths])
    return UNetConfig(
        sample_size=128 if sgm else 64,
        in_channels=shapes["input_blocks.0.0.weight"][1],
        out_channels=shapes["out.2.weight"][0],
        block_out_channels=widths,
        layers_per_block=_same(layers),
        down_block_types=tuple(_CROSS[0] if any(depths) else _PLAIN[0] for depths in down),
        mid_block_type="UNetMidBlock2DCrossAttn" if middle else "UNetMidBlock2D",
        up_block_types=tuple(_CROSS[1] if any(depths) else _PLAIN[1] for depths in ups),
        cross_attention_dim=contexts[0],
        attention_head_dim=heads,
        use_linear_projection=linear,
        time_cond_proj_dim=shapes["time_embed.cond_proj.weight"][1]
        if "time_embed.cond_proj.weight" in shapes
        else None,
        addition_embed_type="text_time" if sgm else None,
        addition_time_embed_dim=256 if sgm else None,
        projection_class_embeddings_input_dim=shapes["label_emb.0.0.weight"][1] if sgm else None,
        **_depths(down, middle, ups),
    )


def _depth(shapes: Shapes, prefix: str) -> int:
    """Return the number of transformer blocks of an attention layer; 0 if there is no such layer."""
    return _count(shapes, re.escape(prefix) + r"\.transformer_blocks\.(\d+)\.")


def _depths(down: list[list[int]], middle: int, up: list[list[int]]) -> dict[str, Any]:
    """Return transformer_layers_per_block, and the reverse_ one if a level's layers or the two halves differ (SSD-1B).

    down, up: for each level the depth of each of its layers. middle: the depth of the middle block.
    """
    # The middle's depth is the coarsest level's, even where that level itself does not attend (SDXL's refiner).
    plain = [max(depths) or 1 for depths in down[:-1]] + [max(down[-1]) or middle or 1]
    ups = [max(depths) or depth for depths, depth in zip(up, plain[::-1], strict=True)]
    alike = all(len(set(depths)) == 1 for depths in (*down, *up))
    if alike and ups == plain[::-1] and middle in (0, plain[-1]):
        return {"transformer_layers_per_block": _same(plain)}
    nested = [tuple(depths) if any(depths) else depth for depths, depth in zip(down, plain, strict=True)]
    reverse = [tuple(depths) if any(depths) else depth for depths, depth in zip(up, plain[::-1], strict=True)]
    if middle not in (0, max(down[-1]), plain[-1]):
        raise ValueError(
            f"the UNet's middle has {middle} transformer blocks, its coarsest level {down[-1]}; give configs"
        )
    return {"transformer_layers_per_block": tuple(nested), "reverse_transformer_layers_per_block": tuple(reverse)}


def vae_config(shapes: Shapes, *, source: str, family: str) -> AutoencoderConfig:
    """Return the config of an autoencoder in LDM's naming.

    shapes, source: as for `unet_config`. family: the one that sets scale and shift of the latents ("sd", "sdxl" or
    "sd3"), which the shapes do not tell. Raises ValueError for an autoencoder that is incomplete.
    """
    for key in ("encoder.conv_in.weight", "decoder.conv_in.weight"):
        if key not in shapes:
            raise ValueError(f"{source}: its autoencoder has no {key}; the file is incomplete")
    levels = _count(shapes, r"encoder\.down\.(\d+)\.")
    scaling = {"sd": (0.18215, None), "sdxl": (0.13025, None), "sd3": (1.5305, 0.0609)}[family]
    return AutoencoderConfig(
        latent_channels=shapes["decoder.conv_in.weight"][1],
        block_out_channels=tuple(shapes[f"encoder.down.{i}.block.0.conv1.weight"][0] for i in range(levels)),
        layers_per_block=_count(shapes, r"encoder\.down\.0\.block\.(\d+)\."),
        use_quant_conv="quant_conv.weight" in shapes,
        use_post_quant_conv="post_quant_conv.weight" in shapes,
        scaling_factor=scaling[0],
        shift_factor=scaling[1],
        sample_size={"sd": 512, "sdxl": 1024, "sd3": 1024}[family],
    )


def clip_config(shapes: Shapes, *, source: str) -> CLIPTextConfig:
    """Return the config of a text encoder in transformers' naming (CLIP-L) or in OpenCLIP's (H, bigG).

    shapes, source: as for `unet_config`. Raises ValueError for an encoder that is incomplete.
    """
    if open_clip := "positional_embedding" in shapes:
        position, token, first = (
            "positional_embedding",
            "token_embedding.weight",
            "transformer.resblocks.0.mlp.c_fc.weight",
        )
    else:
        prefix = "text_model."
        position = f"{prefix}embeddings.position_embedding.weight"
        token, first = f"{prefix}embeddings.token_embedding.weight", f"{prefix}encoder.layers.0.mlp.fc1.weight"
    for key in (position, token, first):
        if key not in shapes:
            raise ValueError(f"{source}: its text encoder has no {key}; the file is incomplete")
    layers = r"transformer\.resblocks\.(\d+)\." if open_clip else r"text_model\.encoder\.layers\.(\d+)\."
    intermediate, hidden = shapes[first]
    projection = shapes.get("text_projection") or shapes.get("text_projection.weight", (hidden,))[::-1]
    return CLIPTextConfig(
        vocab_size=shapes[token][0],
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=_count(shapes, layers),
        num_attention_heads=hidden // 64,
        max_position_embeddings=shapes[position][0],
        hidden_act="quick_gelu" if hidden == 768 else "gelu",
        projection_dim=projection[-1],
    )


def clip_vision_config(shapes: Shapes, *, source: str) -> CLIPVisionConfig:
    """Return the config of an image encoder in OpenCLIP's naming (`visual.`), whose heads are those of its ViTs.

    shapes, source: as for `unet_config`. Raises ValueError for an encoder that is incomplete.
    """
    names = ("conv1.weight", "positional_embedding", "transformer.resblocks.0.mlp.c_fc.weight", "proj")
    patches, positions, first, projection = (shapes.get(f"visual.{name}", ()) for name in names)
    for name, shape, axes in zip(names, (patches, positions, first, projection), (4, 2, 2, 2), strict=True):
        if len(shape) != axes:
            raise ValueError(f"{source}: its image encoder has no visual.{name} of {axes} axes; the file is incomplete")
    width = patches[0]
    return CLIPVisionConfig(
        image_size=math.isqrt(positions[0] - 1) * patches[-1],
        patch_size=patches[-1],
        num_channels=patches[1],
        hidden_size=width,
        intermediate_size=first[0],
        num_hidden_layers=_count(shapes, r"visual\.transformer\.resblocks\.(\d+)\."),
        num_attention_heads=16 if width >= 1280 else width // 64,  # of H, g and bigG; smaller ones have heads of 64
        hidden_act="gelu",
        projection_dim=projection[-1],
    )


def mmdit_config(shapes: Shapes, *, source: str) -> MMDiTConfig:
    """Return the config of an MMDiT in Stability's naming, with heads of 64 channels.

    shapes, source: as for `unet_config`. Raises ValueError for an MMDiT that is incomplete.
    """
    for key in ("x_embedder.proj.weight", "pos_embed", "final_layer.linear.weight", "context_embedder.weight"):
        if key not in shapes:
            raise ValueError(f"{source}: its MMDiT has no {key}; the file is incomplete")
    hidden, channels, patch, _ = shapes["x_embedder.proj.weight"]
    side = round(shapes["pos_embed"][1] ** 0.5)
    dual = [m[1] for key in shapes if (m := re.match(r"joint_blocks\.(\d+)\.x_block\.attn2\.qkv\.weight", key))]
    return MMDiTConfig(
        sample_size=128,
        patch_size=patch,
        in_channels=channels,
        out_channels=shapes["final_layer.linear.weight"][0] // patch**2,
        num_layers=_count(shapes, r"joint_blocks\.(\d+)\."),
        attention_head_dim=64,
        num_attention_heads=hidden // 64,
        joint_attention_dim=shapes["context_embedder.weight"][1],
        caption_projection_dim=hidden,
        pooled_projection_dim=shapes["y_embedder.mlp.0.weight"][1],
        pos_embed_max_size=side,
        dual_attention_layers=tuple(sorted(int(i) for i in dual)),
        qk_norm="rms_norm" if "joint_blocks.0.x_block.attn.ln_q.weight" in shapes else None,
        time_cond_proj_dim=shapes["t_embedder.cond_proj.weight"][1]
        if "t_embedder.cond_proj.weight" in shapes
        else None,
        span_embedding="t_embedder.span_proj.weight" in shapes,
    )


def t5_config(shapes: Shapes, *, source: str) -> T5Config:
    """Return the config of a T5-v1.1 encoder in transformers' naming.

    shapes, source: as for `unet_config`. Raises ValueError for an encoder that is incomplete.
    """
    first = "encoder.block.0.layer."
    keys = ("shared.weight", f"{first}0.SelfAttention.q.weight", f"{first}1.DenseReluDense.wi_0.weight")
    for key in keys:
        if key not in shapes:
            raise ValueError(f"{source}: its T5 encoder has no {key}; the file is incomplete")
    vocabulary, width = shapes[keys[0]]
    buckets, heads = shapes[f"{first}0.SelfAttention.relative_attention_bias.weight"]
    return replace(
        T5Config(),
        vocab_size=vocabulary,
        d_model=width,
        d_kv=shapes[keys[1]][0] // heads,
        d_ff=shapes[keys[2]][0],
        num_layers=_count(shapes, r"encoder\.block\.(\d+)\."),
        num_heads=heads,
        relative_attention_num_buckets=buckets,
        feed_forward_proj="gated-gelu",
    )
