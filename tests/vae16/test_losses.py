"""The autoencoder's objective: its terms, the adaptive weight, and who receives which gradient."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from vae16 import (
    AutoencoderConfig,
    AutoencoderKL,
    AutoencoderTiny,
    DiscriminatorConfig,
    LossConfig,
    PatchDiscriminator,
    PictureLossConfig,
    TinyConfig,
    adaptive_weight,
    autoencoder_loss,
    hinge_discriminator,
    hinge_generator,
    kl_divergence,
    sample_latent,
    scale,
    tiny_loss,
)
from vae16.autoencoder import last_convolution


class Few(nn.Module):
    """Two convolutions."""

    out: int

    @nn.compact
    def __call__(self, x, features=False):
        h = nn.silu(nn.Conv(6, (3, 3), name="conv_in")(x))
        return h if features else nn.Conv(self.out, (3, 3), name="conv_out")(h)


class FewLayers(AutoencoderKL):
    """An autoencoder that compiles fast: the objective asks no more of it than its two directions."""

    def setup(self):
        self.encoder, self.decoder = Few(2 * self.config.latent_channels), Few(self.config.out_channels)


VAE = FewLayers(
    AutoencoderConfig(block_out_channels=(4,), norm_num_groups=2, use_quant_conv=False, use_post_quant_conv=False)
)
CRITIC = PatchDiscriminator(DiscriminatorConfig(ndf=8, n_layers=1, group_size=4))
KEY = jax.random.key(7)
CONFIG = LossConfig(kl_weight=1e-3, gan_weight=0.5, gan_start=10, perceptual_weight=0.3)


def distance(x, y):
    """A stand-in for LPIPS."""
    return jnp.square(x - y).mean((1, 2, 3)) ** 0.7


@pytest.fixture(scope="module")
def setup(random_params):
    x = jax.random.uniform(jax.random.key(0), (2, 16, 16, 3), minval=-1.0)
    parts = {"vae": VAE, "discriminator": CRITIC}
    return {name: random_params(module.init, x)["params"] for name, module in parts.items()}, x


@pytest.fixture(scope="module")
def trained(setup):
    """Loss, metrics and gradient of the whole objective as a function of the step."""
    _, x = setup

    @jax.jit
    def run(params, step):
        return jax.value_and_grad(
            lambda p: autoencoder_loss(VAE, CRITIC, distance, p, x, KEY, step, CONFIG), has_aux=True
        )(params)

    return run


def parts(critic_params, x, y):
    nll = (jnp.abs(x - y) + 0.3 * distance(x, y)[:, None, None, None]).sum() / len(x)
    return nll, hinge_generator(CRITIC.apply({"params": critic_params}, y))


def by_hand(vae_params, critic_params, x, gan_weight):
    """The generator's side as one plain expression, with a constant weight on the adversarial term."""
    mean, logvar = VAE.apply({"params": vae_params}, x, method="encode")
    y = VAE.apply({"params": vae_params}, sample_latent(mean, logvar, KEY), method="decode")
    nll, gan = parts(critic_params, x, y)
    return nll + 1e-3 * kl_divergence(mean, logvar).mean() + gan_weight * gan, y


by_hand_and_its_slope = jax.jit(jax.value_and_grad(by_hand, has_aux=True))


def close(a, b, tolerance=1e-3):
    for p, q in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(p, q, atol=tolerance * np.abs(q).max() + 1e-7)


