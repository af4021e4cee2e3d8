"""The losses of autoencoders: reconstruction + perceptual + KL + adversarial (Rombach et al. 2022, appendix G).

A tiny autoencoder (TAESD) learns from the latents of a large one instead of the KL divergence. One loss trains both
networks: `params = {"vae": ..., "discriminator": ...}` is one trainable tree. The autoencoder's terms see the
discriminator's parameters through stop_gradient, and the discriminator's terms see the reconstruction through
stop_gradient, so a single `jax.grad` gives each network its own gradient.
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
Perceptual = Callable[[Images, Images], Float[Array, " b"]]

RECONSTRUCTIONS: Mapping[str, Callable[[Array], Array]] = {
    "l1": jnp.abs,
    "l2": jnp.square,
    "charbonnier": lambda d: jnp.sqrt(jnp.square(d) + 1e-6),
}


@dataclass(frozen=True, kw_only=True)
class PictureLossConfig:
    """The weights of the loss terms that compare images; the defaults are those of CompVis' published training.

    reconstruction: "l1", "l2" or "charbonnier", sqrt(d^2 + 1e-6). reduction: "sum" adds errors over h, w, c and
    averages over the batch, as published; "mean" divides by the number of values of an image, which makes the scale
    independent of the size. gan_start: the first step with adversarial terms. gan_weight_max: the limit of the adaptive
    weight. Raises ValueError for an unknown reconstruction or reduction.

    >>> from vae16 import PictureLossConfig
    >>> PictureLossConfig().total(values=12), PictureLossConfig(reduction="mean").total(values=12)
    (12.0, 1.0)
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
        """Return the factor that turns a mean over the `values` numbers of an image into this `reduction`."""
        return float(values) if self.reduction == "sum" else 1.0


@dataclass(frozen=True, kw_only=True)
class LossConfig(PictureLossConfig):
    """The weights of a KL autoencoder's loss: those of `PictureLossConfig` and kl_weight.

    `reduction` applies to the KL divergence as to the errors, so their balance does not depend on it.
    """

    kl_weight: float = 1e-6


def _apply(module: nn.Module, params: Any, *args: Any, method: str | None = None) -> Any:
    return module.apply({"params": params}, *args, method=method)


def kl_divergence(mean: Float[Array, "b h w z"], logvar: Float[Array, "b h w z"]) -> Float[Array, " b"]:
    """Return KL(N(mean, exp(logvar)) || N(0, 1)) of each latent, in nats (Kingma & Welling 2014, appendix B).

    KL = sum (mean^2 + exp(logvar) - 1 - logvar) / 2 over h, w and z.

    >>> import jax.numpy as jnp
    >>> from vae16 import kl_divergence
    >>> kl_divergence(jnp.ones((2, 2, 2, 4)), jnp.zeros((2, 2, 2, 4))).tolist()
    [8.0, 8.0]
    """
    return 0.5 * (jnp.square(mean) + jnp.exp(logvar) - 1.0 - logvar).sum((1, 2, 3))


def adaptive_weight(nll_gradient: Array, gan_gradient: Array, maximum: float = 1e4) -> Scalar:
    """Return the adaptive weight of the adversarial loss, |grad nll| / (|grad gan| + 1e-4) (Esser et al. 2021, eq. 7).

    Both gradients are those of the decoder's last layer; the weight is clamped to [0, maximum].

    >>> import jax.numpy as jnp
    >>> from vae16 import adaptive_weight
    >>> round(float(adaptive_weight(jnp.array([3.0, 4.0]), jnp.array([0.0, 2.0]))), 2)
    2.5
    """
    norm = jnp.linalg.norm
    return jnp.clip(norm(nll_gradient.ravel()) / (norm(gan_gradient.ravel()) + 1e-4), 0.0, maximum)


