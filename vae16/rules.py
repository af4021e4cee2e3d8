"""The PyTorch names of the parameter paths: regexes applied in order to the "/"-joined path. Data only."""

from __future__ import annotations

_INDEX = (r"_(\d+)(?=/)", r".\1")

# diffusers' AutoencoderKL: down_blocks_0/resnets_1/conv1 -> down_blocks.0.resnets.1.conv1
RULES: tuple[tuple[str, str], ...] = (_INDEX,)

# diffusers' AutoencoderTiny: encoder/layers_1/conv_0 -> encoder.layers.1.conv.0
TINY_RULES: tuple[tuple[str, str], ...] = (_INDEX,)

# The original TAESD, one file for each half, whose name comes first: encoder/layers_1/conv_0 -> encoder.1.conv.0
# Its decoder begins with the clamp of the latents, which is no layer in diffusers, so all numbers are one higher.
TINY_ORIGINAL_RULES: tuple[tuple[str, str], ...] = (
    (r"^encoder/layers_", "encoder/"),
    *((rf"^decoder/layers_{i}/", f"decoder/{i + 1}/") for i in range(100)),
    _INDEX,
)

# VGG16 as torchvision names it, with the linear heads of the lpips package: lin0/kernel -> lin0.model.1.weight
LPIPS_RULES: tuple[tuple[str, str], ...] = ((r"^lin(\d)/", r"lin\1.model.1/"), _INDEX)

# The state dict of the lpips package itself, which divides the trunk into five slices.
LPIPS_PACKAGE_RULES: tuple[tuple[str, str], ...] = (
    (r"^features_(0|2)/", r"net/slice1_\1/"),
    (r"^features_(5|7)/", r"net/slice2_\1/"),
    (r"^features_(10|12|14)/", r"net/slice3_\1/"),
    (r"^features_(17|19|21)/", r"net/slice4_\1/"),
    (r"^features_(24|26|28)/", r"net/slice5_\1/"),
    *LPIPS_RULES,
)

# Keys of those files that are no parameter of this network (regexes on the PyTorch name).
LPIPS_OPTIONAL: tuple[str, ...] = (r"^classifier\.", r"^scaling_layer\.", r"^lins\.")