def test_each_network_has_the_gradient_of_its_own_plain_expression(setup, trained):
    """The autoencoder that of its loss with the critic held fixed, the critic that of the hinge on a fixed image."""
    params, x = setup

    @jax.jit
    def weight_and_hinge(vae, critic):
        z = sample_latent(*VAE.apply({"params": vae}, x, method="encode"), KEY)
        features = VAE.apply({"params": vae}, z, True, method="decode")
        conv_out = vae["decoder"]["conv_out"]

        def at_kernel(kernel):
            return last_convolution(VAE).apply({"params": conv_out | {"kernel": kernel}}, features)

        y, back = jax.vjp(at_kernel, conv_out["kernel"])
        slopes = [back(jax.grad(lambda y, i=i: parts(critic, x, y)[i])(y))[0] for i in range(2)]

        def hinge(critic):
            return hinge_discriminator(CRITIC.apply({"params": critic}, x), CRITIC.apply({"params": critic}, y))

        return 0.5 * adaptive_weight(*slopes), *jax.value_and_grad(hinge)(critic)

    (loss, metrics), gradient = trained(params, 10)
    weight, hinge, of_hinge = weight_and_hinge(params["vae"], params["discriminator"])
    (value, _), want = by_hand_and_its_slope(params["vae"], params["discriminator"], x, weight)
    np.testing.assert_allclose(metrics["gan_weight"], weight, rtol=1e-3)
    np.testing.assert_allclose(loss, value + hinge, rtol=1e-4)
    close(gradient["vae"], want)
    close(gradient["discriminator"], of_hinge)


def test_before_its_start_the_gan_is_off(setup, trained):
    params, x = setup
    (loss, metrics), gradient = trained(params, 9)
    assert metrics["gan_weight"] == 0.0
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(gradient["discriminator"]))
    (want, _), want_gradient = by_hand_and_its_slope(params["vae"], params["discriminator"], x, 0.0)
    np.testing.assert_allclose(loss, want, rtol=1e-5)
    close(gradient["vae"], want_gradient)


@pytest.mark.slow
def test_without_a_critic_the_gradient_is_that_of_before_its_start(setup, trained):
    params, x = setup

    def alone(p):
        return autoencoder_loss(VAE, None, distance, p, x, KEY, 9, CONFIG)[0]

    want, want_gradient = jax.jit(jax.value_and_grad(alone))({"vae": params["vae"]})
    (loss, _), gradient = trained(params, 9)
    np.testing.assert_allclose(loss, want, rtol=1e-5)
    close(gradient["vae"], want_gradient["vae"])


def test_without_a_gan_the_critic_is_not_part_of_the_program(setup):
    params, x = setup
    off = LossConfig(gan_weight=0.0)
    with_critic = jax.make_jaxpr(lambda p: autoencoder_loss(VAE, CRITIC, None, p, x, KEY, 0, off)[0])(params)
    without = jax.make_jaxpr(lambda p: autoencoder_loss(VAE, None, None, p, x, KEY, 0, CONFIG)[0])(params)
    assert len(with_critic.eqns) == len(without.eqns)


def test_norms_and_reductions_and_no_critic(setup, trained):
    params, x = setup

    @jax.jit
    def run(params):
        def loss(weight=0.0, **keys):
            config = LossConfig(kl_weight=weight, **keys)
            return autoencoder_loss(VAE, None, None, params, x, KEY, 0, config)[0]

        y = by_hand(params["vae"], params["discriminator"], x, 0.0)[1]
        sums = {"l1": jnp.abs(x - y).sum() / len(x), "l2": jnp.square(x - y).sum() / len(x)}
        alone = autoencoder_loss(VAE, None, distance, {"vae": params["vae"]}, x, KEY, 9, CONFIG)[0]
        return {k: loss(reconstruction=k) for k in sums}, sums, loss(0.1), loss(0.1, reduction="mean"), alone

    losses, sums, total, mean, alone = run(params)
    np.testing.assert_allclose(trained(params, 9)[0][0], alone, rtol=1e-5)
    close(losses, sums, 1e-5)
    np.testing.assert_allclose(total, mean * x[0].size, rtol=1e-5)


TINY = AutoencoderTiny(
    TinyConfig(
        encoder_block_out_channels=(5,),
        decoder_block_out_channels=(6,),
        num_encoder_blocks=(1,),
        num_decoder_blocks=(1,),
    )
)


