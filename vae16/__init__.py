"""Images to latents and back: the KL autoencoder with 4, 8 or 16 channels, and what it takes to train one."""

from vae16.autoencoder import AutoencoderConfig, AutoencoderKL, sample_latent, scale, unscale
from vae16.discriminator import DiscriminatorConfig, PatchDiscriminator, hinge_discriminator, hinge_generator
from vae16.losses import LossConfig, adaptive_weight, autoencoder_loss, kl_divergence
from vae16.perceptual import LPIPS, LPIPSConfig
from vae16.rules import LPIPS_OPTIONAL, LPIPS_PACKAGE_RULES, LPIPS_RULES, RULES
from vae16.tiling import decode_tiled, encode_tiled, sliced, tiled

__all__ = [
    "LPIPS",
    "LPIPS_OPTIONAL",
    "LPIPS_PACKAGE_RULES",
    "LPIPS_RULES",
    "RULES",
    "AutoencoderConfig",
    "AutoencoderKL",
    "DiscriminatorConfig",
    "LPIPSConfig",
    "LossConfig",
    "PatchDiscriminator",
    "adaptive_weight",
    "autoencoder_loss",
    "decode_tiled",
    "encode_tiled",
    "hinge_discriminator",
    "hinge_generator",
    "kl_divergence",
    "sample_latent",
    "scale",
    "sliced",
    "tiled",
    "unscale",
]