def _surrogate(value: Scalar, at: Array, gradient: Array) -> Scalar:
    """Return a scalar of this value whose derivative with respect to `at` is the gradient, which is already known."""
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
    """Return the loss terms that compare the reconstruction `draw(kernel)` with the images `batch_x`, and metrics.

    kernel: that of the decoder's last convolution, where the adaptive weight measures gradients. critic: the
    discriminator's parameters. The loss is (reconstruction + perceptual_weight * perceptual) * config.total(values) +
    gan_weight * adaptive_weight * hinge_generator + hinge_discriminator; the last two terms start at gan_start.
    """
    values = batch_x[0].size

    def draw_float32(kernel: Array) -> Images:
        return draw(kernel).astype(jnp.float32)

    reconstruction = draw_float32(kernel)

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

    # The adaptive weight needs both gradients at the reconstruction, and the autoencoder needs nothing else from these
    # terms: the surrogate passes them on, so neither VGG nor the discriminator is differentiated twice.
    frozen = stop_gradient(critic)
    constant = stop_gradient(reconstruction)
    (nll_value, metrics), nll_gradient = jax.value_and_grad(nll, has_aux=True)(constant)
    gan_value, gan_gradient = jax.value_and_grad(lambda y: hinge_generator(discriminator_logits(frozen, y)))(constant)
    _, kernel_vjp = jax.vjp(draw_float32, stop_gradient(kernel))
    balance = adaptive_weight(kernel_vjp(nll_gradient)[0], kernel_vjp(gan_gradient)[0], config.gan_weight_max)
    active = jnp.where(jnp.asarray(step) >= config.gan_start, 1.0, 0.0)
    weight = stop_gradient(config.gan_weight * active * balance)
    autoencoder = _surrogate(nll_value + weight * gan_value, reconstruction, nll_gradient + weight * gan_gradient)
    real, fake = (discriminator_logits(critic, y) for y in (batch_x, constant))
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
    """Return loss and metrics of a KL autoencoder for a batch of images in [-1, 1] (Rombach et al. 2022, appendix G).

    The loss is that of `picture_loss` plus kl_weight * KL. `params` holds "vae" and, with a discriminator,
    "discriminator". `step` may be traced: before `gan_start` the adversarial terms are multiplied by zero.
    `perceptual(x, y)` returns a distance for each image; it is not trained, so bind its weights, e.g.
    jax.tree_util.Partial(lpips.apply, {"params": ...}), and pass it to the jitted step as an argument; else its weights
    become constants of the compiled program.

    >>> import jax, jax.numpy as jnp
    >>> from vae16 import AutoencoderConfig, AutoencoderKL, LossConfig, autoencoder_loss
    >>> vae = AutoencoderKL(AutoencoderConfig(block_out_channels=(2,), norm_num_groups=1))
    >>> x = jax.ShapeDtypeStruct((1, 4, 4, 3), jnp.float32)
    >>> params = {"vae": jax.eval_shape(vae.init, jax.random.key(0), x)["params"]}
    >>> def loss(params, x):
    ...     return autoencoder_loss(vae, None, None, params, x, jax.random.key(1), 0, LossConfig())
    >>> total, metrics = jax.eval_shape(loss, params, x)
    >>> total.shape, sorted(metrics)
    ((), ['kl', 'loss', 'reconstruction'])
    """
    values = batch_x[0].size
    mean, logvar = _apply(vae, params["vae"], batch_x, method="encode")
    features = _apply(vae, params["vae"], sample_latent(mean, logvar, key), True, method="decode")
    layer, last_params = last_convolution(vae), params["vae"]["decoder"]["conv_out"]

    def draw(kernel: Array) -> Images:
        return _apply(layer, {**last_params, "kernel": kernel}, features)

    kl = kl_divergence(mean, logvar).mean()
    critic = params.get("discriminator")
    loss, metrics = picture_loss(draw, last_params["kernel"], discriminator, perceptual, critic, batch_x, step, config)
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
    """Return loss and metrics of a tiny autoencoder that learns to replace `teacher` (Bohan 2023, TAESD).

    The encoder learns the mean of the teacher's posterior, in the units of the diffusion network (`scale`), by squared
    error; the decoder learns to reconstruct the images from samples of that posterior, by `picture_loss`. The two share
    no parameters. `params` is as in `autoencoder_loss`, with the tiny autoencoder as "vae".

    >>> import jax, jax.numpy as jnp
    >>> from vae16 import AutoencoderConfig, AutoencoderKL, AutoencoderTiny, PictureLossConfig, TinyConfig, tiny_loss
    >>> teacher = AutoencoderKL(AutoencoderConfig(block_out_channels=(2, 2), norm_num_groups=1))
    >>> blocks = {f"{half}_block_out_channels": (2, 2) for half in ("encoder", "decoder")}
    >>> tiny = AutoencoderTiny(TinyConfig(**blocks, num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1)))
    >>> x = jax.ShapeDtypeStruct((1, 4, 4, 3), jnp.float32)
    >>> params, teacher_params = (jax.eval_shape(vae.init, jax.random.key(0), x)["params"] for vae in (tiny, teacher))
    >>> def loss(params, teacher_params, x):
    ...     key, config = jax.random.key(1), PictureLossConfig()
    ...     return tiny_loss(tiny, teacher, None, None, {"vae": params}, teacher_params, x, key, 0, config)
    >>> total, metrics = jax.eval_shape(loss, params, teacher_params, x)
    >>> total.shape, sorted(metrics)
    ((), ['latent', 'loss', 'reconstruction'])
    """
    mean, logvar = stop_gradient(_apply(teacher, teacher_params, batch_x, method="encode"))
    tiny_latent, _ = _apply(tiny, params["vae"], batch_x, method="encode")
    latent = jnp.square(tiny_latent - scale(mean, teacher.config)).mean()
    sample = scale(sample_latent(mean, logvar, key), teacher.config)
    features = _apply(tiny, params["vae"], sample, True, method="decode")
    last_params = params["vae"]["decoder"][last_layer(tiny.config)]

    def draw(kernel: Array) -> Images:
        return paint(tiny, {**last_params, "kernel": kernel}, features)

    critic = params.get("discriminator")
    loss, metrics = picture_loss(draw, last_params["kernel"], discriminator, perceptual, critic, batch_x, step, config)
    loss += latent * config.total(batch_x[0].size)
    return loss, metrics | {"latent": latent, "loss": loss}