def test_a_tiny_encoder_learns_the_latents_and_its_decoder_the_pictures(setup, random_params):
    """Each half has the gradient of its own plain expression, the adversarial term included; the teacher has none."""
    params, x = setup
    learner = {"vae": random_params(TINY.init, x)["params"], "discriminator": params["discriminator"]}
    config = PictureLossConfig(perceptual_weight=0.3, gan_start=10)

    def loss(learner, teacher):
        return tiny_loss(TINY, VAE, CRITIC, distance, learner, teacher, x, KEY, 10, config)

    run = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
    (value, metrics), (gradient, of_teacher) = run(learner, params["vae"])
    mean, logvar = jax.jit(lambda p: VAE.apply({"params": p}, x, method="encode"))(params["vae"])

    def latent(encoder):
        encoded, _ = TINY.apply({"params": {**learner["vae"], "encoder": encoder}}, x, method="encode")
        return jnp.square(encoded - 0.18215 * mean).sum() / encoded.size * x[0].size

    def drawn(decoder):
        z = scale(sample_latent(mean, logvar, KEY), VAE.config)
        y = TINY.apply({"params": {**learner["vae"], "decoder": decoder}}, z, method="decode")
        nll = (jnp.abs(x - y) + 0.3 * distance(x, y)[:, None, None, None]).sum() / len(x)
        gan = hinge_generator(CRITIC.apply({"params": learner["discriminator"]}, y))
        return nll + metrics["gan_weight"] * gan

    assert metrics["gan_weight"] > 0.0
    gradients = jax.jit(lambda p: (jax.value_and_grad(latent)(p["encoder"]), jax.value_and_grad(drawn)(p["decoder"])))
    (first, encoder), (second, decoder) = gradients(learner["vae"])
    np.testing.assert_allclose(value, first + second + metrics["discriminator"], rtol=1e-5)
    np.testing.assert_allclose(metrics["latent"] * x[0].size, first, rtol=1e-5)
    close(gradient["vae"], {"encoder": encoder, "decoder": decoder})
    assert np.abs(gradient["discriminator"]["conv_in"]["kernel"]).max() > 0.0
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(of_teacher))


def test_adaptive_weight_is_clamped():
    ones = jnp.ones((3, 3))
    np.testing.assert_allclose(adaptive_weight(2 * ones, ones), 2.0, rtol=1e-3)
    assert adaptive_weight(ones, 0 * ones) == 1e4
    assert adaptive_weight(0 * ones, ones) == 0.0


def test_hinge():
    assert hinge_discriminator(jnp.full(4, 1.5), jnp.full(4, -1.5)) == 0.0
    assert hinge_discriminator(jnp.zeros(4), jnp.zeros(4)) == 1.0
    assert hinge_generator(jnp.full(4, 2.0)) == -2.0


def test_a_discriminator_logit_sees_seventy_pixels():
    critic = PatchDiscriminator(DiscriminatorConfig(ndf=8, group_size=16))
    x = jnp.zeros((1, 128, 128, 3))
    out, variables = jax.eval_shape(critic.init_with_output, jax.random.key(0), x)
    params = variables["params"]
    assert out.shape == (1, 14, 14, 1)
    assert {k: v["kernel"].shape[-1] for k, v in params.items() if "kernel" in v} == {
        "conv_in": 8, "convs_0": 16, "convs_1": 32, "convs_2": 64, "conv_out": 1,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: LossConfig(reconstruction="l3"), "l3"),
        (lambda: LossConfig(reduction="max"), "max"),
        (lambda: DiscriminatorConfig(n_layers=0), "n_layers"),
        (lambda: DiscriminatorConfig(ndf=10, group_size=16), "group_size"),
    ],
)
def test_bad_settings_are_named(make, named):
    with pytest.raises(ValueError, match=named):
        make()
