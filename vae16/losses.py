"""What autoencoders learn from: reconstruction + perceptual + KL + adversarial (Rombach et al. 2022, appendix G), and a
tiny one from a large one's latents besides (TAESD).

One loss trains both networks: `params = {"vae": ..., "discriminator": ...}` is one trainable tree, the autoencoder's
terms see the discriminator behind stop_gradient and the discriminator's see the reconstruction behind one, so a single
`jax.grad` gives each network its own gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.lax import stop_gradient
from jaxtyping import Array, Float, Int, Key

from vae16.autoencoder import AutoencoderKL, last_convolution, sample_latent, scale
from vae16.discriminator import PatchDiscriminator, hinge_discriminator, hinge_generator
from vae16.tiny import AutoencoderTiny, last_layer, paint

Images = Float[Array, "b h w c"]
Scalar = Float[Array, ""]
Perceptual = Callable[[Images, Images], Float[Array, "b"]]

RECONSTRUCTIONS: Mapping[str, Callable[[Array], Array]] = {
    "l1": jnp.abs,
    "l2": jnp.square,
    "charbonnier": lambda d: jnp.sqrt(jnp.square(d) + 1e-6),
}


@dataclass(frozen=True, kw_only=True)
class PictureLossConfig:
    """Weights of the terms that look at pictures; the defaults are CompVis' published ones.

    `reduction` "sum" adds errors over h, w, c and averages over the batch, as published; "mean" divides by the number
    of values of an image, which makes the scale independent of the size.
    """

    reconstruction: str = "l1"
    reduction: str = "sum"
    perceptual_weight: float = 1.0
    gan_weight: float = 0.5
    gan_start: int = 50001
    gan_weight_max: float = 1e4

    def __post_init__(self) -> None:
        if self.reconstruction not in RECONSTRUCTIONS:
            raise ValueError(f"reconstruction: {self.reconstruction!r} is none of {sorted(RECONSTRUCTIONS)}")
        if self.reduction not in ("sum", "mean"):
            raise ValueError(f"reduction: {self.reduction!r} is none of ['mean', 'sum']")

    def total(self, values: int) -> float:
        """What a mean over the `values` of an image is multiplied by."""
        return float(values) if self.reduction == "sum" else 1.0


@dataclass(frozen=True, kw_only=True)
class LossConfig(PictureLossConfig):
    """And the weight of the KL divergence, which `reduction` treats as it does errors, so that their balance stays."""

    kl_weight: float = 1e-6


def _apply(module: nn.Module, params: Any, *args: Any, method: str | None = None) -> Any:
    return module.apply({"params": params}, *args, method=method)


def kl_divergence(mean: Float[Array, "b h w z"], logvar: Float[Array, "b h w z"]) -> Float[Array, "b"]:
    """KL(N(mean, exp(logvar)) || N(0, 1)) of each latent in nats (Kingma & Welling 2014, appendix B)."""
    return 0.5 * (jnp.square(mean) + jnp.exp(logvar) - 1.0 - logvar).sum((1, 2, 3))


def adaptive_weight(nll_gradient: Array, gan_gradient: Array, maximum: float = 1e4) -> Scalar:
    """|grad nll| / (|grad gan| + 1e-4), clamped (Esser et al. 2021, eq. 7)."""
    norm = jnp.linalg.norm
    return jnp.clip(norm(nll_gradient.ravel()) / (norm(gan_gradient.ravel()) + 1e-4), 0.0, maximum)


def _surrogate(value: Scalar, at: Array, gradient: Array) -> Scalar:
    """A scalar of the given value whose derivative with respect to `at` is the given, already known, gradient."""
    linear = jnp.vdot(stop_gradient(gradient), at)
    return linear + stop_gradient(value - linear)


def picture_loss(
    draw: Callable[[Array], Images],
    kernel: Array,
    discriminator: PatchDiscriminator | None,
    perceptual: Perceptual | None,
    critic: Any,
    batch_x: Images,
    step: Int[Array, ""] | int,
    config: PictureLossConfig,
) -> tuple[Scalar, dict[str, Scalar]]:
    """The terms that look at pictures, of `draw(kernel)` against `batch_x`; the last convolution's kernel is where the
    adaptive weight measures. critic: the discriminator's parameters.
    """
    values = batch_x[0].size

    def drawn(kernel: Array) -> Images:
        return draw(kernel).astype(jnp.float32)

    reconstruction = drawn(kernel)

    def nll(y: Images) -> tuple[Scalar, dict[str, Scalar]]:
        error = RECONSTRUCTIONS[config.reconstruction](y - batch_x)
        total = error.mean()
        metrics = {"reconstruction": total}
        if perceptual is not None and config.perceptual_weight:
            metrics["perceptual"] = perceptual(batch_x, y).mean()
            total += config.perceptual_weight * metrics["perceptual"]
        return total * config.total(values), metrics

    if discriminator is None or not config.gan_weight:
        return nll(reconstruction)

    def discriminator_logits(weights: Any, y: Images) -> Array:
        return _apply(discriminator, weights, y)

    # Both gradients at the reconstruction are needed for the adaptive weight, and are then all the autoencoder needs
    # from these terms: the surrogate hands them on, so neither VGG nor the discriminator is differentiated twice.
    frozen = stop_gradient(critic)
    here = stop_gradient(reconstruction)
    (nll_value, metrics), nll_gradient = jax.value_and_grad(nll, has_aux=True)(here)
    gan_value, gan_gradient = jax.value_and_grad(lambda y: hinge_generator(discriminator_logits(frozen, y)))(here)
    _, at_kernel = jax.vjp(drawn, stop_gradient(kernel))
    balance = adaptive_weight(at_kernel(nll_gradient)[0], at_kernel(gan_gradient)[0], config.gan_weight_max)
    active = jnp.where(jnp.asarray(step) >= config.gan_start, 1.0, 0.0)
    weight = stop_gradient(config.gan_weight * active * balance)
    autoencoder = _surrogate(nll_value + weight * gan_value, reconstruction, nll_gradient + weight * gan_gradient)
    real, fake = (discriminator_logits(critic, y) for y in (batch_x, here))
    discrimination = hinge_discriminator(real, fake)
    return autoencoder + active * discrimination, metrics | {
        "gan": gan_value, "gan_weight": weight, "discriminator": discrimination,
        "logits_real": real.mean(), "logits_fake": fake.mean(),
    }  # fmt: skip


def autoencoder_loss(
    vae: AutoencoderKL,
    discriminator: PatchDiscriminator | None,
    perceptual: Perceptual | None,
    params: Mapping[str, Any],
    batch_x: Images,
    key: Key[Array, ""],
    step: Int[Array, ""] | int,
    config: LossConfig,
) -> tuple[Scalar, dict[str, Scalar]]:
    """Loss and metrics of a batch of images in [-1, 1].

    `params` holds "vae" and, with a discriminator, "discriminator". `step` may be traced: before `gan_start` the
    adversarial terms are multiplied by zero. `perceptual(x, y)` gives a distance for each image; it is frozen, so bind
    its weights, e.g. jax.tree_util.Partial(lpips.apply, {"params": ...}), and pass it to the jitted step as an
    argument, or they become constants of the compiled program.
    """
    values = batch_x[0].size
    mean, logvar = _apply(vae, params["vae"], batch_x, method="encode")
    features = _apply(vae, params["vae"], sample_latent(mean, logvar, key), True, method="decode")
    layer, last = last_convolution(vae), params["vae"]["decoder"]["conv_out"]

    def draw(kernel: Array) -> Images:
        return _apply(layer, {**last, "kernel": kernel}, features)

    kl = kl_divergence(mean, logvar).mean()
    critic = params.get("discriminator")
    loss, metrics = picture_loss(draw, last["kernel"], discriminator, perceptual, critic, batch_x, step, config)
    loss += config.kl_weight * kl * config.total(values) / values
    return loss, metrics | {"kl": kl, "loss": loss}


def tiny_loss(
    tiny: AutoencoderTiny,
    teacher: AutoencoderKL,
    discriminator: PatchDiscriminator | None,
    perceptual: Perceptual | None,
    params: Mapping[str, Any],
    teacher_params: Any,
    batch_x: Images,
    key: Key[Array, ""],
    step: Int[Array, ""] | int,
    config: PictureLossConfig,
) -> tuple[Scalar, dict[str, Scalar]]:
    """Loss and metrics of a tiny autoencoder that is to stand in for `teacher` (Bohan 2023, TAESD).

    The encoder learns the mean of the teacher's posterior, as a diffusion network has it (`scale`), by squared error;
    the decoder draws the images themselves from samples of it. The two share no parameter. `params` as those of
    `autoencoder_loss`, "vae" the tiny one.
    """
    mean, logvar = stop_gradient(_apply(teacher, teacher_params, batch_x, method="encode"))
    own, _ = _apply(tiny, params["vae"], batch_x, method="encode")
    latent = jnp.square(own - scale(mean, teacher.config)).mean()
    sample = scale(sample_latent(mean, logvar, key), teacher.config)
    features = _apply(tiny, params["vae"], sample, True, method="decode")
    last = params["vae"]["decoder"][last_layer(tiny.config)]

    def draw(kernel: Array) -> Images:
        return paint(tiny, {**last, "kernel": kernel}, features)

    critic = params.get("discriminator")
    loss, metrics = picture_loss(draw, last["kernel"], discriminator, perceptual, critic, batch_x, step, config)
    loss += latent * config.total(batch_x[0].size)
    return loss, metrics | {"latent": latent, "loss": loss}
