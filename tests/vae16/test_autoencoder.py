"""Laws of the autoencoder: shapes, the norm, scaling, sampling, configuration."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from vae16 import AutoencoderConfig, AutoencoderKL, kl_divergence, sample_latent, scale, unscale
from vae16.autoencoder import last_convolution
from vae16.layers import GroupNorm, Upsample

SMALL = AutoencoderConfig(
    block_out_channels=(8, 16, 16), norm_num_groups=4, latent_channels=16, use_quant_conv=False,
    use_post_quant_conv=False, scaling_factor=1.5305, shift_factor=0.0609,
)  # fmt: skip


@pytest.fixture(scope="module")
def small():
    vae = AutoencoderKL(SMALL)
    x = jax.random.uniform(jax.random.key(0), (2, 16, 24, 3), minval=-1.0)
    params = jax.jit(vae.init)(jax.random.key(1), x)["params"]
    return vae, params, x


def test_encode_and_decode_have_the_factor(small):
    vae, params, x = small
    assert SMALL.downsample_factor == 4
    mean, logvar = vae.apply({"params": params}, x, method="encode")
    assert mean.shape == logvar.shape == (2, 4, 6, 16)
    assert vae.apply({"params": params}, mean, method="decode").shape == x.shape


@pytest.mark.parametrize(
    ("quant", "widths", "layers", "channels", "count"),
    [(True, (128, 256, 512, 512), 2, 4, 83_653_863), (False, (128, 256, 512, 512), 2, 16, 83_819_683)],
)
def test_published_geometries_have_the_published_size(quant, widths, layers, channels, count):
    config = AutoencoderConfig(
        block_out_channels=widths, layers_per_block=layers, latent_channels=channels, use_quant_conv=quant,
        use_post_quant_conv=quant,
    )  # fmt: skip
    shapes = jax.eval_shape(AutoencoderKL(config).init, jax.random.key(0), jnp.zeros((1, 8, 8, 3)))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == count


def test_log_variance_is_clipped(small):
    vae, params, x = small
    for fill, bound in ((100.0, 20.0), (-100.0, -30.0)):
        bias = jnp.full(32, fill)
        encoder = params["encoder"] | {"conv_out": params["encoder"]["conv_out"] | {"bias": bias}}
        _, logvar = vae.apply({"params": params | {"encoder": encoder}}, x, method="encode")
        np.testing.assert_array_equal(logvar, bound)


def test_features_and_last_convolution_compose_to_decode(small):
    vae, params, _ = small
    z = jax.random.normal(jax.random.key(2), (1, 4, 4, 16))
    features = vae.apply({"params": params}, z, True, method="decode")
    assert features.shape == (1, 16, 16, 8)
    image = last_convolution(vae).apply({"params": params["decoder"]["conv_out"]}, features)
    np.testing.assert_allclose(image, vae.apply({"params": params}, z, method="decode"), atol=1e-6)


def test_remat_changes_neither_value_nor_gradient(small):
    vae, params, x = small
    again = AutoencoderKL(SMALL, remat=True)

    def loss(module):
        return jax.jit(jax.value_and_grad(lambda p: jnp.square(module.apply({"params": p}, x)).sum()))(params)

    for a, b in zip(jax.tree.leaves(loss(vae)), jax.tree.leaves(loss(again)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4 * float(jnp.abs(a).max()))


def test_half_precision_follows_float32(small):
    vae, params, x = small
    half = AutoencoderKL(SMALL, dtype=jnp.bfloat16)
    mean, logvar = half.apply({"params": params}, x, method="encode")
    assert mean.dtype == logvar.dtype == jnp.float32
    exact, _ = vae.apply({"params": params}, x, method="encode")
    assert jnp.abs(mean - exact).max() < 0.1 * jnp.abs(exact).max()
    assert half.apply({"params": params}, mean, method="decode").dtype == jnp.bfloat16


def test_call_with_a_key_samples(small):
    vae, params, x = small
    run = jax.jit(lambda key: vae.apply({"params": params}, x, key))
    assert not np.allclose(run(jax.random.key(0)), run(jax.random.key(1)))


@pytest.mark.parametrize("offset", [0.0, 300.0])
def test_group_norm_from_moments_equals_flax(offset):
    x = jax.random.normal(jax.random.key(0), (2, 16, 16, 12)) * 2 + offset + jnp.arange(12.0)
    params = {"scale": jnp.linspace(0.5, 2, 12), "bias": jnp.linspace(-1, 1, 12)}
    oracle = nn.GroupNorm(4, epsilon=1e-6, use_fast_variance=False)

    def both(module):
        def value(p, x):
            y = module.apply({"params": p}, x)
            return (y**3).sum(), y

        return jax.jit(jax.grad(value, argnums=(0, 1), has_aux=True))(params, x)

    (grads, y), (want_grads, want) = both(GroupNorm(4)), both(oracle)
    tolerance = 1e-5 if offset == 0 else 1e-3  # 300 leaves float32 four digits of the deviation
    for a, b in zip(jax.tree.leaves((y, grads)), jax.tree.leaves((want, want_grads)), strict=True):
        np.testing.assert_allclose(a, b, atol=tolerance * float(jnp.abs(b).max()))


def test_upsample_equals_nearest_then_convolution():
    x = jax.random.normal(jax.random.key(0), (2, 5, 6, 8))
    module = Upsample()
    params = module.init(jax.random.key(1), x)["params"]
    near = x.repeat(2, 1).repeat(2, 2)
    want = nn.Conv(8, (3, 3), padding=1).apply({"params": params["conv"]}, near)
    np.testing.assert_allclose(module.apply({"params": params}, x), want, atol=1e-5)


def test_scale_and_unscale_are_inverse():
    z = jax.random.normal(jax.random.key(0), (2, 4, 4, 16))
    for config in (SMALL, AutoencoderConfig()):
        np.testing.assert_allclose(unscale(scale(z, config), config), z, atol=1e-6)
    np.testing.assert_allclose(scale(z, SMALL), (z - 0.0609) * 1.5305, atol=1e-6)


def test_samples_have_the_posterior_moments_and_kl_is_zero_at_the_prior():
    zeros = jnp.zeros((1, 64, 64, 16))
    z = sample_latent(zeros + 3.0, zeros + 2 * np.log(0.5), jax.random.key(0))
    assert abs(float(z.mean()) - 3.0) < 0.01
    assert abs(float(z.std()) - 0.5) < 0.01
    np.testing.assert_array_equal(kl_divergence(zeros, zeros), 0.0)
    np.testing.assert_allclose(kl_divergence(zeros + 1.0, zeros), 0.5 * zeros.size, rtol=1e-6)


def test_config_round_trip():
    assert AutoencoderConfig.from_dict(SMALL.to_dict()) == SMALL


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"act_fn": "relu"}, "act_fn"),
        ({"down_block_types": ["AttnDownEncoderBlock2D"]}, "AttnDownEncoderBlock2D"),
        ({"latents_mean": [0.0]}, "latents_mean"),
        ({"block_out_channels": [8, 10]}, "10"),
        ({"block_out_channels": []}, "block_out_channels"),
    ],
)
def test_what_is_not_supported_is_named(change, named):
    with pytest.raises(ValueError, match=named) as caught:
        AutoencoderConfig.from_dict(SMALL.to_dict() | change, source="vae/config.json")
    assert "vae/config.json" in str(caught.value)


def test_sides_must_fit_the_factor(small):
    vae, params, _ = small
    with pytest.raises(ValueError, match="multiples of 4"):
        vae.apply({"params": params}, jnp.zeros((1, 18, 16, 3)), method="encode")
