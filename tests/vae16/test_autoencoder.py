"""Laws of the autoencoder: shapes, the norm, scaling, sampling, configuration."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from vae16 import AutoencoderConfig, AutoencoderKL, fold_shift, kl_divergence, sample_latent, scale, unscale
from vae16.autoencoder import last_convolution
from vae16.layers import GroupNorm, Upsample

SMALL = AutoencoderConfig(
    block_out_channels=(4, 8), layers_per_block=1, norm_num_groups=4, latent_channels=16, use_quant_conv=False,
    use_post_quant_conv=False, scaling_factor=1.5305, shift_factor=0.0609,
)  # fmt: skip


@pytest.fixture(scope="module")
def small(random_params):
    """The parameters, an image, and the two directions, each compiled once."""
    vae = AutoencoderKL(SMALL)
    x = jax.random.uniform(jax.random.key(0), (2, 8, 12, 3), minval=-1.0)
    params = random_params(vae.init, x)["params"]
    encode = jax.jit(lambda p, x: vae.apply({"params": p}, x, method="encode"))
    decode = jax.jit(lambda p, z: vae.apply({"params": p}, z, method="decode"))
    return params, x, encode, decode


def test_encode_and_decode_have_the_factor():
    vae = AutoencoderKL(dataclasses.replace(SMALL, block_out_channels=(4, 8, 8)))
    assert vae.config.downsample_factor == 4
    x = jnp.zeros((2, 16, 24, 3))
    params = jax.eval_shape(vae.init, jax.random.key(0), x)
    mean, logvar = jax.eval_shape(functools.partial(vae.apply, method="encode"), params, x)
    assert mean.shape == logvar.shape == (2, 4, 6, 16)
    assert jax.eval_shape(functools.partial(vae.apply, method="decode"), params, mean).shape == x.shape


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
    params, x, encode, _ = small
    for fill, bound in ((100.0, 20.0), (-100.0, -30.0)):
        conv_out = params["encoder"]["conv_out"] | {"bias": jnp.full(32, fill)}
        _, logvar = encode(params | {"encoder": params["encoder"] | {"conv_out": conv_out}}, x)
        np.testing.assert_array_equal(logvar, bound)


def test_features_and_last_convolution_compose_to_decode(small):
    params, x, encode, decode = small
    vae = AutoencoderKL(SMALL)
    z, _ = encode(params, x)
    features = jax.jit(lambda p, z: vae.apply({"params": p}, z, True, method="decode"))(params, z)
    assert features.shape == (2, 8, 12, 4)
    image = last_convolution(vae).apply({"params": params["decoder"]["conv_out"]}, features)
    np.testing.assert_allclose(image, decode(params, z), atol=1e-5)


@pytest.mark.parametrize("half", ["encode", pytest.param("decode", marks=pytest.mark.slow)])
def test_remat_changes_neither_value_nor_gradient(random_params, half):
    config = AutoencoderConfig(
        block_out_channels=(4,), layers_per_block=1, norm_num_groups=2, mid_block_add_attention=False
    )
    x = jax.random.uniform(jax.random.key(0), (1, 8, 8, 3), minval=-1.0)
    params = random_params(AutoencoderKL(config).init, x)["params"]

    def loss(remat, method):
        apply = functools.partial(AutoencoderKL(config, remat=remat).apply, method=method)
        given = x if method == "encode" else jnp.linspace(-1, 1, 256).reshape(1, 8, 8, 4)
        return lambda p: sum(jnp.square(y).sum() for y in jax.tree.leaves(apply({"params": p}, given)))

    for method in ("encode", "decode"):  # whose stages are of one class
        assert "remat" in str(jax.make_jaxpr(loss(True, method))(params))
    both = (jax.jit(jax.value_and_grad(loss(remat, half)))(params) for remat in (False, True))
    for a, b in zip(*map(jax.tree.leaves, both), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4 * np.abs(a).max())


def test_half_precision_follows_float32(small):
    params, x, encode, _ = small
    half = AutoencoderKL(SMALL, dtype=jnp.bfloat16)
    mean, logvar = jax.jit(lambda p, x: half.apply({"params": p}, x, method="encode"))(params, x)
    assert mean.dtype == logvar.dtype == jnp.float32
    exact, _ = encode(params, x)
    assert jnp.abs(mean - exact).max() < 0.1 * jnp.abs(exact).max()
    image = jax.eval_shape(lambda p, z: half.apply({"params": p}, z, method="decode"), params, mean)
    assert image.dtype == jnp.bfloat16


def test_a_call_with_a_key_samples_and_without_one_takes_the_mean(small):
    params, x, encode, decode = small
    vae = AutoencoderKL(SMALL)
    run = jax.jit(lambda p, x, key: (vae.apply({"params": p}, x), vae.apply({"params": p}, x, key)))
    mean, sampled = run(params, x, jax.random.key(0))
    moments = encode(params, x)
    np.testing.assert_allclose(mean, decode(params, moments[0]), atol=1e-4)
    np.testing.assert_allclose(sampled, decode(params, sample_latent(*moments, jax.random.key(0))), atol=1e-4)


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


def test_upsample_equals_nearest_then_convolution(random_params):
    x = jax.random.normal(jax.random.key(0), (2, 5, 6, 8))
    module = Upsample()
    params = random_params(module.init, x)["params"]
    near = np.asarray(x).repeat(2, 1).repeat(2, 2)
    want = nn.Conv(8, (3, 3), padding=1).apply({"params": params["conv"]}, near)
    np.testing.assert_allclose(jax.jit(module.apply)({"params": params}, x), want, atol=1e-5)


def test_scale_and_unscale_are_inverse():
    z = jax.random.normal(jax.random.key(0), (2, 4, 4, 16))
    for config in (SMALL, AutoencoderConfig()):
        np.testing.assert_allclose(unscale(scale(z, config), config), z, atol=1e-6)
    np.testing.assert_allclose(scale(z, SMALL), (z - 0.0609) * 1.5305, atol=1e-6)


@pytest.mark.parametrize("quant", [False, True])
def test_a_folded_shift_changes_no_function(random_params, quant):
    config = dataclasses.replace(
        SMALL, block_out_channels=(4,), mid_block_add_attention=False, shift_factor=0.7,
        use_quant_conv=quant, use_post_quant_conv=quant,
    )  # fmt: skip
    vae, x = AutoencoderKL(config), jax.random.uniform(jax.random.key(0), (1, 4, 6, 3), minval=-1.0)
    z = jax.random.normal(jax.random.key(1), (1, 4, 6, 16))
    params = random_params(vae.init, x)["params"]
    folded, moved = fold_shift(config, params)
    assert (folded.shift_factor, folded.use_quant_conv, folded.use_post_quant_conv) == (0.0, True, True)
    assert fold_shift(folded, moved) == (folded, moved)

    @functools.partial(jax.jit, static_argnums=0)
    def both(config, params):
        apply = functools.partial(AutoencoderKL(config).apply, {"params": params})
        mean, logvar = apply(x, method="encode")
        return scale(mean, config), logvar, apply(unscale(z, config), method="decode")

    shifted = both(config, params)
    for a, b in zip(shifted, both(folded, moved), strict=True):
        np.testing.assert_allclose(b, a, atol=2e-6 * float(jnp.abs(a).max()))
    shiftless = jax.jit(lambda p: vae.apply({"params": p}, z / config.scaling_factor, method="decode"))(params)
    assert float(jnp.abs(shiftless - shifted[2]).max()) > 1e-2, "the shift must show"


def test_samples_have_the_posterior_moments_and_kl_is_zero_at_the_prior():
    zeros = jnp.zeros((1, 64, 64, 16))
    z = np.asarray(sample_latent(zeros + 3.0, zeros + 2 * np.log(np.float32(0.5)), jax.random.key(0)))
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
    params, _, encode, _ = small
    with pytest.raises(ValueError, match="multiples of 2"):
        encode(params, jnp.zeros((1, 17, 16, 3)))
