"""The text encoders CLIP and T5, their tokenizers, and the conditioning of each model family."""

from mmdit.text.clip import CLIPModel, CLIPTextModel, CLIPVisionModel, TextOutput, VisionOutput, normalize_images
from mmdit.text.clip_config import (
    CLIP_BIGG,
    CLIP_H,
    CLIP_H_VISION,
    CLIP_L,
    CLIP_L_VISION,
    CLIPConfig,
    CLIPTextConfig,
    CLIPVisionConfig,
)
from mmdit.text.conditioning import Encoding, sd3, sdxl, size_ids, stable_diffusion, zero_prompt
from mmdit.text.t5 import T5Encoder
from mmdit.text.t5_config import T5_XXL, T5Config
from mmdit.text.tokenize import Tokenizer, train_tokenizer, train_unigram

__all__ = [
    "CLIP_BIGG",
    "CLIP_H",
    "CLIP_H_VISION",
    "CLIP_L",
    "CLIP_L_VISION",
    "T5_XXL",
    "CLIPConfig",
    "CLIPModel",
    "CLIPTextConfig",
    "CLIPTextModel",
    "CLIPVisionConfig",
    "CLIPVisionModel",
    "Encoding",
    "T5Config",
    "T5Encoder",
    "TextOutput",
    "Tokenizer",
    "VisionOutput",
    "normalize_images",
    "sd3",
    "sdxl",
    "size_ids",
    "stable_diffusion",
    "train_tokenizer",
    "train_unigram",
    "zero_prompt",
]
