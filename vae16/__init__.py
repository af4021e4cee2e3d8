"""Autoencoders between images and latents.

The KL autoencoder with 4, 8 or 16 latent channels, the losses and the discriminator that train one, and the tiny
autoencoder (TAESD). Imports neither mmdit nor lcm_jax.
"""

from vae16.autoencoder import AutoencoderConfig, AutoencoderKL, fold_shift, sample_latent, scale, unscale
from vae16.discriminator import DiscriminatorConfig, PatchDiscriminator, hinge_discriminator, hinge_generator
from vae16.layers import portable
from vae16.losses import (
    LossConfig,
    PictureLossConfig,
    adaptive_weight,
    autoencoder_loss,
    kl_divergence,
    tiny_loss,
)
from vae16.perceptual import LPIPS, LPIPSConfig
from vae16.rules import LPIPS_OPTIONAL, LPIPS_PACKAGE_RULES, LPIPS_RULES, RULES, TINY_ORIGINAL_RULES, TINY_RULES
from vae16.tiling import decode_tiled, encode_tiled, sliced, tiled
from vae16.tiny import TAESD, TAESD3, AutoencoderTiny, TinyConfig

__all__ = [
    "LPIPS",
    "LPIPS_OPTIONAL",
    "LPIPS_PACKAGE_RULES",
    "LPIPS_RULES",
    "RULES",
    "TAESD",
    "TAESD3",
    "TINY_ORIGINAL_RULES",
    "TINY_RULES",
    "AutoencoderConfig",
    "AutoencoderKL",
    "AutoencoderTiny",
    "DiscriminatorConfig",
    "LPIPSConfig",
    "LossConfig",
    "PatchDiscriminator",
    "PictureLossConfig",
    "TinyConfig",
    "adaptive_weight",
    "autoencoder_loss",
    "decode_tiled",
    "encode_tiled",
    "fold_shift",
    "hinge_discriminator",
    "hinge_generator",
    "kl_divergence",
    "portable",
    "sample_latent",
    "scale",
    "sliced",
    "tiled",
    "tiny_loss",
    "unscale",
]
